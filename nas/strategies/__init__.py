"""Search strategies: one file per method, found by its name.

A file gives one function, `propose(problem, generation, history) -> rows [n, G]`: the networks to
evaluate next, at most `nas.search.GENERATION` (or the file's own `GENERATION`: 1 where every answer
counts for the next question), new and inside every budget. It is a function of its arguments
(randomness from `problem.seed` and `generation`), never of what it did before.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from nas import differentiable
from nas.data import module
from nas.errors import NasctlError, unknown
from nas.search import GENERATION, Problem, Propose
from nas.space import Genes


def names() -> list[str]:
    """Every shipped strategy, by file name."""
    folder = Path(__file__).parent
    return sorted(
        path.stem.replace("_", "-") for path in folder.glob("*.py") if path.stem[0] != "_"
    )


def load(name: str) -> Propose:
    """The `propose` of strategy `name`: a file here, or the user's own `my_pkg.my_mod`."""
    if "." not in name and name not in names() and not learns(name):
        known = [*names(), *differentiable.names()]
        raise unknown("strategy", name, known, where="--strategy")
    propose: Propose = module.attribute(f"{_module(name)}:propose", "--strategy")
    if not callable(propose):
        raise NasctlError(
            f"{name}.propose is no function",
            where="--strategy",
            next="See docs/methods/strategies.md.",
        )
    return propose


def learns(name: str) -> bool:
    """Does strategy `name` train the weights itself, with a distribution to propose from?"""
    return name in differentiable.names()


def generation(name: str) -> int:
    """How many networks strategy `name` proposes at once, at most."""
    load(name)
    return int(getattr(importlib.import_module(_module(name)), "GENERATION", GENERATION))


def drawn(name: str, problem: Problem) -> Genes | None:
    """The rows [N, G] whose `features` strategy `name` will ask for; None if it asks for none."""
    load(name)
    found = getattr(importlib.import_module(_module(name)), "drawn", None)
    return None if found is None else found(problem)


def pool_size(name: str) -> int:
    """How many rows `drawn` has at most; 0 for a strategy without it."""
    module_ = importlib.import_module(_module(name))
    return int(module_.POOL) if hasattr(module_, "drawn") else 0


def _module(name: str) -> str:
    if learns(name):
        return f"nas.differentiable.{name}"
    return name if "." in name else f"nas.strategies.{name.replace('-', '_')}"
