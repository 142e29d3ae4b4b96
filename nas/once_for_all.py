"""Progressive shrinking: a supernet that starts from a trained largest network (Once-for-All, arXiv
1908.09791, section 3.3).

Kernels become elastic first, then depths, then widths; each phase starts from the weights of the
last one and every network learns from labels and from the largest network as it was before
shrinking. Before widths shrink, the channels inside each block are sorted by importance, so that a
prefix keeps the most important ones; small kernels get learned transforms of large ones.

Ours: phases of equal length; the teacher predicts in eval mode; resolutions are elastic from the
start; the widths of stages are elastic too (the paper's are fixed), unsorted, because residual sums
tie them to each other.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nas.elastic import DepthwiseConv2d, Middle, Network, Residual
from nas.recipe import Recipe
from nas.sampling import Archs
from nas.space import Genes, SearchSpace
from nas.supernet import Step, train
from nas.tasks import Task

#: kinds of genes in the order in which they are released, and how much of their range by then
PHASES = (("kernel", 1.0), ("depth", 0.5), ("depth", 1.0), ("width", 0.5), ("width", 1.0))
FREE = "resolution"  # elastic from the start


def shrink(
    net: Network,
    space: SearchSpace,
    task: Task,
    recipe: Recipe,
    teacher: Network,
    *,
    folder: Path | None = None,
) -> Generator[Step, None, None]:
    """Train `net`, a trained largest network of `space`, phase by phase; `recipe.steps` in all.

    `teacher` is that largest network extracted and re-calibrated, in eval mode. With `folder` each
    phase keeps its state there and the same call goes on where it was stopped.
    """
    add_kernel_transforms_(net)
    lowest = phases(space)
    plain = replace(recipe, dropout=0.0, drop_connect=0.0)  # nobody here learns from labels alone
    shares = np.diff(np.linspace(0, recipe.steps, len(lowest) + 1).astype(int)).tolist()
    before = 0
    for at, (floor, steps) in enumerate(zip(lowest, shares, strict=True)):
        last = lowest[at - 1] if at else space.largest
        if _widths_shrink(space, last, floor):
            sort_channels_(net, _served(space, last))
        own = replace(plain, steps=steps, start=f"{recipe.start} phase {at} of {len(lowest)}")
        resume = folder / f"shrink{at}.safetensors" if folder else None
        archs = released(space, own, floor, at)
        run = train(net, archs, task, own, teacher=teacher, resume=resume)
        with closing(run):
            for step in run:
                yield replace(step, step=before + step.step, steps=recipe.steps)
        before += steps


def phases(space: SearchSpace) -> list[Genes]:
    """The lowest option of each gene [G] that a phase may use; each phase allows more than the last
    one. A kind of gene that the space lacks has no phase."""
    floor = np.array([0 if _kind(g.name) == FREE else len(g.options) - 1 for g in space.genes])
    found: list[Genes] = []
    for kind, share in PHASES:
        before = floor.copy()
        for at, gene in enumerate(space.genes):
            if _kind(gene.name) == kind:
                floor[at] = math.ceil((len(gene.options) - 1) * (1 - share))
        if (floor != before).any():
            found.append(floor.copy())
    return found


def _kind(name: str) -> str:
    """Of a gene by the last part of its name; whatever is no kernel, depth or resolution is a
    width."""
    last = name.rpartition(".")[2]
    return last if last in ("kernel", "depth", FREE) else "width"


def _widths_shrink(space: SearchSpace, before: Genes, after: Genes) -> bool:
    widths = np.array([_kind(gene.name) == "width" for gene in space.genes])
    return bool((before != after)[widths].any())


def _served(space: SearchSpace, floor: Genes) -> list[Network]:
    """Networks of full depth with every width from the floor up."""
    widths = np.array([_kind(gene.name) == "width" for gene in space.genes])
    levels = np.arange(space.sizes.max())[:, None]
    rows = np.where(widths, np.clip(levels, floor, space.largest), space.largest)
    return [space.build(space.decode(row)) for row in np.unique(space.canonical(rows), axis=0)]


def released(space: SearchSpace, recipe: Recipe, floor: Genes, phase: int) -> Archs:
    """The networks of a step: 2 + `recipe.n_random` uniform ones of what the phase allows."""

    def archs(step: int) -> list[Any]:
        rng = np.random.default_rng((recipe.seed, 6, phase, step))
        rows = rng.integers(floor, space.sizes, (2 + recipe.n_random, len(floor)))
        return [space.decode(row) for row in space.canonical(rows)]

    return archs


def add_kernel_transforms_(net: nn.Module) -> None:
    """Give every depthwise layer an identity for each smaller kernel: nothing changes until these
    are trained. `extract` applies them."""
    for layer in net.modules():
        if isinstance(layer, DepthwiseConv2d) and not layer.transforms:
            for size in range(layer.kernel_size[0] - 2, 2, -2):
                matrix = torch.eye(size * size, device=layer.weight.device)
                layer.transforms[str(size)] = nn.Parameter(matrix.to(layer.weight.dtype))


@torch.no_grad()
def sort_channels_(net: nn.Module, served: Sequence[nn.Module] = ()) -> None:
    """Reorder the channels inside every block by falling importance: the sum of |weights| that read
    them. The function of `net` stays the same.

    `served` are smaller networks that already work: channels move only within the bands between
    their widths, so that each still gets the same set of channels.
    """
    blocks = [_blocks(other) for other in served]
    for name, block in _blocks(net).items():
        theirs = [other[name].middles() for other in blocks if name in other]
        for at, middle in enumerate(block.middles()):
            _sort(middle, {_channels(middles[at]) for middles in theirs})


def _blocks(net: nn.Module) -> dict[str, Residual]:
    return {name: block for name, block in net.named_modules() if isinstance(block, Residual)}


def _channels(middle: Middle) -> int:
    return middle.reader.shape[1]


def _sort(middle: Middle, edges: Iterable[int]) -> None:
    importance = middle.reader.abs().transpose(0, 1).flatten(1).sum(1)
    band = torch.zeros(len(importance), dtype=torch.long, device=importance.device)
    for edge in edges:
        band[edge:] += 1
    by_importance = importance.argsort(descending=True, stable=True)
    order = by_importance[band[by_importance].argsort(stable=True)]
    for tensor, dim in middle.tensors:
        tensor.copy_(tensor.index_select(dim, order))
