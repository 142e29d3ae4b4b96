from __future__ import annotations

import json

import numpy as np
import pytest

from hw_profiles import alignment
from hw_profiles.alignment import WIDTHS, Alignment
from hw_profiles.device import load
from hw_profiles.measure import sweep
from hw_profiles.op import macs
from nas.errors import NasctlError


def padded(width, tile):
    """A kernel that works on whole tiles of inputs and outputs."""
    return (-(-width // tile) * tile) ** 2 * 1e-4


def of(ms, **fields):
    said = {"device": "cpu", "runtime": "onnxruntime", "precision": "fp32", "threads": 1}
    return Alignment(**said, ms=ms, noise=0.01, **fields)


@pytest.mark.parametrize("tile", [1, 4, 8, 16])
def test_the_tile_of_a_kernel_that_pads_is_found(tile):
    noisy = np.random.default_rng(0).normal(1, 0.01, len(WIDTHS))
    ms = {width: padded(width, tile) * f for width, f in zip(WIDTHS, noisy, strict=True)}
    assert of(ms).tile == tile


def test_odd_widths_that_are_faster_need_no_tile():
    assert of({w: w * w * (0.5 if w % 2 else 1.0) * 1e-4 for w in WIDTHS}).tile == 1


def test_an_overhead_per_call_is_no_alignment():
    assert of({w: w * w * 1e-4 + 0.05 for w in WIDTHS}).tile == 1


def test_the_chain_is_four_convolutions():
    assert macs(alignment.chain(48)) == 4 * 48 * 48 * 9 * 28 * 28


def test_sweeps_are_kept_by_setting_beside_the_device(tmp_path, monkeypatch):
    monkeypatch.setenv("NASCTL_PROFILES", str(tmp_path))
    cpu = load("cpu")
    assert alignment.tile(cpu) == (cpu.tile, "device file")
    flat, coarse = ({w: padded(w, tile) for w in WIDTHS} for tile in (1, 16))
    path = of(flat).save(tmp_path)
    of(coarse).save(tmp_path)
    of(flat).model_copy(update={"precision": "int8"}).save(tmp_path)
    assert path.name == "cpu.alignment.json" and len(json.loads(path.read_text())) == 2
    assert alignment.tile(cpu) == (16, "measured")
    assert alignment.tile(cpu, "int8") == (1, "measured")
    assert alignment.tile(cpu, threads=2) == (cpu.tile, "device file")
    path.write_text("[{}]")
    with pytest.raises(NasctlError, match="damaged file of alignments"):
        alignment.tile(cpu)


@pytest.mark.slow
def test_a_sweep_measures_every_width_in_its_time():
    found = sweep("cpu", rng=np.random.default_rng(0), seconds=20.0)
    assert set(found.ms) == set(WIDTHS) and found.tile in alignment.TILES
    assert found.ms[80] > found.ms[48]
