"""Mean and deviation of uint8 images, and what networks are fed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Moments = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation of each channel


def moments(images: Tensor) -> Moments:
    """Of uint8 [N, C, H, W] scaled to 0..1, from counts of the 256 values: exact, whatever the
    threads do."""
    means, stds = [], []
    values = np.arange(256) / 255
    for channel in images.unbind(1):
        weight = torch.bincount(channel.flatten(), minlength=256).cpu().numpy() / channel.numel()
        mean = float(weight @ values)
        means.append(mean)
        # A channel that never varies is left as it is rather than divided by zero.
        stds.append(float(np.sqrt(weight @ (values - mean) ** 2)) or 1.0)
    return tuple(means), tuple(stds)


def normalised(images: Tensor, by: Moments) -> Tensor:
    """Images of 0 to 255 [N, C, H, W] as float, on the device of the images."""
    mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in by)
    return images.float().div_(255).sub_(mean).div_(std)
