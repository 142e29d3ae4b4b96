"""Part `memory` of the benchmark of distributions: what one step of each method holds at its peak.

Each measurement is a process of its own: how far its resident memory rises above what it held with
network and images loaded. Beside it the bytes that autograd kept for the backward pass, which do
not depend on the allocator. `one path` is a training step of a single network of the supernet.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import contract
from nas import space
from nas.differentiable import gumbel, proxyless, reinforce
from nas.differentiable.learning import Goal, Searched, Turn, path_weights
from nas.differentiable.policy import free

STEPS: dict[str, Callable[[Turn], object]] = {
    "one path": path_weights,
    "gumbel: weights": gumbel.weights,
    "gumbel: distribution": gumbel.architecture,
    "proxyless: distribution": proxyless.architecture,
    "reinforce: distribution": reinforce.architecture,
}
QUICK = ("one path", "proxyless: distribution")
MOST = 1.5  # of one path's saved bytes, for a method that promises the memory of one path
MB = 2**20


def run(outcome: contract.Outcome, *, quick: bool) -> None:
    """Proxyless and REINFORCE train weights by `one path`."""
    size, width, batch = (8, 0.5, 32) if quick else (32, 1.0, 64)
    spawned = multiprocessing.get_context("spawn")
    rows, saved = [], {}
    for name in QUICK if quick else STEPS:
        with spawned.Pool(1) as pool:
            saved[name], rose = pool.apply(measured, (name, size, width, batch))
        share = saved[name] / saved["one path"]
        rows.append([name, saved[name] / MB, share, rose / MB])
        outcome.figures |= {f"saved MB: {name}": saved[name] / MB, f"peak MB: {name}": rose / MB}
    print(f"FBNet at {size} px, width {width:g}, {batch} images, fp32")
    print(contract.table(["step of", "saved MB", "of one path", "resident MB above"], rows))
    worst = saved["proxyless: distribution"] / saved["one path"]
    aim = f"proxyless keeps <= {MOST} of one path"
    outcome.aim("memory_of_one_path", aim, worst, worst <= MOST)


def measured(name: str, size: int, width: float, batch: int) -> tuple[int, int]:
    """(bytes saved for the backward pass, bytes by which resident memory rose, weights' gradients
    included) of one step."""
    torch.set_num_threads(1)
    turn = _turn(size, width, batch)
    before = psutil.Process().memory_info().rss
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        STEPS[name](turn)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return sum(storages.values()), max(0, peak - before)


def _turn(size: int, width: float, batch: int) -> Turn:
    """Latencies count for nothing here, and every operator is as likely."""
    found = space.load("fbnet", size=size, width=width)
    torch.manual_seed(0)
    whole = Searched(found.supernet().train(), found)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator)
    labels = torch.arange(batch) % found.classes  # type: ignore[attr-defined]
    goal = Goal(free(found), 1.0)
    return Turn(
        whole.net,
        whole.policy,
        found,
        goal,
        images,
        lambda logits: F.cross_entropy(logits, labels),
        0.5,
        generator,
    )
