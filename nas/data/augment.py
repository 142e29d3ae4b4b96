"""Random crop and flip of a whole batch at once, on uint8 and on the device of the images."""

from __future__ import annotations

import torch


def augment(
    images: torch.Tensor, generator: torch.Generator, *, flip: bool, pad: int
) -> torch.Tensor:
    """Shift every image by up to `pad` pixels each way and mirror half of them if `flip`.

    The border is filled by reflection, so no colour is invented. [N, C, H, W] in, the same out.
    """
    n, channels, height, width = images.shape
    assert 0 <= pad < min(height, width), "reflection cannot reach further than the image"
    rows = _shifted(height, _integers(n, 2 * pad + 1, generator) - pad)
    columns = _shifted(width, _integers(n, 2 * pad + 1, generator) - pad)
    if flip:
        mirrored = _integers(n, 2, generator).bool()
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    index = (rows[:, :, None] * width + columns[:, None, :]).to(images.device)
    index = index.view(n, 1, height * width).expand(n, channels, height * width)
    return images.reshape(n, channels, height * width).gather(2, index).view(images.shape)


def _integers(n: int, high: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(high, (n,), generator=generator, device=generator.device)


def _shifted(length: int, offset: torch.Tensor) -> torch.Tensor:
    """Source position of every pixel [N, length] after a shift, reflected at both ends."""
    position = torch.arange(length, device=offset.device) + offset[:, None]
    return (length - 1) - ((length - 1) - position.abs()).abs()
