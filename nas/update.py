"""What every training does with a gradient: SGD with Nesterov momentum, clipping, the average of
the weights. Its state lives in the optimiser, which `nas.checkpoint` writes down."""

from __future__ import annotations

import torch
from torch import nn


def sgd(net: nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.Optimizer:
    """Decay pulls at matrices and filters, not at norms and biases."""
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim <= 1]
    return torch.optim.SGD(
        [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=lr,
        momentum=momentum,
        nesterov=True,
    )


def step(net: nn.Module, optimiser: torch.optim.Optimizer, rate: float, clip_norm: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate
    nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


@torch.no_grad()
def average(net: nn.Module, optimiser: torch.optim.Optimizer, decay: float, step: int) -> None:
    """Keep the moving average of the weights."""
    decay = min(decay, (1 + step) / (10 + step))  # else the start would weigh on short runs
    for parameter in net.parameters():
        kept = optimiser.state[parameter].setdefault("ema", parameter.detach().clone())
        kept.lerp_(parameter, 1 - decay)


@torch.no_grad()
def take_average(net: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Replace the weights by their average."""
    for parameter in net.parameters():
        parameter.copy_(optimiser.state[parameter]["ema"])
