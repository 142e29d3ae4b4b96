"""Several questions about the same images: data, goals and how images are moved and fed.

`load` makes one from what `--data` names: a folder of parquet files with boxes or with label maps,
or the user's own `my_pkg.my_mod:task`, whose training and validation images are put into a fixed
shuffled order: parts of them have to be fair samples. As with `nas.tasks`, nothing but the final
judgement reads `test`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.data import augment, boxes, camvid, module, parquet
from nas.data.examples import Examples
from nas.data.moments import Moments, moments, normalised
from nas.data.randaugment import jitter
from nas.elastic import resize
from nas.errors import NasctlError, UsageError, unknown
from nas.goals import Goal, Outputs, Targets, boundary, box, classes, own, presence, segmentation
from nas.judge import device_of
from nas.outputs import tensors
from nas.tasks import Task, top1

FORMS = "a folder of parquet files with boxes or label maps, my_pkg.my_mod:task"
BATCH_EVAL = 128


@dataclass(frozen=True, eq=False)
class MultiTask:
    """What a network with several outputs has to learn. Valid once it exists.

    `boxes` and `maps` name the targets that move with the image; all others stay as they are.
    `flip`, `pad` (pixels) and `colour` (0 to 1) are the augmentation that keeps all targets true.
    """

    name: str
    goals: tuple[Goal, ...]
    train: Examples
    val: Examples
    test: Examples
    boxes: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()
    flip: bool = False
    pad: int = 0
    colour: float = 0.0

    def __post_init__(self) -> None:
        _check(self)

    @property
    def splits(self) -> dict[str, Examples]:
        return {"train": self.train, "val": self.val, "test": self.test}

    @property
    def shape(self) -> tuple[int, int, int]:
        """One image's channels, height and width."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @cached_property
    def moments(self) -> Moments:
        """Mean and deviation of each channel on train, of pixels in 0..1."""
        return moments(self.train.images)

    def normalise(self, images: Tensor) -> Tensor:
        """Images of 0 to 255 [N, C, H, W] to what networks are fed."""
        return normalised(images, self.moments).contiguous(memory_format=torch.channels_last)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything a training reads off the task but the code of its goals."""
        found = hashlib.sha256()
        head = [[goal.name, goal.weight] for goal in self.goals]
        moving = [self.boxes, self.maps, self.flip, self.pad, self.colour]
        found.update(json.dumps([head, moving]).encode())
        for split in self.splits.values():
            for name, tensor in (("", split.images), *sorted(split.targets.items())):
                found.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
                found.update(tensor.cpu().contiguous().numpy().data)
        return found.hexdigest()

    def only(self, names: Sequence[str]) -> MultiTask:
        """The same data with some of the goals, in their order here."""
        known = [goal.name for goal in self.goals]
        for name in names:
            if name not in known:
                raise unknown("task", name, known, where="--tasks")
        return replace(self, goals=tuple(goal for goal in self.goals if goal.name in names))

    def batches(
        self, split: Examples, batch: int = BATCH_EVAL, device: torch.device | None = None
    ) -> Iterator[tuple[Tensor, Targets]]:
        """All of a split in order, not augmented, ready for a network on `device` (None: on the
        processor)."""
        for rows in torch.arange(len(split)).split(batch):
            part = split.at(rows)
            if device is not None:
                part = part.to(device)
            yield self.normalise(part.images), part.targets

    def augmented(self, part: Examples, generator: torch.Generator) -> tuple[Tensor, Targets]:
        """A batch ready for a network, its targets moved with their images."""
        placement = augment.placed(len(part), generator, flip=self.flip, pad=self.pad)
        moved = dict(part.targets)
        for name in self.maps:
            moved[name] = augment.move(moved[name][:, None], placement)[:, 0]
        for name in self.boxes:
            moved[name] = augment.move_boxes(moved[name], placement, self.shape[1:])
        images = augment.move(part.images, placement)
        if self.colour:
            images = jitter(images, generator, strength=self.colour)
        return self.normalise(images), moved


def answers(outputs: Tensor | Outputs, task: MultiTask) -> Outputs:
    """What a network returned, by goal: a network of one goal may return its answer alone, or as
    the only tensor of whatever structure.

    Raises NasctlError naming the goal that has none.
    """
    if len(task.goals) == 1 and len(found := tensors(outputs)) == 1:
        return {task.goals[0].name: found[0]}
    there = outputs if isinstance(outputs, Mapping) else {}
    for goal in task.goals:
        if goal.name not in there:
            gives = ", ".join(there) or type(outputs).__name__
            raise NasctlError(
                f"the network has no output '{goal.name}'",
                where=f"multi-task '{task.name}'",
                allowed=f"a dict of outputs by goal; this one gives {gives}",
            )
    return there


def single(task: Task, resolution: int) -> MultiTask:
    """A classification as a multi-task of one goal, "class", judged as the task says; its images
    are resized once."""
    splits = []
    for split in (task.train, task.val, task.test):
        resized = resize(split.images.float(), resolution).round_().clamp_(0, 255)
        splits.append(Examples(resized.to(torch.uint8), {"label": split.labels}))
    pad = round(task.pad * resolution / task.size)
    goal = classes("class", target="label")
    if (task.loss, task.metric) != (F.cross_entropy, top1):
        goal = own("class", target="label", loss=task.loss, metric=task.metric)
    goals, (train, val, test) = (goal,), splits
    return MultiTask(task.name, goals, train, val, test, flip=task.flip, pad=pad)


@torch.no_grad()
def evidence(
    net: nn.Module, task: MultiTask, split: Examples, batch: int = BATCH_EVAL
) -> dict[str, Tensor]:
    """What each goal's metric needs to know of each image, by name, on the processor; `net` is in
    eval mode."""
    found: dict[str, list[Tensor]] = {goal.name: [] for goal in task.goals}
    for images, targets in task.batches(split, batch, device_of(net)):
        outputs = answers(net(images), task)
        for goal in task.goals:
            found[goal.name].append(goal.evidence(outputs, targets).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def scores(task: MultiTask, found: dict[str, Tensor]) -> dict[str, float]:
    """Each goal's metric, from `evidence`."""
    return {goal.name: goal.score(found[goal.name]) for goal in task.goals}


def load(data: str, *, size: int | None = None) -> MultiTask:
    """The multi-task that `data` names; `size` is the shorter side in pixels."""
    if size is not None and size < 8:
        raise UsageError(f"{size} pixels", where="--size", allowed="a whole number from 8")
    path = Path(os.path.expanduser(data))
    if path.is_dir():
        return _of_folder(path, size)
    if module.is_reference(data):
        task = module.read(data)
        if not isinstance(task, MultiTask):
            raise NasctlError(
                f"gave a {type(task).__name__}",
                where=f"--data {data}",
                allowed="a nas.multitask.MultiTask",
            )
        return replace(task, train=task.train.mixed(3, 0), val=task.val.mixed(3, 1))
    raise UsageError(f"no such data '{data}'", where="--data", allowed=FORMS)


def _of_folder(path: Path, size: int | None) -> MultiTask:
    if not (files := parquet.files_in(path)):
        raise NasctlError("no parquet files", where=str(path), allowed=FORMS)
    if boxes.fits(files[0]):
        splits = boxes.read(path, size)
        n = int(splits["train"].targets["label"].max()) + 1
        named = classes("class", target="label", n_classes=n)
        goals: tuple[Goal, ...] = (named, box("box", target="box"))
        return _assembled(path, goals, splits, boxes=("box",))
    if camvid.fits(files[0]):
        n = len(camvid.CLASSES)
        dense = segmentation("seg", target="map", n_classes=n)
        there = presence("presence", target="map", n_classes=n)
        goals = (dense, boundary("edge", target="map"), there)
        return _assembled(path, goals, camvid.read(path, size), maps=("map",))
    raise NasctlError("columns of no known form", where=str(files[0]), allowed=FORMS)


def _assembled(
    path: Path,
    goals: tuple[Goal, ...],
    splits: Mapping[str, Examples],
    boxes: tuple[str, ...] = (),
    maps: tuple[str, ...] = (),
) -> MultiTask:
    """Photographs: a mirrored one, an eighth of it elsewhere, other colours are still one."""
    train, val, test = (splits[name] for name in ("train", "val", "test"))
    pad = min(train.images.shape[2:]) // 8
    return MultiTask(
        path.resolve().name, goals, train, val, test, boxes, maps, flip=True, pad=pad, colour=0.4
    )


def _check(task: MultiTask) -> None:
    where = f"multi-task '{task.name}'"
    names = [goal.name for goal in task.goals]
    if not names or len(set(names)) < len(names):
        raise NasctlError(f"goals are {names}", where=where, allowed="one or more, named apart")
    for part, split in task.splits.items():
        images, place = split.images, f"{where} {part}"
        if images.dtype != torch.uint8 or images.dim() != 4 or not len(images):
            found = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            raise NasctlError(f"images are {found}", where=place, allowed="uint8 [N, C, H, W]")
        if images.shape[1:] != task.train.images.shape[1:]:
            raise NasctlError(f"images of {list(images.shape[1:])}", where=place)
        for name, target in split.targets.items():
            if len(target) != len(images):
                raise NasctlError(f"{len(images)} images, {len(target)} of {name}", where=place)
        for name in (*task.boxes, *task.maps):
            if name not in split.targets:
                raise unknown("target", name, split.targets, where=place)
    if not 0 <= task.pad < min(task.shape[1:]):
        raise NasctlError(f"pad is {task.pad}", where=where, allowed="less than the image's sides")
