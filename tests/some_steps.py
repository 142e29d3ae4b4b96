"""`python -m tests.some_steps FOLDER STOP ACCUMULATE`, under torchrun or alone: train on, from the
state in FOLDER, until STOP steps are done, save, and write what this process saw to RANK.json."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from cli import torchrun
from nas import space as spaces
from nas import supernet
from nas.supernet import Recipe
from nas.tasks import Task
from tests.conftest import tiny_split

SPACE = spaces.load("resnet", channels=1, classes=4, size=8, width=0.25)
RECIPE = {
    "steps": 6,
    "batch": 48,
    "lr": 0.05,
    "weight_decay": 0.0,
    "clip_norm": 1e9,
    "policy": "bestup",
}


def main(folder: Path, stop: int, accumulate: int) -> None:
    torch.set_num_threads(1)
    splits = tiny_split(200, 0), tiny_split(64, 1), tiny_split(64, 2)
    task = Task("tiny", ("a", "b", "c", "d"), *splits, pad=1)
    torch.manual_seed(0)
    net = SPACE.build(SPACE.decode(SPACE.largest))
    recipe = Recipe(**RECIPE, accumulate=accumulate)
    archs, ran, losses = supernet.sandwich(SPACE, recipe), [], []

    def recorded(step):
        ran.append([asdict(arch) for arch in archs(step)])
        return archs(step)

    with torchrun.joined() as group:
        steps = supernet.train(net, recorded, task, recipe, resume=folder / "state.safetensors")
        for step in steps:
            losses.append(step.losses)
            if step.step == stop:
                steps.close()
        group.workers.wait()
    weights = b"".join(p.detach().numpy().tobytes() for p in net.parameters())
    seen = {"archs": ran, "losses": losses, "weights": hashlib.sha256(weights).hexdigest()}
    (folder / f"{group.workers.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
