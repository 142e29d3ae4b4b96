"""Part `step` of the supernet benchmark: what a sandwich step costs beside its networks alone.

Ours: one `nas.supernet.train` step of four networks. The sum: one such step of each of the four,
built alone. Set-active: the same resnet space written the usual way, the sizes being attributes of
the layers that somebody sets before each forward pass. All take turns in one process, in a new
random order each round, so that the machine's mood cancels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import contract
from nas import space, supernet
from nas.data.augment import augment
from nas.elastic import Network, channels_last
from nas.recipe import Recipe
from nas.search_spaces import resnet
from nas.space import SearchSpace
from nas.tasks import Split, Task

#: space, pixels, images per step
SETTINGS = (("resnet", 16, 128), ("resnet", 32, 128), ("mobilenet", 32, 64))
LIMIT = 1.10
Turns = dict[str, Iterator[Any]]


def run(outcome: contract.Outcome, *, quick: bool) -> None:
    settings = (("resnet", 16, 32),) if quick else SETTINGS
    rows = []
    for name, size, batch in settings:
        seconds = measured(name, size, batch, rounds=5 if quick else 25)
        four = sum(np.median(seconds[f"alone{at}"]) for at in range(4))
        ratio = float(np.median(seconds["sandwich"]) / four)
        low, high = np.percentile(seconds["sandwich"], (25, 75)) / four
        active = float(np.median(seconds["set_active"]) / four) if "set_active" in seconds else None
        shown = f"{active:.3f}" if active else "not written"
        rows.append([name, size, batch, float(four), ratio, f"{low:.3f} to {high:.3f}", shown])
        label = f"step_{name}_{size}px"
        outcome.figures[f"{label}_ratio"] = ratio
        outcome.aim(label, f"sandwich <= {LIMIT} of the four alone", ratio, ratio <= LIMIT)
        if active:
            outcome.figures[f"{label}_set_active_ratio"] = active
    header = ["space", "px", "batch", "four alone s", "ours", "quartiles", "set-active"]
    print(contract.table(header, rows))


def measured(name: str, size: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every turn, the first two rounds left out."""
    found, task = space.load(name, size=size), noise(size)
    recipe = Recipe(steps=10**6, batch=batch)
    rows = found.sample(np.random.default_rng(0), 2)
    archs = [found.decode(row) for row in (found.largest, found.smallest, *rows)]
    turns: Turns = {"sandwich": supernet.train(built(found, archs[0]), _four(archs), task, recipe)}
    for at, arch in enumerate(archs):
        net = built(found, arch)
        turns[f"alone{at}"] = supernet.train(net, supernet.alone(net), task, recipe)
    if name == "resnet":
        turns["set_active"] = set_active_steps(archs, task, recipe)
    seconds: dict[str, list[float]] = {turn: [] for turn in turns}
    rng = np.random.default_rng(1)
    for number in range(rounds + 2):
        for turn in rng.permutation(list(turns)).tolist():
            began = time.perf_counter()
            next(turns[turn])
            if number >= 2:
                seconds[turn].append(time.perf_counter() - began)
    return seconds


def _four(archs: list[Any]) -> Callable[[int], list[Any]]:
    return lambda step: archs


def built(found: SearchSpace, arch: Any) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return channels_last(found.build(arch))


def noise(size: int) -> Task:
    """Images of noise: what a step costs does not depend on what is to be seen."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2048, 3, size, size), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(2048) % 10)
    classes = tuple(str(label) for label in range(10))
    return Task("noise", classes, split, split, split, flip=True, pad=size // 8)


# ---- the same space, set active ------------------------------------------------------------------


class ActiveConv(nn.Conv2d):
    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(c_in, c_out, kernel, stride, kernel // 2, bias=False)
        self.active = c_out

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight[: self.active, : x.shape[1]].contiguous()
        return F.conv2d(x, weight, None, self.stride, self.padding)


class ActiveNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        assert self.running_mean is not None and self.running_var is not None
        mean, var = self.running_mean[:c], self.running_var[:c]
        return F.batch_norm(x, mean, var, self.weight[:c], self.bias[:c], True, 0.1, self.eps)


class ActiveBlock(nn.Module):
    def __init__(self, c_in: int, width: int, mid: int, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.conv1, self.norm1 = ActiveConv(c_in, mid, 3, 2 if first else 1), ActiveNorm(mid)
        self.conv2, self.norm2 = ActiveConv(mid, width, 3), ActiveNorm(width)
        nn.init.zeros_(self.norm2.weight)
        if first:
            self.shortcut, self.shortcut_norm = ActiveConv(c_in, width, 1), ActiveNorm(width)

    def set_active(self, width: int, mid: int) -> None:
        self.conv1.active, self.conv2.active = mid, width
        if self.first:
            self.shortcut.active = width

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.first:
            x = self.shortcut_norm(self.shortcut(F.avg_pool2d(x, 2)))
        return F.relu(x + y)


class ActiveResNet(nn.Module):
    def __init__(self, arch: resnet.Arch) -> None:
        super().__init__()
        self.stem, self.stem_norm = ActiveConv(3, arch.stem, 3), ActiveNorm(arch.stem)
        self.stages, c = nn.ModuleList(), arch.stem
        for width, mids in zip(arch.widths, arch.mids, strict=True):
            blocks = nn.ModuleList()
            for b, mid in enumerate(mids):
                blocks.append(ActiveBlock(c, width, mid, first=b == 0))
                c = width
            self.stages.append(blocks)
        self.head = nn.Linear(c, 10)
        self.depths = [len(mids) for mids in arch.mids]

    def set_active(self, arch: resnet.Arch) -> None:
        self.depths = [len(mids) for mids in arch.mids]
        for stage, width, mids in zip(self.stages, arch.widths, arch.mids, strict=True):
            for block, mid in zip(stage.children(), mids, strict=False):
                assert isinstance(block, ActiveBlock)
                block.set_active(width, mid)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        for stage, depth in zip(self.stages, self.depths, strict=True):
            for block in list(stage.children())[:depth]:
                x = block(x)
        x = x.mean((2, 3))
        return F.linear(x, self.head.weight[:, : x.shape[1]].contiguous(), self.head.bias)


def set_active_steps(archs: list[Any], task: Task, recipe: Recipe) -> Iterator[None]:
    """The same data, losses and optimiser as ours, around `set_active`."""
    net = channels_last(ActiveResNet(archs[0])).train()
    optimiser = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    step = 0
    while True:
        at = supernet.batch_indices(len(task.train), recipe.batch, step, recipe.seed)
        generator = torch.Generator().manual_seed(step)
        images = augment(task.train.images[at], generator, flip=task.flip, pad=task.pad)
        x = task.normalise(images).contiguous(memory_format=torch.channels_last)
        target = None
        for arch in archs:
            net.set_active(arch)
            logits = net(x)
            if target is None:
                loss = F.cross_entropy(logits, task.train.labels[at], label_smoothing=0.1)
                target = logits.detach().softmax(1)
            else:
                loss = F.cross_entropy(logits, target)
            (loss / len(archs)).backward()
        nn.utils.clip_grad_norm_(net.parameters(), recipe.clip_norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        yield
