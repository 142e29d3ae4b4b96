"""A small bundle of a network that tells the digits apart a little, and its data."""

from __future__ import annotations

import functools

import numpy as np
from onnx import ModelProto, numpy_helper

from cli import bundling
from deploy import onnx as files
from deploy.interface import of_task
from hw_profiles import device
from hw_profiles.graph import onnx_graph
from hw_profiles.op import Tape
from nas import tasks


@functools.cache
def digits():
    return tasks.load("digits")


def network(c=16) -> ModelProto:
    """Random convolutions under a linear layer that is fitted to the training images."""
    from hw_profiles.runtimes import onnxruntime

    tape = Tape(1, 8)
    x = tape.conv(tape.input, c, kernel=3, bias=True, act="relu")
    x = tape.conv(x, 2 * c, kernel=3, stride=2, bias=True, act="relu")
    tape.linear(tape.gap(tape.conv(x, 4 * c, kernel=3, stride=2, bias=True, act="relu")), 10)
    model = onnx_graph(tape.ops, batch=None)
    model.graph.output[0].name = model.graph.node[-1].output[0] = "logits"
    (last,) = (t for t in model.graph.initializer if list(t.dims) == [10, 4 * c])
    (bias,) = (t for t in model.graph.initializer if list(t.dims) == [10])
    task = digits()
    images = task.normalise(task.train.images).numpy()
    twin = onnx_graph(tape.ops[:-1], batch=None).SerializeToString()
    (seen,) = onnxruntime.run(onnxruntime.load(twin), {"input": images})
    seen = np.concatenate([seen.reshape(len(images), -1), np.ones((len(images), 1))], 1)
    wanted = 2.0 * np.eye(10)[task.train.labels.numpy()] - 1
    weights = np.linalg.solve(seen.T @ seen + 1e-3 * np.eye(seen.shape[1]), seen.T @ wanted)
    last.CopyFrom(numpy_helper.from_array(weights[:-1].T.astype(np.float32), last.name))
    bias.CopyFrom(numpy_helper.from_array(weights[-1].astype(np.float32), bias.name))
    return model


def small(folder, c=16, *, sizes=("batch", 1, 8, 8), data=True):
    """A sealed bundle; its file's input has those sizes, and it may be as exported without data."""
    model = network(c)
    first = (model.graph.output[0].type.tensor_type.shape.dim[0], sizes[0])
    taken = model.graph.input[0].type.tensor_type.shape.dim
    for dim, size in (first, *zip(taken, sizes, strict=True)):
        setattr(dim, "dim_param" if isinstance(size, str) else "dim_value", size)
    files.write(model, folder / bundling.FLOAT)
    task = digits()
    interface = of_task(task, "digits", None, 8)
    sample = bundling.sample(interface, task.train.images)
    contents = bundling.Contents(
        interface if data else None,
        {"none": 0},
        {"of": "a test"},
        sample,
        device.load("cpu"),
    )
    return bundling.seal(folder, contents)
