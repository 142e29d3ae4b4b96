"""Images of two tasks, made up: a bright square on the left or the right, its side and its box."""

import torch

from nas.data.examples import Examples


def examples(n, seed=0):
    """`n` of 8 x 8 pixels, of noise but for the square."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (n, 3, 8, 8), generator=generator)
    side = torch.arange(n) % 2
    for image, right in zip(images, side.tolist(), strict=True):
        image[:, 2:5, 1 + 4 * right : 4 + 4 * right] += 130
    left = (1 + 4 * side) / 8
    edges = [left, torch.full_like(left, 2 / 8), left + 3 / 8, torch.full_like(left, 5 / 8)]
    return Examples(images.to(torch.uint8), {"label": side, "box": torch.stack(edges, 1)})
