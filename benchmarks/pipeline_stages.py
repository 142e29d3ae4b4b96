"""The stages of `benchmarks.pipeline`, as verbs that are typed, and the rows of an experiment."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import contract
from benchmarks.pipeline_rows import ATTEMPTS, load, machine, typed
from cli import measuring
from deploy import bundle as bundles
from hw_profiles import device
from hw_profiles.measure import Timing
from nas import file, multitask
from nas.multitask import MultiTask
from nas.multitask_search import space_for
from nas.search_spaces.fbnetv5 import Space

MODEL, WEIGHTS = "bundle/model.onnx", "model.safetensors"
ENDS = {"ort": ".ort", "openvino": ".blob"}


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
    share: float = 0.4  # of the way from the fastest to the slowest network: the budget
    hw: str = "cpu"  # of search and pruning: another one is not measured here


@dataclass(frozen=True)
class Made:
    """A run's folder, and what the verbs that made what it delivers ended with: an exit code, or
    that the machine was busy."""

    run: Path
    codes: dict[str, int | str]

    def then(self, verb: str, code: int | str, run: Path | None = None) -> Made:
        return Made(run or self.run, {**self.codes, verb: code})


@dataclass(frozen=True)
class Experiment:
    """One seed."""

    setting: Setting
    seed: int
    rows: contract.Rows
    folder: Path

    def row(
        self,
        work: Callable[[], dict[str, Any]],
        valid: Callable[[dict[str, Any]], bool] = lambda row: True,
        **key: Any,
    ) -> dict[str, Any]:
        """The row of that name, from `work()` if it is not on disk yet or not valid any more."""
        sizes = {**asdict(self.setting), "data": Path(self.setting.data).name}
        own = {"seed": self.seed, "sizes": list(sizes.values()), "machine": machine()}
        whole = {**key, **own}
        known = self.rows.get(whole)
        if known is None or not valid(known):
            known = {**work(), "load": load()}
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

    def searched(self, name: str, budget_ms: float, more: float = 0.0) -> Made:
        """`more` epochs of the found network's own training."""
        setting, run = self.setting, self.folder / f"{name}.search"
        names = ",".join(goal.name for goal in self.task.goals)
        words: list[object] = ["search", "--together", "--tasks", names]
        words += ["--data", setting.data, "--size", setting.size, "--width", setting.width]
        words += ["--epochs", setting.search, "--finetune", f"{setting.own + more:.6g}"]
        words += ["--hw", setting.hw, "--latency", f"{budget_ms:.6g}ms", *self._ours(run)]
        return Made(run, {"search": self._ran(words, run)["code"]})

    def pruned(self, name: str, found: Made) -> Made:
        run = self.folder / f"{name}.prune"
        return found.then("prune", self.pruning(name, found.run)["code"], run)

    def pruning(self, name: str, model: Path) -> dict[str, Any]:
        setting, run = self.setting, self.folder / f"{name}.prune"
        words: list[object] = ["prune", model, "--data", setting.data]
        words += ["--target", f"macs=-{setting.pruned}%", "--max-drop", "20%", "--rounds", 2]
        words += ["--epochs", setting.tuning, "--hw", setting.hw, *self._ours(run)]
        return self._ran(words, run, again=True)

    def _ours(self, run: Path) -> list[object]:
        setting = self.setting
        return [
            *("--batch", setting.batch, "--seed", self.seed, "--threads", 1),
            *("--run", run, "--json"),
        ]

    def _ran(self, words: Sequence[object], run: Path, again: bool = False) -> dict[str, Any]:
        """The row of a verb that makes a run; one that was stopped begins `again`, or goes on."""
        left = run / "bundle" / bundles.MANIFEST

        def work() -> dict[str, Any]:
            if again:
                shutil.rmtree(run, ignore_errors=True)
            began = time.process_time()
            code, _ = typed(words, left)
            return {"code": code, "cpu_seconds": round(time.process_time() - began, 1)}

        return self.row(work, lambda _: left.is_file(), verb=words[0], run=run.name)

    def quantized(self, found: Made) -> Made:
        """In place: the run's bundle then delivers INT8, or float where that is faster; repeated
        where the machine was too busy to tell, which is said where it stays so."""
        run, left = found.run, found.run / "bundle" / bundles.MANIFEST

        def work() -> dict[str, Any]:
            words = ["quantize", run, "--data", self.setting.data, "--max-drop", "2%"]
            words += ["--hw", self.setting.hw, "--seed", self.seed, "--json"]
            for _ in range(ATTEMPTS):
                code, _ = typed(words, left)
                busy = any("the machine was busy" in line for line in told_of(run)["why"])
                if not busy:
                    break
            return {"code": "busy" if busy else code}

        def there(row: dict[str, Any]) -> bool:
            return "quantize.json" in bundles.read(run / "bundle").manifest.members

        return found.then("quantize", self.row(work, there, verb="quantize", run=run.name)["code"])

    def engine(self, run: Path, name: str) -> dict[str, Any]:
        """The engine of what is delivered: built, verified, timed in turn with its ONNX file."""
        left = run / "bundle" / bundles.MANIFEST
        codes = {"build": typed(["build", run, "--engine", name, "--json"], left)[0]}
        bundle = bundles.read(run / "bundle")
        made = next(each for each in bundle.of("engine") if Path(each).suffix == ENDS[name])
        words = ["verify", run, "--data", self.setting.data, "--engine", made, "--json"]
        codes["verify"], _ = typed(words, left)
        path = run / "bundle" / made
        car = json.loads(path.with_name(f"{path.name}.json").read_text())
        plain, engine = file_timings([bundle.model, path], self.seed, car["runtime"])
        return {
            "file": str(path.relative_to(self.folder)),
            "sha256": car["sha256"],
            "bytes": car["bytes"],
            "observed": car["observed"],
            "ms": engine.median_ms,
            "ratio": engine.median_ms / plain.median_ms,
            "noisy": engine.noisy or plain.noisy,
            "codes": codes,
        }

    def there(self, row: dict[str, Any]) -> bool:
        """Is the row's file still what it was?"""
        path = self.folder / row["file"]
        return path.is_file() and file.sha256(path) == row["sha256"]

    def steps(self, epochs: float) -> int:
        return max(1, round(epochs * len(self.task.train) / self.setting.batch))


def file_timings(paths: Sequence[Path], seed: int, runtime: str = "onnxruntime") -> list[Timing]:
    board = device.load("cpu").model_copy(update={"runtime": runtime})
    return measuring.timer(measuring.LOCAL, board, seed, as_written=True)(paths)


def told_of(run: Path) -> dict[str, Any]:
    """What `nasctl quantize` reported."""
    told: dict[str, Any] = json.loads((run / "bundle/quantize.json").read_text())
    return told
