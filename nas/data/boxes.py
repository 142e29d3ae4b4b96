"""A folder of parquet files whose rows are a square image, a class and one box.

Columns: encoded image (binary), label (integer), box (four integers: left, top, right, bottom, the
last pixels included). Files as in `nas.data.parquet`. Without a file called *test*, the one called
*val* is the test set, as is usual where the published test labels are secret; what validates is
then held out of train.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nas.data.examples import Examples
from nas.data.images import Encoded, decode, stack
from nas.data.split import shuffled, stratified
from nas.errors import NasctlError

_COLUMNS = ("jpeg", "label", "box_xyxy")
_HELD_OUT = 0.1  # of train, if no file validates


def fits(file: Path) -> bool:
    return set(_COLUMNS) <= set(pq.read_schema(file).names)


def read(folder: Path, size: int | None) -> dict[str, Examples]:
    """train, val and test with targets `label` int64 [N] and `box` float32 [N, 4] in shares of the
    image. A box without area (0.2 % of Tiny ImageNet's) becomes NaN: the image keeps its class."""
    found = {part: _of_file(file, size) for part, file in _files(folder).items()}
    if "test" in found:
        return found
    if "val" not in found:
        raise NasctlError("no *val* or *test* file", where=str(folder))
    test, labels = found["val"], found["train"].targets["label"].numpy()
    names = [str(label) for label in range(int(labels.max()) + 1)]
    train, val, _ = stratified(labels, names, _HELD_OUT, 0.0, str(folder))
    # a prefix of a split must be a fair sample
    train, val = (rows[shuffled(len(rows), 1, s)] for s, rows in enumerate((train, val)))
    every = found["train"]
    return {
        "train": every.at(torch.from_numpy(train)),
        "val": every.at(torch.from_numpy(val)),
        "test": test,
    }


def _files(folder: Path) -> dict[str, Path]:
    found = {p: sorted(folder.glob(f"*{p}*.parquet")) for p in ("train", "val", "test")}
    for part, files in found.items():
        if len(files) > 1 or (part == "train" and not files):
            raise NasctlError(
                f"{len(files)} files *{part}*.parquet", where=str(folder), allowed="one"
            )
    return {part: files[0] for part, files in found.items() if files}


def _of_file(file: Path, size: int | None) -> Examples:
    try:
        table = pq.read_table(file, columns=list(_COLUMNS)).to_pydict()
    except (pa.ArrowException, OSError) as error:
        raise NasctlError(f"unreadable parquet file ({error})", where=str(file)) from error
    contents, labels, boxes = (table[name] for name in _COLUMNS)
    encoded = [
        Encoded(f"{file} row {row}", content, int(label))
        for row, (content, label) in enumerate(zip(contents, labels, strict=True))
    ]
    whole = decode(encoded, None).images
    # square and of one size, or the boxes would not fit what `size` leaves of an image
    images = stack({"": whole}, str(file))[""]
    side = images.shape[2]
    if size is not None:
        images = stack({"": decode(encoded, size).images}, str(file))[""]
    return Examples(
        torch.from_numpy(images),
        {
            "label": torch.tensor(labels, dtype=torch.int64),
            "box": torch.from_numpy(_shares(np.array(boxes, np.float32), side)),
        },
    )


def _shares(boxes: np.ndarray, side: int) -> np.ndarray:
    empty = (boxes[:, 2:] <= boxes[:, :2]).any(1)
    shares = (boxes + np.array([0, 0, 1, 1], np.float32)) / side
    shares[empty] = np.nan
    return shares
