"""deploy.onnx: a file that is right, whole, quiet and says nothing of the machine it came from."""

import errno
import logging
import os
import warnings

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from deploy import verify
from deploy.onnx import export
from hw_profiles.runtimes import onnxruntime
from nas import file
from nas.errors import NasctlError, ParityFailed


class Net(nn.Module):
    """Each thing that exports badly when it does: norms, depthwise, residual, dropout."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = nn.functional.hardswish(self.norm(self.stem(x)))
        x = torch.relu(self.norm2(self.depthwise(x)) + x)
        return self.head(self.drop(x.mean((2, 3))))


def make_net(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Net()
        for norm in (net.norm, net.norm2):  # as after training: nothing is one or zero
            for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                tensor.uniform_(0.5, 2.0)
    return net


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(network, file, model), exported once from a network in training mode."""
    net, path = make_net().train(), tmp_path_factory.mktemp("export") / "model.onnx"
    net.norm2.eval()
    export(net, path, input_shape=(3, 8, 8), metadata={"space": "resnet", "arch": '{"w": 8}'})
    return net, path, onnx.load(path)


def test_the_file_computes_what_the_network_computes(exported):
    net, path, _ = exported
    images = np.random.default_rng(0).standard_normal((32, 3, 8, 8)).astype(np.float32)
    assert verify.parity(net, path, images) < 1e-5


def test_modes_of_the_modules_are_restored(exported):
    net, _, _ = exported
    assert net.training and net.drop.training and not net.norm2.training


def test_norms_are_folded_and_nothing_is_sliced_or_dropped(exported):
    kinds = {node.op_type for node in exported[2].graph.node}
    assert "Conv" in kinds
    assert not kinds & {"BatchNormalization", "Slice", "Dropout", "Identity"}


def test_names_batch_opset_and_metadata(exported):
    _, path, model = exported
    session = onnxruntime.load(path)
    assert session.inputs == {"input": ("batch", 3, 8, 8)}
    assert session.outputs == ("logits",)
    assert model.opset_import[0].version == 18
    assert {p.key: p.value for p in model.metadata_props} == {"space": "resnet", "arch": '{"w": 8}'}


def test_weights_are_inside_the_one_file(exported):
    assert [p.name for p in exported[1].parent.iterdir()] == ["model.onnx"]


def test_no_path_of_this_machine_is_in_the_file(exported):
    data = exported[1].read_bytes()
    assert b".py" not in data
    assert b"stack_trace" not in data


def test_exporting_again_gives_the_same_bytes_and_says_nothing(exported, tmp_path, capfd, caplog):
    _, path, _ = exported
    again = tmp_path / "again.onnx"
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        export(make_net(), again, input_shape=(3, 8, 8), metadata={"space": "resnet"})
    one, two = onnx.load(path), onnx.load(again)
    one.ClearField("metadata_props"), two.ClearField("metadata_props")
    assert one.SerializeToString(deterministic=True) == two.SerializeToString(deterministic=True)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_what_cannot_be_exported_is_one_clear_line_and_no_file(tmp_path, capfd):
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(NasctlError, match="cannot export Branches") as caught:
        export(Branches(), tmp_path / "model.onnx", input_shape=(3, 8, 8))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


class Tasks(nn.Module):
    """Three outputs in a mapping, not in the order of their names, one of them nested."""

    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        x = self.trunk(x).relu()
        return {"seg": self.b(x), "box": self.a(x), "more": (x.mean((2, 3)),)}


def test_outputs_of_several_tasks_keep_their_names(tmp_path):
    net, path = Tasks().eval(), tmp_path / "model.onnx"
    export(net, path, input_shape=(3, 8, 8))
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    assert verify.parity(net, path, images) < 1e-5
    found = verify.outputs(path, images, batch=3)
    assert {name: value.shape[:2] for name, value in found.items()} == {
        "seg": (5, 5),
        "box": (5, 2),
        "more.output_0": (5, 4),
    }
    net.a.weight.data[0] += 0.1
    with pytest.raises(ParityFailed, match=r"box: file and network differ"):
        verify.parity(net, path, images)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "plain").write_text("a file where a folder should be")
    for path in (tmp_path / "plain" / "model.onnx", tmp_path / "plain" / "deep" / "model.onnx"):
        with pytest.raises(NasctlError, match="cannot write: .*the folder must exist") as caught:
            file.write(path, b"data")
        assert str(path) in str(caught.value)


def test_a_full_disk_leaves_the_old_file_and_no_half_one(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    file.write(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NasctlError, match="No space left on device"):
        file.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_record_names_size_and_digest(tmp_path):
    path = tmp_path / "model.onnx"
    file.write(path, b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert file.record(path) == {"path": "model.onnx", "sha256": known, "bytes": 3}
    with pytest.raises(NasctlError, match="cannot read"):
        file.record(tmp_path / "absent")
