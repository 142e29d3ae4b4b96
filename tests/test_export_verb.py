"""`nasctl export` of users' own networks: a sealed bundle, with data and without."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnx
import pytest

from cli import bundling, exporting
from deploy import bundle as bundles
from hw_profiles.runtimes import onnxruntime, random_feeds
from nas.errors import UsageError
from tests.test_prune_verb import MODULE

MORE = """
from nets import Words


def words():
    return Words()


def filters():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 4, 3))
"""


@pytest.fixture
def mine(workdir, monkeypatch):
    monkeypatch.syspath_prepend(str(workdir))
    (workdir / "mine.py").write_text(MODULE + MORE)
    sys.modules.pop("mine", None)


def exported(nasctl, *arguments):
    outcome = nasctl("export", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


@pytest.mark.slow
@pytest.mark.usefixtures("mine", "stated")
def test_a_network_with_its_data_becomes_a_bundle_that_other_verbs_take(nasctl, workdir):
    words = ("mine:build", "--data", "mine:task", "--out", "b", "--licence", "Apache-2.0")
    assert exported(nasctl, *words)["parity"] < 1e-5
    found = bundles.read(workdir / "b")
    assert found.manifest.licence == "Apache-2.0"
    properties = {p.key: p.value for p in onnx.load(found.model).metadata_props}
    assert properties["licence"] == "Apache-2.0" and properties["model"] == "mine:build"
    assert set(json.loads(properties["validation"])) == {"quadrant", "where"}
    assert bundling.interface_of(found).goals == ("quadrant", "where")
    assert bundling.sample_of(found)["input"].shape == (64, 1, 8, 8)
    verified = nasctl("verify", "b", "--data", "mine:task", "--json")
    assert verified.code == 0, verified.err
    assert set(json.loads(verified.out)["metric"]) == {"quadrant", "where"}
    limits = ("--max-drop", "50%", "--images", "32", "--hw", "jetson")
    quantized = nasctl("quantize", "b", "--data", "mine:task", *limits, "--json")
    assert quantized.code == 0, quantized.err
    assert bundles.read(workdir / "b").manifest.licence == "Apache-2.0"


@pytest.mark.usefixtures("mine", "stated")
def test_without_data_it_is_verified_but_neither_quantized_nor_judged(nasctl, workdir):
    sizes = ("--input", "photo:batch,3,height=12,width=10")
    exported(nasctl, "mine:filters", *sizes, "--licence", "Apache-2.0", "--out", "b")
    assert bundles.read(workdir / "b").manifest.licence == "Apache-2.0"
    session = onnxruntime.load(workdir / "b/model.onnx")
    assert session.inputs == {"photo": ("batch", 3, "height", "width")}
    assert session.sizes == {"height": 12, "width": 10}
    shape = random_feeds(session, np.random.default_rng(0))["photo"].shape
    assert shape == (1, 3, 12, 10)  # a call of 1 x 1 pixels would fail
    verified = nasctl("verify", "b", "--json")
    assert verified.code == 0, verified.err
    assert any("exported without data" in note for note in json.loads(verified.out)["not_measured"])
    refused = nasctl("quantize", "b")
    assert refused.code == 1 and len(refused.err.strip().splitlines()) == 1
    assert "Export it again with --data" in refused.err
    again = nasctl("export", "mine:filters", "--input", "x:batch,3,12,12", "--out", "b")
    assert again.code == 2 and "exists already" in again.err


@pytest.mark.slow
@pytest.mark.usefixtures("mine")
def test_several_inputs_keep_names_types_and_their_common_free_size(nasctl, workdir):
    inputs = ("--input", "ids:batch,length=7:int64", "--input", "mask:batch,length=7")
    content = exported(nasctl, "mine:words", *inputs, "--out", "b")
    assert content["inputs"] == {"ids": ["batch", "length"], "mask": ["batch", "length"]}
    session = onnxruntime.load(workdir / "b/model.onnx")
    assert session.inputs == {"ids": ("batch", "length"), "mask": ("batch", "length")}
    line = nasctl("build", "b", "--commands").out
    assert "--optShapes=ids:1x7,mask:1x7" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("mine:build", "--data or --input: nobody says what goes into the network"),
        ("mine:build --size 8 --input x:batch,1,8,8", "--size: is about data"),
        ("mine:build --input x:batch,2,8,8", "mine:build: it does not run on those inputs"),
        ("mine:number --input x:batch,1,8,8", "mine:number: gave a int"),
        ("mine:absent --input x:batch,1,8,8", "module 'mine' has no 'absent'"),
        ("mine:build --data mine:task --input x:batch,1,9,9", "one input of 1,8,8, float32"),
        ("mine:build --data mine:task --latency 2ms", "--latency: is about a run's networks"),
        ("mine:build --input x:batch,1,8,8 --hw nowhere", "unknown device 'nowhere'"),
        ("run --slot 1 --licence MIT", "--licence: is for a model of your own"),
    ],
)
@pytest.mark.usefixtures("mine")
def test_what_cannot_be_exported_is_one_line_and_no_folder(nasctl, workdir, words, said):
    outcome = nasctl("export", *words.split(), "--out", "b")
    assert outcome.code in (1, 2) and said in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1 and not (workdir / "b").exists()


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["x"], "NAME:batch,3,64,64"),
        (["x:batch,0,3"], "NAME:batch,3,64,64"),
        (["x:3,64"], "does not begin with the batch"),
        (["x:batch,height"], "'height' needs a size to try it with"),
        (["x:batch,3:float16"], "type 'float16'"),
        (["x:batch,3", "x:batch,3"], "the same name"),
        (["x:batch,3", "y:1,3"], "the batch is free for some"),
        (["x:batch,n=3", "y:batch,n=4"], "'n' is 3 and 4"),
    ],
)
def test_inputs_are_checked_as_they_were_typed(texts, said):
    with pytest.raises(UsageError, match=said):
        exporting.parse_inputs(texts)


@pytest.mark.parametrize("text", ["", " ", "two\nlines", "x" * 501])
def test_a_licence_is_one_line(nasctl, text):
    refused = nasctl("prune", "mine:build", "--target", "macs=-50%", "--licence", text)
    assert refused.code == 2 and "--licence" in refused.err
