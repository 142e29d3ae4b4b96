"""Engines of one network timed in turn, as ratios to the first of them, on a machine that is busy.

A figure of milliseconds from a shared core says little; which of two files is faster, and how much,
holds better where both had their turns in the same process at the same time. So every process gives
a ratio per file, and what is told is their middle and how far apart they are.

The clock is the processor's time of this process, not the wall's: with one thread they are the same
on an idle core, and on a shared one the wall's counts what others do in the middle of a call. Calls
longer than the scheduler's turns suffer that, short ones do not: by the wall, a MobileNet of 2.9 ms
and its INT8 file seemed 5 times apart here, and 1.1 to 7 times from process to process.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploy import engine as engines
from hw_profiles import measure, processes, protocol, runtimes
from hw_profiles.protocol import Instruments, Plan, Timing

ENDS = (0.05, 0.95)  # of the processes' ratios


@dataclass(frozen=True)
class Turns:
    """What one file took, and how much faster than the first one it was."""

    ms: float
    ratio: float  # the first file's milliseconds over this one's: above 1 is faster
    low: float
    high: float
    noisy: str = ""  # a reason for doubt that a process gave

    def timing(self, base_ms: float, processes: int) -> Timing:
        """For the speed guard, whose doubt is then the lower end of the ratios: this file is faster
        beyond the spread exactly if that is above 1. A process in doubt leaves it in doubt, as a
        busy machine decides nothing in `nasctl quantize` either."""
        ms = base_ms / self.ratio
        spread = max(0.0, 2 * (base_ms / self.low - ms))
        return Timing(ms, spread, self.ms, self.ms, self.ms, processes, self.noisy)


def in_turn(paths: Sequence[Path], n: int, seconds: float) -> list[Turns]:
    """Time engines (with their side-cars), on one input each, in `n` fresh processes of that many
    seconds of the processor; results in their order."""
    sessions = []
    for seed in range(n):
        with processes.fresh() as pool:
            sessions.append(pool.submit(_session, list(paths), seed, seconds).result())
    return summed(sessions)


def summed(sessions: Sequence[Sequence[Timing]]) -> list[Turns]:
    """Of every file, over the processes that timed all of them."""
    found = []
    for at in range(len(sessions[0])):
        timings = [session[at] for session in sessions]
        ratios = [session[0].median_ms / session[at].median_ms for session in sessions]
        low, high = np.quantile(ratios, ENDS).tolist()
        doubts = [timing.noisy for timing in timings if timing.noisy]
        noisy = f"{len(doubts)} of {len(timings)} processes: {doubts[0]}" if doubts else ""
        middle = statistics.median(timing.median_ms for timing in timings)
        found.append(Turns(middle, statistics.median(ratios), low, high, noisy))
    return found


def _session(paths: Sequence[Path], seed: int, seconds: float) -> list[Timing]:
    """The reference, which tells busy moments from quiet ones, runs in ONNX Runtime whatever the
    engines are: AOTInductor would compile it anew in every process."""
    rng = np.random.default_rng(seed)

    def call(path: Path) -> protocol.Call:
        session, car = engines.load(path)
        module = runtimes.load_module(car.runtime)
        return module.timed(session, runtimes.random_feeds(session, rng))

    reference = runtimes.load_module("onnxruntime").load(measure.reference_model())
    return protocol.session(
        [call(path) for path in paths],
        rng=random.Random(seed),
        plan=Plan(rounds=10, time_limit_s=seconds),
        reference=measure.session_call(reference, rng),
        instruments=Instruments(clock=time.process_time),
    ).timings
