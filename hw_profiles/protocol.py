"""The timing protocol: the one place where anything is timed.

Why this protocol. Networks timed one after another repeat badly, because machines drift; so all
candidates and a fixed reference are called in shuffled round-robin. A candidate's sample in a round
is the fastest of a few calls (the slower ones carry somebody else's interruptions), its result the
median over rounds. Rounds come in blocks: a block in which the reference ran slower than in the
best block is discarded and repeated while there is time. Candidates whose median is not yet known
well enough get further blocks, until the time limit. What remains doubtful is said in
`Timing.noisy`, never hidden; how well the machine repeats itself is `Session.noise`.

This file is also sent to boards: it needs Python 3.8 and its standard library, nothing else.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Sequence

from hw_profiles import clocks
from nas.errors import NasctlError

Call = Callable[[], object]
Progress = Callable[[float], object]  # told the share that is done, from 0 to 1

#: what of the calls of a round counts, by the name that a bundle's manifest gives it
PER_ROUND: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "median": statistics.median,
}


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call. `median_ms` and `spread_ms` (interquartile range) are over rounds,
    each one figure of a few calls (`Plan.per_round`); the percentiles are over single calls."""

    median_ms: float
    spread_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    n: int  # rounds
    noisy: str = ""  # why the numbers are in doubt; empty when they are not


@dataclass(frozen=True)
class Plan:
    """How much to measure and what counts as steady."""

    rounds: int = 20  # at least, unless time runs out
    max_rounds: int = 200
    inner: int = 3  # calls per round, one right after the other
    per_round: Callable[[Sequence[float]], float] = min  # what of them counts
    precision: float = 0.02  # wanted half-width of the median's 95 % interval, relative
    drift: float = 0.03  # how far the reference may move between blocks, relative
    clock_drift: float = 0.05  # how far a core's or GPU's clock may move, relative
    time_limit_s: float = 60.0

    def to_json(self) -> dict[str, Any]:
        """Plain values; raises NasctlError where `per_round` has no name in PER_ROUND."""
        for name, function in PER_ROUND.items():
            if function is self.per_round:
                return {**asdict(self), "per_round": name}
        raise NasctlError("per_round cannot be sent to a board", where="plan", allowed=PER_ROUND)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        return cls(**{**values, "per_round": PER_ROUND[values["per_round"]]})


@dataclass(frozen=True)
class Session:
    """What one call of `session` measured; lists are in the order of the callables."""

    timings: list[Timing]
    rounds_ms: list[list[float]]  # of each callable: the rounds that its timing rests on
    reference_ms: list[float]  # the reference's median in each block, discarded ones too
    clocks: list[clocks.Clocks]  # after warm-up and after each block

    @property
    def noise(self) -> float:
        """How far the same work is off from one block to the next, relative (0.01 = 1 %)."""
        return noise(self.reference_ms)


@dataclass(frozen=True)
class Instruments:
    """What is read during a session."""

    clock: Callable[[], float] = time.perf_counter  # seconds
    clocks: Callable[[], clocks.Clocks] = clocks.read


def session(
    calls: Sequence[Call],
    *,
    rng: random.Random,
    plan: Plan = Plan(),
    reference: Call | None = None,
    instruments: Instruments = Instruments(),
    progress: Progress | None = None,
) -> Session:
    """Time each callable, in turn with the others and the reference.

    The default reference is a fixed piece of arithmetic on one core. Pass one that runs on the
    accelerator when the candidates do.
    """
    bench = _Bench([*calls, reference or _arithmetic], plan, rng, instruments)
    tell = progress or (lambda share: None)
    pending = list(range(len(calls)))
    done = 0.0
    with _collector_off():
        bench.begin(pending)
        while pending and not bench.finished():
            for share in bench.block(pending):
                done = max(done, share)
                tell(done)
            quiet = bench.quiet()
            pending = [
                at for at in range(len(calls)) if not _settled(bench.samples(quiet, at), plan)
            ]
    tell(1.0)
    return bench.result()


def noise(reference_ms: Sequence[float]) -> float:
    """The noise floor of one or several sessions, relative: a robust standard deviation (1.4826
    times the median absolute deviation) of the reference's block medians over their median.

    Robust, because a disturbed block is discarded and repeated and does no harm; infinite for
    fewer than two blocks, which say nothing.
    """
    if len(reference_ms) < 2:
        return math.inf
    middle = statistics.median(reference_ms)
    return 1.4826 * statistics.median(abs(one - middle) for one in reference_ms) / middle


@contextlib.contextmanager
def pinned(cores: Iterable[int]) -> Iterator[None]:
    """Keep this thread, and the threads it starts inside, on these cores; no cores, no change.

    Load the sessions inside too: a runtime's threads get the cores of the thread that starts them.
    Raises NasctlError where the system cannot pin or this process may not use such a core.
    """
    wanted = set(cores)
    if not wanted:
        yield
        return
    if not hasattr(os, "sched_setaffinity"):
        raise NasctlError("this system cannot pin a process to cores", where="cores")
    before = os.sched_getaffinity(0)
    if not wanted <= before:
        raise NasctlError(
            f"this process may not use core {min(wanted - before)}",
            where="cores",
            allowed=(str(core) for core in sorted(before)),
        )
    os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _arithmetic() -> int:
    return sum(range(20_000))


_Block = Dict[int, List[List[float]]]  # candidate -> rounds -> seconds of each inner call


class _Bench:
    """Samples of one measurement, in blocks of rounds."""

    def __init__(
        self, calls: Sequence[Call], plan: Plan, rng: random.Random, instruments: Instruments
    ) -> None:
        self.calls, self.plan, self.rng = calls, plan, rng
        self.clock, self.read_clocks = instruments.clock, instruments.clocks
        self.blocks: list[_Block] = []
        self.clocks: list[clocks.Clocks] = []
        # two blocks make the wanted rounds, so that a drift between them is always seen
        self.block_rounds = max(1, plan.rounds // 2)
        self.reference = len(calls) - 1
        self.started = 0.0

    def begin(self, pending: Sequence[int]) -> None:
        self.started = self.clock()
        if pending:
            for call in self.calls:
                self._warm_up(call)
            self.clocks.append(self.read_clocks())

    def finished(self) -> bool:
        rounds = sum(len(block[self.reference]) for block in self.blocks)
        return rounds > 0 and (
            rounds >= self.plan.max_rounds or self.clock() - self.started > self.plan.time_limit_s
        )

    def block(self, pending: Sequence[int]) -> Iterator[float]:
        """Measure a block of rounds, fewer if time runs out; yields the share that is done."""
        block: _Block = {at: [] for at in (*pending, self.reference)}
        self.blocks.append(block)
        for turn in range(self.block_rounds):
            for at in self.rng.sample(list(block), len(block)):
                call = self.calls[at]
                block[at].append([self._once(call) for _ in range(self.plan.inner)])
            spent = (self.clock() - self.started) / self.plan.time_limit_s
            # half of a block's worth: whether it was quiet and sufficed shows only at its end
            left = len(pending) * (1 - (turn + 1) / (2 * self.block_rounds))
            yield min(0.99, max(spent, 1 - left / self.reference))
            if spent > 1:
                break
        self.clocks.append(self.read_clocks())

    def samples(self, blocks: Sequence[_Block], at: int) -> list[float]:
        """One figure per round of a candidate, in seconds."""
        return [self.plan.per_round(turn) for block in blocks for turn in block.get(at, [])]

    def quiet(self) -> list[_Block]:
        """The blocks in which the reference ran about as fast as in its best block."""
        paces = self._paces()
        limit = min(paces) * (1 + self.plan.drift)
        return [block for block, pace in zip(self.blocks, paces) if pace <= limit]

    def result(self) -> Session:
        chosen = [self._calmest(at) for at in range(self.reference)] if self.blocks else []
        return Session(
            timings=[self._timing(at, blocks) for at, blocks in enumerate(chosen)],
            rounds_ms=[
                [1e3 * one for one in self.samples(blocks, at)] for at, blocks in enumerate(chosen)
            ],
            reference_ms=[1e3 * pace for pace in self._paces()],
            clocks=self.clocks,
        )

    def _timing(self, at: int, blocks: Sequence[_Block]) -> Timing:
        samples = self.samples(blocks, at)
        every = sorted(one for block in blocks for turn in block.get(at, []) for one in turn)
        low, middle, high = _quartiles(samples)
        quiet = len(self.samples(self.quiet(), at))
        return Timing(
            median_ms=middle * 1e3,
            spread_ms=(high - low) * 1e3,
            p90_ms=_quantile(every, 0.90) * 1e3,
            p95_ms=_quantile(every, 0.95) * 1e3,
            p99_ms=_quantile(every, 0.99) * 1e3,
            n=len(samples),
            noisy="; ".join(self._doubts(samples, quiet)),
        )

    def _calmest(self, at: int) -> list[_Block]:
        """The quiet blocks and, where these are too few, the least disturbed of the others.

        On a machine that stays busy many disturbed rounds rank networks better than few quiet
        ones; that the result is in doubt is said all the same.
        """
        chosen = self.quiet()
        paces = self._paces()
        by_pace = sorted(range(len(paces)), key=paces.__getitem__)
        for index in by_pace[len(chosen) :]:
            if len(self.samples(chosen, at)) >= self.plan.rounds:
                break
            chosen.append(self.blocks[index])
        return chosen

    def _doubts(self, samples: Sequence[float], quiet: int) -> Iterator[str]:
        if quiet < self.plan.rounds:
            yield f"only {quiet} quiet rounds of {self.plan.rounds} in the time limit"
            best, worst = min(self._paces()), max(self._paces())
            if best and worst / best - 1 > self.plan.drift:
                moved = worst / best - 1
                yield f"the reference moved by {moved:.0%}: something else runs, or clocks change"
        error = _relative_error(samples)
        if error > self.plan.precision:
            yield f"the median is known to {error:.1%} only"
        yield from clocks.doubts(self.clocks, self.plan.clock_drift)

    def _paces(self) -> list[float]:
        """The reference's median in each block, in seconds."""
        return [statistics.median(self.samples([block], self.reference)) for block in self.blocks]

    def _warm_up(self, call: Call) -> None:
        """Call until two windows in a row agree within 5 %: caches, allocators and clocks settle.

        At most half a second per candidate: what has not settled by then shows in the spread.
        """
        began, before = self.clock(), math.inf
        while True:
            window = min(self._once(call) for _ in range(self.plan.inner))
            if abs(window - before) <= 0.05 * before or self.clock() - began > 0.5:
                return
            before = window

    def _once(self, call: Call) -> float:
        began = self.clock()
        call()
        return self.clock() - began


def _settled(samples: Sequence[float], plan: Plan) -> bool:
    return len(samples) >= plan.rounds and _relative_error(samples) <= plan.precision


def _relative_error(samples: Sequence[float]) -> float:
    """Half-width of the median's 95 % interval over the median: 1.57 IQR / sqrt(n).

    The notch of a box plot (McGill, Tukey and Larsen 1978); it assumes no distribution's tails.
    """
    low, middle, high = _quartiles(samples)
    return 1.57 * (high - low) / math.sqrt(len(samples)) / middle if middle else 0.0


def _quartiles(samples: Sequence[float]) -> list[float]:
    ordered = sorted(samples)
    return [_quantile(ordered, share) for share in (0.25, 0.5, 0.75)]


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Of values in ascending order, linear between neighbours."""
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """No garbage collection inside a timed call."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
