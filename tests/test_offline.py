"""hw_profiles.remote.offline: the script runs for real, with a pretended trtexec."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from hw_profiles import chains, profile
from hw_profiles.protocol import noise
from hw_profiles.remote import offline
from nas.errors import NasctlError

TRTEXEC = """#!/bin/sh
# Writes what trtexec writes: an engine, or the times of three calls, of six digits.
for word; do
    case $word in
        --help) echo --stronglyTyped; exit ;;
        --buildOnly) only=yes ;;
        --onnx=*) onnx=${word#*=} ;;
        --saveEngine=*) saved=${word#*=} ;;
        --loadEngine=*) loaded=${word#*=} ;;
        --exportTimes=*) times=${word#*=} ;;
    esac
done
if [ "$onnx" ]; then
    [ "$only" ] && [ "$UNBUILDABLE" != "$onnx" ] || exit 1
    wc -c < "$onnx" > "$saved"
    exit
fi
echo "$loaded" >> calls
[ -e stop ] && [ "$(wc -l < calls)" -gt "$(cat stop)" ] && exit 1
awk '{
    ms = $1 / 1e4
    row = "{\\"startComputeMs\\": %d, \\"endComputeMs\\": %.6g, \\"computeMs\\": %.17g}"
    printf "[" row ", " row ", " row "]", 1, 1 + ms, ms, 2, 2 + ms, ms, 3, 3 + ms, ms
}' "$loaded" > "$times"
"""


BOARD = offline.Board("jetson-tx2", "tensorrt", "fp32")


@pytest.fixture(scope="module")
def networks():
    return chains.sample(np.random.default_rng(0), 12)


@pytest.fixture(scope="module")
def written(networks, tmp_path_factory):
    """A folder with the networks, to be copied by whoever runs or changes it."""
    made = tmp_path_factory.mktemp("written") / "networks"
    offline.write(made, networks, BOARD, np.random.default_rng(1))
    return made


@pytest.fixture
def folder(tmp_path, written, monkeypatch):
    tool = tmp_path / "trtexec"
    tool.write_text(TRTEXEC)
    tool.chmod(0o755)
    monkeypatch.setenv("TRTEXEC", str(tool))
    return Path(shutil.copytree(written, tmp_path / "networks"))


def run(folder):
    return subprocess.run([folder / offline.SCRIPT], capture_output=True, text=True, timeout=60)


def test_a_folder_travels_and_comes_back(folder, networks, tmp_path):
    elsewhere = tmp_path / "board" / "somewhere"
    shutil.copytree(folder, elsewhere)  # the script finds its files wherever the folder is
    assert not offline.there(elsewhere, networks)
    done = run(elsewhere)
    assert done.returncode == 0, done.stderr
    assert offline.there(elsewhere, networks) == networks
    group = offline.measured(elsewhere, networks)
    for ops, timing in zip(networks, group.timings, strict=True):
        size = (elsewhere / f"{profile.digest(ops)}.onnx").stat().st_size
        assert timing.median_ms == pytest.approx(size / 1e4, rel=1e-4)
        assert timing.n == offline.ROUNDS and not timing.noisy
    assert len(group.reference_ms) == offline.ROUNDS * 2  # before every eight of the twelve


def test_networks_are_timed_in_another_order_each_round(folder, networks):
    lines = [line.split() for line in (folder / offline.ORDER).read_text().splitlines()]
    rounds = [[name for at, name in lines if at == str(turn)] for turn in range(offline.ROUNDS)]
    assert all(sorted(one) == sorted(map(profile.digest, networks)) for one in rounds)
    assert rounds[0] != rounds[1]


def test_an_interrupted_script_goes_on(folder, networks):
    (folder / "stop").write_text("7")
    run(folder)
    assert len(list(folder.glob("*.times.json"))) == 7
    (folder / "stop").unlink()
    (folder / "calls").unlink()
    run(folder)
    total = len((folder / offline.ORDER).read_text().splitlines())
    assert len((folder / "calls").read_text().splitlines()) == total - 7
    assert offline.there(folder, networks) == networks


def test_what_cannot_be_built_is_said_and_left_out(folder, networks, monkeypatch):
    bad = profile.digest(networks[3])
    monkeypatch.setenv("UNBUILDABLE", f"{bad}.onnx")
    assert f"{bad} cannot be built" in run(folder).stderr
    assert offline.there(folder, networks) == networks[:3] + networks[4:]


def test_rounds_that_differ_are_in_doubt(folder, networks):
    run(folder)
    path = folder / f"{profile.digest(networks[0])}.1.times.json"
    rows = json.loads(path.read_text())
    for row in rows:
        row["computeMs"] *= 1.2
        row["endComputeMs"] = row["startComputeMs"] + row["computeMs"]
    path.write_text(json.dumps(rows))
    first, second, *_ = offline.measured(folder, networks).timings
    assert "differ by 20%" in first.noisy
    assert not second.noisy


def test_no_trtexec(folder, monkeypatch):
    monkeypatch.setenv("TRTEXEC", "/nowhere/trtexec")
    done = run(folder)
    assert done.returncode == 1
    assert "set TRTEXEC" in done.stderr


def test_fp16_files_are_fp16(tmp_path, networks):
    half = replace(BOARD, precision="fp16", batch=2)
    offline.write(tmp_path, networks[:1], half, np.random.default_rng(1))
    model = onnx.load(tmp_path / f"{profile.digest(networks[0])}.onnx")
    weights = {tensor.data_type for tensor in model.graph.initializer if tensor.dims}
    assert weights == {onnx.TensorProto.FLOAT16}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    with pytest.raises(NasctlError, match="int8"):
        int8 = replace(BOARD, precision="int8")
        offline.write(tmp_path / "int8", networks, int8, np.random.default_rng(1))


def listed(tmp_path, networks, *rows):
    names = [profile.digest(ops) for ops in networks]
    lines = ["name,median_ms", *(f"{names[at]},{ms}" for at, ms in rows)]
    (tmp_path / offline.TABLE).write_text("\n".join(lines) + "\n")


def test_times_of_another_tool(tmp_path, networks):
    listed(tmp_path, networks, (0, 1.0), (1, 2.0), (1, 2.02), (0, 1.01))
    assert offline.there(tmp_path, networks) == networks[:2]
    group = offline.measured(tmp_path, networks[:2])
    assert [timing.median_ms for timing in group.timings] == pytest.approx([1.005, 2.01])
    # no reference: the noise floor is how far the repeats lie apart
    apart = [1 - math.sqrt(2) * 0.01 / 2.01, 1 - math.sqrt(2) * 0.02 / 4.02]
    assert group.reference_ms == pytest.approx(apart)


def test_what_was_timed_once_is_in_doubt(tmp_path, networks):
    listed(tmp_path, networks, (0, 1.0), (0, 1.01), (1, 2.0))
    sure, once = offline.measured(tmp_path, networks[:2]).timings
    assert not sure.noisy and "once" in once.noisy


def test_the_noise_floor_of_repeats_is_that_of_one_round(tmp_path, networks):
    rng = np.random.default_rng(0)
    rows = [(at, float(np.exp(0.03 * rng.standard_normal()))) for at in range(12) for _ in range(9)]
    listed(tmp_path, networks, *rows)
    assert noise(offline.measured(tmp_path, networks).reference_ms) == pytest.approx(0.03, rel=0.3)


def test_a_folder_is_of_one_board_and_setting(folder, networks):
    for other in (
        replace(BOARD, batch=8),
        replace(BOARD, precision="fp16"),
        replace(BOARD, device="jetson-orin-nano"),
    ):
        with pytest.raises(NasctlError, match="is for device jetson-tx2, runtime tensorrt"):
            offline.write(folder, networks, other, np.random.default_rng(1))
    offline.write(folder, networks, BOARD, np.random.default_rng(1))


def test_fp16_files_need_a_tensorrt_that_obeys_them(tmp_path, networks, folder, monkeypatch):
    tool = tmp_path / "trtexec"
    tool.write_text(tool.read_text().replace("echo --stronglyTyped", ":"))
    half = tmp_path / "half"
    offline.write(half, networks, replace(BOARD, precision="fp16"), np.random.default_rng(1))
    done = run(half)
    assert done.returncode == 1 and "profile it in fp32" in done.stderr


def test_names_with_a_suffix_and_files_of_another_encoding(tmp_path, networks):
    name = profile.digest(networks[0])
    path = tmp_path / offline.TABLE
    path.write_text(f"name,median_ms\n{name}.onnx,1\n{name}.onnx,1\n", encoding="utf-8-sig")
    assert offline.there(tmp_path, networks) == networks[:1]
    path.write_text("name,median_ms\n", encoding="utf-16")
    with pytest.raises(NasctlError, match="UTF-8"):
        offline.there(tmp_path, networks)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("x,0", "says 0.0 ms"),
        ("x,-1", "says -1.0 ms"),
        ("x,nan", "says nan ms"),
        ("x,fast", "is 'x,fast'"),
        ("x,1,2", "is 'x,1,2'"),
        ("x", "is 'x'"),
    ],
)
def test_damaged_times_of_another_tool(tmp_path, networks, row, said):
    (tmp_path / offline.TABLE).write_text(f"name,median_ms\n{row}\n")
    with pytest.raises(NasctlError, match=said) as caught:
        offline.there(tmp_path, networks)
    assert "line 2" in str(caught.value)


def test_times_without_a_unit_are_refused(tmp_path, networks):
    (tmp_path / offline.TABLE).write_text("name,latency\nx,1\n")
    with pytest.raises(NasctlError, match="median_ms"):
        offline.there(tmp_path, networks)


def test_nothing_repeated_means_no_noise_floor(tmp_path, networks):
    listed(tmp_path, networks, (0, 1.0), (1, 2.0))
    with pytest.raises(NasctlError, match="timed twice"):
        offline.measured(tmp_path, networks[:2])


def test_only_a_shell_is_needed_on_the_board(folder):
    words = (folder / offline.SCRIPT).read_text()
    assert words.startswith("#!/bin/sh\n")
    assert "python" not in words
    assert os.access(folder / offline.SCRIPT, os.X_OK)
