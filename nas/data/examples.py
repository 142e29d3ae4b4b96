"""Images with everything that is known about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nas.data.split import shuffled


@dataclass(frozen=True, eq=False)
class Examples:
    """uint8 images [N, C, H, W] and targets by name, each with N rows."""

    images: Tensor
    targets: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Examples:
        return Examples(
            self.images.to(device), {name: t.to(device) for name, t in self.targets.items()}
        )

    def mixed(self, *stream: int) -> Examples:
        """In a fixed shuffled order, so that a prefix is a fair sample; of another `stream` another
        one."""
        return self.at(torch.from_numpy(shuffled(len(self), *stream)))

    def at(self, rows: Tensor) -> Examples:
        return Examples(self.images[rows], {name: t[rows] for name, t in self.targets.items()})
