"""PAGCP: performance-aware global channel pruning (T-PAMI 2023, arXiv 2303.11923).

Units are visited one after another on the network as pruned so far. Inside a unit the filters of
least norm go first; how many is decided by measuring every task's loss with ever more of them gone,
until one task's loss grows by more than the unit's share of what is permitted. Afterwards the units
that cost the tasks most per saving are put back.

Written from the paper's algorithm. Where the published code differs from it or from what it is
for, docs/methods/pagcp.md says what is done here, and what is an extension (bounds per task,
statistics of batch norms, latency, reaching a target exactly).
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from compress import losses, norms, units, widths
from compress.easing import bargains, worst_first
from compress.graph import Graph
from compress.history import History, Step
from compress.job import Job, OutOfReach, Progress, Pruned, Row, Settings, Steps
from compress.objective import Objective
from compress.record import Record
from compress.reuse import Prefix
from compress.schedule import Schedule
from compress.tally import Tally
from compress.units import Unit
from nas.errors import NasctlError

Recover = Callable[[nn.Module, int], nn.Module]  # (pruned network, round) -> the same, trained


def prune(
    job: Job,
    settings: Settings = Settings(),
    record: Path | None = None,
    *,
    rounds: int = 1,
    recover: Recover | None = None,
) -> Steps:
    """PAGCP in `rounds` rounds of equal shares of the way, with `recover` (fine-tuning) between.

    Yields Progress. With `record` every measurement is a line of a file (of each round), and the
    same call goes on from there. Bounds hold for a round, against the network that it begins with;
    where they end a round early, the next one makes up for it. Bounds from a `Room` are loosened
    first, as far as the round's own target needs and the tasks' ceilings let.
    Raises OutOfReach, naming the task that limits, where the target is not met in the end.
    """
    result = None
    for number in range(rounds):
        known = Record(record and record.with_stem(f"{record.stem}-{number}"), job.inputs())
        whole = result.cost_before if result else Tally(job, known).of(job.net)
        share = min(1.0, job.target / whole) ** ((number + 1) / rounds)
        last = number + 1 == rounds
        asked = job if last or share == 1 else replace(job, target=whole * share)
        found = yield from _bounded(asked, settings, known)
        found = replace(found, rows=tuple(replace(row, round=number) for row in found.rows))
        result = result.then(found) if result else found
        if last and result.cost <= job.target:
            return result
        if not last:
            job = replace(job, net=recover(found.net, number) if recover else found.net)
    assert result is not None, "rounds is at least 1"
    raise _infeasible(job, settings, result)


def one_round(job: Job, settings: Settings = Settings(), record: Path | None = None) -> Steps:
    """One round, whether it meets the target or not."""
    return (yield from _bounded(job, settings, Record(record, job.inputs())))


def _bounded(job: Job, settings: Settings, known: Record) -> Steps:
    """A round by the bounds that were asked for; where its target is not met within them, by the
    first looser ones that meet it."""
    every = settings.loosened()
    for these in every:
        run = _Round(job, these, known)
        yield from run.scan()
        found = run.chosen()
        limited = any(row.limiting for row in found.rows)
        if found.cost <= job.target or not limited:  # looser ones would change nothing
            break
    return found


@dataclass(frozen=True)
class _Visit:
    """What was measured of a unit."""

    unit: Unit
    order: Sequence[int]
    #: by accepted width, widest first: the share of its whole bound that the task which suffers
    #: most has used up for it
    grown: Mapping[int, float]
    row: Row

    @property
    def least(self) -> int:
        return min(self.grown, default=self.unit.width)


@dataclass
class _Round:
    """The state of one round: what is pruned so far, and what the tasks' losses are held to."""

    job: Job
    settings: Settings
    known: Record
    history: History = History()
    visits: list[_Visit] = field(default_factory=list)

    def __post_init__(self) -> None:
        job, settings = self.job, self.settings
        self.tally = Tally(job, self.known)
        self.cost_before = self.tally.of(job.net)
        self.renews = bool(norms.of(job.net)) and not settings.stale
        #: the unpruned network, as it and all that comes of it are measured
        self.whole = self._renewed(copy.deepcopy(job.net))
        self.losses_before = self._losses(History(), self.whole, job.objectives)
        _check_positive(self.losses_before)
        self.permitted = settings.bounds(self.losses_before)
        self.judged: Sequence[Objective] = job.objectives
        self.before, self.bounds = self.losses_before, self.permitted
        if settings.summed:
            self.judged = [summed(job.objectives)]
            self.before = self._losses(History(), self.whole, self.judged)
            self.bounds = {"sum": _of_the_sum(self.permitted, self.losses_before)}
        self.found = units.find(job.net, job.example_inputs)
        stairs = {u: widths.stairs(job, u, settings, self.known) for u in self.found.units}
        self.stairs = {unit: stair for unit, stair in stairs.items() if stair.widths}
        if not self.stairs:
            raise _nothing(self.found, settings)
        self.schedule = Schedule(self.bounds, settings.first, len(self.stairs))
        self.net = self.whole
        self.base = dict(self.before)
        self.at = dict(self.before)  # losses of `net`

    def scan(self) -> Generator[Progress, None, None]:
        """Visit every unit, in the order of what it saves."""
        began = time.perf_counter()
        sign = 1 if self.schedule.ascending else -1
        order = sorted(self.stairs, key=lambda unit: sign * self.stairs[unit].gain)
        for number, unit in enumerate(order):
            spent = time.perf_counter() - began
            eta = spent / number * (len(order) - number) if number else math.nan
            yield Progress(f"pruning {unit.root}", number / len(order), spent, eta)
            self.visits.append(self._visit(unit))
        yield Progress("choosing units", 1.0, time.perf_counter() - began, math.nan)

    def _visit(self, unit: Unit) -> _Visit:
        net, history = self.net, self.history
        if self.settings.one_shot:
            net, history = self.whole, History()
        members = Graph(copy.deepcopy(net), self.job.example_inputs).members(unit.root)
        order = widths.weakest_first(widths.by_place(widths.magnitude(members, unit.width), unit))
        limits = self._limits()
        prefixes = Prefix(unit.members), Prefix(unit.members)
        grown: dict[int, float] = {}
        limiting = ""
        last: Mapping[str, float] = self.at
        for kept in self.stairs[unit].widths:
            step = widths.step(unit, order, kept)
            found = self._trial(net, history.then(step), limits, prefixes)
            if found.over:
                limiting = found.over
                break
            grown[kept] = max(
                math.log(max(1.0, found.values[task] / base)) / math.log(self.bounds[task])
                for task, base in self.base.items()
            )
            last = found.values
        row = Row(unit.root, unit.width, unit.width, unit.width, last, limits, limiting)
        if grown:
            row = self._accept(unit, widths.step(unit, order, min(grown)), row)
        return _Visit(unit, order, grown, row)

    def _limits(self) -> dict[str, float]:
        """What the losses are held to in the unit that comes next."""
        if self.settings.carried and not self.settings.one_shot:
            # all that the units so far had among them, whatever they and those refused left of it
            shares = [self.schedule.thresholds(n) for n in range(len(self.visits) + 1)]
            return {
                task: loss * math.prod(1 + share[task] for share in shares)
                for task, loss in self.before.items()
            }
        accepted = sum(bool(visit.grown) for visit in self.visits)
        thresholds = self.schedule.thresholds(accepted)
        return {task: loss * (1 + thresholds[task]) for task, loss in self.base.items()}

    def _trial(
        self,
        net: nn.Module,
        history: History,
        limits: Mapping[str, float],
        prefixes: tuple[Prefix, Prefix],
    ) -> losses.Losses:
        """Of `net`, whose statistics are those of its own weights: both prefixes need that."""
        job, step = self.job, history.steps[-1]
        of_images, of_batches = prefixes

        def measured() -> list[object]:
            trial = self._renewed(History((step,)).replay(net, job.example_inputs), of_images)
            with of_batches.on(trial):
                found = losses.measure(trial, self.judged, job.batches, limits)
            return [found.values, found.over]

        key = _digest(f"{history.to_json()} {sorted(limits.items())}")
        return losses.Losses(*self.known.of(f"losses {key}{self._renewal}", measured))

    def _renewed(self, net: nn.Module, prefix: Prefix | None = None) -> nn.Module:
        return self.job.renewed(net, prefix) if self.renews else net

    @property
    def _renewal(self) -> str:
        """What a record's keys say of it."""
        return " with renewed statistics" if self.renews else ""

    def _accept(self, unit: Unit, step: Step, row: Row) -> Row:
        """Keep the widest step that every task bore, and say what it was worth."""
        before = self.net
        self.net = self._renewed(History((step,)).replay(before, self.job.example_inputs))
        self.history = self.history.then(step)
        saved = self.tally.saved(before, self.net)
        grown = sum(
            (row.losses[task] - self.at[task]) / self.before[task] / math.log(bound)
            for task, bound in self.bounds.items()
        )
        if not self.settings.one_shot:
            self.at = dict(row.losses)
            self.base = {t: max(loss, row.losses[t]) for t, loss in self.base.items()}
        accepted = unit.width - len(step.indices)
        score = grown / saved if saved > 0 else math.inf
        return replace(row, accepted=accepted, saved=saved, score=score)

    # ---- which of the accepted steps are kept --------------------------------------------------

    def chosen(self) -> Pruned:
        """The network that is kept: the best units by score, as far down as the target asks."""
        # an infinite score, of units that saved nothing where they were taken, is the last resort
        pruned = sorted((v for v in self.visits if v.grown), key=lambda visit: visit.row.score)
        least = math.ceil(self.settings.keep * sum(v.row.score < math.inf for v in pruned))
        stops: dict[Unit, int] = {}
        for n in range(least, len(pruned) + 1):
            stops = {visit.unit: visit.least for visit in pruned[:n]}
            if self._at(stops) <= self.job.target:
                stops = self._eased(pruned[:n])
                if self.tally.confirmed(self._applied(stops)[1]) <= self.job.target:
                    break
        result = self._result(*self._applied(stops))
        if self.settings.summed or self.settings.one_shot or not self._over(result):
            return result
        # others than were measured together: what was is within the bounds
        return self._result(*self._applied({visit.unit: visit.least for visit in self.visits}))

    def _over(self, result: Pruned) -> bool:
        return any(
            not loss <= self.permitted[task] * result.losses_before[task]
            for task, loss in result.losses.items()
        )

    def _eased(self, visits: Sequence[_Visit]) -> dict[Unit, int]:
        """Prune no further than the target asks: the worst bargains are undone, as many as the
        target lets; then those that fit into what is left."""
        stairs = {visit.unit: self.stairs[visit.unit].savings for visit in visits}
        undone = worst_first(b for v in visits for b in bargains(v.unit, v.grown, stairs[v.unit]))

        def stops(n: int) -> dict[Unit, int]:
            least = {visit.unit: visit.least for visit in visits}
            return least | {bargain.unit: bargain.wide for bargain in undone[:n]}

        low, high = 0, len(undone)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if self._at(stops(middle)) <= self.job.target else (low, middle - 1)
            )
        found = stops(low)
        for bargain in undone[low:]:
            saved = {bargain.unit.width: 0.0, **stairs[bargain.unit]}
            now = found[bargain.unit]
            slack = self.job.target - self._at(found)
            for width in [w for w in saved if now < w <= bargain.wide]:  # widest first
                wider = found | {bargain.unit: width}
                if saved[now] - saved[width] <= slack and self._at(wider) <= self.job.target:
                    found = wider
                    break
        while low and self.tally.confirmed(self._applied(found)[1]) > self.job.target:
            low -= 1
            found = stops(low)
        return found

    def _at(self, stops: Mapping[Unit, int]) -> float:
        """The cost with units at these widths, as sure as it has to be against the target."""
        named = {unit.root: width for unit, width in stops.items()}
        key = f"{self.job.cost.unit} at {named} against {self.job.target}"

        def taken() -> float:
            return self.tally.against(self._applied(stops)[1], self.job.target)

        return float(self.known.of(key, taken))

    def _applied(self, stops: Mapping[Unit, int]) -> tuple[History, nn.Module]:
        """The accepted steps down to these widths, in the order they were taken, on the unpruned
        network; units that are not named stay whole."""
        steps = [
            widths.step(visit.unit, visit.order, stops[visit.unit])
            for visit in self.visits
            if stops.get(visit.unit, visit.unit.width) < visit.unit.width
        ]
        history = History(tuple(steps))
        return history, history.replay(self.job.net, self.job.example_inputs)

    def _result(self, history: History, net: nn.Module) -> Pruned:
        went = {step.root: len(step.indices) for step in history.steps}
        rows = tuple(
            replace(visit.row, kept=visit.row.width - went.get(visit.unit.root, 0))
            for visit in self.visits
        )
        return Pruned(
            net=self._renewed(net),
            history=history,
            cost_before=self.cost_before,
            cost=self.tally.confirmed(net),
            losses_before=self.losses_before,
            losses=self._losses(history, net, self.job.objectives),
            rows=rows,
            bounds=(self.permitted,),
            left_alone=self.found.left_alone,
        )

    def _losses(
        self, history: History, net: nn.Module, objectives: Sequence[Objective]
    ) -> dict[str, float]:
        names = ", ".join(objective.name for objective in objectives)
        key = f"{names} of {_digest(history.to_json())}{self._renewal}"
        return dict(
            self.known.of(key, lambda: losses.measure(net, objectives, self.job.batches).values)
        )


def summed(objectives: Sequence[Objective]) -> Objective:
    """One objective, the plain sum: what pruning by a training loss looks at."""

    def loss(outputs: object, targets: object) -> torch.Tensor:
        return torch.stack([o.loss(outputs, targets) for o in objectives]).sum()

    return Objective("sum", loss, sum(o.least for o in objectives))


def _of_the_sum(bounds: Mapping[str, float], before: Mapping[str, float]) -> float:
    """What the sum of the losses may be multiplied by: as if each task grew to its own bound."""
    whole = sum(before.values())
    return sum(bounds[task] * (loss / whole) for task, loss in before.items())


def _check_positive(before: Mapping[str, float]) -> None:
    for task, loss in before.items():
        if loss <= 0:
            raise NasctlError(
                f"a loss of {loss:g} before pruning: no relative bound on its growth is possible",
                where=f"task '{task}'",
                allowed="a loss above 0",
            )


def _nothing(found: units.Found, settings: Settings) -> NasctlError:
    reasons = [f"{left.root}: {left.reason}" for left in found.left_alone]
    reasons += [f"{u.root}: {u.width // u.parts} channels of a part" for u in found.units]
    return NasctlError(
        f"nothing can be pruned to multiples of {settings.divisor} channels "
        f"({'; '.join(reasons[:3])})",
        where="model",
    )


def _infeasible(job: Job, settings: Settings, result: Pruned) -> OutOfReach:
    limits = Counter(row.limiting for row in result.rows if row.limiting)
    task, times = limits.most_common(1)[0] if limits else ("no task", 0)
    return OutOfReach(
        f"{result.cost:.4g} {job.cost.unit} of {result.cost_before:.4g} is as far as it goes "
        f"within the bounds; {task} limits ({times} of {len(result.rows)} units)",
        where=f"target {job.target:.4g} {job.cost.unit}",
        next="Permit larger drops, more rounds with fine-tuning, or a smaller divisor than "
        f"{settings.divisor}.",
        reached=result,
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
