"""Random crop and flip of a whole batch at once, on uint8 and on the device of the images.

What is drawn is a value, so that label maps and boxes can move with their images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Placement:
    """How each of N images moves: output pixel (y, x) shows (y + rows, x' + columns) of the input,
    reflected at the borders, where x' counts from the right if the image is mirrored."""

    rows: Tensor  # [N], pixels
    columns: Tensor  # [N], pixels
    mirrored: Tensor  # [N], bool


def augment(images: Tensor, generator: torch.Generator, *, flip: bool, pad: int) -> Tensor:
    """Shift every image by up to `pad` pixels each way and mirror half of them if `flip`.

    The border is filled by reflection, so no colour is invented. [N, C, H, W] in, the same out.
    """
    assert 0 <= pad < min(images.shape[2:]), "reflection cannot reach further than the image"
    return move(images, placed(len(images), generator, flip=flip, pad=pad))


def placed(n: int, generator: torch.Generator, *, flip: bool, pad: int) -> Placement:
    rows = _integers(n, 2 * pad + 1, generator) - pad
    columns = _integers(n, 2 * pad + 1, generator) - pad
    mirrored = _integers(n, 2, generator).bool() if flip else torch.zeros(n, dtype=torch.bool)
    return Placement(rows, columns, mirrored.to(rows.device))


def move(images: Tensor, placement: Placement) -> Tensor:
    """Images or label maps [N, C, H, W], moved pixel by pixel: no value is mixed with another."""
    n, channels, height, width = images.shape
    rows, columns = _shifted(height, placement.rows), _shifted(width, placement.columns)
    columns = torch.where(placement.mirrored[:, None], columns.flip(1), columns)
    index = (rows[:, :, None] * width + columns[:, None, :]).to(images.device)
    index = index.view(n, 1, height * width).expand(n, channels, height * width)
    return images.reshape(n, channels, height * width).gather(2, index).view(images.shape)


def move_boxes(boxes: Tensor, placement: Placement, size: tuple[int, int]) -> Tensor:
    """Boxes [N, 4] as left, top, right, bottom in shares of an image of `size` (height, width).

    What left the image is cut off; of a box that left it altogether, and of one that was missing
    (not a number), nothing is left but NaN. Reflections of an object do not count.
    """
    height, width = size
    across = (placement.columns / width).to(boxes)
    down = (placement.rows / height).to(boxes)
    left, top, right, bottom = (boxes - torch.stack([across, down, across, down], 1)).unbind(1)
    mirrored = placement.mirrored.to(boxes.device)
    left, right = torch.where(mirrored, 1 - right, left), torch.where(mirrored, 1 - left, right)
    moved = torch.stack([left, top, right, bottom], 1).clamp(0, 1)
    empty = (moved[:, 2:] <= moved[:, :2]).any(1, keepdim=True)
    return moved.masked_fill(empty, torch.nan)


def _integers(n: int, high: int, generator: torch.Generator) -> Tensor:
    return torch.randint(high, (n,), generator=generator, device=generator.device)


def _shifted(length: int, offset: Tensor) -> Tensor:
    """Source position of every pixel [N, length] after a shift, reflected at both ends."""
    position = torch.arange(length, device=offset.device) + offset[:, None]
    return (length - 1) - ((length - 1) - position.abs()).abs()
