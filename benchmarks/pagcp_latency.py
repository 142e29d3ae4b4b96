"""Milliseconds of the exported file, always beside the dense network's in the same process.

A shared machine is some per cent faster or slower from one process to the next. What a network
needs relative to the dense one in the same process is steadier by far, so milliseconds here are
that share of one figure for the dense network.

Sessions of several networks beside the dense one (the widths of a unit) are kept: every method and
seed asks for the same in its first round. Those that tell whether one network meets a target are
always taken anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import nn

from benchmarks import contract
from benchmarks.pagcp_experiment import Experiment
from compress.cost import Latency, shape_of
from deploy import onnx
from hw_profiles import measure
from hw_profiles.measure import Plan

ROUGH_S = 3.0  # of a measurement while pruning: many networks, a little each


@dataclass(frozen=True)
class Target:
    """ONNX Runtime on this machine, one thread, batch 1."""

    experiment: Experiment
    dense: nn.Module
    dense_ms: float = 1.0  # until it is measured
    #: how often this pruning has asked for a session: each time is another one
    asked: Counter[str] = field(default_factory=Counter)

    def cost(self) -> Latency:
        return Latency(self._drafted, self._rough, self.dense, self.dense_ms)

    def export(self, net: nn.Module) -> Path:
        path = self._path(net, "onnx")
        if not path.exists():
            onnx.export(net, path, input_shape=self.experiment.task.shape)
        return path

    def _drafted(self, net: nn.Module) -> Path:
        path = self._path(net, "measured")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            onnx.draft(net, path, self.experiment.example)
        return path

    def _path(self, net: nn.Module, kind: str) -> Path:
        """One file per shape: what the weights are does not change the time."""
        return self.experiment.folder / kind / f"{self.experiment.name}-{shape_of(net)}.onnx"

    def relative(self, net: nn.Module) -> list[float]:
        """Of the dense network's milliseconds, one figure of each process."""
        files = [self.export(self.dense), self.export(net)]
        found = [self._session(files, at) for at in range(self.experiment.processes)]
        return [here / dense for dense, here in found]

    def dense_milliseconds(self) -> float:
        """The median of several processes."""
        files = [self.export(self.dense)]
        found = [self._session(files, at) for at in range(self.experiment.processes)]
        return float(np.median(found))

    def _session(self, files: Sequence[Path], seed: int) -> list[float]:
        plan = Plan(precision=0.01, time_limit_s=self.experiment.turns_s)
        return _session(files, plan, seed)

    def _rough(self, files: Sequence[Path]) -> list[float]:
        plan = Plan(rounds=10, time_limit_s=min(ROUGH_S, self.experiment.turns_s))
        if len(files) < 3:
            return _session(files, plan, seed=0)
        names = " ".join(path.name for path in files)
        self.asked[names] += 1
        key = {"session": self.asked[names], "files": names}
        kept = contract.Rows(self.experiment.folder / "sessions.jsonl")
        known = kept.get(key)
        if known is None:
            known = {"ms": _session(files, plan, seed=0)}
            kept.add(key, known)
        return list(known["ms"])


def _session(files: Sequence[Path], plan: Plan, seed: int) -> list[float]:
    session = measure.fresh_session(list(files), rng=np.random.default_rng(seed), plan=plan)
    return [timing.median_ms for timing in session.timings]
