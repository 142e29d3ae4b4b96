"""The one place where anything is timed.

Protocol, and why. Networks timed one after another repeat badly, because machines drift; so all
candidates and a fixed reference are called in shuffled round-robin. A candidate's sample in a round
is the fastest of a few calls (the slower ones carry somebody else's interruptions), its result the
median over rounds. Rounds come in blocks: a block in which the reference ran slower than in the
best block is discarded and repeated while there is time. Candidates whose median is not yet known
well enough get further blocks, until the time limit. What remains doubtful is said in
`Timing.noisy`, never hidden.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hw_profiles.graph import onnx_graph
from hw_profiles.op import Op, Tape
from hw_profiles.runtimes import onnxruntime

Call = Callable[[], object]
Clock = Callable[[], float]
Progress = Callable[[float], object]  # told the share that is done, from 0 to 1

#: how many networks are in memory and in turn at once
GROUP = 48


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds per call. `median_ms` and `spread_ms` (interquartile range) are over rounds,
    each one figure of a few calls (`Plan.per_round`); `p95_ms` is over every single call."""

    median_ms: float
    spread_ms: float
    p95_ms: float
    n: int  # rounds
    noisy: str = ""  # why the numbers are in doubt; empty when they are not


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to measure and what counts as steady."""

    rounds: int = 20  # at least, unless time runs out
    max_rounds: int = 200
    inner: int = 3  # calls per round, one right after the other
    per_round: Callable[[Sequence[float]], float] = min  # what of them counts
    precision: float = 0.02  # wanted half-width of the median's 95 % interval, relative
    drift: float = 0.03  # how far the reference may move between blocks, relative
    time_limit_s: float = 60.0


def interleaved(
    calls: Sequence[Call],
    *,
    rng: np.random.Generator,
    plan: Plan = Plan(),
    reference: Call | None = None,
    clock: Clock = time.perf_counter,
    progress: Progress | None = None,
) -> list[Timing]:
    """Time each callable, in turn with the others and the reference; results in their order.

    The default reference is a fixed piece of arithmetic on one core. Pass one that runs on the
    accelerator when the candidates do. `clock` returns seconds.
    """
    bench = _Bench([*calls, reference or _arithmetic], plan, rng, clock)
    tell = progress or (lambda share: None)
    pending = list(range(len(calls)))
    done = 0.0
    with _collector_off():
        started = clock()
        for call in bench.calls:
            bench.warm_up(call)
        while pending and not bench.finished(started):
            for share in bench.block(pending, started):
                done = max(done, share)
                tell(done)
            quiet = bench.quiet()
            pending = [
                at for at in range(len(calls)) if not _settled(bench.samples(quiet, at), plan)
            ]
    tell(1.0)
    return [bench.timing(at) for at in range(len(calls))]


def measure_ops(
    networks: Sequence[Sequence[Op]],
    *,
    rng: np.random.Generator,
    threads: int = 1,
    plan: Plan = Plan(),
    progress: Progress | None = None,
) -> list[Timing]:
    """Time whole op lists as networks in ONNX Runtime, batch 1; results in their order.

    Many networks are measured in groups drawn at random, each with the same reference network and
    its share of `plan.time_limit_s`.
    """
    order = rng.permutation(len(networks))
    groups = np.array_split(order, -(-len(order) // GROUP)) if len(order) else []
    reference = _call(_reference_ops(), threads, rng)
    timings: dict[int, Timing] = {}
    for number, group in enumerate(groups):

        def report(share: float, number: int = number) -> None:
            if progress:
                progress((number + share) / len(groups))

        measured = interleaved(
            [_call(networks[at], threads, rng) for at in group],
            rng=rng,
            plan=replace(plan, time_limit_s=plan.time_limit_s / len(groups)),
            reference=reference,
            progress=report,
        )
        timings.update(zip(group.tolist(), measured, strict=True))
    return [timings[at] for at in range(len(networks))]


def _call(ops: Sequence[Op], threads: int, rng: np.random.Generator) -> Call:
    session = onnxruntime.load(onnx_graph(ops).SerializeToString(), threads=threads)
    return session_call(session, rng)


def session_call(session: onnxruntime.Session, rng: np.random.Generator) -> Call:
    """One call of a session on a fixed random batch of 1 (free dimensions are taken as 1)."""
    feeds = {
        name: rng.standard_normal([size if isinstance(size, int) else 1 for size in shape]).astype(
            np.float32
        )
        for name, shape in session.inputs.items()
    }
    return lambda: onnxruntime.run(session, feeds)


def _reference_ops() -> list[Op]:
    """A fixed small network, some hundred microseconds: long enough to feel a disturbance."""
    tape = Tape(channels=16, size=28)
    x = tape.input
    for _ in range(3):
        x = tape.conv(x, 32, kernel=3, bias=True, act="relu")
    return tape.ops


def _arithmetic() -> int:
    return sum(range(20_000))


_Block = dict[int, list[list[float]]]  # candidate -> rounds -> seconds of each inner call


class _Bench:
    """Samples of one measurement, in blocks of rounds."""

    def __init__(
        self, calls: Sequence[Call], plan: Plan, rng: np.random.Generator, clock: Clock
    ) -> None:
        self.calls, self.plan, self.rng, self.clock = calls, plan, rng, clock
        self.blocks: list[_Block] = []
        # two blocks make the wanted rounds, so that a drift between them is always seen
        self.block_rounds = max(1, plan.rounds // 2)
        self.reference = len(calls) - 1

    def samples(self, blocks: Sequence[_Block], at: int) -> list[float]:
        """One figure per round of a candidate, in seconds."""
        return [self.plan.per_round(turn) for block in blocks for turn in block.get(at, [])]

    @property
    def rounds(self) -> int:
        return sum(len(block[self.reference]) for block in self.blocks)

    def finished(self, started: float) -> bool:
        if self.rounds == 0:
            return False
        return (
            self.rounds >= self.plan.max_rounds or self.clock() - started > self.plan.time_limit_s
        )

    def warm_up(self, call: Call) -> None:
        """Call until two windows in a row agree within 5 %: caches, allocators and clocks settle.

        At most half a second per candidate: what has not settled by then shows in the spread.
        """
        began, before = self.clock(), float("inf")
        while True:
            window = min(self._once(call) for _ in range(self.plan.inner))
            if abs(window - before) <= 0.05 * before or self.clock() - began > 0.5:
                return
            before = window

    def block(self, pending: Sequence[int], started: float) -> Iterator[float]:
        """Measure a block of rounds, fewer if time runs out; yields the share that is done."""
        block: _Block = {at: [] for at in (*pending, self.reference)}
        self.blocks.append(block)
        for turn in range(self.block_rounds):
            for at in self.rng.permutation(list(block)):
                call = self.calls[at]
                block[int(at)].append([self._once(call) for _ in range(self.plan.inner)])
            spent = (self.clock() - started) / self.plan.time_limit_s
            # half of a block's worth: whether it was quiet and sufficed shows only at its end
            left = len(pending) * (1 - (turn + 1) / (2 * self.block_rounds))
            yield min(0.99, max(spent, 1 - left / self.reference))
            if spent > 1:
                return

    def quiet(self) -> list[_Block]:
        """The blocks in which the reference ran about as fast as in its best block."""
        limit = self._paces().min() * (1 + self.plan.drift)
        return [self.blocks[at] for at in np.flatnonzero(self._paces() <= limit)]

    def timing(self, at: int) -> Timing:
        quiet = len(self.samples(self.quiet(), at))
        blocks = self._calmest(at)
        samples = self.samples(blocks, at)
        every = [one for block in blocks for turn in block.get(at, []) for one in turn]
        low, middle, high = np.percentile(samples, [25, 50, 75])
        return Timing(
            median_ms=float(middle) * 1e3,
            spread_ms=float(high - low) * 1e3,
            p95_ms=float(np.percentile(every, 95)) * 1e3,
            n=len(samples),
            noisy="; ".join(self._doubts(samples, quiet)),
        )

    def _calmest(self, at: int) -> list[_Block]:
        """The quiet blocks and, where these are too few, the least disturbed of the others.

        On a machine that stays busy many disturbed rounds rank networks better than few quiet
        ones; that the result is in doubt is said all the same.
        """
        chosen = self.quiet()
        for index in np.argsort(self._paces(), kind="stable")[len(chosen) :]:
            if len(self.samples(chosen, at)) >= self.plan.rounds:
                break
            chosen.append(self.blocks[index])
        return chosen

    def _doubts(self, samples: Sequence[float], quiet: int) -> Iterator[str]:
        if quiet < self.plan.rounds:
            yield f"only {quiet} quiet rounds of {self.plan.rounds} in the time limit"
            best, worst = self._paces().min(), self._paces().max()
            if best and worst / best - 1 > self.plan.drift:
                moved = worst / best - 1
                yield f"the reference moved by {moved:.0%}: something else runs, or clocks change"
        error = _relative_error(samples)
        if error > self.plan.precision:
            yield f"the median is known to {error:.1%} only"

    def _paces(self) -> NDArray[np.float64]:
        """The reference's median in each block."""
        return np.array([np.median(self.samples([block], self.reference)) for block in self.blocks])

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
    low, middle, high = np.percentile(samples, [25, 50, 75])
    return float(1.57 * (high - low) / np.sqrt(len(samples)) / middle) if middle else 0.0


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
