"""hw_profiles.ingest on small files in the formats of the tools."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hw_profiles import device as devices
from hw_profiles import ingest
from hw_profiles.ingest import Kernel
from hw_profiles.latency import Interval, LatencyTable, Terms
from hw_profiles.op import Op
from nas.errors import NasctlError

ROW32 = "Thirty-two wide channel vectorized row major Int8 format"


def saved(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# ---- nn-Meter ------------------------------------------------------------------------------------


def kernel_file(latency: object = "42.001 +- 1.0", **changes) -> dict[str, object]:
    config = {"HW": 14, "CIN": 98, "COUT": 120, "KERNEL_SIZE": 3, "STRIDES": 1} | changes
    entry = {"model": "m", "shapes": [[14, 14, 98]], "config": config, "latency": latency}
    return {"conv-bn-relu": {"id_0": entry}}


def test_nn_meter_kernels_need_their_unit(tmp_path):
    path = saved(tmp_path, "k.json", kernel_file())
    kernels = ingest.nn_meter(path, unit="us")
    op = Op("conv", 98, 120, 14, 14, 3, act="relu", norm=True)
    assert kernels.found == (Kernel("conv-bn-relu id_0", op, pytest.approx(0.042001), 1),)
    with pytest.raises(NasctlError, match="unknown unit 's'; allowed: ms, us"):
        ingest.nn_meter(path, unit="s")


def test_every_kind_that_has_an_op(tmp_path):
    sizes = {"HW": 14, "CIN": 32, "COUT": 48, "KERNEL_SIZE": 3, "STRIDES": 2, "POOL_STRIDES": 2}
    kinds = ("dwconv-relu6", "maxpool", "fc", "global-avgpool", "add", "hswish", "channelshuffle")
    content = {kind: {"a": {"config": sizes, "latency": "1.0 +- 0.1"}} for kind in kinds}
    kernels = ingest.nn_meter(saved(tmp_path, "k.json", content), unit="ms")
    assert [kernel.op for kernel in kernels.found] == [
        Op("dwconv", 32, 32, 14, 14, 3, 2, 32, "relu"),
        Op("maxpool", 32, 32, 14, 14, 3, 2),
        Op("linear", 32, 48, 1, 1, bias=True),
        Op("gap", 32, 32, 14, 14),
        Op("add", 32, 32, 14, 14),
        Op("act", 32, 32, 14, 14, act="hswish"),
    ]
    assert [layer.why for layer in kernels.skipped] == ["channelshuffle is not translated"]


def test_dimensions_may_be_in_the_file_beside_it(tmp_path):
    configs = saved(tmp_path, "c.json", kernel_file())
    path = saved(tmp_path, "k.json", {"conv-bn-relu": {"id_0": {"latency": "1.5 +- 0.2"}}})
    assert ingest.nn_meter(path, unit="ms", configs=configs).found[0].ms == 1.5
    with pytest.raises(NasctlError, match="DETAIL"):
        ingest.nn_meter(path, unit="ms")


def test_a_failed_run_is_not_a_time(tmp_path):
    content = kernel_file()
    content["conv-bn-relu"]["id_1"] = content["conv-bn-relu"]["id_0"] | {"latency": "0.0 +- 0.0"}
    kernels = ingest.nn_meter(saved(tmp_path, "k.json", content), unit="ms")
    assert [layer.why for layer in kernels.skipped] == ["was not measured"]


@pytest.mark.parametrize("text", ["-1.0 +- 0.1", "nan +- 0.1", "1.0", "1 ms +- 0.1", None, 4.2])
def test_a_latency_that_is_not_one_is_refused(text, tmp_path):
    with pytest.raises(NasctlError, match="conv-bn-relu id_0: latency is"):
        ingest.nn_meter(saved(tmp_path, "k.json", kernel_file(text)), unit="ms")


@pytest.mark.parametrize("value", [0, -3, 1.5, "14", None, True])
def test_a_size_that_is_not_one_is_refused(value, tmp_path):
    with pytest.raises(NasctlError, match="HW is .*positive integer"):
        ingest.nn_meter(saved(tmp_path, "k.json", kernel_file(HW=value)), unit="ms")


# ---- our own tables ------------------------------------------------------------------------------


def table(**changes) -> LatencyTable:
    device = devices.load("jetson-tx2")
    fields = {
        "device": device.name,
        "runtime": device.runtime,
        "precision": device.precision,
        "origin": "a colleague's",
        "constant_ms": 1.0,
        "fitted_on": ("mine",),
        "terms": {"conv": Terms(ms_per_gmac=10.0)},
        "intervals": dict.fromkeys(
            ("same", "cross", "analytic"), Interval(low=0.9, high=1.1, n=9, how="")
        ),
    }
    return LatencyTable(**(fields | changes))


def test_a_table_of_the_same_setting_is_taken(tmp_path):
    path = tmp_path / "t.json"
    table().save(path)
    mark = ingest.fingerprint(table())
    assert ingest.own(path, devices.load("jetson-tx2"), sha256=mark.upper()) == table()
    path.write_text(json.dumps(json.loads(path.read_text())))  # laid out anew, not changed
    assert ingest.fingerprint(LatencyTable.load(path)) == mark


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "raspi4"}, "device raspi4, not jetson-tx2"),
        ({"runtime": "onnxruntime"}, "runtime onnxruntime"),
        ({"precision": "int8"}, "precision int8"),
        ({"batch": 8}, "batch 8, not 1"),
        ({"constant_ms": 0.5}, "its fingerprint is"),
    ],
)
def test_a_table_of_another_setting_or_content_is_refused(change, message, tmp_path):
    table(**change).save(tmp_path / "t.json")
    mark = ingest.fingerprint(table())
    with pytest.raises(NasctlError, match=message):
        ingest.own(tmp_path / "t.json", devices.load("jetson-tx2"), sha256=mark)


def test_a_table_is_checked_with_a_few_measured_networks():
    ops = [Op("conv", 16, 16, 32, 32, 3)]
    said = table().estimate(ops, "mine").value_ms
    assert ingest.revalidate(table(), [(ops, said * 1.05)] * 9 + [(ops, said * 1.2)], "mine") == 0.9
    with pytest.raises(NasctlError, match="0 of 3 networks .* take 1.50 times"):
        ingest.revalidate(table(), [(ops, said * 1.5)] * 3, "mine")
    with pytest.raises(NasctlError, match="no network"):
        ingest.revalidate(table(), [], "mine")


def test_one_network_outside_is_no_proof():
    """A true 90 % interval misses one of ten."""
    ops = [Op("conv", 16, 16, 32, 32, 3)]
    said = table().estimate(ops, "mine").value_ms
    assert ingest.revalidate(table(), [(ops, said * 2)], "mine") == 0.0


# ---- kernels as a table --------------------------------------------------------------------------


def timed_kernels(n=40):
    """Convolutions of a pretended GPU: 5 us and 1 us for every MMAC."""
    rng = np.random.default_rng(0)
    ops = []
    while len(ops) < n:
        c_in, c_out, size = (int(rng.choice(c)) for c in ((16, 32, 64), (16, 32, 64), (8, 16, 32)))
        ops.append(Op("conv", c_in, c_out, size, size, 3, act="relu", norm=True))
    found = [Kernel(f"k{at}", one, 5e-3 + one.macs * 1e-9, 1) for at, one in enumerate(ops)]
    return ingest.Kernels(tuple(found), ())


def test_kernels_make_a_table_of_measured_and_interpolated_operators(tmp_path):
    board = devices.load("jetson-orin-nano")
    kernels = timed_kernels()
    made = ingest.kernel_table(kernels, board, np.random.default_rng(0))
    made.save(tmp_path / "t.json")
    made = LatencyTable.load(tmp_path / "t.json")
    seen = kernels.found[0].op
    unseen = Op("conv", 48, 48, 16, 16, 3, act="relu", norm=True)
    other = Op("gap", 64, 64, 8, 8)
    measured, between, rest = (made.columns(one) for one in (seen, unseen, other))
    assert measured[0] == pytest.approx(5e-3 + seen.macs * 1e-9) and not measured[1:].any()
    assert between[2] == pytest.approx(5e-3 + unseen.macs * 1e-9, rel=0.2)
    assert not between[[0, 1, 3]].any()
    assert rest[3] > 0 and not rest[:3].any()  # as the datasheet says
    estimate = made.estimate([seen, unseen, other], "resnet")
    assert estimate.source == "analytic"
    assert set(estimate.shares) == {"measured", "interpolated", "analytic"}
    assert "kernels timed one by one" in made.origin


def test_a_table_does_not_care_who_carries_the_bias(tmp_path):
    made = ingest.kernel_table(
        timed_kernels(), devices.load("jetson-orin-nano"), np.random.default_rng(0)
    )
    seen = timed_kernels().found[0].op
    as_deployed = made.columns(seen.deployed())
    assert (made.columns(seen) == as_deployed).all()


def test_ingest_of_kernels(nasctl, workdir):
    sizes = [(c, size) for c in (8, 16, 24, 32) for size in (8, 16, 28, 32)]
    entries = {
        f"k{at}": {
            "config": {"HW": size, "CIN": c, "COUT": c, "KERNEL_SIZE": 3, "STRIDES": 1},
            "latency": f"{20 + c * c * size * size * 9e-6} +- 1",
        }
        for at, (c, size) in enumerate(sizes)
    }
    saved(
        workdir,
        "kernels.json",
        {"conv-bn-relu": entries, "hole": {"x": {"config": {"CIN": 1}, "latency": "1 +- 1"}}},
    )
    command = ("ingest", "kernels.json", "--hw", "jetson-orin-nano", "--format", "nn-meter")
    assert "ms, us" in nasctl(*command).err
    outcome = nasctl(*command, "--unit", "us", "--json")
    assert outcome.code == 0, outcome.err
    assert "16 understood" in outcome.err and "hole is not translated" in outcome.err
    made = LatencyTable.load(workdir / "profiles/jetson-orin-nano.table.json")
    assert len(made.measured) == len(sizes)
    assert made.provenance["ingested"] == "nn-meter file kernels.json"
    assert json.loads(outcome.out)["sha256"] == ingest.fingerprint(made)
    again = nasctl(*command, "--unit", "us")
    assert again.code == 2 and "--force" in again.err


def test_ingest_of_a_table(nasctl, workdir):
    path = workdir / "theirs.json"
    table().save(path)
    command = ("ingest", "theirs.json", "--hw", table().device)
    wrong = nasctl(*command, "--sha256", "0" * 64)
    assert wrong.code == 1 and "fingerprint" in wrong.err
    assert not (workdir / "profiles").exists()
    taken = nasctl(*command, "--sha256", ingest.fingerprint(table()))
    assert taken.code == 0, taken.err
    other = nasctl("ingest", "theirs.json", "--hw", "raspi4")
    assert other.code == 1 and "measured with device" in other.err
