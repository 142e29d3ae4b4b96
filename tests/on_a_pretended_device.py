"""`python -m tests.on_a_pretended_device FOLDER VERB...`: run verbs on the processor and on a
pretended device, and print as JSON for each the exit codes, the tensors of its files that differ
and how many operations ran there.

A process of its own: torch counts devices once, at its first backward pass.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import torch

from cli import main
from nas import checkpoint
from tests import pretend_device

TESTS = Path(__file__).parent
THERE = [
    *("--threads", "1", "--width", "0.25", "--batch", "64"),
    *("--hw", "jetson-tx2", "--seed", "1"),
]
SEARCH = ["search", *THERE, "--evaluations", "3", "--epochs", "0.2"]
CELLS = ["--space", "nasbench201", "--latency", "900ms"]
MODULES = {
    "two_sides": "from test_multitask_search import examples, sides\ndef task(): return sides()\n",
    "mine": """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )
        self.side, self.place = nn.Linear(64, 2), nn.Linear(64, 4)

    def forward(self, x):
        x = self.body(x)
        return {"class": self.side(x), "box": self.place(x)}

def build():
    torch.manual_seed(0)
    return Net()
""",
}


def words(verb: str, folder: Path) -> list[str]:
    sides = ["--data", "two_sides:task", "--threads", "1", "--batch", "16"]
    if verb == "distill":
        given = ["--teacher", str(folder / "teacher"), "--text", str(folder / "text.txt")]
        small = ["--sequence", "12", "--batch", "8", "--epochs", "0.5", "--subspaces", "tiny"]
        tuned = ["--finetune", str(folder / "train.tsv"), "--test", str(folder / "train.tsv")]
        return [verb, *given, *small, *tuned, "--threads", "1", "--hw", "jetson-tx2"]
    return {
        "train": ["train", *THERE[:6], "--epochs", "0.15", "--operations", "2", "--cutout", "0.2",
                  "--dropout", "0.1", "--policy", "bestup", "--ema", "0.9"],
        "search": [*SEARCH, "--no-alone", "--space", "mobilenet", "--finetune", "0.1"],
        "alone": [*SEARCH, "--alone"],
        "gumbel": [*SEARCH, "--space", "fbnet", "--strategy", "gumbel", "--latency", "900ms"],
        "proxyless": [*SEARCH, *CELLS, "--strategy", "proxyless"],
        "reinforce": [*SEARCH, *CELLS, "--strategy", "reinforce"],
        "tasks": ["search", "--tasks", "class,box", *sides, "--width", "0.25", "--epochs", "1.6",
                  "--finetune", "0.4", "--hw", "jetson-tx2"],
        "together": ["search", "--tasks", "class,box", "--together", *sides, "--width", "0.25",
                     "--epochs", "1.6", "--finetune", "0.4", "--hw", "jetson-tx2"],
        "prune-together": ["prune", str(folder / "together-here"), "--data", "two_sides:task",
                           "--target", "macs=-10%", "--max-drop", "class=99%,box=99%", "--rounds",
                           "1", "--epochs", "1", "--divisor", "4", "--threads", "1", "--batch",
                           "16"],
        "prune": ["prune", "mine:build", "--target", "macs=-30%", "--max-drop", "class=99%,box=99%",
                  "--rounds", "2", "--epochs", "3", "--divisor", "4", *sides],
    }[verb]  # fmt: skip


def run(arguments: list[str], run_folder: Path, device: str) -> int:
    return main.run([*arguments, "--run", str(run_folder), "--train-on", device])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file that a run left."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors, _ = checkpoint.read(path)
        found.update({f"{path.relative_to(folder)} {k}": t for k, t in tensors.items()})
    return found


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """To rounding: strides of one channel may differ, and with them the order of sums."""
    return torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-4, equal_nan=True)


def compare(verb: str, folder: Path) -> dict[str, object]:
    arguments = words(verb, folder)
    codes = [run(arguments, folder / f"{verb}-here", "cpu")]
    before = pretend_device.ran
    codes.append(run(arguments, folder / f"{verb}-there", f"{pretend_device.NAME}:0"))
    here, there = (weights(folder / f"{verb}-{side}") for side in ("here", "there"))
    same = here.keys() == there.keys()
    differ = [name for name in here if not same or not alike(here[name], there[name])]
    # a key's bias shifts all of a softmax: its gradient is nothing but rounding; and a few steps of
    # fine-tuning after the calibration, which rounds otherwise, lead elsewhere
    grown = "model.safetensors" if "--finetune" in arguments and verb == "search" else "key.bias"
    differ = [name for name in differ if grown not in name]
    return {
        "codes": codes,
        "tensors": len(here),
        "differ": differ,
        "operations": pretend_device.ran - before,
    }


def prepare(folder: Path) -> None:
    sys.path[:0] = [str(TESTS), str(folder)]
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(text)


def prepare_text(folder: Path) -> None:
    from tests.texts import prose, save_teacher

    save_teacher(folder / "teacher")
    (folder / "text.txt").write_text(prose(120))
    lines = [f"{line}\t{at % 2}" for at, line in enumerate(prose(48, 1).splitlines())]
    (folder / "train.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    prepare(folder)
    if "distill" in sys.argv:
        prepare_text(folder)
    os.chdir(folder)
    with pretend_device.pretended(), contextlib.redirect_stdout(sys.stderr):
        found = {verb: compare(verb, folder) for verb in sys.argv[2:]}
    print(json.dumps(found))
