"""Encoded images in, uint8 arrays out: every reader that meets files or bytes decodes here.

Grey pictures become [H, W], all others [H, W, 3]; `stack` brings a data set to one shape.
One thread: a pool of two was no faster, neither on 32 px nor on 480 px JPEG files.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image, ImageOps, UnidentifiedImageError

from nas.errors import NasctlError

Label = int | str

# What Pillow's decoders let through for broken files; anything else is a bug and should be seen.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Encoded:
    """One picture before decoding; `where` is what an error names (a file, or a row of one)."""

    where: str
    content: Path | bytes | None
    label: Label


@dataclass(frozen=True)
class Labelled:
    """What a reader hands over for one split: pixels and the labels as the source spells them."""

    images: list[np.ndarray]
    labels: list[Label]


def fit(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size`, then the central square."""
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BILINEAR)


def pixels(content: Path | bytes | None, size: int | None) -> np.ndarray:
    """Decode one picture the way a viewer shows it (EXIF rotation applied, first frame)."""
    if not content:
        raise ValueError("no bytes")
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
        if size is not None:  # JPEG can decode at a fraction; twice the target keeps it sharp
            image.draft(None, (2 * size, 2 * size))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        eight = _eight_bit(image)
        return np.asarray(eight if size is None else fit(eight, size))


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode in ("L", "RGB"):
        return image
    if image.mode in ("1", "LA", "La"):
        return image.convert("L")
    if image.mode.startswith("I;16"):  # convert("L") would clip at 255 instead of scaling
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):  # no range is declared, so any scaling would be a guess
        raise ValueError(f"pixel format '{image.mode}' is neither 8 nor 16 bit")
    if image.mode == "P":  # a palette may carry transparency, which only RGBA can take over
        image = image.convert("RGBA")
    return image.convert("RGB")


def decode(encoded: Sequence[Encoded], size: int | None) -> Labelled:
    """Decode all; if any fails, one error names the first and counts the others."""
    images: list[np.ndarray] = []
    broken: list[str] = []
    for item in encoded:
        try:
            images.append(pixels(item.content, size))
        except _BROKEN as error:
            broken.append(f"{item.where}: unreadable image ({_reason(error)})")
            continue
        if len(images) == 1:
            _check_memory(images[0].nbytes * len(encoded), item.where)
    if broken:
        others = f" and {len(broken) - 1} other unreadable" if len(broken) > 1 else ""
        raise NasctlError(
            f"{broken[0]}{others} of {len(encoded)}",
            allowed="8 or 16 bit images that Pillow opens",
            next="Repair or remove them",
        )
    return Labelled(images, [item.label for item in encoded])


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own text shows a memory address
        return "no known image format"
    return str(error) or type(error).__name__


def _check_memory(nbytes: int, where: str) -> None:
    """The pictures of a task are held in memory; twice, for a moment, while they are stacked."""
    free = psutil.virtual_memory().available
    if 2 * nbytes > free:
        raise NasctlError(
            f"the decoded images need about {2 * nbytes / 1e9:.1f} GB of memory",
            where=where,
            allowed=f"{free / 1e9:.1f} GB are free",
            next="Pass a smaller --size, or fewer images",
        )


def stack(splits: dict[str, list[np.ndarray]], where: str) -> dict[str, np.ndarray]:
    """Lists of [H, W] and [H, W, 3] to uint8 [N, C, H, W], the same C, H, W for every split.

    One colour picture makes the whole task RGB; grey stays one channel only when all are grey.
    """
    everything = [image for images in splits.values() for image in images]
    sizes = Counter(image.shape[:2] for image in everything)
    if len(sizes) > 1 or any(height != width for height, width in sizes):
        raise NasctlError(
            f"images are {_describe(sizes)}",
            where=where,
            allowed="square images of one size",
            next="Pass --size N: the shorter side becomes N and the centre is kept",
        )
    colour = any(image.ndim == 3 for image in everything)
    return {name: _to_nchw(images, colour) for name, images in splits.items()}


def _describe(sizes: Counter[tuple[int, ...]]) -> str:
    common = [f"{width}x{height} ({n})" for (height, width), n in sizes.most_common(4)]
    more = f" and {len(sizes) - 4} other sizes" if len(sizes) > 4 else ""
    return ", ".join(common) + more


def _to_nchw(images: list[np.ndarray], colour: bool) -> np.ndarray:
    height, width = images[0].shape[:2]
    out = np.empty((len(images), 3 if colour else 1, height, width), np.uint8)
    for row, image in zip(out, images, strict=True):
        row[:] = np.moveaxis(image, 2, 0) if image.ndim == 3 else image
    return out
