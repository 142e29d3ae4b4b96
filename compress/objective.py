"""What pruning knows of a task: a name and a loss over cached batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

#: inputs as the network takes them, on its device, and whatever the losses take as targets
Batch = tuple[Tensor, Any]


@dataclass(frozen=True)
class Objective:
    """One task of a multi-task network. `loss(outputs, targets)` is a scalar, the mean over the
    batch; `outputs` is what the network returns, of all tasks."""

    name: str
    loss: Callable[[Any, Any], Tensor]
    #: the loss is never below this; what a partly measured loss is held to (-inf: nobody knows)
    least: float = 0.0
