"""Hard budgets: as people type them, as limits of a search, and what to say when none fits."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cli import console
from nas.errors import BudgetInfeasible, UsageError

if TYPE_CHECKING:
    from cli.stages import Job
    from hw_profiles.latency import LatencyTable
    from nas.run import Spec
    from nas.search import Limit, Problem
    from nas.space import Genes


@dataclass(frozen=True)
class Quantity:
    """What is counted, its units (in lower case; the first is counted in) and how to type it."""

    what: str
    units: Mapping[str, float]
    allowed: str


MACS = Quantity(
    "a number of MACs",
    {"macs": 1, "kmacs": 1e3, "mmacs": 1e6, "gmacs": 1e9},
    "a number with kMACs, MMACs or GMACs, as in 200MMACs",
)
PARAMS = Quantity(
    "a number of parameters",
    {"params": 1, "kparams": 1e3, "mparams": 1e6},
    "a number with params, kparams or Mparams, as in 2Mparams",
)
MEMORY = Quantity(
    "an amount of memory",
    {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30},
    "a number with kB, MB, GB, KiB, MiB or GiB, as in 8MB",
)
#: the unit that a budget is counted in, as people type it
TYPED = {"macs": "MACs", "params": "params", "memory": "B"}


def parse(text: str | None, quantity: Quantity, where: str) -> float | None:
    """'200MMACs', '2Mparams' or '8MB' as a count; a bare number is refused."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    if not match or match[2] not in quantity.units:
        bare = match is not None and not match[2]
        what = f"'{text}' has no unit" if bare else f"'{text}' is not {quantity.what}"
        raise UsageError(what, where=where, allowed=quantity.allowed)
    value = float(match[1]) * quantity.units[match[2]]
    if value <= 0:
        raise UsageError("a budget must be above zero", where=where)
    return value


def show(name: str, value: float) -> str:
    """A budget or a cost in the unit that reads best."""
    if name == "latency":
        return console.format_ms(value)
    scales = {1e9: "G", 1e6: "M", 1e3: "k"}
    scale = next((scale for scale in scales if value >= scale), 1.0)
    return f"{value / scale:.4g} {scales.get(scale, '')}{TYPED[name]}"


def stated(spec: Spec) -> dict[str, float] | None:
    """The budgets that were asked for, by the report's names; None without any."""
    asked = {
        "latency_ms": spec.latency_ms,
        "macs": spec.macs,
        "params": spec.params,
        "activation_bytes": spec.memory_bytes,
    }
    return {name: most for name, most in asked.items() if most is not None} or None


def goal(budget: Mapping[str, float] | None) -> str:
    """The budgets of a report on one line."""
    if not budget:
        return "no budget: the front's knee"
    names = {"latency_ms": "latency", "activation_bytes": "memory"}
    return "budget " + ", ".join(show(names.get(k, k), most) for k, most in budget.items())


def limits(job: Job) -> tuple[Limit, ...]:
    """The budgets besides latency, as costs of whole arrays of networks."""
    from nas.search import Limit

    spec, space, itemsize = job.spec, job.space, job.device.itemsize

    def column(at: int) -> Any:
        return lambda genes: space.costs(genes)[:, at]

    def memory(genes: Genes) -> Any:
        return space.peak_elements(genes) * itemsize

    asked = (
        ("macs", spec.macs, column(0)),
        ("params", spec.params, column(1)),
        ("memory", spec.memory_bytes, memory),
    )
    return tuple(Limit(name, most, cost) for name, most, cost in asked if most is not None)


def check(job: Job, table: LatencyTable, problem: Problem) -> None:
    """Raises BudgetInfeasible, naming the best network found, if no network fits."""
    from nas import search

    for limit in problem.budgets:
        best = search.least(problem, limit.cost)
        needs = float(limit.cost(best[None])[0])
        if needs > limit.most:
            raise _infeasible(job, table, problem, limit, best)
    if len(problem.budgets) < 2:
        return
    nearest = problem.nearest
    costs = {b.name: float(b.cost(nearest[None])[0]) for b in problem.budgets}
    if any(costs[limit.name] > limit.most for limit in problem.budgets):
        asked = ", ".join(show(limit.name, limit.most) for limit in problem.budgets)
        needs = ", ".join(show(name, value) for name, value in costs.items())
        raise BudgetInfeasible(
            f"no network of the space '{job.spec.space}' was found inside {asked} together: the "
            f"nearest has {needs}, {job.space.decode(nearest)}",
            where=", ".join(f"--{limit.name}" for limit in problem.budgets),
            next="Each fits alone: raise one of them.",
        )


def _infeasible(
    job: Job, table: LatencyTable, problem: Problem, limit: Limit, best: Genes
) -> BudgetInfeasible:
    space, needs = job.spec.space, float(limit.cost(best[None])[0])
    arch, where = job.space.decode(best), f"--{limit.name}"
    smaller = "or a smaller --width or --size"
    if limit.name == "latency":
        value = float(problem.latency(best[None])[0][0])
        return BudgetInfeasible(
            f"no network of the space '{space}' fits {limit.most:g} ms on {job.device.name}: the "
            f"fastest found needs {show('latency', needs)} (upper end; estimate "
            f"{show('latency', value)}, {table.source}), {arch}",
            where=where,
            next=f"Ask for {math.ceil(needs * 1e4) / 1e4:g}ms, {smaller}.",
        )
    return BudgetInfeasible(
        f"no network of the space '{space}' fits {show(limit.name, limit.most)}: the smallest "
        f"found needs {show(limit.name, needs)}, {arch}",
        where=where,
        next=f"Ask for {math.ceil(needs)}{TYPED[limit.name]}, {smaller}.",
    )
