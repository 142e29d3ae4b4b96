"""What `benchmarks.pipeline` runs: the whole chain, verb by verb, and the chains that lack a stage.

  whole          search for all tasks together -> PAGCP -> INT8 -> bundle -> engines
  no search      a network at random, as slow as the one found, trained for as long as search and
                 training of that one took; then as above
  no pruning     a search for what pruning came down to; then INT8
  no INT8        a search for less, and pruning, so that float takes as long as INT8 does above;
                 the whole chain itself where its speed guard kept the float file
  smaller input  every gate of the space, on fewer pixels, of the width that takes as long; INT8

Equal milliseconds are arranged before a network is trained, on graphs or files timed beside each
other; what they came to is measured at the end, all files in one session. The stages are the verbs
as they are typed; each goes on in its own folder where it was stopped.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import contract
from cli import bundling, judging, main, many_tasks_stages, several
from deploy import bundle as bundles
from deploy import onnx, verify
from hw_profiles import device, latency, measure
from hw_profiles.measure import Plan, Timing
from hw_profiles.op import Op, macs
from nas import checkpoint, multitask
from nas.elastic import channels_last
from nas.errors import NasctlError
from nas.multitask import MultiTask
from nas.multitask_search import EVERY, WARM, space_for
from nas.multitask_training import Schedule, train
from nas.search_spaces.fbnetv5 import Space
from nas.space import Genes

TOLERANCE = 1.02  # of milliseconds, for a file that is taken as equally fast
DRAWN = 24  # networks among which an equally fast one is looked for
WIDTHS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)  # of the network on the smaller input
SAMPLES, FORWARD = 8, 1 / 3  # of a step of the distributions: networks, and of a step's work each
LR = 0.1  # of trainings alone: what the verbs take
MODEL, WEIGHTS = "bundle/model.onnx", "model.safetensors"


@dataclass(frozen=True)
class Setting:
    """Sizes of a run; epochs are of the training images."""

    data: str  # as --data has it
    size: int  # pixels
    small: int  # of the smaller input
    width: float
    batch: int
    search: float  # epochs of the supernet
    own: float  # of the network that is found
    tuning: float  # after pruning
    pruned: int = 40  # per cent of the multiply-adds
    share: float = 0.6  # of the way from the fastest to the slowest network: the budget
    hw: str = "cpu"  # of search and pruning: another one is not measured here


@dataclass(frozen=True)
class Experiment:
    """One seed."""

    setting: Setting
    seed: int
    rows: contract.Rows
    folder: Path

    def row(self, work: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any]:
        """The row of that name, from `work()` if it is not on disk yet."""
        sizes = {**asdict(self.setting), "data": Path(self.setting.data).name}
        whole = {**key, "seed": self.seed, "sizes": list(sizes.values())}
        if (known := self.rows.get(whole)) is None:
            known = work()
            self.rows.add(whole, known)
        return known

    @cached_property
    def task(self) -> MultiTask:
        return multitask.load(self.setting.data, size=self.setting.size)

    @cached_property
    def space(self) -> Space:
        return space_for(self.task, self.setting.width)

    @property
    def measured(self) -> bool:
        return device.load(self.setting.hw).local

    # ---- stages, as typed ------------------------------------------------------------------------

    def searched(self, name: str, budget_ms: float, more: float = 0.0) -> Path:
        """`more` epochs of the found network's own training."""
        setting, run = self.setting, self.folder / f"{name}.search"
        names = ",".join(goal.name for goal in self.task.goals)
        words: list[object] = ["search", "--together", "--tasks", names]
        words += ["--data", setting.data, "--size", setting.size, "--width", setting.width]
        words += ["--epochs", setting.search, "--finetune", setting.own + more, "--hw", setting.hw]
        words += ["--latency", f"{budget_ms:.6g}ms"]
        typed([*words, *self._ours(run)], run)
        return run

    def pruned(self, name: str, model: Path) -> Path:
        setting, run = self.setting, self.folder / f"{name}.prune"
        words = ["prune", model, "--data", setting.data, "--target", f"macs=-{setting.pruned}%"]
        words += ["--max-drop", "20%", "--rounds", 2, "--epochs", setting.tuning]
        typed([*words, "--hw", setting.hw, *self._ours(run)], run)
        return run

    def _ours(self, run: Path) -> list[object]:
        setting = self.setting
        return [
            *("--batch", setting.batch, "--seed", self.seed, "--threads", 1),
            *("--run", run, "--json"),
        ]

    def quantized(self, run: Path) -> Path:
        """In place: the run's bundle then delivers INT8, or float where that is faster."""
        if "quantize.json" not in bundles.read(run / "bundle").manifest.members:
            words = ["quantize", run, "--data", self.setting.data, "--max-drop", "2%"]
            words += ["--hw", self.setting.hw, "--seed", self.seed, "--json"]
            typed(words, run)
        return run

    def engine(self, run: Path, name: str) -> dict[str, Any]:
        """The engine of what is delivered, verified."""
        typed(["build", run, "--engine", name, "--json"], run)
        bundle = bundles.read(run / "bundle")
        made = next(each for each in bundle.of("engine") if Path(each).suffix == ENDS[name])
        typed(["verify", run, "--data", self.setting.data, "--engine", made, "--json"], run)
        car = json.loads((run / "bundle" / f"{made}.json").read_text())
        found = {"ms": car["latency"]["median_ms"], "bytes": car["bytes"]}
        return {**found, "observed": car["observed"]}

    # ---- networks that no search found -----------------------------------------------------------

    def steps(self, epochs: float) -> int:
        return max(1, round(epochs * len(self.task.train) / self.setting.batch))

    @property
    def work(self) -> int:
        """Steps that are as much work as a search and the training of what it finds."""
        search = self.steps(self.setting.search)
        moves = len(range(math.ceil(WARM * search), search, EVERY))
        return round(search + FORWARD * (SAMPLES + 1) * moves) + self.steps(self.setting.own)

    @property
    def recovery(self) -> float:
        """Epochs that a pruning trains: a quarter of its tuning between two rounds, then all."""
        return 1.25 * self.setting.tuning

    def trained(
        self, name: str, task: MultiTask, space: Space, genes: Genes, more: float = 0.0
    ) -> Path:
        """A run's folder with such a network, trained from scratch and sealed as a search's is;
        for `more` epochs where no pruning follows that would train it."""
        run, setting = self.folder / name, self.setting
        if (run / "bundle" / bundles.MANIFEST).is_file():
            return run
        (run / "bundle").mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            net = channels_last(space.build(space.decode(genes)))
        steps = self.work + (self.steps(more) if more else 0)
        schedule = Schedule(steps=steps, batch=setting.batch, lr=LR, seed=self.seed)
        for _ in train(net, task, schedule, resume=run / "training.safetensors"):
            pass
        names = [goal.name for goal in task.goals]
        size = task.shape[1]
        spec = many_tasks_stages.TasksSpec(
            data=setting.data,
            tasks=names,
            space="fbnetv5",
            width=space.scale,
            size=size,
            batch=setting.batch,
            lr=LR,
            seed=self.seed,
            epochs=1,
            finetune=0,
            threads=1,
            licence="",
        )
        said = several.describe(spec, task, space, genes.tolist())
        checkpoint.write_described(run / WEIGHTS, net, said)
        onnx.export(net, run / MODEL, input_shape=task.shape)
        verify.parity(net, run / MODEL, next(task.batches(task.val, 32))[0].numpy())
        given = several.interface_of(task, setting.data, size)
        arch, board = {"genes": genes.tolist()}, device.load("cpu")
        sample = bundling.sample(given, task.train.images)
        contents = bundling.Contents(given, arch, {}, sample, board)
        bundling.seal(run / "bundle", contents)
        return run

    def at_random(self, like: Path) -> Genes:
        """Genes of a network that is about as slow as that of the run `like`: of those drawn that
        are not slower, the one with the most multiply-adds."""
        rng = np.random.default_rng((self.seed, 71))
        rows = self.space.sample(rng, DRAWN)
        genes = np.array(json.loads((like / "bundle/arch.json").read_text())["genes"])
        graphs = [self.space.ops(self.space.decode(row)) for row in (genes, *rows)]
        found, *others = graph_ms(graphs, self.seed)
        fits = [at for at, ms in enumerate(others) if ms <= found * TOLERANCE]
        at = max(fits or [int(np.argmin(others))], key=lambda at: macs(graphs[at + 1]))
        return rows[at]

    def on_less(self, ms: float) -> tuple[MultiTask, Space]:
        """Fewer pixels and the space whose largest network takes at most `ms` there, the widest."""
        task = multitask.load(self.setting.data, size=self.setting.small)
        spaces = [space_for(task, width) for width in WIDTHS]
        took = graph_ms([space.ops(space.decode(space.largest)) for space in spaces], self.seed)
        fits = [at for at, each in enumerate(took) if each <= ms * TOLERANCE]
        return task, spaces[max(fits, default=0)]


ENDS = {"ort": ".ort", "openvino": ".blob"}


def typed(words: Sequence[object], run: Path) -> str:
    """Run a verb as it is typed; what it prints. A budget or a bound that was missed (3, 4) is told
    by its files; raises NasctlError where it left none, and for whatever else it ends with."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = main.run([str(word) for word in words])
    kept = (run / "bundle" / bundles.MANIFEST).is_file()
    if code and not (code in (3, 4) and kept):
        raise NasctlError(f"nasctl {words[0]} ended with {code}", where=str(run))
    return said.getvalue()


def graph_ms(graphs: Sequence[Sequence[Op]], seed: int) -> list[float]:
    """Op lists as networks, timed in turn with each other in one process."""
    plan = Plan(rounds=12, time_limit_s=1.0 * len(graphs))
    rng = np.random.default_rng((seed, 72))
    return [t.median_ms for t in measure.fresh_session(graphs, rng=rng, plan=plan).timings]


def file_timings(paths: Sequence[Path], seed: int) -> list[Timing]:
    from cli.measuring import LOCAL, timer

    return timer(LOCAL, device.load("cpu"), seed, as_written=True)(paths)


# ---- chains --------------------------------------------------------------------------------------


def budget_ms(e: Experiment) -> float:
    """Of the whole chain's search: between the smallest and the largest network, as measured, or
    as the table has them of a device that is not this machine."""

    def work() -> dict[str, Any]:
        ends = [e.space.ops(e.space.decode(row)) for row in (e.space.smallest, e.space.largest)]
        if e.measured:
            low, high = graph_ms(ends, e.seed)
        else:
            table = latency.table(device.load(e.setting.hw))
            low, high = (table.estimate(ops, "fbnetv5").high_ms for ops in ends)
        return {"ms": low + e.setting.share * (high - low), "smallest": low, "largest": high}

    return float(e.row(work, what="budget")["ms"])


def whole(e: Experiment) -> Path:
    return e.quantized(e.pruned("whole", e.searched("whole", budget_ms(e))))


def no_search(e: Experiment) -> Path:
    like = e.searched("whole", budget_ms(e))
    genes = np.array(e.row(lambda: {"genes": e.at_random(like).tolist()}, what="random")["genes"])
    run = e.trained("random", e.task, e.space, genes)
    return e.quantized(e.pruned("random", run))


def no_pruning(e: Experiment) -> Path:
    return e.quantized(e.searched("for-less", float_ms(e), more=e.recovery))


def no_int8(e: Experiment) -> Path:
    run = whole(e)
    if (share := int8_share(run)) == 1:
        return run
    return e.pruned("float", e.searched("float", share * budget_ms(e)))


def smaller_input(e: Experiment) -> Path:
    def work() -> dict[str, Any]:
        return {"width": e.on_less(float_ms(e))[1].scale}

    width = float(e.row(work, what="width on less")["width"])
    task = multitask.load(e.setting.data, size=e.setting.small)
    space = space_for(task, width)
    small = replace(e, setting=replace(e.setting, size=e.setting.small))
    return small.quantized(small.trained("small", task, space, space.largest, more=e.recovery))


CHAINS: dict[str, Callable[[Experiment], Path]] = {
    "whole": whole,
    "no search": no_search,
    "no pruning": no_pruning,
    "no INT8": no_int8,
    "smaller input": smaller_input,
}


def float_ms(e: Experiment) -> float:
    """What the whole chain's float file took, pruned, on the search's own scale."""
    timed = json.loads((whole(e) / "report.json").read_text())["latency"]
    report = json.loads((e.folder / "whole.search" / "report.json").read_text())
    found = next(iter(report["tasks"].values()))["measured"]["median_ms"]
    return float(found * timed["after"]["median_ms"] / timed["before"]["median_ms"])


def int8_share(run: Path) -> float:
    """Of the float file's milliseconds that the delivered file takes, as timed in turn."""
    told = json.loads((run / "bundle/quantize.json").read_text())
    taken = {row["name"]: row["timing"] for row in told["variants"]}
    choice = told["choice"]
    plain = taken["model.onnx"]
    return float(taken[choice]["median_ms"] / plain["median_ms"]) if choice and plain else 1.0


def judged(e: Experiment, name: str, run: Path) -> dict[str, Any]:
    """Metrics of the delivered file on validation and on test images, which are read here."""
    with bundling.opened(run) as bundle:
        judge = judging.judge(bundling.interface_of(bundle), e.setting.data)
        runner = judging.runner(bundle.model, "onnxruntime")
        seen = judge.evidence(runner, judge.task.test)
        checkpoint.write(evidence_path(e, name), seen, {})
        return {
            "file": str(bundle.model.relative_to(e.folder)),
            "bytes": bundle.model.stat().st_size,
            "test": multitask.scores(judge.task, seen),
            "val": judge.scores(runner, judge.task.val),
        }


def evidence_path(e: Experiment, name: str) -> Path:
    return e.folder / f"{name.replace(' ', '-')}.evidence.safetensors"
