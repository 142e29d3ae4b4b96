"""Milliseconds of the networks that part `real` of the FBNetV5 benchmark trained, from their files.

Methods are held to equal MACs, which are known before anything is measured. Whether that is equal
latency too is measured here, once all are found: files of one data set in turn with each other, so
that they are comparable whatever else the machine does.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fbnetv5_experiment import Experiment, Genes1, fresh
from deploy import onnx
from hw_profiles import measure
from hw_profiles.measure import Plan

PROCESSES = 3
SECONDS = 60.0  # of each process

Network = tuple[str, Genes1]  # a task and the genes of its network


def milliseconds(
    experiment: Experiment, networks: set[Network], seconds: float = SECONDS
) -> Mapping[Network, float]:
    """Of each, in ONNX Runtime at one input and one thread: the median of processes that timed all
    of them."""
    ordered = sorted(networks)
    words = [f"{name} {''.join(map(str, genes))}" for name, genes in ordered]

    def work(_: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            files = [_drafted(experiment, *network, Path(folder)) for network in ordered]
            plan = Plan(precision=0.01, time_limit_s=seconds)
            sessions = [
                measure.fresh_session(files, rng=np.random.default_rng(seed), plan=plan)
                for seed in range(PROCESSES)
            ]
        every = np.array([[timing.median_ms for timing in one.timings] for one in sessions])
        spread = (every.max(0) - every.min(0)) / np.median(every, 0)
        doubts = [timing.noisy for one in sessions for timing in one.timings if timing.noisy]
        return {
            "ms": dict(zip(words, np.median(every, 0).tolist(), strict=True)),
            "spread": float(spread.max()),
            "noisy": doubts[:1],
        }

    which = hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]
    row = experiment.row({"what": "milliseconds", "networks": which}, work)
    return {network: row["ms"][word] for network, word in zip(ordered, words, strict=True)}


def _drafted(experiment: Experiment, name: str, genes: Genes1, folder: Path) -> Path:
    path = folder / f"{name}-{''.join(map(str, genes))}.onnx"
    task = experiment.task
    net = fresh(experiment.of[name], genes, experiment.seed).eval()
    onnx.draft(net, path, task.normalise(task.train.images[:1]))
    return path
