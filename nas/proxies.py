"""Training-free proxies by name: the files in `nas/predictors/` that give `score(net, batch)`.

Imports without torch; `load` does not.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from nas.data import module
from nas.errors import NasctlError, unknown

if TYPE_CHECKING:
    from nas.passes import Value

#: sizes, not guesses: what every other proxy is held against
BASELINES = ("macs", "params")


@cache
def names() -> tuple[str, ...]:
    """Every shipped proxy, by file name; learned predictors give `fit` and are not among them."""
    folder = Path(__file__).parent / "predictors"
    files = (path for path in sorted(folder.glob("*.py")) if path.stem[0] != "_")
    return tuple(path.stem for path in files if "\ndef score(" in path.read_text())


def summary(name: str) -> str:
    """The first sentence of a shipped proxy's file."""
    path = Path(__file__).parent / "predictors" / f"{name}.py"
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(doc.split("\n\n")[0].split())


def check(chosen: Iterable[str]) -> None:
    """Raises UsageError for a name that is neither shipped nor a module's."""
    for name in chosen:
        if "." not in name and name not in names():
            raise unknown("proxy", name, names(), where="--proxies")


def load(name: str) -> Value:
    """The formula of proxy `name`: a file here, or `my_pkg.my_mod` with `score(net, batch)`, and
    with `value(seen)` if it is to share passes with others."""
    check([name])
    module_name = name if "." in name else f"nas.predictors.{name}"
    score = module.attribute(f"{module_name}:score", "--proxies")
    if not callable(score):
        raise NasctlError(
            f"{name}.score is no function", where="--proxies", next="See docs/methods/proxies.md."
        )
    value: Value | None = getattr(sys.modules[module_name], "value", None)
    return value or (lambda seen: score(seen.net, seen.batch))
