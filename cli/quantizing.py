"""What `nasctl quantize` does: variants for the device's runtime, both guards, the bundle.

INT8 has the accuracy guard (`compress/guard.py`); a half-precision form is what `hw_profiles/half`
makes of the file, judged whole. All that are inside the bound go before the speed guard.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from cli import bundling, console, judging, measuring
from cli.judging import Judge
from cli.prune import parse_drops
from compress import guard
from compress import quantize as int8
from compress.guard import Guard, Guarded, Kept, Variant
from compress.quantize import Feeds, Scheme
from compress.record import Record
from deploy import bundle as bundles
from deploy import engine as engines
from deploy import onnx as files
from deploy.bundle import Bundle
from hw_profiles import half, runtimes
from hw_profiles.device import Device
from hw_profiles.protocol import Timing
from nas import file, paired
from nas.errors import NasctlError, UsageError, unknown
from nas.run import digest

FLOAT, INT8, REPORT = "model.onnx", "model.int8.onnx", "quantize.json"
HALVES = {name: f"model.{name}.onnx" for name in half.CODES}
FORMS = ("int8", *HALVES)
BATCH = 32
#: what is tried, by the runtime that the file is for
DEPTHWISE = "u8 but depthwise"  # convolutions, which stay in float
VARIANTS = {
    "onnxruntime": ("u8", DEPTHWISE),
    "openvino": ("u8", "s8"),
    "tensorrt": ("s8",),
}
ELSEWHERE = "onnxruntime"  # judges where the device's own runtime is not on this machine


@dataclass(frozen=True)
class Asked:
    """What was typed."""

    board: Device
    on: str
    max_drop: str
    calibration: str
    images: int
    seed: int
    forms: tuple[str, ...] = ("int8",)


@dataclass(frozen=True, eq=False)
class Job:
    """A bundle's float model and what it is judged by."""

    bundle: Bundle
    asked: Asked
    judge: Judge
    bound: dict[str, float]  # relative, of each task's metric
    plain: onnx.ModelProto
    runtime: str  # that judges

    @property
    def reachable(self) -> bool:
        """Can it be measured how fast a file is there?"""
        return self.asked.board.local == (self.asked.on == measuring.LOCAL)

    def evidence(self, model: onnx.ModelProto, half: int) -> dict[str, Tensor]:
        run = judging.runner(model.SerializeToString(), self.runtime)
        return self.judge.evidence(run, self.judge.halves(self.asked.seed)[half])


def prepare(bundle: Bundle, asked: Asked, data: str | None) -> Job:
    """Everything validated before any work."""
    for form in asked.forms:
        if form not in FORMS:
            raise unknown("form", form, FORMS, where="--forms")
    if "int8" in asked.forms and asked.board.runtime not in VARIANTS:
        raise UsageError(f"{asked.board.runtime} computes no INT8", where="--hw", allowed=VARIANTS)
    runtimes.load_module(asked.board.runtime)  # raises for one that does not exist
    if asked.on != measuring.LOCAL:
        measuring.here_or_there(asked.board, asked.on)
    Scheme(calibration=asked.calibration)  # raises for one that does not exist
    judge = judging.judge(bundling.interface_of(bundle), data)
    bound = parse_drops(asked.max_drop, [goal.name for goal in judge.task.goals])
    plain = int8.prepared(files.read(bundle.onnx(FLOAT)))
    runtime = judging_runtime(asked.board)
    here = not runtimes.load_module(runtime).unavailable()
    return Job(bundle, asked, judge, bound, plain, runtime if here else ELSEWHERE)


def judging_runtime(board: Device) -> str:
    """That the bound is held in, if it is on this machine."""
    return board.runtime if board.local else ELSEWHERE


def quantize(job: Job) -> dict[str, Any]:
    """Add to the bundle the INT8 file, where it is worth it, and the report that says why; returns
    the report. What was measured before a kill is kept beside the bundle."""
    console.say(f"{job.asked.board.name}, {job.asked.board.runtime}", "device")
    found = {name: _guarded(job, name) for name in _variants(job)}
    refused, halves = {}, [form for form in job.asked.forms if form in HALVES]
    before = _before(job) if halves else {}
    for name in halves:
        try:
            found[name] = _halved(job, name, before)
        except NasctlError as error:  # what cannot be lowered, or not be run here
            refused[name] = str(error)
    with tempfile.TemporaryDirectory() as folder:
        paths = {FLOAT: job.bundle.onnx(FLOAT)}
        for name, each in found.items():
            paths[name] = Path(folder) / f"{len(paths)}.onnx"
            files.write(each.model, paths[name])
        timings = _timed(job, list(paths.values()))
        content = {**_report(job, found, paths, timings), "refused": refused}
        content["why"] += [f"{name}: not possible here: {why}" for name, why in refused.items()]
        if "fp16" in found and (lost := half.vanishing(files.read(paths[FLOAT]))):
            content["why"].append(f"fp16: {lost} weights are too small for it and became 0")
        chosen = content["choice"]
        members: dict[str, tuple[bundles.Role, bytes | Path]] = {
            REPORT: ("report", (json.dumps(content, indent=1) + "\n").encode())
        }
        for name in [chosen] if chosen else sorted(found, key=lambda name: found[name].spent):
            if name != FLOAT and found[name].spent <= 1:
                members.setdefault(_member(name), ("model", paths[name]))
        delivers = FLOAT if chosen in (None, FLOAT) else _member(chosen)
        bundles.add(job.bundle, members, model=delivers, drop=_stale(job.bundle, members))
    for left in _records(job.bundle).parent.glob(f"{_records(job.bundle).name}*"):
        left.unlink()
    return content


def _member(name: str) -> str:
    """The file of a variant."""
    return HALVES.get(name, INT8)


def _stale(bundle: Bundle, members: Collection[str]) -> list[str]:
    """What earlier files leave: themselves, where there is none now, and their engines."""
    made = (INT8, *HALVES.values())
    found = [name for name in made if name in bundle.manifest.members and name not in members]
    for name in bundle.of("engine"):
        if engines.read(bundle.folder / name).model in made:
            found += [name, engines.beside(Path(name)).as_posix()]
    return found


def _variants(job: Job) -> list[str]:
    names = VARIANTS[job.asked.board.runtime] if "int8" in job.asked.forms else ()
    return [name for name in names if name != DEPTHWISE or int8.depthwise(job.plain)]


def _before(job: Job) -> dict[str, float]:
    """The float file's scores. Raises NasctlError for one that has nothing to lose."""
    before = _scores(job, job.evidence(job.plain, 0))
    for task, score in before.items():
        if not score > 0:
            raise NasctlError(
                f"the float file scores {score:g}: a share of that cannot be kept",
                where=f"task '{task}'",
            )
    return before


def _halved(job: Job, name: str, before: Mapping[str, float]) -> Guarded:
    """The half-precision form, with its share of the bound and what stays float32.

    Raises NasctlError where the model cannot be lowered, or the runtime cannot run what it was
    lowered to.
    """
    plain = files.read(job.bundle.onnx(FLOAT))
    model = half.half(plain, FLOAT, to=name)
    after = _scores(job, job.evidence(model, 0))
    spent = judging.spent(before, after, job.bound)
    kept = tuple(Kept(node.name, node.op_type, None) for node in half.kept(plain))
    return Guarded(model, kept, len(plain.graph.node), spent, spent, 1)


def _guarded(job: Job, name: str) -> Guarded:
    before = _before(job)

    def spent(model: onnx.ModelProto) -> float:
        after = _scores(job, job.evidence(model, 0))
        return judging.spent(before, after, job.bound)

    def run(model: onnx.ModelProto, batches: Sequence[Feeds]) -> list[list[np.ndarray]]:
        outputs = judging.runner(model.SerializeToString(), job.runtime)
        return [list(outputs(batch).values()) for batch in batches]

    board = job.asked.board.model_dump(mode="json")
    judged_by = [job.runtime, runtimes.load_module(job.runtime).version()]
    asked = [{**asdict(job.asked), "board": board}, judged_by, name]
    key = digest([*asked, file.sha256(job.bundle.onnx(FLOAT)), job.judge.task.fingerprint])
    record = Record(Path(f"{_records(job.bundle)}.{key[:16]}.jsonl"), key)
    scheme = Scheme("s8" if name == "s8" else "u8", job.asked.calibration)
    always = int8.depthwise(job.plain) if name == DEPTHWISE else ()
    asked_for = Guard(job.plain, _calibration(job), scheme, run, spent, record, always)
    with console.bar(f"int8, {name}", 1.0) as update:
        return asked_for.guarded(update)


def _scores(job: Job, evidence: Mapping[str, Tensor]) -> dict[str, float]:
    return {goal.name: goal.score(evidence[goal.name]) for goal in job.judge.task.goals}


def _calibration(job: Job) -> list[Feeds]:
    """Training images drawn at random, as the file is fed: one at a time where its batch is 1."""
    train = job.judge.task.train
    generator = torch.Generator().manual_seed(job.asked.seed)
    rows = torch.randperm(len(train), generator=generator)[: job.asked.images]
    inputs = files.inputs(job.bundle.onnx(FLOAT))
    batch = 1 if any(sizes[:1] == (1,) for sizes in inputs.values()) else BATCH
    return [feeds for feeds, _ in job.judge.batches(train.at(rows), batch)]


def _timed(job: Job, paths: Sequence[Path]) -> list[Timing] | None:
    if not job.reachable:
        return None
    asked = job.asked
    return measuring.timer(asked.on, asked.board, asked.seed, as_written=True)(paths)


def _report(
    job: Job,
    found: Mapping[str, Guarded],
    paths: Mapping[str, Path],
    timings: list[Timing] | None,
) -> dict[str, Any]:
    """What was tried and decided; what it costs is told for images that decided nothing."""
    whole = job.evidence(job.plain, 1)
    rows: list[dict[str, Any]] = [{"name": FLOAT, "spent": 0.0}]
    for name, each in found.items():
        seen = job.evidence(each.model, 1)
        told = {}
        for goal in job.judge.task.goals:
            rng = np.random.default_rng((job.asked.seed, 31))
            change = paired.change(goal, [whole[goal.name]], [seen[goal.name]], rng=rng)
            scores = [goal.score(part[goal.name]) for part in (whole, seen)]
            told[goal.name] = {"before": scores[0], "after": scores[1], **asdict(change)}
        row = {key: value for key, value in vars(each).items() if key not in ("model", "kept")}
        rows.append({"name": name, **row, "kept": [asdict(k) for k in each.kept], "told": told})
    for row in rows:
        row["bytes"] = paths[row["name"]].stat().st_size
        if row["name"] in HALVES:
            row["observed"] = _observed(job, paths[row["name"]])
    choice, why = None, ["the device was not reached: what is faster is not known"]
    if timings is not None:
        for row, timing in zip(rows, timings, strict=True):
            row["timing"] = asdict(timing)
        pairs = list(zip(rows, timings, strict=True))
        other = [pair for pair in pairs if _computes_otherwise(pair[0])]
        variants = [Variant(row["name"], row["spent"], t) for row, t in pairs]
        picked = guard.fastest([v for v in variants if v.name not in {r["name"] for r, _ in other}])
        choice, why = picked.name, list(picked.why)
        for row, timing in other:
            ratio = timings[0].median_ms / timing.median_ms
            why.append(
                f"{row['name']}: computes in {row['observed']} there, at x{ratio:.2f} of "
                f"{FLOAT}'s speed: refused"
            )
    why += [line for row in rows[1:] if row["spent"] <= 1 for line in _beyond(row, job.bound)]
    asked = {**asdict(job.asked), "board": job.asked.board.name}
    told_on = len(job.judge.halves(job.asked.seed)[1])
    return {**asked, "variants": rows, "choice": choice, "why": why, "told_on": told_on}


def _beyond(row: Mapping[str, Any], bound: Mapping[str, float]) -> Iterator[str]:
    """Where the images that decided nothing say that a file loses more than the bound that it was
    chosen by; choosing by them as well would leave none to tell what it costs."""
    for name, told in row["told"].items():
        share = judging.spent({name: told["before"]}, {name: told["after"]}, {name: bound[name]})
        if share > 1 and math.isfinite(told["before"]):
            yield (
                f"{row['name']}: beyond the bound on the images that decided nothing: {name} "
                f"{told['after']:.4f}, before {told['before']:.4f}, of which "
                f"{100 * bound[name]:.3g} % may go"
            )


def _observed(job: Job, path: Path) -> str:
    """What a file's multiplications are seen to compute in; "?" of a device that is elsewhere."""
    module = runtimes.load_module(job.asked.board.runtime)
    if not job.asked.board.local or module.unavailable():
        return "?"
    return module.observed_precision(module.load(path))


def _computes_otherwise(row: Mapping[str, Any]) -> bool:
    """A half-precision form some of whose multiplications are seen to be of another precision."""
    seen = {part.split()[0] for part in row.get("observed", "?").split(", ")}
    return not seen <= {row["name"], "?"}


def _records(bundle: Bundle) -> Path:
    return bundle.folder.with_name(f".{bundle.folder.name}.quantize")


def say_outcome(content: Mapping[str, Any], folder: Path) -> None:
    """The report, for people."""
    from rich.table import Table

    table = Table("", "ms", "kB", "in float", "change, other images")
    for row in content["variants"]:
        timing = row.get("timing")
        told = row.get("told", {})
        changes = [
            f"{name} {100 * c['value']:+.2f} % ({100 * c['low']:+.2f} to {100 * c['high']:+.2f})"
            for name, c in told.items()
        ]
        kept = f"{len(row['kept'])} of {row['nodes']}" if told else ""
        speed = f"{timing['median_ms']:.4g}" if timing else "–"
        table.add_row(row["name"], speed, f"{row['bytes'] / 1e3:.4g}", kept, ", ".join(changes))
    console.show(table)
    for row in content["variants"]:
        kept = row.get("kept", ())
        for each in (one for one in kept if one["error"] is not None):
            console.say(
                f"{row['name']}: {each['node']} ({each['kind']}) stays in float: alone in INT8 it "
                f"changes the outputs by {each['error']:.1%}"
            )
        kinds = Counter(each["kind"] for each in kept if each["error"] is None)
        if kinds:
            listed = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
            console.say(f"{row['name']}: stay in float32: {listed}")
    for line in content["why"]:
        console.say(line)
    console.say(str(folder / bundles.read(folder).manifest.model), "delivers")
