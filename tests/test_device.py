from __future__ import annotations

import pytest

from hw_profiles import device
from nas.errors import NasctlError, UsageError

WRITTEN = """
name = "board"
aliases = ["b"]
summary = "a board"
kind = "gpu"
runtime = "tensorrt"
precision = "fp16"
sources = ["its box"]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setenv(device.ENV, str(tmp_path))
    (tmp_path / "board.toml").write_text(WRITTEN)
    return tmp_path


@pytest.mark.parametrize("name", device.names())
def test_every_shipped_device_keeps_the_contract(name):
    found = device.load(name)
    assert found.name == name  # the file's name is the registration
    assert found.summary and all(len(source) > 10 for source in found.sources)
    for alias in found.aliases:
        assert device.load(alias) == found
    if found.peak_gmacs_per_s or found.bandwidth_gb_per_s:
        text = " ".join(found.sources)
        assert "peak" in text and "GB/s" in text, "a figure without its origin"
    if found.relative:
        assert device.load(found.relative).peak


def test_the_devices_that_the_documentation_names_are_shipped():
    assert set(device.names()) >= {"cpu", "jetson-orin-nano", "jetson-tx2", "raspi4"}
    assert device.load("jetson").name == "jetson-orin-nano"
    assert [name for name in device.names() if device.load(name).local] == ["cpu"]


def test_aliases_are_unique():
    known = [alias for name in device.names() for alias in device.load(name).aliases]
    assert len(set(known) | set(device.names())) == len(known) + len(device.names())


def test_datasheet_arithmetic():
    orin = device.load("jetson")
    assert orin.peak_gmacs_per_s["fp32"] == pytest.approx(1024 * 0.625)
    assert orin.peak == pytest.approx(40e3 / 2 / 2 / 2)
    assert device.load("raspi4").bandwidth_gb_per_s == pytest.approx(3.2 * 32 / 8)


def test_own_folder_is_searched_and_wins(own):
    assert device.load("board").itemsize == 2
    assert device.load("b").name == "board"
    assert "board" in device.names()
    (own / "raspi4.toml").write_text(WRITTEN.replace('"board"', '"raspi4"'))
    assert device.load("raspi4").precision == "fp16"


def test_a_path_is_loaded(tmp_path):
    path = tmp_path / "elsewhere.toml"
    path.write_text(WRITTEN)
    assert device.load(path).peak is None


@pytest.mark.parametrize("name", ["jetsn", "../hw_profiles/cpu", ""])
def test_unknown_name_lists_what_is_known(name):
    with pytest.raises(UsageError, match="--hw: unknown device.*jetson-orin-nano") as caught:
        device.load(name)
    if name == "jetsn":
        assert "Did you mean jetson?" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name = ", "not valid TOML"),
        (WRITTEN.replace('precision = "fp16"', 'precision = "fp17"'), "field 'precision'"),
        (WRITTEN + "memory_mb = -1", "field 'memory_mb'"),
        (WRITTEN + "warp_drive = 1", "field 'warp_drive'"),
        (WRITTEN.replace('sources = ["its box"]', "sources = []"), "field 'sources'"),
        (WRITTEN + "[peak_gmacs_per_s]\nfp16 = 0", "field 'peak_gmacs_per_s.fp16'"),
    ],
)
def test_broken_file_names_file_and_field(tmp_path, text, problem):
    path = tmp_path / "broken.toml"
    path.write_text(text)
    with pytest.raises(NasctlError) as caught:
        device.load(path)
    assert problem in str(caught.value) and "broken.toml" in str(caught.value)


def test_missing_and_binary_files_are_one_clear_error(tmp_path):
    with pytest.raises(NasctlError, match="cannot read the device file"):
        device.load(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(NasctlError, match="not valid TOML"):
        device.load(tmp_path / "binary.toml")
