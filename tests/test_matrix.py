"""Every space at every stage of compression: the exported file computes what torch computes."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import pytest
import torch

from compress import quantize, units
from compress.history import History, Step
from compress.inherit import inherit
from compress.quantize import Scheme
from deploy import chain, text
from deploy import onnx as files
from hw_profiles.runtimes import onnxruntime
from nas import space as spaces
from nas.elastic import extract
from nas.outputs import named
from nas.search_spaces.bert import Arch, Bert, Frame
from tests.test_spaces import inputs, load, rows, single, supernet

#: in the default run; the others take minutes
FAST = ("resnet",)
slow = pytest.mark.slow


def extracted(name):
    space = load(name)
    arch = space.decode(rows(space, 1)[-1])
    with torch.no_grad():
        return extract(supernet(space).float(), space.build(arch)).eval()


def pruned(name):
    """Every unit without every third place."""
    net, example = extracted(name), examples(name, 2)
    found = units.find(net, example).units
    assert found, "nothing can be pruned"
    history = History()
    for unit in found:
        history = history.then(Step(unit.root, units.places(unit, range(0, unit.places, 3))))
    smaller = history.replay(net, example)
    sizes = [sum(p.numel() for p in of.parameters()) for of in (smaller, net)]
    assert sizes[0] < sizes[1]  # by how much is the network's: most of some can only go whole
    return smaller


def student(name):
    """Distilled students begin, and are built, as slices of their teacher."""
    torch.manual_seed(0)
    frame = Frame(vocabulary=50, positions=16, head=16)
    teacher = Bert(Arch((0, 1, 2, 3), 64, 4, 128), frame, 4)
    for parameter in teacher.parameters():
        parameter.data.normal_(0, 0.1)
    return inherit(Bert(Arch((0, 2), 32, 2, 64), frame, 4), teacher).eval()


STAGES = {"extracted": extracted, "pruned": pruned, "student": student}


def examples(name, n):
    space = load(name)
    return single(inputs(space, space.decode(rows(space, 1)[-1]), batch=n))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A space's network at a stage and its file, each made once."""
    folder = tmp_path_factory.mktemp("matrix")

    @functools.cache
    def make(name, stage):
        net, path = STAGES[stage](name), folder / f"{name}.{stage}.onnx"
        if load(name).reads == "text":
            text.export(net, path)
        else:
            files.export(net, path, input_shape=examples(name, 1).shape[1:])
        return net, path

    return make


def answers(path, given):
    session = onnxruntime.load(path)
    found = onnxruntime.run(session, {"input": given.numpy()})
    return dict(zip(session.outputs, found, strict=True))


CELLS = [
    pytest.param(name, stage, marks=() if name in FAST else slow)
    for name in spaces.names()
    for stage in STAGES
    if stage != "student" or name == "bert"
]


@pytest.mark.parametrize(("name", "stage"), CELLS)
@pytest.mark.parametrize("n", [1, 5])
def test_the_file_computes_what_torch_computes(made, name, stage, n):
    net, path = made(name, stage)
    given = examples(name, n)
    with torch.no_grad():
        expected = {key: t.numpy() for key, t in named(net(given)).items()}
    one = chain.link("torch = ONNX", "fp32", expected, answers(path, given))
    chain.require([one])
    if n > 1:  # of a network that answers the same to everything, many a file would be right
        for value in expected.values():
            apart = np.linalg.norm(value - value.mean(0)) / np.linalg.norm(value)
            assert apart > 10 * one.tolerance


@pytest.mark.parametrize(("name", "stage"), CELLS)
def test_the_quantized_file_stays_near_the_float_one(made, name, stage, tmp_path):
    path, given = made(name, stage)[1], examples(name, 16)
    model, scheme = quantize.prepared(onnx.load(path)), Scheme()
    ranges = quantize.calibrate(model, [{"input": given.numpy()}], scheme)
    files.write(quantize.int8(model, ranges, scheme), tmp_path / "int8.onnx")
    observed = onnxruntime.observed_precision(onnxruntime.load(tmp_path / "int8.onnx"))
    assert chain.coarsest(observed) == "int8"
    both = [answers(file, given) for file in (path, tmp_path / "int8.onnx")]
    one = chain.link("ONNX = INT8", "int8", *both)
    chain.require([one])
    assert one.error > 0
