"""Part `int8`: do tables of float milliseconds pick the wrong network for INT8?

Random networks of each space at 32 px, as the graphs that tables are measured with; of each the
float file and its INT8 files (every scheme that `nasctl quantize` tries for the runtime, of which
the fastest counts), all of a space timed in turn in one session. Told are the rank correlation of
float and INT8 milliseconds, and what choosing by float costs. For budgets at every tenth of the
networks' INT8 milliseconds that network is taken which has the most multiply-adds (they stand in
for accuracy) of those whose float milliseconds, times the space's median ratio, are inside. Missed:
its INT8 file is above the budget. Lost: multiply-adds given away against a choice by INT8
milliseconds, where it is inside. Networks of which a figure is in doubt are left out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from scipy import stats

from benchmarks import contract
from benchmarks.pipeline_rows import ATTEMPTS, load, machine
from cli.quantizing import DEPTHWISE, VARIANTS
from compress import quantize
from compress.quantize import Scheme
from hw_profiles import measure, runtimes
from hw_profiles.graph import onnx_graph
from hw_profiles.measure import Plan, Setting
from hw_profiles.op import Op, macs
from nas import space
from nas.errors import NasctlError

SIZE, NETWORKS = 32, 12
ENOUGH = 0.75  # of the networks: those of a row that are beyond doubt
RUNTIMES = ("onnxruntime", "openvino")
SECONDS = 2.0  # of the session, per file, at most: less on a quiet machine
HEADER = (
    "space",
    "runtime",
    "int8 / fp32",
    "lowest",
    "highest",
    "Kendall",
    "missed",
    "lost",
    "sure",
)


def run(outcome: contract.Outcome, rows: contract.Rows, quick: bool = False) -> None:
    """A row per space and runtime; the same call goes on where it was stopped."""
    names = [name for name in space.names() if space.load(name).reads == "images"]
    places = [(name, runtime) for runtime in RUNTIMES for name in names]
    n, attempts = (3, 1) if quick else (NETWORKS, ATTEMPTS)
    lines: list[list[object]] = []
    for name, runtime in places[:1] if quick else places:
        try:
            found = row(rows, name, runtime, n, attempts)["networks"]
        except NasctlError as error:
            print(f"{name}, {runtime}: not measured: {error}", flush=True)
            continue
        beyond_doubt = sure(found)
        enough = len(beyond_doubt) >= ENOUGH * n
        told = judged(*figures(beyond_doubt if enough else found))
        lines.append([name, runtime, *told.values(), f"{len(beyond_doubt)} of {n}"])
        if enough:
            outcome.figures |= {f"{name}, {runtime}: {part}": v for part, v in told.items()}
    print(contract.table(HEADER, lines))


def row(rows: contract.Rows, name: str, runtime: str, n: int, attempts: int) -> dict[str, Any]:
    """Kept where enough networks are beyond doubt; else the next call measures again."""
    key = {"part": "int8", "space": name, "runtime": runtime, "size": SIZE, "n": n}
    key |= {"machine": machine(), "version": runtimes.load_module(runtime).version()}
    if (known := rows.get(key)) is not None:
        return known
    networks = measured(name, runtime, n, attempts)
    made = {"networks": networks, "load": load()}
    if len(sure(networks)) >= ENOUGH * n:
        rows.add(key, made)
    return made


def sure(networks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of which no figure is in doubt."""
    return [network for network in networks if not any(network["noisy"])]


def figures(networks: Sequence[dict[str, Any]]) -> list[np.ndarray]:
    """Multiply-adds, milliseconds of the float file and of the fastest INT8 file [N]."""
    parts = [(each["macs"], each["ms"][0], min(each["ms"][1:])) for each in networks]
    return list(np.array(parts, float).T)


def judged(work: np.ndarray, fp32: np.ndarray, int8: np.ndarray) -> dict[str, float]:
    """The figures of one space from its networks' multiply-adds and milliseconds [N]."""
    ratio = int8 / fp32
    expected = fp32 * np.median(ratio)
    missed, lost, budgets = 0, [], np.quantile(int8, np.arange(0.1, 1.0, 0.1))
    for budget in budgets:
        best = work[int8 <= budget].max()
        inside = np.flatnonzero(expected <= budget)
        taken = inside[np.argmax(work[inside])] if len(inside) else np.argmin(expected)
        if int8[taken] > budget:
            missed += 1
        else:
            lost.append(1 - work[taken] / best)
    return {
        "int8 / fp32": float(np.median(ratio)),
        "lowest": float(ratio.min()),
        "highest": float(ratio.max()),
        "kendall": float(stats.kendalltau(fp32, int8).statistic),
        "missed": missed / len(budgets),
        "lost": float(np.mean(lost)) if lost else 0.0,
    }


def measured(name: str, runtime: str, n: int, attempts: int) -> list[dict[str, Any]]:
    """Of each network all files' milliseconds, the float one first, and why they are in doubt: all
    networks of a space in one session, `attempts` times while too many are in doubt."""
    found = space.load(name, size=SIZE)
    networks = [found.ops(found.decode(row)) for row in found.sample(np.random.default_rng(0), n)]
    files = [forms(graph(ops), runtime) for ops in networks]
    with tempfile.TemporaryDirectory() as folder:
        paths: list[Path] = []
        for model in (model for each in files for model in each):
            paths.append(Path(folder) / f"{len(paths)}.onnx")
            onnx.save(model, paths[-1])
        plan = Plan(rounds=10, time_limit_s=SECONDS * len(paths))
        for attempt in range(attempts):
            rng = np.random.default_rng(attempt)
            session = measure.fresh_session(paths, Setting(runtime), rng=rng, plan=plan)
            left = iter(session.timings)
            made: list[dict[str, Any]] = []
            for ops, each in zip(networks, files, strict=True):
                own = [next(left) for _ in each]
                told = {"ms": [t.median_ms for t in own], "noisy": [t.noisy for t in own]}
                made.append({"macs": macs(ops), **told})
            if len(sure(made)) >= ENOUGH * n:
                break
    return made


def graph(ops: Sequence[Op]) -> onnx.ModelProto:
    """Without outputs of branches that nothing reads."""
    model = onnx_graph(ops, batch=None)
    for value in [value for value in model.graph.output if value.name != "output"]:
        model.graph.output.remove(value)
    return model


def forms(model: onnx.ModelProto, runtime: str) -> list[onnx.ModelProto]:
    """The float file, then its INT8 files; noise calibrates, as values change no milliseconds."""
    plain = quantize.prepared(model)
    shape = [dim.dim_value or 4 for dim in plain.graph.input[0].type.tensor_type.shape.dim]
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    batches, made = [{plain.graph.input[0].name: noise}], [plain]
    depthwise = quantize.depthwise(plain)
    for name in VARIANTS[runtime]:
        if name == DEPTHWISE and not depthwise:
            continue
        scheme = Scheme("s8" if name == "s8" else "u8")
        ranges = quantize.calibrate(plain, batches, scheme)
        floats = depthwise if name == DEPTHWISE else ()
        made.append(quantize.int8(plain, ranges, scheme, floats))
    return made
