"""What do INT8 and its guards give on this processor: per space, runtime and precision?

Networks drawn from every space, as the graphs that latency tables are measured with: random
convolutions, and a linear layer fitted by ridge regression to CIFAR-10's training images (digits
with --quick), so that there is an accuracy to lose, though a low one. Calibrated on training
images, guarded on one half of the held-out images at a bound of half a point, told for the other.
Beside the guards: the same scheme without them and ONNX Runtime's own defaults. Per runtime all
files are timed in turn with each other, in several processes. Rows are kept in
results/deploy.rows.jsonl, and a stopped run goes on; rows of a busy machine are not kept.

Not here: trained networks (`nasctl quantize` on a run), NNCF's accuracy control, TensorRT.
"""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from benchmarks import contract
from compress import guard, quantize
from compress.guard import Guard, Variant
from compress.quantize import Scheme
from hw_profiles import measure, runtimes
from hw_profiles.graph import onnx_graph
from hw_profiles.protocol import Plan, Timing
from hw_profiles.runtimes import onnxruntime
from nas import space, tasks
from nas.elastic import resize
from nas.tasks import Task

SIZE = 32
BOUND = 0.005  # of accuracy: half a point
FIT, CALIBRATE, HELD_OUT = 2000, 256, 2000  # images
QUICK = 300  # of each kind
RUNTIMES = ("onnxruntime", "openvino")
RIDGE = 10.0
PROCESSES = 3
HEADER = ("space", "net", "runtime", "file", "ms", "speed", "kB", "points", "in float", "chosen")


@dataclass(frozen=True)
class Images:
    """Normalised images at the spaces' size, and labels."""

    fit: np.ndarray
    fit_labels: np.ndarray
    held: np.ndarray
    held_labels: np.ndarray

    def half(self, which: int) -> tuple[np.ndarray, np.ndarray]:
        return self.held[which::2], self.held_labels[which::2]


def main(argv: list[str] | None = None) -> int:
    flags = contract.parser(__doc__)
    flags.add_argument("--networks", type=int, default=2, help="of each space")
    of_images = [name for name in space.names() if space.load(name).reads == "images"]
    flags.add_argument("--spaces", nargs="*", choices=of_images, default=of_images)
    arguments = flags.parse_args(argv)
    outcome = contract.Outcome("deploy")
    folder = None if arguments.quick else contract.data("cifar10")
    if folder is None and not arguments.quick:
        return outcome.skip("NASCTL_DATA/cifar10 is absent")
    names = ["resnet"] if arguments.quick else arguments.spaces
    rows_path = contract.RESULTS / "deploy.rows.jsonl"
    rows = contract.Rows(Path(tempfile.mkdtemp()) / "rows" if arguments.quick else rows_path)
    work = Work(str(folder or "digits"), rows, arguments.quick)
    places = range(1 if arguments.quick else arguments.networks)
    engines = RUNTIMES[: 1 if arguments.quick else None]
    found = [work.row(*each) for each in itertools.product(names, places, engines)]
    lines = [line for key, row in found for line in table_lines(key, row)]
    print(contract.table(HEADER, lines))
    clean = [row for _, row in found if not any(one["noisy"] for one in row["files"].values())]
    print(f"{len(clean)} of {len(found)} rows were measured beyond doubt")
    if clean:
        figures(outcome, clean)
    return outcome.finish(arguments.save)


@dataclass
class Work:
    """Where rows come from."""

    data: str
    rows: contract.Rows
    quick: bool

    @cached_property
    def images(self) -> Images:
        return images(tasks.load(self.data), self.quick)

    def row(self, name: str, at: int, runtime: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Its key, and what is known or measured now. What is in doubt is measured again the next
        time."""
        key = {"space": name, "network": at, "runtime": runtime, "version": 1}
        row = self.rows.get(key)
        if row is None:
            row = measured(name, at, runtime, self.images, 1 if self.quick else PROCESSES)
            if not any(one["noisy"] for one in row["files"].values()):
                self.rows.add(key, row)
        return key, row


def images(task: Task, quick: bool) -> Images:
    def ready(split: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
        pictures = resize(task.normalise(split.images[:n]), SIZE)
        return pictures.contiguous().numpy(), split.labels[:n].numpy()

    fit, held = (QUICK, QUICK) if quick else (FIT, HELD_OUT)
    return Images(*ready(task.train, fit), *ready(task.val, held))


def network(name: str, at: int, data: Images) -> onnx.ModelProto:
    """The `at`-th random network of a space, its last layer fitted."""
    found = space.load(name, channels=data.fit.shape[1], size=SIZE)
    ops = found.ops(found.decode(found.sample(np.random.default_rng(0), at + 1)[at]))
    model = onnx_graph(ops, batch=None)
    for value in [value for value in model.graph.output if value.name != "output"]:
        model.graph.output.remove(value)  # of branches that nothing reads
    last = next(node for node in reversed(model.graph.node) if node.op_type == "Gemm")
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    seen = features(model, last, data.fit)
    seen = np.concatenate([seen, np.ones((len(seen), 1), np.float32)], 1).astype(np.float64)
    wanted = 2.0 * np.eye(10)[data.fit_labels] - 1
    scale = RIDGE * np.trace(seen.T @ seen) / len(seen) / seen.shape[1]
    fitted = np.linalg.solve(seen.T @ seen + scale * np.eye(seen.shape[1]), seen.T @ wanted)
    for tensor, values in ((last.input[1], fitted[:-1].T), (last.input[2], fitted[-1])):
        weights[tensor].CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor))
    return quantize.prepared(model)


def features(model: onnx.ModelProto, last: onnx.NodeProto, x: np.ndarray) -> np.ndarray:
    """What the last layer reads."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    value = onnx.helper.make_tensor_value_info(last.input[0], onnx.TensorProto.FLOAT, None)
    del twin.graph.output[:]
    twin.graph.output.append(value)
    session = onnxruntime.load(twin.SerializeToString())
    parts = [onnxruntime.run(session, {"input": x[at : at + 64]})[0] for at in range(0, len(x), 64)]
    return np.concatenate(parts)


def measured(name: str, at: int, runtime: str, data: Images, processes: int) -> dict[str, Any]:
    """A row: every file of one network in one runtime, timed in that many processes."""
    plain = network(name, at, data)
    module = runtimes.load_module(runtime)

    def logits(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
        session = module.load(model.SerializeToString())
        parts = (module.run(session, {"input": x[i : i + 64]})[0] for i in range(0, len(x), 64))
        return np.concatenate(list(parts))

    def accuracy(model: onnx.ModelProto, half: int) -> float:
        x, labels = data.half(half)
        return float((logits(model, x).argmax(1) == labels).mean())

    before = accuracy(plain, 0)

    def spent(model: onnx.ModelProto) -> float:
        return (before - accuracy(model, 0)) / BOUND

    def run(model: onnx.ModelProto, some: Sequence[quantize.Feeds]) -> list[list[np.ndarray]]:
        return [[logits(model, batch["input"])] for batch in some]

    chosen = data.fit[:CALIBRATE]
    batches = [{"input": chosen[i : i + 32]} for i in range(0, len(chosen), 32)]
    files: dict[str, tuple[onnx.ModelProto, int]] = {"fp32": (plain, 0)}
    schemes = {"u8": Scheme()} if runtime == "onnxruntime" else {"u8": Scheme(), "s8": Scheme("s8")}
    for label, scheme in schemes.items():
        ranges = quantize.calibrate(plain, batches, scheme)
        files[f"{label}, no guard"] = (quantize.int8(plain, ranges, scheme), 0)
        guarded = Guard(plain, batches, scheme, run, spent).guarded()
        files[label] = (guarded.model, len(guarded.kept))
    if floats := quantize.depthwise(plain):
        guarded = Guard(plain, batches, Scheme(), run, spent, always=floats).guarded()
        files["u8 but depthwise"] = (guarded.model, len(guarded.kept))
    files["library's defaults"] = (defaults(plain, batches), 0)
    timings = timed([model for model, _ in files.values()], runtime, processes)
    return judged(files, timings, accuracy, logits, data)


def timed(models: Sequence[onnx.ModelProto], runtime: str, processes: int) -> list[Timing]:
    """All files in turn with each other; of each the middle one of several fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{at}.onnx" for at in range(len(models))]
        for path, model in zip(paths, models, strict=True):
            onnx.save(model, path)
        plan = Plan(rounds=10, time_limit_s=6.0 if processes > 1 else 1.0)
        setting, rng = measure.Setting(runtime), np.random.default_rng(0)
        sessions = [
            measure.fresh_session(paths, setting, rng=rng, plan=plan).timings
            for _ in range(processes)
        ]
    every = zip(*sessions, strict=True)
    return [sorted(each, key=lambda t: t.median_ms)[len(each) // 2] for each in every]


def judged(
    files: dict[str, tuple[onnx.ModelProto, int]],
    timings: Sequence[Timing],
    accuracy: Callable[[onnx.ModelProto, int], float],
    logits: Callable[[onnx.ModelProto, np.ndarray], np.ndarray],
    data: Images,
) -> dict[str, Any]:
    """What each file costs, on the half that guarded and on the other, and which is taken."""
    rows: dict[str, Any] = {}
    x, _ = data.half(1)
    plain = files["fp32"][0]
    expected = logits(plain, x[:64])
    whole = [accuracy(plain, half) for half in (0, 1)]
    variants = []
    for timing, (label, (model, kept)) in zip(timings, files.items(), strict=True):
        drops = [whole[half] - accuracy(model, half) for half in (0, 1)]
        rows[label] = {
            **asdict(timing),
            "bytes": model.ByteSize(),
            "kept": kept,
            "drop_guard": drops[0],
            "drop_told": drops[1],
            "error": guard.relative_error([[expected]], [[logits(model, x[:64])]]),
        }
        if "guard" not in label and "defaults" not in label:
            variants.append(Variant(label, drops[0] / BOUND, timing))
    choice = guard.fastest(variants)
    return {"files": rows, "choice": choice.name, "why": list(choice.why), "accuracy": whole[1]}


def defaults(plain: onnx.ModelProto, batches: Sequence[quantize.Feeds]) -> onnx.ModelProto:
    """What `quantize_static` makes of the same model and data if nothing else is said."""
    import logging

    from onnxruntime.quantization import quantize_static

    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as folder:
            before, after = Path(folder) / "a.onnx", Path(folder) / "b.onnx"
            onnx.save(plain, before)
            quantize_static(before, after, Reader(batches))
            return onnx.load(after)
    finally:
        logging.disable(disabled)


class Reader:
    """Calibration data as the library reads them."""

    def __init__(self, batches: Sequence[quantize.Feeds]) -> None:
        self._left = iter([dict(batch) for batch in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def table_lines(key: dict[str, Any], row: dict[str, Any]) -> list[list[object]]:
    base = row["files"]["fp32"]["median_ms"]
    return [
        [
            *(key["space"], key["network"], key["runtime"], label),
            *(one["median_ms"], base / one["median_ms"], one["bytes"] / 1e3),
            *(f"{-100 * one['drop_told']:+.2f}", one["kept"]),
            "*" if label == row["choice"] else "",
        ]
        for label, one in row["files"].items()
    ]


def figures(outcome: contract.Outcome, rows: Sequence[dict[str, Any]]) -> None:
    """Means over networks; the choice beside what the library does if nothing is said."""
    ratios, drops = [], []
    for row in rows:
        base, taken = row["files"]["fp32"], row["files"][row["choice"]]
        ratios.append(base["median_ms"] / taken["median_ms"])
        drops.append(taken["drop_told"])
    library = [row["files"]["library's defaults"] for row in rows]
    plain = [row["files"]["fp32"]["median_ms"] for row in rows]
    theirs = [ms / one["median_ms"] for ms, one in zip(plain, library, strict=True)]
    outcome.figures |= {
        "networks": len(rows),
        "speed_geomean": math.exp(float(np.log(ratios).mean())),
        "speed_lowest": min(ratios),
        "drop_points_mean": 100 * float(np.mean(drops)),
        "drop_points_worst": 100 * max(drops),
        "defaults_speed_geomean": math.exp(float(np.log(theirs).mean())),
        "defaults_drop_points_worst": 100 * max(f["drop_told"] for f in library),
        "faster_1_5_within_half_a_point": sum(
            r >= 1.5 and d <= BOUND for r, d in zip(ratios, drops, strict=True)
        ),
        "kept_in_float": sum(row["choice"] == "fp32" for row in rows),
    }
    outcome.aim(
        "INT8 at least 1.5 times as fast within half a point",
        ">= 5 networks",
        outcome.figures["faster_1_5_within_half_a_point"],
        outcome.figures["faster_1_5_within_half_a_point"] >= 5,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
