"""A distilled encoder on a task of labelled sentences: every weight is trained on, as in
AutoDistil's evaluation (arXiv 2201.12507, section 4.1; rates and lengths are the caller's)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from compress import adamw
from compress.adamw import Plan, Step
from compress.teacher import Teacher
from nas import checkpoint, parallel
from nas.elastic import Noise, extract
from nas.errors import NasctlError
from nas.judge import device_of
from nas.search_spaces.bert import Bert

BATCH_EVAL = 256
WINDOW = 16  # batches that are drawn together and sorted by length


class Labelled(NamedTuple):
    """Token numbers [N, S], padded, and labels [N]."""

    tokens: Tensor
    labels: Tensor

    @property
    def digest(self) -> str:
        """sha256 of both."""
        return hashlib.sha256(
            self.tokens.numpy().tobytes() + self.labels.numpy().tobytes()
        ).hexdigest()


@dataclass(frozen=True)
class Finetuning:
    """Of one network on one task; the result is a function of it, the network and the data."""

    plan: Plan
    batch: int = 32
    dropout: float = 0.1  # of the head's input
    seed: int = 0


def encoded(teacher: Teacher, texts: Sequence[str], length: int) -> Tensor:
    """Token numbers [N, S], S at most `length`: longer texts are cut, shorter ones padded.

    Raises NasctlError if a text is longer than the teacher has positions for, were it not cut.
    """
    wrap, frame = teacher.wrapping, teacher.net.frame
    if length > frame.positions:
        raise NasctlError(
            f"{length} tokens, but positions for {frame.positions}", where="--sequence"
        )
    rows = [
        [wrap.opening, *numbers[: length - 2], wrap.closing] for numbers in teacher.encode(texts)
    ]
    found = torch.full((len(rows), max(map(len, rows))), frame.padding)
    for at, row in enumerate(rows):
        found[at, : len(row)] = torch.tensor(row)
    return found


def with_classes(encoder: Bert, classes: int, seed: int) -> Bert:
    """The encoder with a fresh head for so many classes, drawn from (seed)."""
    net = Bert(encoder.arch, encoder.frame, encoder.head.out_features)
    extract(encoder, net)
    generator = torch.Generator().manual_seed(1_000_003 * seed + 7)
    net.head = type(net.head)(encoder.arch.hidden, classes)
    nn.init.normal_(net.head.weight, std=0.02, generator=generator)
    nn.init.zeros_(net.head.bias)
    return net


def finetune(
    net: Bert, data: Labelled, how: Finetuning, *, resume: Path | None = None
) -> Generator[Step, None, None]:
    """Train `net` in place on the labels, yielding after each step."""
    rows = batches(lengths(data.tokens, net.frame.padding), how.batch, how.seed)

    def gradients(step: int) -> Tensor:
        chosen = torch.from_numpy(rows(step))
        device = device_of(net)
        total = torch.zeros(1, device=device)
        for shard, part in parallel.workers().shards(len(chosen)):
            at = chosen[part]
            generator = torch.Generator().manual_seed(how.seed * 1_000_003 + 2 * step + shard)
            noise = Noise(how.dropout, 0.0, generator)
            tokens = trimmed(data.tokens[at], net.frame.padding).to(device)
            loss = F.cross_entropy(net(tokens, None, noise), data.labels[at].to(device))
            loss = loss * len(at) / len(chosen)
            loss.backward()
            total += loss.detach()
        return total

    identity = f"{data.digest} {how} {checkpoint.digest(net)}"
    return adamw.train(net.train(), gradients, how.plan, identity, resume=resume)


@torch.no_grad()
def predictions(net: Bert, tokens: Tensor) -> Tensor:
    """Classes [N] by an eval-mode network, on the processor."""
    net.eval()
    device, padding = device_of(net), net.frame.padding
    found = torch.empty(len(tokens), dtype=torch.int64)
    # texts of one length together: padding costs as much as words
    for rows in torch.from_numpy(np.argsort(lengths(tokens, padding))).split(BATCH_EVAL):
        found[rows] = net(trimmed(tokens[rows], padding).to(device)).argmax(1).cpu()
    return found


def lengths(tokens: Tensor, padding: int) -> NDArray[np.int64]:
    """[N]: how many tokens each row has before its padding."""
    places = torch.arange(1, tokens.shape[1] + 1)
    found: NDArray[np.int64] = ((tokens != padding) * places).amax(1).numpy()
    return found


def batches(length: NDArray[np.int64], batch: int, seed: int) -> Callable[[int], NDArray[np.int64]]:
    """A step's number to the rows of its batch, which are of similar length.

    Epochs are permutations of (seed, epoch); in each, WINDOW batches at a time are sorted by length
    and cut, and the batches come in an order drawn again. Raises NasctlError if there are fewer
    rows than `batch`.
    """
    if batch > len(length):
        raise NasctlError(f"{batch} examples per step, but {len(length)} in all", where="--batch")
    many = len(length) // batch

    @lru_cache(maxsize=1)
    def epoch_of(epoch: int) -> NDArray[np.int64]:
        rng = np.random.default_rng((seed, 31, epoch))
        order = rng.permutation(len(length))[: many * batch]
        windows = [order[at : at + WINDOW * batch] for at in range(0, len(order), WINDOW * batch)]
        near = np.concatenate([w[np.argsort(length[w], kind="stable")] for w in windows])
        found: NDArray[np.int64] = near.reshape(many, batch)[rng.permutation(many)]
        return found

    return lambda step: epoch_of(step // many)[step % many]


def trimmed(tokens: Tensor, padding: int) -> Tensor:
    """Without the columns that hold padding only."""
    return tokens[:, : int((tokens != padding).any(0).nonzero().max()) + 1]
