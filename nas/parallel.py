"""One training in several processes: who runs which images, and the one sum of their gradients.

Every process holds the whole network and the whole data set. A step's images depend on (seed, step)
and never on how many processes there are; they are cut into `size x accumulate` shards, in order. A
process runs every architecture of the step on each of its shards, backward after backward, and then
the gradients of all processes are summed in one all-reduce of one flat buffer, with the losses in
its tail. So a step costs one synchronisation however many networks it trains, a training stopped
on N processes goes on with M, and no image is lost or seen twice.

Batch norms see the statistics of their shard alone. Published sandwich trainings without
synchronised norms do the same; what a network is judged with is re-calibrated anyway.

Why the sum and not torch's DistributedDataParallel: its hooks expect one backward per step. Four
networks that use different parameters would need `no_sync` around all backwards but the last and a
search for unused parameters in that one, for the overlap of communication with one backward in four
(`python -m benchmarks.scale` compares them).

The process group is torch's own; without one there is one process and everything here is free.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nas.errors import NasctlError, UsageError


@dataclass(frozen=True)
class Workers:
    """The processes of a training, and which of them this is."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Is this the process that reads and writes the run?"""
        return self.rank == 0

    def shards(self, n: int, accumulate: int = 1) -> list[tuple[int, slice]]:
        """This process's shards of a step's `n` images: (number of the shard, its images).

        Over all processes they are `size * accumulate` shards which hold each image once. Raises
        UsageError if a shard would have fewer than two images: a batch norm needs a batch.
        """
        every = self.size * accumulate
        if n < 2 * every:
            raise UsageError(
                f"{n} images per step in {every} shards leave fewer than 2 for one",
                where="--batch",
                next=f"Ask for at least {2 * every}, or for fewer processes or less --accumulate.",
            )
        mine = range(self.rank * accumulate, (self.rank + 1) * accumulate)
        return [(shard, slice(n * shard // every, n * (shard + 1) // every)) for shard in mine]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, all in one all-reduce.

        They must be the same ones on every process, of one type and on one device.
        """
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _peers():
            dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))

    def any(self, flag: bool) -> bool:
        """Is it true on any process? Every process has to ask, at the same step."""
        if self.size == 1:
            return flag
        told = torch.tensor([int(flag)])
        with _peers():
            dist.all_reduce(told)
        return bool(told)

    def share(self, data: bytes) -> bytes:
        """The first process's `data`, on every process."""
        if self.size == 1:
            return data
        length = torch.tensor([len(data)])
        with _peers():
            dist.broadcast(length, 0)
            content = torch.empty(int(length), dtype=torch.uint8)
            if self.first:
                content.copy_(torch.tensor(bytearray(data), dtype=torch.uint8))
            if len(content):
                dist.broadcast(content, 0)
        return content.numpy().tobytes()

    def wait(self) -> None:
        """Until every process has come here."""
        self.any(False)


def workers() -> Workers:
    """Of torch's process group; one process where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return Workers()
    return Workers(dist.get_rank(), dist.get_world_size())


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """A broken or silent connection, for which torch raises a RuntimeError, as one clear line."""
    try:
        yield
    except RuntimeError as error:
        raise NasctlError(
            "another process of this training ended or cannot be reached",
            next="The same command goes on from the last save.",
        ) from error
