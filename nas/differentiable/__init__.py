"""Searches that learn a distribution over operators while they train the weights: one file each.

`gumbel` is FBNet's, `proxyless` and `reinforce` are the two of ProxylessNAS. A file gives three
functions: `weights(turn)` leaves a loss's gradient in the supernet's weights, `architecture(turn)`
moves the distribution, both on the images of one step; and `propose`, which draws from the learned
distribution what the search will judge. `learning` takes them in turn.

Imports without torch; the files do not.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nas.differentiable.learning import Method

NOT_METHODS = {"__init__", "learning", "policy", "proposals"}  # the other files of this folder


def names() -> list[str]:
    """Every shipped method, by file name."""
    return sorted({path.stem for path in Path(__file__).parent.glob("*.py")} - NOT_METHODS)


def load(name: str) -> Method:
    """The file of method `name`, one of `names()`."""
    found: Any = importlib.import_module(f"nas.differentiable.{name}")
    return found
