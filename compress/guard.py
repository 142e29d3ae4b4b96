"""Which nodes stay in float, and which of several files is delivered.

The accuracy guard: where INT8 costs more than is allowed, the nodes that change the outputs most
stay in float. Every node's own effect is measured with it alone in INT8, on calibration data and
without labels: quantization errors of nodes add up nearly independently, so the order needs one
pass per node. How many must stay is then searched with the task's own metric, doubling and then
halving, and at last each is given back to INT8 where that holds the bound. NNCF's accuracy control
is the nearest relative; it ranks by the metric itself and does not give nodes back.

The speed guard: INT8 is not faster everywhere (depthwise convolutions, processors without VNNI),
so all files are timed on the target and the fastest one inside the bound is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from compress import quantize
from compress.quantize import Feeds, Ranges, Scheme
from compress.record import Record
from hw_profiles.protocol import Timing
from nas.errors import NasctlError

#: a model -> the largest share of its allowed loss that any task uses: up to 1 is inside the bound
Spent = Callable[[onnx.ModelProto], float]
#: a model and a batch -> its outputs
Run = Callable[[onnx.ModelProto, Sequence[Feeds]], list[list[np.ndarray]]]
Progress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class Kept:
    """A node that stays in float, and by how much it alone in INT8 changes the outputs; None where
    that was not measured, because such nodes always stay."""

    node: str
    kind: str
    error: float | None  # root of the squared change over the squared outputs, the worst output


@dataclass(frozen=True)
class Guarded:
    model: onnx.ModelProto
    kept: tuple[Kept, ...]
    nodes: int  # that could have been kept
    spent: float  # of the bound, with these kept
    spent_without: float  # with none kept
    judged: int  # models that the metric was computed of


@dataclass(frozen=True)
class Guard:
    """What the accuracy guard works with. `run` executes a model, `spent` judges it on data that
    is neither trained nor tested on; both are of a prepared model or of its INT8 twins."""

    model: onnx.ModelProto
    batches: Sequence[Feeds]  # of training data
    scheme: Scheme
    run: Run
    spent: Spent
    #: of a file: what was measured is not measured again after a kill
    record: Record = field(default_factory=Record)
    always: Collection[str] = ()  # nodes that stay in float whatever they cost

    def guarded(self, progress: Progress = lambda share, doing: None) -> Guarded:
        """The model in INT8 with as few nodes in float as the bound needs.

        Raises NasctlError where even the float model is outside the bound: it is another model than
        the one that was judged, or `spent` is not comparable.
        """
        progress(0.0, "calibrating")
        ranges = quantize.calibrate(self.model, self.batches, self.scheme)
        every = {
            node.name: node.op_type
            for node in quantize.quantized(self.model, self.scheme)
            if node.name not in self.always
        }
        judge = _Judge(self, ranges, progress)
        without = judge.spent(())
        if without <= 1:
            return Guarded(judge.model(()), (), len(every), without, without, judge.asked)
        errors = self._errors(ranges, every, progress)
        order = sorted(every, key=lambda node: (-errors[node], node))
        keep = judge.enough(order)
        keep = judge.given_back(keep, errors)
        kept = tuple(Kept(node, every[node], errors[node]) for node in keep)
        final = judge.spent(keep)
        return Guarded(judge.model(keep), kept, len(every), final, without, judge.asked)

    def _errors(
        self, ranges: Ranges, every: Collection[str], progress: Progress
    ) -> dict[str, float]:
        expected = self.run(self.model, self.batches[:1])
        found = {}
        for done, node in enumerate(sorted(every)):
            progress(done / len(every), f"error of {node}")
            others = [other for other in self.names if other != node]

            def measured(others: list[str] = others) -> float:
                model = quantize.int8(self.model, ranges, self.scheme, others)
                return relative_error(expected, self.run(model, self.batches[:1]))

            found[node] = float(self.record.of(f"error {node}", measured))
        return found

    @property
    def names(self) -> list[str]:
        return [node.name for node in self.model.graph.node]


@dataclass
class _Judge:
    """The share of the bound that a choice of float nodes uses, each choice judged once."""

    guard: Guard
    ranges: Ranges
    progress: Progress
    asked: int = 0

    def model(self, keep: Collection[str]) -> onnx.ModelProto:
        floats = {*keep, *self.guard.always}
        return quantize.int8(self.guard.model, self.ranges, self.guard.scheme, floats)

    def spent(self, keep: Collection[str]) -> float:
        key = "spent " + ",".join(sorted(keep))

        def judged() -> float:
            return self.guard.spent(self.model(keep))

        self.asked += 1
        self.progress(1.0, f"{len(keep)} nodes in float")
        return float(self.guard.record.of(key, judged))

    def enough(self, order: Sequence[str]) -> list[str]:
        """The shortest prefix of `order` that holds the bound, as far as doubling and then halving
        tells: accuracy is not quite monotone in it."""
        high = 1
        while self.spent(order[:high]) > 1:
            if high >= len(order):
                raise NasctlError(
                    "the bound is not held even with every node in float",
                    where="--max-drop",
                    next="Is the data the model's own? Judge the float file with `nasctl verify`.",
                )
            high = min(2 * high, len(order))
        low = high // 2  # known to be too few
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.spent(order[:middle]) <= 1 else (middle, high)
        return list(order[:high])

    def given_back(self, keep: list[str], errors: dict[str, float]) -> list[str]:
        """Without those that the bound holds without: the less sensitive half at once, halves of
        what cannot go as a whole, the least sensitive first. Each that stays was tried alone."""
        groups = [sorted(keep, key=lambda node: (errors[node], node))]
        while groups:
            group = groups.pop()
            rest = [node for node in keep if node not in group]
            if len(group) < len(keep) and self.spent(rest) <= 1:
                keep = rest
            elif len(group) > 1:
                half = (len(group) + 1) // 2
                groups += [group[half:], group[:half]]
        return keep


def relative_error(
    expected: Sequence[Sequence[np.ndarray]], found: Sequence[Sequence[np.ndarray]]
) -> float:
    """Root of the squared difference over the squared expectation, of the output where it is
    largest; both are outputs per batch. Infinite where an output is not a number."""
    worst = 0.0
    for wanted, got in zip(zip(*expected, strict=True), zip(*found, strict=True), strict=True):
        difference = sum(
            float(np.square(a - b, dtype=np.float64).sum())
            for a, b in zip(wanted, got, strict=True)
        )
        scale = sum(float(np.square(a, dtype=np.float64).sum()) for a in wanted)
        error = math.sqrt(difference / max(scale, 1e-30))
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


# ---- the speed guard -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Variant:
    """One file of a model: what it computes in, how much of the bound it spends, how long it takes.
    The first of several is the float one, which is always inside."""

    name: str
    spent: float
    timing: Timing


@dataclass(frozen=True, slots=True)
class Choice:
    name: str
    why: tuple[str, ...]  # one line per variant


#: on a busy machine: how many times as fast a file has to be to be surely faster. Of files timed in
#: turn there, the ratios that several processes saw lay up to 1.3 apart (`benchmarks.deploy`)
BUSY = 1.3


def fastest(variants: Sequence[Variant]) -> Choice:
    """The fastest variant inside the bound; the float one unless another is faster by more than
    both spreads, because what cannot be told apart is not worth an approximation; where the machine
    was busy by BUSY and by twice the spreads.
    """
    plain = variants[0]
    best, why = plain, []
    for variant in sorted(variants[1:], key=lambda v: v.timing.median_ms):
        ratio = plain.timing.median_ms / variant.timing.median_ms
        told = f"{variant.name}: x{ratio:.2f} of {plain.name}'s speed"
        gain = plain.timing.median_ms - variant.timing.median_ms
        doubt = (plain.timing.spread_ms + variant.timing.spread_ms) / 2
        if not variant.spent <= 1:
            told += f", but spends {variant.spent:.2f} of the accuracy bound"
        elif (plain.timing.noisy or variant.timing.noisy) and (ratio < BUSY or gain <= 2 * doubt):
            told += ", but the machine was busy: such a figure decides nothing"
        elif gain <= doubt:
            told += ", which is not faster beyond the spread" if ratio >= 1 else ", slower"
        elif best is plain:
            best = variant
            told += f", {variant.spent:.2f} of the bound: taken"
        else:
            told += f", inside the bound, slower than {best.name}"
        why.append(told)
    if best is plain:
        why.append(f"{plain.name} is kept")
    return Choice(best.name, tuple(why))
