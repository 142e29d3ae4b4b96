"""Interface: what goes into a network's file, what comes out and what that means.

`task.json` of a bundle. With it alone somebody who has none of our code can feed the file: images
of 0 to 255 are scaled to 0..1, normalised per channel, resized (bilinear, antialiased) and
passed as float32 [N, C, H, W].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from nas.errors import NasctlError
from nas.outputs import ONLY

if TYPE_CHECKING:
    from nas.multitask import MultiTask
    from nas.tasks import Task

NAME = "task.json"
SAMPLE = "calibration.safetensors"


class Interface(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    input: str = "input"
    shape: tuple[int, int, int]  # channels, height, width as the file wants them
    mean: tuple[float, ...]  # per channel, of pixels in 0..1
    std: tuple[float, ...]
    outputs: tuple[str, ...]  # the file's
    classes: tuple[str, ...] = ()  # in the order of the logits, of a classification
    goals: tuple[str, ...]  # what it is judged by
    #: what it was trained on: of these, train calibrates, val guards and test is never read
    data: str
    data_size: int | None = None  # px that the data were resized to when they were read
    data_sha256: str
    classification: bool  # the data are a `nas.tasks.Task`, else a `nas.multitask.MultiTask`

    def to_json(self) -> bytes:
        return (self.model_dump_json(indent=1) + "\n").encode()


def of_task(task: Task, data: str, size: int | None, resolution: int) -> Interface:
    """Of a network of ours that classifies images of `task`, read from `data`, at a resolution."""
    return Interface(
        shape=(task.channels, resolution, resolution),
        mean=task.mean,
        std=task.std,
        outputs=(ONLY,),
        classes=task.classes,
        goals=("class",),
        data=data,
        data_size=size,
        data_sha256=task.fingerprint,
        classification=True,
    )


def of_tasks(task: MultiTask, data: str, size: int | None) -> Interface:
    """Of a network of anybody's for the goals of `task`, fed as they are read from `data`."""
    mean, std = task.moments
    goals = tuple(goal.name for goal in task.goals)
    return Interface(
        shape=task.shape,
        mean=mean,
        std=std,
        outputs=goals,
        goals=goals,
        data=data,
        data_size=size,
        data_sha256=task.fingerprint,
        classification=False,
    )


def read(path: Path) -> Interface:
    try:
        return Interface.model_validate_json(path.read_bytes())
    except OSError as error:
        raise NasctlError(f"cannot read: {error.strerror}", where=str(path)) from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise NasctlError(f"field '{field}': {first['msg']}", where=str(path)) from error


def sample(feeds: Mapping[str, np.ndarray]) -> bytes:
    """A few ready inputs [N, C, H, W] by name: to calibrate or check with, without the data."""
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(values) for name, values in feeds.items()})
