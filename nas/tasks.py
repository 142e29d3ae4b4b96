"""A task is data, a loss and a metric; `load` makes one from what `--data` names.

The search never sees `test`: supernet training, predictors and selection read `train` and `val`
only, and `test` is read once, for the network that was chosen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from nas.data import digits, folder, module, parquet
from nas.data.images import Label, Labelled, stack
from nas.data.moments import Moments, moments, normalised
from nas.data.split import fractions, shuffled, stratified
from nas.errors import NasctlError, UsageError, unknown

FORMS = "digits, a folder of class folders, a parquet file or folder of them, my_pkg.my_mod:task"
_SPLITS = ("train", "val", "test")


def top1(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of rows whose largest logit is the label's, 0 to 1."""
    return (logits.argmax(1) == labels).float().mean().item()


@dataclass(frozen=True, eq=False)
class Split:
    """uint8 images [N, C, H, W] and int64 labels [N]."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False)
class Task:
    """What a network has to learn. Valid once it exists; loss and metric take (logits, labels).

    Rows of a loaded task are in a fixed shuffled order, so a prefix of a split is a fair sample.
    `flip` and `pad` say which augmentation keeps the label true: digits must not be mirrored.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = cross_entropy
    metric: Callable[[torch.Tensor, torch.Tensor], float] = top1
    flip: bool = False
    pad: int = 0

    def __post_init__(self) -> None:
        _check_classes(self)
        for name in _SPLITS:
            _check_split(getattr(self, name), name, self)
        _check_agreement(self)

    @property
    def splits(self) -> dict[str, Split]:
        return {name: getattr(self, name) for name in _SPLITS}

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def size(self) -> int:
        return self.train.images.shape[2]

    @property
    def n_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def _moments(self) -> Moments:
        return moments(self.train.images)

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, of train alone, on pixels scaled to 0..1."""
        return self._moments[0]

    @property
    def std(self) -> tuple[float, ...]:
        return self._moments[1]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything a run reads off the task but the code of its loss and metric."""
        digest = hashlib.sha256()
        head = [self.classes, self.flip, self.pad]
        head += [tuple(split.images.shape) for split in self.splits.values()]
        digest.update(json.dumps(head).encode())
        for split in self.splits.values():
            digest.update(split.images.cpu().contiguous().numpy().data)
            digest.update(split.labels.cpu().contiguous().numpy().astype("<i8").data)
        return digest.hexdigest()

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [N, C, H, W] to what networks are fed, on the device of the images."""
        return normalised(images, self._moments)


def load(data: str, *, size: int | None = None) -> Task:
    """The task that `data` names; `size` resizes the shorter side and crops the centre."""
    if size is not None and size < 1:
        raise UsageError(f"{size} pixels", where="--size", allowed="a whole number from 1")
    path = Path(os.path.expanduser(data))  # unlike Path's own, leaves an unknown ~user alone
    if data == "digits":
        return _assemble("digits", digits.read(size), data, flip=False)
    if data and os.path.exists(path):
        name = path.resolve().name.removesuffix(".parquet")
        return _assemble(name, _read_path(path, size, data), data, flip=True)
    if module.is_reference(data):
        return _users_task(data, size)
    raise _no_such(data)


def _no_such(data: str) -> UsageError:
    hint = unknown("data set", data, ["digits"]).next or f"Searched from {Path.cwd()}"
    return UsageError(f"no such data '{data}'", where="--data", allowed=FORMS, next=hint)


def _read_path(path: Path, size: int | None, data: str) -> Mapping[str, Labelled]:
    try:
        if path.is_dir() and not parquet.files_in(path):
            return folder.read(path, size)
        if path.is_dir() or path.suffix.lower() == ".parquet":
            return parquet.read(path, size)
    except PermissionError as error:
        raise NasctlError(f"no permission to read '{error.filename}'", where=data) from error
    raise UsageError(f"cannot read '{path.name}' as a data set", where="--data", allowed=FORMS)


def _users_task(reference: str, size: int | None) -> Task:
    task = module.read(reference)
    where = f"--data {reference}"
    if not isinstance(task, Task):
        raise NasctlError(f"gave a {type(task).__name__}", where=where, allowed="a nas.tasks.Task")
    if size not in (None, task.size):
        raise UsageError(
            f"--size {size} does not apply to a task of your own of {task.size} pixels",
            where=where,
            next="Resize in your module, or drop --size",
        )
    return replace(task, train=_mixed(task.train, 0), val=_mixed(task.val, 1))


def _mixed(split: Split, stream: int) -> Split:
    """In a fixed shuffled order: parts of a split have to be fair samples."""
    rows = torch.from_numpy(shuffled(len(split), 3, stream))
    return Split(split.images[rows], split.labels[rows])


def _assemble(name: str, source: Mapping[str, Labelled], where: str, *, flip: bool) -> Task:
    """From what a reader found to a task: number the classes, hold out what is missing, shuffle."""
    spelled = _spelled_classes(source, where)
    images = stack({part: source[part].images for part in source}, where)
    labels = {
        part: np.array([spelled[y] for y in source[part].labels], np.int64) for part in source
    }
    classes = tuple(str(value) for value in spelled)
    shares = fractions(len(labels["train"]), "val" in source, "test" in source)
    held = stratified(labels["train"], classes, *shares, where=where)
    splits = []
    for stream, (part, rows) in enumerate(zip(_SPLITS, held, strict=True)):
        origin = part if part in source else "train"
        if origin != "train":  # brought by the source, so nothing was held out for it
            rows = np.arange(len(labels[part]))
        rows = rows[shuffled(len(rows), 1, stream)]
        splits.append(
            Split(torch.from_numpy(images[origin][rows]), torch.from_numpy(labels[origin][rows]))
        )
    train, val, test = splits
    channels, size = train.images.shape[1:3]
    return Task(name, classes, train, val, test, flip=flip and channels == 3, pad=size // 8)


def _spelled_classes(source: Mapping[str, Labelled], where: str) -> dict[Label, int]:
    """Labels of train as the source spells them, numbered in sorted order; gaps close up."""
    found = {part: set(source[part].labels) for part in source}
    for part in found:
        extra = sorted(map(str, found[part] - found["train"]))
        if extra:
            raise NasctlError(
                f"{part} has labels that train lacks: {', '.join(extra[:5])}",
                where=where,
                allowed="labels that occur in train",
                next=f"Add them to train or remove them from {part}",
            )
    if len(found["train"]) < 2:
        raise NasctlError(
            f"only one class, '{next(iter(found['train']))}'", where=where, allowed="2 or more"
        )
    ordered = sorted(found["train"], key=lambda value: (isinstance(value, str), value))
    return {value: index for index, value in enumerate(ordered)}


def _check_classes(task: Task) -> None:
    names = task.classes
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        problem = f"classes is {names!r:.80}"
    elif len(set(names)) < len(names):
        problem = "two classes have the same name"
    elif len(names) < 2:
        problem = f"{len(names)} classes"
    else:
        return
    raise NasctlError(problem, where=f"task '{task.name}'", allowed="a tuple of 2 or more names")


def _check_split(split: Split, name: str, task: Task) -> None:
    where = f"task '{task.name}' {name}"
    wanted = {
        "images": ("uint8 [N, C, H, W]", torch.uint8, 4),
        "labels": ("int64 [N]", torch.int64, 1),
    }
    for part, (allowed, dtype, dims) in wanted.items():
        value = getattr(split, part, None)
        if not isinstance(value, torch.Tensor):
            raise NasctlError(f"{part} is a {type(value).__name__}", where=where, allowed=allowed)
        if value.dtype != dtype or value.dim() != dims or not value.numel():
            found = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            raise NasctlError(f"{part} is {found}", where=where, allowed=f"{allowed}, not empty")
    if len(split.images) != len(split.labels):
        raise NasctlError(f"{len(split.images)} images and {len(split.labels)} labels", where=where)
    low, high = split.labels.min().item(), split.labels.max().item()
    if low < 0 or high >= task.n_classes:
        raise NasctlError(
            f"labels from {low} to {high}", where=where, allowed=f"0 to {task.n_classes - 1}"
        )


def _check_agreement(task: Task) -> None:
    """What only shows when the splits are seen together."""
    where = f"task '{task.name}'"
    shapes = {name: tuple(split.images.shape[1:]) for name, split in task.splits.items()}
    if len(set(shapes.values())) > 1 or task.train.images.shape[2] != task.train.images.shape[3]:
        raise NasctlError(
            f"images are {shapes}", where=where, allowed="square images of one [C, H, W]"
        )
    if not 0 <= task.pad < task.size:
        raise NasctlError(f"pad is {task.pad}", where=where, allowed=f"0 to {task.size - 1}")
    known = set(task.train.labels.tolist())
    for name in ("val", "test"):
        extra = sorted(set(task.splits[name].labels.tolist()) - known)
        if extra:
            names = ", ".join(task.classes[label] for label in extra[:5])
            raise NasctlError(
                f"{name} has classes that train lacks: {names}",
                where=where,
                allowed="classes that occur in train",
            )
