"""What every pruning method takes and gives."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from compress import norms
from compress.cost import Cost
from compress.graph import Graph, Inputs
from compress.history import History
from compress.objective import Batch, Objective
from compress.reuse import Prefix
from compress.room import Room
from compress.units import LeftAlone
from nas.errors import BudgetInfeasible, NasctlError, UsageError
from nas.outputs import tensors

#: 0.05, 0.10, ..., 0.95
GRID = tuple(round(0.05 * step, 2) for step in range(1, 20))


@dataclass(frozen=True)
class Job:
    """A trained network, the training data held out to judge it on, and what it shall cost.

    Raises NasctlError for what no method can work with.
    """

    net: nn.Module
    example_inputs: Inputs  # of one forward call, as the target will make it
    objectives: Sequence[Objective]
    batches: Sequence[Batch]
    cost: Cost
    target: float  # in the cost's unit
    #: of the training images, as the network takes them, about `norms.IMAGES`: what batch norms'
    #: statistics are taken of. None: the first of `batches`
    calibration: Tensor | None = None

    def __post_init__(self) -> None:
        names = [objective.name for objective in self.objectives]
        if not names:
            raise UsageError("no tasks", where="objectives", allowed="one or more")
        if len(set(names)) < len(names):
            raise UsageError("two tasks have the same name", where="objectives")
        for objective in self.objectives:
            if not callable(objective.loss):
                raise UsageError(
                    "a task without loss",
                    where=f"task '{objective.name}'",
                    allowed="loss(outputs, targets) -> scalar",
                )
        if self.net.training:
            raise UsageError(
                "it is in training mode: measuring would change its statistics",
                where="model",
                next="Call net.eval() first.",
            )
        if not self.batches:
            raise NasctlError("no batches to measure losses on", where="batches")
        if norms.of(self.net) and len(self.images) < 2:
            raise UsageError(
                "one image: batch norms have no statistics of it",
                where="batches" if self.calibration is None else "calibration",
                allowed=f"two or more, as {norms.IMAGES}",
            )
        if not (math.isfinite(self.target) and self.target > 0):
            raise UsageError(f"{self.target} {self.cost.unit}", where="target", allowed="above 0")

    def graph(self) -> Graph:
        """Of a copy of the network."""
        return Graph(copy.deepcopy(self.net), self.example_inputs)

    @cached_property
    def images(self) -> Tensor:
        """What batch norms' statistics are taken of."""
        if self.calibration is not None:
            return self.calibration
        first = self.batches[0][0]
        alike = [inputs for inputs, _ in self.batches if inputs.shape[1:] == first.shape[1:]]
        return torch.cat(alike)[: norms.IMAGES]

    def renewed(self, net: nn.Module, prefix: Prefix | None = None) -> nn.Module:
        """`net` itself, its batch norms with statistics of `images`."""
        norms.renew(net, self.images, prefix)
        return net

    def inputs(self) -> str:
        """What a record's values depend on: weights, data and tasks."""
        digest = hashlib.sha256()
        held = [t for batch in self.batches for t in (*tensors(batch[0]), *tensors(batch[1]))]
        if self.calibration is not None and norms.of(self.net):
            held.append(self.calibration)
        for tensor in (*self.net.state_dict().values(), *held):
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        names = ", ".join(objective.name for objective in self.objectives)
        return f"{names}, sha256 {digest.hexdigest()[:16]}"


@dataclass(frozen=True)
class Settings:
    """PAGCP's parameters, by the paper's letters where it has them; baselines read `grid`,
    `divisor`, `seed` and `stale`."""

    #: D: what each task's loss may be multiplied by in one round. One factor for all, as published,
    #: one per task, or from what each task has to lose
    bound: float | Mapping[str, float] | Room = 6.0
    #: d0: the relative increase of a loss that the first unit may cause. None: 1.66 even shares of
    #: the whole, which is what the paper's 0.06 is for its 51 units and D = 6
    first: float | None = None
    keep: float = 0.8  # P: share of the units, the best by score, that are pruned
    grid: Sequence[float] = GRID  # ratios tried, ascending
    probe: float = 0.3  # ratio whose saving orders the units
    divisor: int = 8  # kept widths are multiples of it; `hw_profiles.alignment` measures it
    summed: bool = False  # one bound on the sum of the losses: an ablation
    one_shot: bool = False  # units measured on the dense network, not the pruned one: an ablation
    #: batch norms keep the unpruned network's statistics, as published: an ablation. Baselines read
    #: it too, for the network that they end in
    stale: bool = False
    #: what a unit leaves of its share of the bound is the next ones', where units are measured one
    #: on another; `loosened` sets it
    carried: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        named = {"every task": self.bound} if isinstance(self.bound, float | int) else self.bound
        for task, factor in named.items() if isinstance(named, Mapping) else ():
            if not 1 < factor < math.inf:
                raise UsageError(
                    f"a bound of {100 * (factor - 1):g} % leaves nothing to prune",
                    where=f"bound of {task}",
                    allowed="a factor above 1: 1.05 lets a loss grow by 5 %",
                )
        grid = list(self.grid)
        if not grid or sorted(set(grid)) != grid or not 0 < grid[0] <= grid[-1] < 1:
            raise UsageError(f"{grid}", where="grid", allowed="ratios from 0 to 1, ascending")
        if not 0 < self.keep <= 1:
            raise UsageError(f"{self.keep}", where="keep", allowed="above 0, up to 1")
        if self.divisor < 1:
            raise UsageError(f"{self.divisor}", where="divisor", allowed="a whole number from 1")

    def bounds(self, losses: Mapping[str, float]) -> dict[str, float]:
        """D of each task, of a network with these losses; raises UsageError where a mapping has
        other tasks."""
        if isinstance(self.bound, float | int):
            return dict.fromkeys(losses, self.bound)
        named = self.bound.shares if isinstance(self.bound, Room) else self.bound
        if set(losses) != set(named):
            raise UsageError(
                f"bounds for {', '.join(sorted(named))}",
                where="bound",
                allowed=f"one for each of {', '.join(losses)}",
            )
        return self.bound.bounds(losses) if isinstance(self.bound, Room) else dict(self.bound)

    def loosened(self) -> list[Settings]:
        """These, and those to go on with while a round misses its target: none where factors were
        given."""
        if not isinstance(self.bound, Room):
            return [self]
        first, *looser = self.bound.loosened()
        return [
            replace(self, bound=first),
            *(replace(self, bound=room, carried=True) for room in looser),
        ]


@dataclass(frozen=True)
class Row:
    """What became of one unit."""

    root: str
    width: int
    kept: int  # in the result
    accepted: int  # the least width that every task bore; what a baseline keeps
    losses: Mapping[str, float] = field(default_factory=dict)  # of the network with it accepted
    limits: Mapping[str, float] = field(default_factory=dict)  # that they were held to
    limiting: str = ""  # the task that refused the next smaller width; "" if there was none
    saved: float = 0.0  # cost, when it was accepted
    score: float = math.nan  # increase of the losses per cost saved
    round: int = 0


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned network, and all that rebuilds and explains it."""

    net: nn.Module
    history: History  # from `Job.net`; weights differ where a network was trained between rounds
    cost_before: float
    cost: float
    losses_before: Mapping[str, float]
    losses: Mapping[str, float]
    rows: tuple[Row, ...] = ()
    bounds: tuple[Mapping[str, float], ...] = ()  # D of each task, by round; none of a baseline
    left_alone: tuple[LeftAlone, ...] = ()

    def then(self, later: Pruned) -> Pruned:
        """This and a `later` pruning of what it left, as one."""
        return replace(
            later,
            history=self.history.then(*later.history.steps),
            cost_before=self.cost_before,
            losses_before=self.losses_before,
            rows=self.rows + later.rows,
            bounds=self.bounds + later.bounds,
        )

    def to_json(self) -> str:
        """All but the weights."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "net"}
        return json.dumps({**said, "history": self.history.to_json()}, default=asdict)

    @classmethod
    def from_json(cls, text: str, net: nn.Module, example_inputs: Inputs) -> Pruned:
        """What `to_json` said, of the unpruned `net`: with its weights, whatever was trained."""
        said = json.loads(text)
        history = History.from_json(said["history"])
        parts = {
            "net": history.replay(net, example_inputs),
            "history": history,
            "rows": tuple(Row(**row) for row in said["rows"]),
            "bounds": tuple(said["bounds"]),
            "left_alone": tuple(LeftAlone(**left) for left in said["left_alone"]),
        }
        return cls(**{**said, **parts})


class OutOfReach(BudgetInfeasible):
    """A method did not come to its target; `reached` is what it did come to."""

    def __init__(self, what: str, *, where: str, next: str = "", reached: Pruned) -> None:
        super().__init__(what, where=where, next=next)
        self.reached = reached


@dataclass(frozen=True)
class Progress:
    """Where a method stands."""

    doing: str
    done: float  # share, from 0 to 1
    seconds: float
    eta_s: float  # nan while nobody knows


Steps = Generator[Progress, None, Pruned]


def finish(steps: Steps) -> Pruned:
    """Run to the end, whoever listens."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
