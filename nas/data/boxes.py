"""A folder of parquet files whose rows are a square image, a class and one box.

Columns: encoded image (binary), label (integer), box (four integers: left, top, right, bottom, the
last pixels included). Labels are 0 to C - 1, each of them in train; null or -1 is an image without
a class, a null box one without a box. Files as in `nas.data.parquet`. Without a file called *test*,
the one called *val* is the test set, as is usual where the published test labels are secret. What
validates is held out of train if no file is left for it.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nas.data import parquet
from nas.data.examples import Examples
from nas.data.images import Encoded, decode, stack
from nas.data.split import shuffled, stratified
from nas.errors import NasctlError
from nas.goals import UNLABELLED

_COLUMNS = ("jpeg", "label", "box_xyxy")
_HELD_OUT = 0.1  # of train, if no file validates
MOST_CLASSES = 1 << 20  # more is a mistake: a class is an output of the network


def fits(file: Path) -> bool:
    return set(_COLUMNS) <= set(parquet.columns(file))


def read(folder: Path, size: int | None) -> dict[str, Examples]:
    """train, val and test with targets `label` int64 [N] and `box` float32 [N, 4] in shares of the
    image. A box without area (0.2 % of Tiny ImageNet's) becomes NaN: the image keeps its class.

    Raises NasctlError naming the first row whose label or box is none, and labels train lacks.
    """
    files = _files(folder)
    found = {part: _of_file(file, size) for part, file in files.items()}
    labels = {part: split.targets["label"] for part, split in found.items()}
    known = set(labels["train"].unique().tolist()) - {UNLABELLED}
    if not known:
        raise NasctlError("no image has a label", where=str(files["train"]))
    for part, given in labels.items():
        _check_labels(given, len(known), str(files[part]))
    # a prefix of a split must be a fair sample
    if "test" in found and "val" in found:
        return {part: split.mixed(1, stream) for stream, (part, split) in enumerate(found.items())}
    if len(found) == 1:
        raise NasctlError("no *val* or *test* file", where=str(folder))
    (test,) = (split for part, split in found.items() if part != "train")
    train, val = _held_out(labels["train"].numpy(), str(folder))
    train, val = (rows[shuffled(len(rows), 1, s)] for s, rows in enumerate((train, val)))
    every = found["train"]
    return {
        "train": every.at(torch.from_numpy(train)),
        "val": every.at(torch.from_numpy(val)),
        "test": test,
    }


def _held_out(labels: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows that train and rows that validate: the same share of every class, and of the images
    without one."""
    known, others = (np.flatnonzero(rows) for rows in (labels != UNLABELLED, labels == UNLABELLED))
    classes = int(labels.max()) + 1
    names = [str(label) for label in range(classes)]
    train, val, _ = stratified(labels[known], names, _HELD_OUT, 0.0, where)
    others = others[shuffled(len(others), 0, classes)]
    cut = round(_HELD_OUT * len(others))
    return np.concatenate([known[train], others[cut:]]), np.concatenate([known[val], others[:cut]])


def _check_labels(labels: torch.Tensor, classes: int, where: str) -> None:
    """Raises NasctlError for the first label beyond the classes that occur in train: in train, one
    of those below it is missing then."""
    beyond = (labels >= classes).nonzero()
    if len(beyond):
        row = int(beyond[0])
        raise NasctlError(
            f"row {row} has the label {int(labels[row])}, train has {classes} different ones",
            where=where,
            allowed=f"0 to {classes - 1}, each of them in train",
        )


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
        raise parquet.unreadable(file, error) from error
    contents, labels, boxes = (table[name] for name in _COLUMNS)
    if not contents:
        raise NasctlError("no rows", where=str(file), allowed="one row per image")
    rows = [f"{file} row {row}" for row in range(len(contents))]
    labels = [_label(label, where) for label, where in zip(labels, rows, strict=True)]
    boxes = [_box(box, where) for box, where in zip(boxes, rows, strict=True)]
    encoded = [Encoded(*item) for item in zip(rows, contents, labels, strict=True)]
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


def _label(value: object, where: str) -> int:
    if value is None or value == UNLABELLED:
        return UNLABELLED
    if isinstance(value, int | float) and value == value // 1 and 0 <= value < MOST_CLASSES:
        return int(value)
    raise NasctlError(
        f"the label is {value!r}",
        where=where,
        allowed=f"whole numbers from 0 to {MOST_CLASSES - 1}; null or -1 where there is none",
    )


def _box(value: object, where: str) -> list[float]:
    if value is None:
        return [math.nan] * 4
    if isinstance(value, list) and len(value) == 4:
        numbers = [math.nan if side is None else side for side in value]
        if all(isinstance(side, int | float) for side in numbers):
            return numbers
    raise NasctlError(
        f"the box is {value!r}",
        where=where,
        allowed="left, top, right, bottom; null where there is none",
    )


def _shares(boxes: np.ndarray, side: int) -> np.ndarray:
    empty = (boxes[:, 2:] <= boxes[:, :2]).any(1) | ~np.isfinite(boxes).all(1)
    shares = (boxes + np.array([0, 0, 1, 1], np.float32)) / side
    shares[empty] = np.nan
    return shares
