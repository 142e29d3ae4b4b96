"""CamVid street scenes with a label per pixel, SegNet's split into train, val and test.

G. Brostow et al., Pattern Recognition Letters 2009. Parquet files *train*, *val*, *test* with the
columns image_jpeg and label_png, in which 11 means that nobody labelled the pixel.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from nas.data import parquet
from nas.data.examples import Examples
from nas.data.images import Encoded, decode
from nas.errors import NasctlError
from nas.goals import VOID

CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
_COLUMNS = ("image_jpeg", "label_png")


def fits(file: Path) -> bool:
    return set(_COLUMNS) <= set(parquet.columns(file))


def read(folder: Path, size: int | None) -> dict[str, Examples]:
    """train, val and test in a fixed shuffled order, with the target `map` uint8 [N, H, W].

    `size` is the shorter side: images are resampled bilinearly, maps by their nearest pixel.
    """
    found = in_order(folder, size).items()
    return {part: split.mixed(2, stream) for stream, (part, split) in enumerate(found)}


def in_order(folder: Path, size: int | None) -> dict[str, Examples]:
    """As `read`, in the order of the files: neighbours are frames of one drive."""
    found = {}
    for part in ("train", "val", "test"):
        files = sorted(folder.glob(f"*{part}*.parquet"))
        if len(files) != 1:
            raise NasctlError(f"{len(files)} files *{part}*.parquet", where=str(folder))
        found[part] = _of_file(files[0], size)
    return found


def _of_file(file: Path, size: int | None) -> Examples:
    try:
        table = pq.read_table(file, columns=list(_COLUMNS)).to_pydict()
    except (pa.ArrowException, OSError) as error:
        raise parquet.unreadable(file, error) from error
    pictures, maps = (
        decode([Encoded(f"{file} row {at}", c, 0) for at, c in enumerate(table[name])], None).images
        for name in _COLUMNS
    )
    images = np.stack([_sized(image, size, Image.Resampling.BILINEAR) for image in pictures])
    labels = np.stack([_sized(found, size, Image.Resampling.NEAREST) for found in maps])
    labels = np.where(labels == len(CLASSES), VOID, labels).astype(np.uint8)
    if (labels[labels != VOID] >= len(CLASSES)).any():
        raise NasctlError(
            f"labels up to {labels[labels != VOID].max()}",
            where=str(file),
            allowed=f"0 to {len(CLASSES)}",
        )
    return Examples(
        torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
        {"map": torch.from_numpy(labels)},
    )


def _sized(pixels: np.ndarray, size: int | None, method: Image.Resampling) -> np.ndarray:
    if size is None:
        return pixels
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    shape = (round(width * scale), round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(shape, method))
