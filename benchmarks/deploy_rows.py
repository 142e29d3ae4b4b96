"""A row of `benchmarks.deploy`: every file of one network in one runtime, from file to engine.

Each file is built as the runtime's engine for one input, loaded again and held against torch, then
judged by what counts on the half of the held-out data that guarded nothing, and timed in turn with
the others. What a runtime refuses is a cell that says so in its words.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks import deploy_nncf
from benchmarks.deploy_nets import Subject, for_one
from benchmarks.deploy_timing import Turns, in_turn
from compress import guard, quantize
from compress.guard import Guard, Variant
from compress.quantize import Scheme
from deploy import chain
from deploy import engine as engines
from deploy import onnx as files
from hw_profiles import half, runtimes
from hw_profiles.runtimes import Session
from nas.errors import NasctlError

BOUND = 0.005  # of accuracy: half a point
CALIBRATE = 256  # images
COMPARED = 64  # inputs on which engines are held against torch
BATCH = 64
FLOAT, NNCF = "fp32", "NNCF"
#: tried by the guards, and so to be chosen from; the others are there to compare with
OFFERED = ("fp16", "bf16", "u8", "u8 but depthwise", "s8")
#: runtimes that read quantized files
QUANTIZED = {"onnxruntime": ("u8",), "openvino": ("u8", "s8")}


@dataclass(frozen=True)
class Effort:
    """How long a row may take."""

    processes: int
    seconds: float  # of the processor, of each
    nncf: str = ""  # the interpreter of an environment that has it


@dataclass
class File:
    """One form of the network: an ONNX model (or a file of the runtime's own) and how it came."""

    model: onnx.ModelProto | Path
    precision: str | None = None  # demanded of the runtime
    kept: int = 0  # nodes that a guard took back to float, or was told to: see `in_float`
    seconds: float = 0.0  # of the processor, to make it
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class Bench:
    """One network in one runtime."""

    subject: Subject
    runtime: str
    effort: Effort
    folder: Path
    files: dict[str, File] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return self.subject.data.held.shape[1:]

    @property
    def batches(self) -> list[quantize.Feeds]:
        chosen = self.subject.data.fit[:CALIBRATE]
        return [{"input": chosen[i : i + 32]} for i in range(0, len(chosen), 32)]

    def logits(self, model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
        """Of a file, in this runtime, many inputs at once."""
        module = runtimes.load_module(self.runtime)
        return answers(self.runtime, module.load(model.SerializeToString()), x, BATCH)

    def spent(self, model: onnx.ModelProto) -> float:
        """Of the bound, on the half that guards."""
        return self.lost(0, self.logits(model, self.subject.data.half(0)[0])) / BOUND

    def lost(self, half: int, got: np.ndarray) -> float:
        """Accuracy of torch minus that of these answers to a half of the held-out data."""
        labels = self.subject.data.half(half)[1]
        return hits(self.subject.half(half), labels) - hits(got, labels)

    def run(self, model: onnx.ModelProto, some: Sequence[quantize.Feeds]) -> list[list[np.ndarray]]:
        return [[self.logits(model, batch["input"])] for batch in some]


def answers(runtime: str, session: Session, x: np.ndarray, batch: int) -> np.ndarray:
    """Logits [N, classes] of a loaded file."""
    module = runtimes.load_module(runtime)
    parts = (module.run(session, {"input": x[i : i + batch]})[0] for i in range(0, len(x), batch))
    return np.concatenate(list(parts))


def hits(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(1) == labels).mean())


def measured(subject: Subject, runtime: str, effort: Effort) -> dict[str, Any]:
    """The row: {"files": {label: cell}, "refused": {label: why}, "accuracy", "processes", ...}."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(subject, runtime, effort, Path(folder))
        prepare(bench)
        cells = {label: cell for label in list(bench.files) if (cell := built(bench, label))}
        row: dict[str, Any] = {"files": cells, "refused": bench.refused, **asdict(effort)}
        row["clock"] = "processor"
        row["nncf"] = bool(effort.nncf)  # no path of this machine
        row["accuracy"] = hits(subject.half(1), subject.data.half(1)[1])
        if FLOAT not in cells:  # nothing to compare with
            return row | {"files": {}}
        turns = in_turn(
            [path_of(bench, label) for label in cells], effort.processes, effort.seconds
        )
        for cell, each in zip(cells.values(), turns, strict=True):
            cell |= asdict(each)
        return row


def prepare(bench: Bench) -> None:
    """Every file that the runtime may take; which of them it does, `built` tells."""
    exported, runtime = bench.subject.exported, bench.runtime
    if runtime == "aoti":  # torch reads no arithmetic on shapes: at fixed sizes none is left
        exported = quantize.prepared(for_one(exported, bench.shape))
    bench.files[FLOAT] = File(exported)
    for form in half.CODES:
        if runtime == "aoti":  # lowers by itself what it is asked to
            bench.files[form] = File(exported, form)
            continue
        offered = form in runtimes.load_module(runtime).PRECISIONS
        try:
            lowered = half.half(exported, "model", to=form)
        except NasctlError as error:
            bench.refused[form] = str(error)
        else:
            bench.files[form] = File(lowered, form if offered else None)
    if runtime not in QUANTIZED:
        unguarded(bench, "u8, no guard", Scheme())  # to hear what it says
        return
    for name in QUANTIZED[runtime]:
        scheme = Scheme("s8" if name == "s8" else "u8")
        unguarded(bench, f"{name}, no guard", scheme)
        guarded(bench, name, scheme, ())
    if floats := quantize.depthwise(bench.subject.plain):
        guarded(bench, "u8 but depthwise", Scheme(), floats)
    bench.files["library's defaults"] = File(defaults(bench))
    if bench.effort.nncf:
        theirs(bench)


def unguarded(bench: Bench, label: str, scheme: Scheme) -> None:
    plain = bench.subject.plain
    ranges = quantize.calibrate(plain, bench.batches, scheme)
    bench.files[label] = File(quantize.int8(plain, ranges, scheme))


def guarded(bench: Bench, label: str, scheme: Scheme, always: Sequence[str]) -> None:
    began = time.process_time()
    plain = bench.subject.plain
    asked = Guard(plain, bench.batches, scheme, bench.run, bench.spent, always=always)
    try:
        made = asked.guarded()
    except NasctlError as error:  # the runtime cannot load it, or no file holds the bound
        bench.refused[label] = str(error)
        return
    more = {"spent": made.spent, "spent_without": made.spent_without, "judged": made.judged}
    seconds = time.process_time() - began
    bench.files[label] = File(made.model, None, len(made.kept) + len(always), seconds, more)


def theirs(bench: Bench) -> None:
    """NNCF's accuracy control with the same data and bound."""
    data = bench.subject.data
    x, labels = data.half(0)
    asked = deploy_nncf.Asked(bench.runtime, data.fit[:CALIBRATE], x, labels, BOUND)
    model = bench.subject.exported
    try:
        made = deploy_nncf.controlled(bench.effort.nncf, model, asked, bench.folder)
    except NasctlError as error:
        bench.refused[NNCF] = str(error)
        return
    bench.files[NNCF] = File(made.path, None, made.reverted, made.seconds, made.more)


def defaults(bench: Bench) -> onnx.ModelProto:
    """What `quantize_static` makes of the same model and data if nothing else is said."""
    from onnxruntime.quantization import quantize_static

    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        before, after = bench.folder / "before.onnx", bench.folder / "after.onnx"
        onnx.save(bench.subject.plain, before)
        quantize_static(before, after, Reader(bench.batches))
        return onnx.load(after)
    finally:
        logging.disable(disabled)


class Reader:
    """Calibration data as the library reads them."""

    def __init__(self, batches: Sequence[quantize.Feeds]) -> None:
        self._left = iter([dict(batch) for batch in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def path_of(bench: Bench, label: str) -> Path:
    """Of the engine of a file."""
    suffix = runtimes.compiled(bench.runtime).ENGINE
    return bench.folder / f"{list(bench.files).index(label)}{suffix}"


def built(bench: Bench, label: str) -> dict[str, Any] | None:
    """The cell of a file without its times; None where the runtime refuses it, which is noted."""
    made, path = bench.files[label], path_of(bench, label)
    if isinstance(made.model, Path):
        source = made.model
    else:
        source = path.with_name(f"{path.stem}.one.onnx")
        files.write(for_one(made.model, bench.shape), source)
    began = time.process_time(), time.perf_counter()
    try:
        car = engines.build(source, path, runtime=bench.runtime, precision=made.precision)
    except NasctlError as error:
        bench.refused[label] = str(error).replace(f"{source}: ", "")
        return None
    took = time.perf_counter() - began[1]
    session, _ = engines.load(path)
    expected = bench.subject.half(1)
    got = answers(bench.runtime, session, bench.subject.data.half(1)[0], 1)
    if label in half.CODES:  # which no guard has judged
        x, _ = bench.subject.data.half(0)
        made.more["spent"] = bench.lost(0, answers(bench.runtime, session, x, 1)) / BOUND
    some = slice(COMPARED)
    one = chain.link(
        "torch = engine",
        label if label in half.CODES else chain.coarsest(car.observed),  # what weights were cut to
        {"logits": expected[some]},
        {"logits": got[some]},
    )
    return {
        "kept": made.kept,
        "make_seconds": made.seconds,
        **made.more,
        "observed": car.observed,
        "model_bytes": sum(each.stat().st_size for each in files_of(source)),
        "engine_bytes": car.bytes,
        "build_seconds": took,
        "error": one.error,
        "error_largest": float(np.abs(expected[some] - got[some]).max() / np.abs(expected).max()),
        "holds": one.holds,
        "drop_told": bench.lost(1, got),
        "changed": float((expected.argmax(1) != got.argmax(1)).mean()),
    }


def files_of(source: Path) -> list[Path]:
    """OpenVINO's own description has its weights beside it."""
    weights = source.with_suffix(".bin")
    return [source, weights] if source.suffix == ".xml" else [source]


def chosen(row: Mapping[str, Any]) -> guard.Choice | None:
    """What the speed guard takes of the files that are offered to it, and why; None where there is
    nothing to compare with. It is no part of a row, so that old ones are told by today's rules."""
    cells = row["files"]
    if FLOAT not in cells:
        return None
    variants = []
    for label, cell in cells.items():
        if label == FLOAT or (label in OFFERED and is_lower(label, cell)):
            turns = Turns(**{each.name: cell[each.name] for each in fields(Turns)})
            timing = turns.timing(cells[FLOAT]["ms"], row["processes"])
            variants.append(Variant(label, cell.get("spent", 0.0), timing))
    return guard.fastest(variants)


def in_float(cell: Mapping[str, Any]) -> float:
    """The share of the multiplying operators that compute in float in the loaded file, whoever
    left them there: a guard, a default, or the runtime itself."""
    parts = [part.split() for part in cell["observed"].split(", ")]
    counts = {name: int(count[0]) if count else 1 for name, *count in parts}
    return 1 - counts.get("int8", 0) / sum(counts.values())


def is_lower(label: str, cell: dict[str, Any]) -> bool:
    """Does it compute in what it is called? A float16 file may run in float32."""
    wanted = label if label in half.CODES else "int8"
    return wanted in {part.split()[0] for part in cell["observed"].split(", ")}
