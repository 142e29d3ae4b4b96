from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from deploy import text
from hw_profiles.runtimes import onnxruntime
from nas.errors import ParityFailed
from nas.search_spaces.bert import Arch, Bert, Frame


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.manual_seed(0)
    net = Bert(Arch((0, 2), 64, 2, 128), Frame(vocabulary=40, positions=24, head=32), 3)
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("text") / "model.onnx"
    text.export(net, path, metadata={"made": "here"})
    return net, path


def tokens(n, length, seed=0):
    found = torch.randint(1, 40, (n, length), generator=torch.Generator().manual_seed(seed))
    found[0, length // 2 :] = 0
    return found


@pytest.mark.parametrize(("n", "length"), [(1, 2), (5, 9), (2, 24)])
def test_the_file_takes_any_number_of_texts_and_tokens(made, n, length):
    net, path = made
    assert text.parity(path, net, tokens(n, length)) < 1e-5


def test_it_carries_its_properties_and_says_what_it_takes(made):
    _, path = made
    model = onnx.load(path)
    assert {prop.key: prop.value for prop in model.metadata_props} == {"made": "here"}
    session = onnxruntime.load(path)
    assert session.inputs == {"input": ("batch", "tokens")} and session.outputs == ("logits",)
    assert session.dtypes == {"input": "int64"}


def test_another_network_than_the_files_is_noticed(made):
    net, path = made
    torch.manual_seed(1)
    other = Bert(net.arch, net.frame, 3)
    with pytest.raises(ParityFailed, match="differ"):
        text.parity(path, other, tokens(3, 9))


def test_eight_bits_are_smaller_and_nearly_the_same(made, tmp_path):
    net, path = made
    text.quantized(path, tmp_path / "int8.onnx")
    assert "int8" in onnxruntime.observed_precision(onnxruntime.load(tmp_path / "int8.onnx"))
    x = tokens(64, 12)
    exact, rough = (
        onnxruntime.run(onnxruntime.load(file), {"input": x.numpy()})[0]
        for file in (path, tmp_path / "int8.onnx")
    )
    assert 0 < np.abs(exact - rough).max() < 0.2 * np.abs(exact).max()
    same = text.predictions(path, x.numpy()) == text.predictions(tmp_path / "int8.onnx", x.numpy())
    assert same.mean() > 0.9
    assert (text.predictions(path, x.numpy()) == net(x).argmax(1).numpy()).all()


def test_a_copy_of_fixed_length_is_what_is_timed(made, tmp_path):
    _, path = made
    text.of_length(path, 7, tmp_path / "fixed.onnx")
    assert onnxruntime.load(tmp_path / "fixed.onnx").inputs == {"input": (1, 7)}
    x = tokens(1, 7).numpy()
    (a,), (b,) = (
        onnxruntime.run(onnxruntime.load(f), {"input": x}) for f in (path, tmp_path / "fixed.onnx")
    )
    np.testing.assert_allclose(a, b, atol=1e-6)
