"""Public latency measurements as (design matrix, milliseconds per device).

Devices are whatever columns the tables have. NAS-Bench-201 rows are the 9,444 networks in which
every edge carries something: what the others' dead edges cost depends on whether the measuring
runtime executes them, which says nothing about the device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
from numpy.typing import NDArray

from benchmarks import networks
from hw_profiles import device as devices
from hw_profiles.device import Device
from hw_profiles.latency import Array
from hw_profiles.models.calibrate import Design
from hw_profiles.op import Op

# device column -> (what kind, fp32 GMAC/s, GB/s, where from). TITAN X is left out: two different
# cards have that name. Simulated and integer-only devices have no datasheet that applies.
DATASHEETS = {
    "1080ti": ("gpu", 5670.0, 484.0, "GTX 1080 Ti: 3584 cores x 1.582 GHz; 484 GB/s"),
    "2080ti": ("gpu", 6724.0, 616.0, "RTX 2080 Ti: 4352 cores x 1.545 GHz; 616 GB/s"),
    "titan_xp": ("gpu", 6075.0, 547.7, "TITAN Xp: 3840 cores x 1.582 GHz; 547.7 GB/s"),
    "gold_6226": ("cpu", 1037.0, 140.8, "Xeon Gold 6226: 12 x 2.7 GHz x 32; 6 x DDR4-2933"),
    "silver_4114": ("cpu", 352.0, 115.2, "Xeon Silver 4114: 10 x 2.2 GHz x 16; 6 x DDR4-2400"),
}
OWN_FILES = {"edgegpu": ("gpu", "jetson-tx2"), "raspi4": ("cpu", "raspi4")}


@dataclass(frozen=True)
class Family:
    """Networks of one kind and their measured times, column by column."""

    name: str
    ops: tuple[tuple[Op, ...], ...]
    times: dict[str, Array]
    sums: frozenset[str] = frozenset()  # columns that are sums of block times, not measurements
    repeats: dict[str, Array] = field(default_factory=dict)  # a second measurement of some columns
    index: NDArray[np.intp] | None = None  # of each network in its benchmark, for other tables

    @cached_property
    def design(self) -> Design:
        return Design.of(self.ops, device_of(""))

    def design_for(self, column: str) -> Design:
        """The same features with the floor of this column's datasheet."""
        floor = Design.of([], device_of(column)).floor * batch_of(column)
        return Design(self.design.features, floor)


def device_of(column: str) -> Device:
    """A column's datasheet as a Device; without one nothing bounds its rates."""
    name = re.sub(r"_\d+$", "", column) if column not in DATASHEETS else column
    if name in OWN_FILES:
        return devices.load(OWN_FILES[name][1])
    kind, peak, bandwidth, source = DATASHEETS.get(name, ("", 0.0, 0.0, "no datasheet"))
    return Device(
        name=(name or "none").replace("_", "-"),
        summary=source,
        kind="gpu" if kind == "gpu" else "cpu",
        runtime="pytorch",
        precision="fp32",
        sources=(source,),
        peak_gmacs_per_s={"fp32": peak} if peak else {},
        bandwidth_gb_per_s=bandwidth or None,
    )


def kind_of(column: str) -> str:
    name = re.sub(r"_\d+$", "", column) if column not in DATASHEETS else column
    known = OWN_FILES.get(name) or DATASHEETS.get(name)
    return known[0] if known else ""


def batch_of(column: str) -> int:
    """HELP's suffix; the Xeons' model numbers, of four digits, are not one."""
    found = re.search(r"_(\d{1,3})$", column)
    return int(found[1]) if found else 1


def board_of(column: str) -> str:
    """What was measured, whatever the batch: columns of one board are not unseen by one another."""
    return re.sub(r"_\d{1,3}$", "", column)


def nb201(root: Path, limit: int | None) -> Family:
    strings, columns, _ = _nb201_tables(root)
    chosen = _sample(_without_dead_edges(strings), limit)
    ops = tuple(tuple(networks.nb201_ops(strings[at], 100)) for at in chosen)
    columns = {name: times[chosen] for name, times in columns.items()}
    return Family("nasbench201", ops, columns, index=np.array(chosen))


def nb201_executed(root: Path, limit: int | None) -> Family:
    """The same networks with the operators that PyTorch runs, `none` included."""
    strings, columns, repeats = _nb201_tables(root)
    chosen = _sample(_without_dead_edges(strings), limit)
    return Family(
        "nasbench201",
        tuple(tuple(networks.nb201_executed(strings[at], 100)) for at in chosen),
        {name: times[chosen] for name, times in columns.items()},
        repeats={name: times[chosen] for name, times in repeats.items()},
        index=np.array(chosen),
    )


def _nb201_tables(root: Path) -> tuple[list[str], dict[str, Array], dict[str, Array]]:
    """(architectures, column -> ms on CIFAR-100, column -> ms on CIFAR-10, whose networks differ
    in the last layer only)."""
    rows = parquet.read_table(root / "hwnasbench/nb201_hw.parquet").to_pydict()
    more = parquet.read_table(root / "help_latency/nb201_latency.parquet").to_pydict()
    assert rows["arch_index"] == more["arch_index"]
    found = {
        data: {
            hit[1]: np.array(values, dtype=float)
            for name, values in rows.items()
            if (hit := re.fullmatch(rf"{data}_(\w+)_latency_ms", name))
        }
        for data in ("cifar100", "cifar10")
    }
    for name, times in _columns(more).items():
        found["cifar100"].setdefault(name, np.array(times, dtype=float))
    return rows["arch_str"], found["cifar100"], found["cifar10"]


def _without_dead_edges(strings: Sequence[str]) -> list[int]:
    return [
        at
        for at, arch in enumerate(strings)
        if networks.nb201_live(arch) == networks.nb201_edges(arch)
    ]


def _sample(chosen: list[int], limit: int | None) -> list[int]:
    if limit and limit < len(chosen):
        return sorted(np.random.default_rng(0).permutation(chosen)[:limit])
    return chosen


def fbnet(root: Path, limit: int) -> Family:
    rows = parquet.read_table(root / "help_latency/fbnet_latency.parquet").slice(0, limit)
    columns = rows.to_pydict()
    choices = list(zip(*(columns[f"op_{at:02d}"] for at in range(22)), strict=True))
    times = {name: np.array(values, dtype=float) for name, values in _columns(columns).items()}
    summed = block_sums(root / "hwnasbench", choices)
    ops = tuple(tuple(networks.fbnet_ops(choice)) for choice in choices)
    return Family("fbnet", ops, summed | times, frozenset(summed))


def block_sums(folder: Path, choices: Sequence[Sequence[int]]) -> dict[str, Array]:
    """FBNet times of the devices for which only a table of blocks exists."""
    meta = json.loads((folder / "fbnet_cifar100_lut_recovered.json").read_text())
    rows = parquet.read_table(folder / "fbnet_cifar100_lut_recovered.parquet").to_pylist()
    block = {
        (row["device"], *(row[name] for name in meta["position_fields"]), row["op_idx"]): row
        for row in rows
    }
    places = [tuple(place) for place in meta["position_type_of_each_of_22_layers"]]

    def total(device: str, choice: Sequence[int]) -> float:
        picked = (block.get((device, *place, op)) for place, op in zip(places, choice, strict=True))
        return meta["base_ms"][device] + sum(row["delta_vs_skip_ms"] for row in picked if row)

    names = sorted({row["device"] for row in rows})
    return {name: np.array([total(name, choice) for choice in choices]) for name in names}


def ofa(root: Path, limit: int) -> Family:
    rows = parquet.read_table(root / "help_latency/ofa_latency.parquet").slice(0, limit).to_pydict()
    genes = zip(rows["ks"], rows["e"], rows["d"], rows["r"], strict=True)
    ops = tuple(
        tuple(networks.ofa_ops(json.loads(ks), json.loads(e), json.loads(d), size))
        for ks, e, d, size in genes
    )
    times = {name: np.array(values, dtype=float) for name, values in _columns(rows).items()}
    return Family("ofa", ops, times)


def _columns(table: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name[:-3]: values for name, values in table.items() if name.endswith("_ms")}
