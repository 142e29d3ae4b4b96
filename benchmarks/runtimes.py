"""How much faster or slower are this machine's other runtimes than ONNX Runtime, per network?

Random networks of both spaces, as the graphs that latency tables are measured with, each loaded
in every processor runtime that is installed, batch 1, one thread, all of them in one shuffled
round-robin. Twice, with new sessions: how far the two passes differ is what the machine allows to
say. Also how well one runtime's latencies rank another's: whether a table serves both.

--compile also measures what AOTInductor makes of the first two networks of each space (a minute or
more of compiling apiece).
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from benchmarks import contract
from hw_profiles import protocol, runtimes
from hw_profiles.graph import onnx_graph
from hw_profiles.measure import ops_call, reference_ops
from hw_profiles.op import Op
from hw_profiles.protocol import Plan
from hw_profiles.runtimes import Clock
from nas import space

SPACES = ("resnet", "mobilenet")
BASE = "onnxruntime"
ON_CPU = (BASE, "openvino")
COMPILED = "aoti"
COMPILED_NETWORKS = 2
PASSES = 2
#: calls per turn, of which the fastest counts: more than a table's, because networks of some
#: milliseconds are longer than the slices in which a busy core is shared
INNER = 10
HEADER = (
    *("space", "runtime", "networks", "base ms", "ms", "base / this", "lowest", "highest", "tau"),
    *("repeat %", "base %", "noise %"),
)


def main() -> int:
    flags = contract.parser(__doc__)
    flags.add_argument("--networks", type=int, default=12, help="of each space")
    flags.add_argument("--compile", action="store_true", help=f"also {COMPILED}")
    arguments = flags.parse_args()
    outcome = contract.Outcome("runtimes")
    others = [name for name in ON_CPU[1:] if not runtimes.load_module(name).unavailable()]
    if not others and not arguments.compile:
        return outcome.skip(runtimes.load_module(ON_CPU[1]).unavailable())
    count, seconds = (3, 8.0) if arguments.quick else (arguments.networks, 90.0)
    rows = []
    for name in SPACES:
        found = space.load(name)
        genes = found.sample(np.random.default_rng(0), count)
        networks = [found.ops(found.decode(row)) for row in genes]
        rows += [compared(outcome, name, networks, other, seconds) for other in others]
        if arguments.compile:
            few = networks[:COMPILED_NETWORKS]
            rows.append(compared(outcome, name, few, COMPILED, seconds))
    print(contract.table(HEADER, rows))
    return outcome.finish(arguments.save)


def compared(
    outcome: contract.Outcome,
    name: str,
    networks: Sequence[Sequence[Op]],
    other: str,
    seconds: float,
) -> list[object]:
    """A row of the table; fills the figures."""
    models = [onnx_graph(ops).SerializeToString() for ops in networks]
    with tempfile.TemporaryDirectory() as folder:
        files = {BASE: models, other: built(models, other, Path(folder))}
        found = [timed(files, seconds, seed) for seed in range(PASSES)]
    passes, noise = zip(*found, strict=True)
    base, this = np.mean(passes, axis=0)
    ratios = base / this
    repeat = np.abs(np.diff(np.log(passes), axis=0)).mean(axis=(0, 2))  # per runtime
    figures = {
        "networks": len(base),
        "base_ms_median": np.median(base),
        "ms_median": np.median(this),
        "speedup_geomean": np.exp(np.log(ratios).mean()),
        "speedup_lowest": ratios.min(),
        "speedup_highest": ratios.max(),
        "tau": kendalltau(base, this).statistic,
        "repeat_percent": 100 * repeat[1],
        "repeat_percent_base": 100 * repeat[0],
        "noise_percent": 100 * max(noise),
    }
    outcome.figures |= {f"{name}.{other}.{key}": float(value) for key, value in figures.items()}
    return [
        name,
        other,
        *(float(value) if at else len(base) for at, value in enumerate(figures.values())),
    ]


def built(models: Sequence[bytes], name: str, folder: Path) -> Sequence[bytes | Path]:
    """What the runtime loads: the models themselves, or files that it compiled from them."""
    runtime = runtimes.load_module(name)
    if runtime.SUFFIX == ".onnx":
        return models
    compiled = cast(runtimes.Compiled, runtime)
    return [
        compiled.build(model, folder / f"{at}{runtime.SUFFIX}") for at, model in enumerate(models)
    ]


def timed(
    files: Mapping[str, Sequence[bytes | Path]], seconds: float, seed: int
) -> tuple[NDArray[np.float64], float]:
    """(milliseconds [runtimes, networks], the session's noise floor)."""
    rng, clock, calls = np.random.default_rng(seed), Clock(), []
    for name, models in files.items():
        runtime = runtimes.load_module(name)
        for model in models:
            loaded = runtime.load(model, precision="fp32")
            calls.append(clock.of(runtime.timed(loaded, runtimes.random_feeds(loaded, rng))))
    session = protocol.session(
        calls,
        rng=random.Random(seed),
        plan=Plan(inner=INNER, time_limit_s=seconds),
        reference=ops_call(reference_ops(), rng),
        instruments=protocol.Instruments(clock=clock),
    )
    medians = np.array([timing.median_ms for timing in session.timings])
    return medians.reshape(len(files), -1), session.noise


if __name__ == "__main__":
    sys.exit(main())
