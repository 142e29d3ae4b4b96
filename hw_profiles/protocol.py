"""The timing protocol: the one place where anything is timed.

Why this protocol. Networks timed one after another repeat badly, because machines drift; so all
candidates are called in shuffled round-robin. Between any two turns a fixed short reference runs: a
turn counts only if the reference was as fast before and after it as it ever is, so that what
somebody else's work slowed down is left out, millisecond by millisecond. (On two cores that others
kept busy, where turns counted regardless differed by 19 to 24 % between sessions, the quiet ones
differed by 1 to 2 %.) A candidate's sample in a turn is the fastest of a few calls, its result the
median over its quiet turns. Candidates whose median is not yet known well enough get further turns,
until the time limit. What remains doubtful is said in `Timing.noisy`, never hidden; how well the
machine repeats itself is `Session.noise`.

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
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence

from hw_profiles import clocks
from nas.errors import NasctlError

Call = Callable[[], object]
Progress = Callable[[float], object]  # told the share that is done, from 0 to 1

#: the quantile of the reference's calls that counts as its speed when nothing else runs
PACE = 0.05
CLOCKS_EVERY = 10  # rounds
PROCESSES_DIFFER = 0.05  # relative, in how fast they run the very same
SLOW = 1.10  # times the machine's best pace: more is no difference of processes any more

#: what of the calls of a round counts, by the name that a parcel's manifest gives it
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

    rounds: int = 20  # quiet ones, at least, unless time runs out
    max_rounds: int = 2000
    inner: int = 3  # calls per round, one right after the other
    per_round: Callable[[Sequence[float]], float] = min  # what of them counts
    precision: float = 0.02  # wanted half-width of the median's 95 % interval, relative
    drift: float = 0.06  # how much slower than its best the reference may be in a quiet turn
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
    reference_ms: list[float]  # the median of the reference's quiet calls in each round
    pace_ms: float  # of the reference when nothing else runs
    quiet: float  # the share of the reference's calls that were quiet
    clocks: list[clocks.Clocks]  # after warm-up, now and then, and at the end

    @property
    def noise(self) -> float:
        """How far the same work is off from one quiet round to the next, relative (0.01: 1 %)."""
        return noise(self.reference_ms)


@dataclass(frozen=True)
class Instruments:
    """What is read during a session, and what is known of its reference from earlier ones."""

    clock: Callable[[], float] = time.perf_counter  # seconds
    clocks: Callable[[], clocks.Clocks] = clocks.read
    pace_ms: float = math.inf  # how fast this very reference is known to be


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
    accelerator when the candidates do. Where `instruments` knows no pace of it, from an earlier
    session of this process, this session's best is taken for quiet.
    """
    bench = _Bench([*calls, reference or _arithmetic], plan, rng, instruments)
    tell = progress or (lambda share: None)
    pending = list(range(len(calls)))
    done = 0.0
    with _collector_off():
        bench.begin(pending)
        while pending and not bench.finished():
            bench.round(pending)
            done = max(done, bench.share_done())
            tell(done)
            pending = bench.pending()
    tell(1.0)
    return bench.result()


def noise(reference_ms: Sequence[float]) -> float:
    """The noise floor of one or several sessions, relative: a robust standard deviation (1.4826
    times the median absolute deviation) of `Session.reference_ms` over its median.

    Infinite for fewer than two figures, which say nothing.
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
    return sum(range(5_000))


class _Turn(NamedTuple):
    """A candidate's calls in one round, in seconds, between two calls of the reference."""

    guard: float  # the slower of the two
    calls: list[float]


class _Bench:
    """Turns of one measurement."""

    def __init__(
        self, calls: Sequence[Call], plan: Plan, rng: random.Random, instruments: Instruments
    ) -> None:
        *self.calls, self.reference = calls
        self.plan, self.rng = plan, rng
        self.clock, self.read_clocks = instruments.clock, instruments.clocks
        self.turns: list[list[_Turn]] = [[] for _ in self.calls]
        self.guards: list[list[float]] = []  # of each round
        self.clocks: list[clocks.Clocks] = []
        self.started = 0.0
        self.known_pace = instruments.pace_ms / 1e3

    def begin(self, pending: Sequence[int]) -> None:
        self.started = self.clock()
        if pending:
            for call in (*self.calls, self.reference):
                self._warm_up(call)
            self.clocks.append(self.read_clocks())

    def finished(self) -> bool:
        return len(self.guards) > 0 and (len(self.guards) >= self.plan.max_rounds or self.spent > 1)

    @property
    def spent(self) -> float:
        """The share of the time limit that is gone."""
        return (self.clock() - self.started) / self.plan.time_limit_s

    def round(self, pending: Sequence[int]) -> None:
        """A turn of every candidate that is still pending, in random order."""
        before = self._guard()
        guards = [before]
        for at in self.rng.sample(pending, len(pending)):
            calls = [self._once(self.calls[at]) for _ in range(self.plan.inner)]
            after = self._guard()
            self.turns[at].append(_Turn(max(before, after), calls))
            guards.append(after)
            before = after
        self.guards.append(guards)
        if len(self.guards) % CLOCKS_EVERY == 0:
            self.clocks.append(self.read_clocks())

    def pending(self) -> list[int]:
        """Which candidates are not known well enough yet, from their quiet turns."""
        limit = self._limit()
        quiet = [
            self._samples(turn for turn in turns if turn.guard <= limit) for turns in self.turns
        ]
        return [at for at, samples in enumerate(quiet) if not _settled(samples, self.plan)]

    def share_done(self) -> float:
        """Of the quiet turns that are wanted; at least the share of the time that is gone."""
        limit, wanted = self._limit(), self.plan.rounds
        had = [
            min(wanted, sum(turn.guard <= limit for turn in turns)) / wanted for turns in self.turns
        ]
        return min(0.99, max(self.spent, statistics.fmean(had)))

    def result(self) -> Session:
        if self.guards:
            self.clocks.append(self.read_clocks())
        limit = self._limit()
        chosen = [self._calmest(turns, limit) for turns in self.turns] if self.guards else []
        calm = ([one for one in guards if one <= limit] for guards in self.guards)
        return Session(
            timings=[self._timing(turns, limit) for turns in chosen],
            rounds_ms=[[1e3 * one for one in self._samples(turns)] for turns in chosen],
            reference_ms=[1e3 * statistics.median(guards) for guards in calm if guards],
            pace_ms=1e3 * self._pace(),
            quiet=self._quiet_share(limit),
            clocks=self.clocks,
        )

    def _pace(self) -> float:
        """Seconds that the reference takes when nothing else runs."""
        every = sorted(one for guards in self.guards for one in guards)
        return min(self.known_pace, _quantile(every, PACE) if every else math.inf)

    def _limit(self) -> float:
        """How slow the reference may be in a quiet turn, in seconds."""
        return self._pace() * (1 + self.plan.drift)

    def _quiet_share(self, limit: float) -> float:
        every = [one <= limit for guards in self.guards for one in guards]
        return sum(every) / len(every) if every else 0.0

    def _samples(self, turns: Iterable[_Turn]) -> list[float]:
        """One figure per turn, in seconds."""
        return [self.plan.per_round(turn.calls) for turn in turns]

    def _calmest(self, turns: Sequence[_Turn], limit: float) -> list[_Turn]:
        """The quiet turns and, where these are too few, the least disturbed of the others.

        On a machine that stays busy many disturbed turns rank networks better than few quiet
        ones; that the result is in doubt is said all the same.
        """
        by_guard = sorted(turns, key=lambda turn: turn.guard)
        quiet = sum(turn.guard <= limit for turn in turns)
        return by_guard[: max(quiet, self.plan.rounds)]

    def _timing(self, turns: Sequence[_Turn], limit: float) -> Timing:
        samples = self._samples(turns)
        every = sorted(one for turn in turns for one in turn.calls)
        low, middle, high = _quartiles(samples)
        quiet = sum(turn.guard <= limit for turn in turns)
        return Timing(
            median_ms=middle * 1e3,
            spread_ms=(high - low) * 1e3,
            p90_ms=_quantile(every, 0.90) * 1e3,
            p95_ms=_quantile(every, 0.95) * 1e3,
            p99_ms=_quantile(every, 0.99) * 1e3,
            n=len(samples),
            noisy="; ".join(self._doubts(samples, quiet, limit)),
        )

    def _doubts(self, samples: Sequence[float], quiet: int, limit: float) -> Iterator[str]:
        if quiet < self.plan.rounds:
            share = self._quiet_share(limit)
            yield (
                f"only {quiet} quiet rounds of {self.plan.rounds} in the time limit: the reference "
                f"moved, quiet {share:.0%} of the time; something else runs, or clocks change"
            )
        error = _relative_error(samples)
        if error > self.plan.precision:
            yield f"the median is known to {error:.1%} only"
        yield from clocks.doubts(self.clocks, self.plan.clock_drift)

    def _guard(self) -> float:
        """Seconds of a call of the reference, after one that brings it back into the caches."""
        self.reference()
        return self._once(self.reference)

    def _warm_up(self, call: Call) -> None:
        """Call until two windows in a row agree within 5 %: caches, allocators and clocks settle.

        At most half a second per candidate: what has not settled by then shows in the spread.
        """
        began, before = self.clock(), math.inf
        while True:
            window = min(self._once(call) for _ in range(self.plan.inner))
            if abs(window - before) <= 0.05 * window or self.clock() - began > 0.5:
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
