"""What many tests share: one torch thread, a learnable task of seconds, the CLI in this process."""

from __future__ import annotations

import functools
import gc
import io
from dataclasses import dataclass

import pytest
import sshd
import torch
from onnx import load_from_string

from cli import main
from deploy import onnx
from hw_profiles.protocol import Timing
from nas.outputs import named
from nas.tasks import Split, Task


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-equality needs a fixed number of threads; `nasctl search` sets its own."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def only_new_objects_may_be_garbage():
    """A full collection, with which every measurement begins, searches all objects: half a second
    where as much is loaded as here."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def translations_read_once():
    """torch's exporter reads the source of all its translations again for every file, a quarter
    of what a small network's takes. Put in place by the first export, because it loads a lot."""
    with pytest.MonkeyPatch.context() as patch:

        def traced(*arguments):
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            patch.undo()
            read = functools.cache(ONNXRegistry.from_torchlib)
            patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(read))
            return onnx._trace(*arguments)

        patch.setattr(onnx, "_trace", traced)
        yield


def drafted(net, examples, free, opset):
    """In place of `deploy.onnx._trace`: a file of the same inputs and outputs by torch's older
    exporter, in a tenth of the seconds."""
    inputs, content = tuple(examples.values()), io.BytesIO()
    with onnx._eval_mode(net), onnx._quiet(), torch.no_grad():
        outputs = list(named(net(*inputs)))
        batch = {name: {0: axes[0]} for axes in free.values() for name in outputs if 0 in axes}
        torch.onnx.export(
            net,
            inputs,
            content,
            dynamo=False,
            opset_version=opset,
            input_names=list(examples),
            output_names=outputs,
            dynamic_axes={**free, **batch},
        )
    return load_from_string(content.getvalue())


@pytest.fixture(scope="module")
def drafts():
    """For verbs whose tests are about something else than the file: it is drafted. The exporter
    that users get has tests of its own, and `nasctl search`, `prune` and `export` with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "_trace", drafted)
        yield


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A current folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny_split(n, seed, channels=1):
    """8 x 8 noise in which the class's quadrant is brighter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    images = torch.randint(0, 160, (n, channels, 8, 8), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[:, row : row + 4, column : column + 4] += 90
    order = torch.randperm(n, generator=generator)
    return Split(images.to(torch.uint8)[order], labels[order])


@pytest.fixture(scope="session")
def tiny():
    """Four classes, 200 training images."""
    return Task(
        "tiny", ("a", "b", "c", "d"), tiny_split(200, 0), tiny_split(64, 1), tiny_split(64, 2)
    )


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def nasctl(capsys, workdir):
    """`nasctl(*arguments)` in this process and in a folder of its own."""

    def run(*arguments):
        capsys.readouterr()
        code = main.run([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture
def stated(monkeypatch):
    """Figures instead of measurements, which take seconds: 50 us and 3 MB."""
    timing = Timing(0.05, 0.001, 0.06, 0.06, 0.07, 9)
    monkeypatch.setattr("deploy.verify.latency", lambda *_, **__: timing)
    monkeypatch.setattr("cli.verifying.memory", lambda *_: 3_000_000)


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """A machine to log in to: `tests/sshd.py`."""
    with sshd.board(tmp_path_factory.mktemp("sshd")) as board:
        yield board


@pytest.fixture
def nothing_left(board):
    """Tests of boards leave no folder there."""
    yield
    assert board.found == []
