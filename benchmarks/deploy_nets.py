"""The networks of `benchmarks.deploy`: random ones of a space, fitted a little, and their files.

Convolutions and layers are as initialised (norms calibrated), the last linear layer is fitted by
ridge regression to images, so that there is an accuracy to lose, though a low one. Spaces of text
get made-up token numbers with made-up labels: nothing can be learned of these, so what counts
there is how often a file answers other than the float network does.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from compress import quantize
from deploy import onnx as files
from deploy import text
from nas import scores, space
from nas.elastic import recalibrate, resize
from nas.search_spaces.bert import Bert
from nas.space import SearchSpace
from nas.tasks import Task

LARGEST = "largest"
SIZE = 32  # pixels, or tokens
FIT, HELD_OUT = 2000, 2000  # images
TEXTS = 400  # of each kind
QUICK = 100
CALIBRATE = 500  # for norms
RIDGE = 10.0
BATCH = 100


@dataclass(frozen=True)
class Examples:
    """Inputs [N, C, H, W] or token numbers [N, S], as the network takes them, and labels [N]."""

    fit: np.ndarray
    fit_labels: np.ndarray
    held: np.ndarray
    held_labels: np.ndarray

    def half(self, which: int) -> tuple[np.ndarray, np.ndarray]:
        """Of what was held out: half 0 guards, half 1 is told."""
        return self.held[which::2], self.held_labels[which::2]


@dataclass(frozen=True)
class Subject:
    """A network, its file and its data."""

    net: nn.Module
    exported: onnx.ModelProto  # of any batch size
    plain: onnx.ModelProto  # the same, prepared for quantization
    data: Examples

    @cached_property
    def answers(self) -> np.ndarray:
        """Of torch, of what was held out: logits [N, classes] in float32."""
        return through(self.net, self.data.held)

    def half(self, which: int) -> np.ndarray:
        """The answers to `data.half(which)`."""
        return self.answers[which::2]


def subject(name: str, at: int | str, task: Task, quick: bool) -> Subject:
    """The `at`-th random network of a space, or its LARGEST; the same whenever it is asked for."""
    found = space.load(name, channels=task.channels, classes=len(task.classes), size=SIZE)
    if isinstance(at, int):
        row, seed = found.sample(np.random.default_rng(0), at + 1)[at], at
    else:
        row, seed = found.largest, 0
    net = awake(scores.fresh(found, row, seed))
    if isinstance(net, Bert):
        data = texts(len(task.classes), net.frame.vocabulary, QUICK if quick else TEXTS)
    else:
        data = images(task, found.decode(row).resolution, quick)
        recalibrate(net, torch.from_numpy(data.fit[:CALIBRATE]).split(BATCH))
    fit(net.eval(), data)
    if isinstance(net, Bert):
        data = replace(data, held_labels=through(net, data.held).argmax(1))
    exported = file_of(net, found, data.held)
    return Subject(net, exported, quantize.prepared(exported), data)


def awake(net: nn.Module) -> nn.Module:
    """With values for the layers that begin at 0 for training: such a branch would cost nothing in
    any precision."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
    return net


def images(task: Task, resolution: int, quick: bool) -> Examples:
    """Normalised images of training and validation at a network's resolution."""

    def ready(split: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
        pictures = resize(task.normalise(split.images[:n]), resolution)
        return pictures.contiguous().numpy(), split.labels[:n].numpy()

    fit, held = (QUICK, QUICK) if quick else (FIT, HELD_OUT)
    return Examples(*ready(task.train, fit), *ready(task.val, held))


def texts(classes: int, vocabulary: int, n: int) -> Examples:
    """Token numbers above 0, which is padding, and labels that mean nothing."""
    rng = np.random.default_rng((0, 83))
    parts = [
        part
        for _ in ("fit", "held")
        for part in (rng.integers(1, vocabulary, (n, SIZE)), rng.integers(0, classes, n))
    ]
    return Examples(*parts)


def fit(net: nn.Module, data: Examples) -> None:
    """Fit the last linear layer, in place, to its inputs on the data that are for it."""
    last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[np.ndarray] = []
    hook = last.register_forward_pre_hook(lambda _, given: seen.append(given[0].numpy()))
    through(net, data.fit)
    hook.remove()
    x = np.concatenate(seen).astype(np.float64)
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    wanted = 2.0 * np.eye(last.out_features)[data.fit_labels] - 1
    scale = RIDGE * np.trace(x.T @ x) / len(x) / x.shape[1]
    fitted = np.linalg.solve(x.T @ x + scale * np.eye(x.shape[1]), x.T @ wanted)
    with torch.no_grad():
        last.weight.copy_(torch.from_numpy(fitted[:-1].T))
        last.bias.copy_(torch.from_numpy(fitted[-1]))


@torch.no_grad()
def through(net: nn.Module, x: np.ndarray) -> np.ndarray:
    """The network's logits."""
    return np.concatenate([net(part).numpy() for part in torch.from_numpy(x).split(BATCH)])


def file_of(net: nn.Module, found: SearchSpace, held: np.ndarray) -> onnx.ModelProto:
    """The network as `nasctl` exports it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        if isinstance(net, Bert):
            text.export(net, path)
        else:
            files.export(net, path, input_shape=held.shape[1:])
        return files.read(path)


def for_one(model: onnx.ModelProto, shape: tuple[int, ...]) -> onnx.ModelProto:
    """A copy for one input of that shape, which engines are built and timed with."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    del twin.graph.value_info[:]  # of any size
    for dim, size in zip(twin.graph.input[0].type.tensor_type.shape.dim, (1, *shape), strict=True):
        dim.dim_value = size
    twin.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    return twin
