"""A latency knapsack in the manner of HALP (NeurIPS 2022, arXiv 2110.10811): of every unit keep the
width such that the channels lost are worth least in all, while the milliseconds saved (or whatever
the cost counts) reach the target. Channels are worth their Taylor scores.

Savings come from a table of each unit alone at each of its widths, measured; they are taken to add
up, as HALP's do, which overstates them where units share layers. So the nominal saving is raised
until the network itself, costed as a whole, meets the target.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from compress import units, widths
from compress.baselines.taylor import taylor
from compress.job import Job, Settings, Steps
from compress.reach import Scores, Widths, reach
from compress.record import Record
from compress.units import Unit

BINS = 2000  # that the largest saving of all units together is divided into

Array = NDArray[np.float64]
Options = Mapping[int, tuple[float, float]]  # by width: (cost saved, worth lost)


def prune(job: Job, settings: Settings = Settings(), known: Record | None = None) -> Steps:
    found = units.find(job.net, job.example_inputs)
    scores = taylor(job, found.units)
    known = known or Record()
    options = {unit: _options(job, unit, scores, settings, known) for unit in scores}
    most = sum(max(saved for saved, _ in of.values()) for of in options.values())
    return reach(
        job, found, scores, lambda strength: knapsack(options, strength * most), settings, known
    )


def _options(job: Job, unit: Unit, scores: Scores, settings: Settings, known: Record) -> Options:
    offered = widths.offered(unit, settings)
    sessions = widths.alone(job, unit, offered, known)
    worth = scores[unit].sort().values.cumsum(0)  # of the first so many to go
    options = {unit.width: (0.0, 0.0)}
    for kept, saved in widths.rising(offered, sessions).items():
        options[kept] = (saved, float(worth[widths.gone(unit, kept) - 1]))
    return options


def knapsack(options: Mapping[Unit, Options], saving: float) -> Widths:
    """The widths of least worth lost that save at least `saving`, by dynamic programming over the
    saving in `BINS` steps, each unit's rounded down. The most that can be saved, if it is less."""
    top = sum(max(saved for saved, _ in of.values()) for of in options.values())
    if top <= 0:
        return {unit: unit.width for unit in options}
    need = int(np.ceil(min(saving, top) / top * BINS))
    least = np.full(need + 1, np.inf)  # worth lost, by the bins saved (the last: or more)
    least[0] = 0.0
    choices = []
    for of in options.values():
        new, choice = np.full(need + 1, np.inf), np.zeros(need + 1, int)
        origin = np.zeros(need + 1, int)
        for width, (saved, worth) in of.items():
            moved, source = _with(least, int(saved / top * BINS + 1e-9))
            better = moved + worth < new
            new[better] = moved[better] + worth
            choice[better], origin[better] = width, source[better]
        least = new
        choices.append((choice, origin))
    at = int(np.flatnonzero(np.isfinite(least))[-1])
    kept: dict[Unit, int] = {}
    for unit, (choice, origin) in zip(reversed([*options]), reversed(choices), strict=True):
        kept[unit], at = int(choice[at]), int(origin[at])
    return {unit: kept[unit] for unit in options}


def _with(least: Array, bins: int) -> tuple[Array, NDArray[np.int64]]:
    """`least` once so many more bins are saved, and the entry that each comes from."""
    last = len(least) - 1
    source = np.arange(len(least)) - bins
    tail = max(0, last - bins)  # from here on, whatever is saved is enough
    source[last] = tail + int(least[tail:].argmin())
    return np.where(source >= 0, least[np.maximum(source, 0)], np.inf), source
