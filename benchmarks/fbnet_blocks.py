"""HW-NAS-Bench's table of FBNet's blocks as latencies of the space `fbnet`.

Published are whole networks' sums; what can be recovered from them is each block's time beyond a
skip at the same place, on CIFAR-100 at 32 px and width 1, for raspi4, pixel3, eyeriss and fpga. A
block's time cannot be divided among its operators, so this is a table of genes and no LatencyTable:
one of operators would have to invent the division. At other sizes and widths it stands for the Pi's
order of blocks, not for its milliseconds.
"""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq

from benchmarks import contract
from nas.differentiable.policy import Latency
from nas.errors import NasctlError
from nas.search_spaces import fbnet
from nas.space import SearchSpace

LUT = "fbnet_cifar100_lut_recovered"


def block_latency(space: SearchSpace, device: str) -> Latency:
    """Milliseconds of any network, one entry per layer and option.

    Raises NasctlError if the data is absent or the table lacks the device or an operator.
    """
    folder = contract.data("hwnasbench")
    if folder is None:
        raise NasctlError("NASCTL_DATA/hwnasbench is absent", where="raspi4 blocks")
    assert isinstance(space, fbnet.Space)
    meta = json.loads((folder / f"{LUT}.json").read_text())
    if device not in meta["base_ms"]:
        raise NasctlError(f"no blocks of {device}", where=LUT, allowed=meta["base_ms"])
    fields = meta["position_fields"]
    entries = {
        (*(row[name] for name in fields), row["op"]): row["delta_vs_skip_ms"]
        for row in pq.read_table(folder / f"{LUT}.parquet").to_pylist()
        if row["device"] == device
    }
    tables = []
    places = meta["position_type_of_each_of_22_layers"]
    for layer, (place, order) in enumerate(zip(places, space.order, strict=True)):
        ms = [entries.get((*place, name), 0.0 if name == fbnet.SKIP else np.nan) for name in order]
        tables.append(([layer], np.array([1]), np.array(ms)[:, None]))
    return Latency(float(meta["base_ms"][device]), tables, space.sizes)
