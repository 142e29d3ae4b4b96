"""Random augmentation of a whole batch at once, on the device of the images: RandAugment's idea
(arXiv 1909.13719) over the operations that make sense on small images, and cutout (1708.04552).

Ours: an image's geometric operations are composed to one matrix and resampled once, its colour
operations to one linear map of its pixels, so the cost does not grow with their number. Geometry
comes before colour, whatever the order drawn. Borders are filled by reflection.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

GEOMETRY = {  # at full magnitude
    "rotate": math.radians(30),
    "shear_x": 0.3,
    "shear_y": 0.3,
    "translate_x": 0.6,  # in half widths
    "translate_y": 0.6,
}
COLOUR = {"brightness": 0.9, "contrast": 0.9, "saturation": 0.9}
NAMES = ("identity", *GEOMETRY, *COLOUR)


def randaugment(
    images: Tensor, generator: torch.Generator, *, operations: int, magnitude: float
) -> Tensor:
    """`operations` of NAMES on each image, of random sign and strength up to `magnitude` (0 to 1).

    Images [N, C, H, W] of 0 to 255 in; float of the same range out. Grey ones keep their (absent)
    saturation.
    """
    drawn = _strengths(len(images), generator, operations, magnitude)
    by = {name: strength.to(images.device) for name, strength in drawn.items()}
    moved = _geometry(images.float(), {k: by[k] * most for k, most in GEOMETRY.items()})
    return _colour(moved, {k: 1 + by[k] * most for k, most in COLOUR.items()})


def jitter(images: Tensor, generator: torch.Generator, *, strength: float) -> Tensor:
    """Brightness, contrast and saturation of each image, each by a random factor of up to
    1 +- `strength`; as `randaugment` in and out."""
    drawn = 2 * torch.rand((len(COLOUR), len(images)), generator=generator) - 1
    factors = (1 + strength * drawn).to(images.device)
    return _colour(images.float(), dict(zip(COLOUR, factors, strict=True)))


def cutout(images: Tensor, generator: torch.Generator, *, share: float) -> Tensor:
    """A square of `share` of the side around a random pixel of each image becomes its mean colour;
    it may reach over the border."""
    n, _, height, width = images.shape
    half = share * torch.tensor([height, width]) / 2
    centre = torch.rand(n, 2, generator=generator, device=generator.device) * torch.tensor(
        [height, width]
    )
    inside = [
        ((torch.arange(length) + 0.5 - centre[:, i, None]).abs() < half[i]).to(images.device)
        for i, length in enumerate((height, width))
    ]
    hole = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
    mean = images.float().mean((2, 3), keepdim=True)
    return torch.where(hole, mean.to(images.dtype), images)


def _strengths(
    n: int, generator: torch.Generator, operations: int, magnitude: float
) -> dict[str, Tensor]:
    """Operation -> strength of every image [N], zero where it was not drawn."""
    drawn = torch.randint(len(NAMES), (operations, n), generator=generator)
    value = magnitude * (2 * torch.rand((operations, n), generator=generator) - 1)
    # drawn twice, an operation acts with the sum of both, within what one may do
    return {
        name: torch.where(drawn == at, value, torch.zeros(())).sum(0).clamp(-magnitude, magnitude)
        for at, name in enumerate(NAMES)
    }


def _geometry(images: Tensor, by: dict[str, Tensor]) -> Tensor:
    """One resampling by rotation, then shears, then shift: [x y 1] of the output to the input."""
    cos, sin = by["rotate"].cos(), by["rotate"].sin()
    one = torch.ones_like(cos)
    rotate = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    shear = torch.stack([one, by["shear_x"], by["shear_y"], one], 1).view(-1, 2, 2)
    shift = torch.stack([by["translate_x"], by["translate_y"]], 1)[:, :, None]
    matrix = torch.cat([rotate @ shear, shift], 2)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _colour(images: Tensor, by: dict[str, Tensor]) -> Tensor:
    """Blends with the image's grey version, its mean and black, as in the enhancing operations of
    imaging libraries; factors of 1 change nothing."""
    saturation, contrast, brightness = (
        by[name][:, None, None, None] for name in ("saturation", "contrast", "brightness")
    )
    grey = images.mean(1, keepdim=True)
    images = torch.lerp(grey, images, saturation)
    images = torch.lerp(grey.mean((2, 3), keepdim=True), images, contrast)
    return (images * brightness).clamp_(0, 255)
