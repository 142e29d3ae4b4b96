"""Do models of strangers go through the whole chain, and if not, why: prune, export, INT8, verify?

Architectures of installed packages (`strangers_nets`), random weights, made-up images: what is
shown is the chain, not accuracy. Each is pruned to half of its multiply-adds, by the same ratio
everywhere (the easy baseline) and by PAGCP with a loose bound, no training in between. What PAGCP
gives (or else the baseline, or the whole network) is exported, compared with torch, quantized
behind the accuracy guard and compared again. Losses are distances to what the whole network
answers. Rows are kept in results/strangers.rows.jsonl, and a stopped run goes on; a row of another
version of this benchmark is made again.

A refusal is a row too: the stage and our one line. Nothing else than NasctlError is caught.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import contract
from benchmarks.strangers_nets import STRANGERS, Stranger
from compress import baselines, guard, prune, quantize
from compress.cost import Macs, Params
from compress.guard import Guard
from compress.job import Job, Pruned, Settings, finish
from compress.objective import Objective
from compress.quantize import Feeds, Scheme
from deploy import chain
from deploy import onnx as files
from deploy.chain import Link
from hw_profiles.runtimes import onnxruntime
from nas.errors import NasctlError
from nas.outputs import named, tensors

VERSION = 1
SHARE = 0.5  # of the multiply-adds
SETTINGS = Settings(bound=100.0, divisor=8, grid=(0.5, 0.75, 0.9))
BOUND = 0.2  # of the answers' size: how far INT8 may move them on what it is calibrated with
STEER, CALIBRATE, HELD_OUT = 4, 32, 16  # images
QUICK = ("resnet",)
HEADER = (
    *("network", "k params", "M MACs", "even", "PAGCP", "pruned", "of layers"),
    *("torch = ONNX", "INT8", "INT8 = ONNX", "s"),
)


def main(argv: list[str] | None = None) -> int:
    flags = contract.parser(__doc__)
    flags.add_argument("--networks", nargs="*", choices=list(STRANGERS), default=list(STRANGERS))
    arguments = flags.parse_args(argv)
    outcome = contract.Outcome("strangers")
    names = QUICK if arguments.quick else arguments.networks
    path = contract.RESULTS / "strangers.rows.jsonl"
    rows = contract.Rows(Path(tempfile.mkdtemp()) / "rows" if arguments.quick else path)
    found, absent = {}, []
    for name in names:
        if (row := rows.get(key := {"network": name, "version": VERSION})) is None:
            if STRANGERS[name].absent:
                absent.append(name)
                continue
            row = through(STRANGERS[name])
            rows.add(key, row)
        found[name] = row
    print(contract.table(HEADER, [line(name, row) for name, row in found.items()]))
    for name, row in found.items():
        for stage, why in row["refused"].items():
            print(f"{name}: {stage}: {why}")
    if absent:
        print(f"not run, their packages are not installed: {', '.join(absent)}")
    figures(outcome, list(found.values()))
    return outcome.finish(arguments.save)


def through(stranger: Stranger) -> dict[str, Any]:
    """The row of one network: what each stage gave, or why it refused."""
    began = time.perf_counter()
    torch.manual_seed(0)  # their constructors draw from the global generator
    images = made_up(STEER + CALIBRATE + HELD_OUT, stranger.size)
    net = settled(stranger.build(), images[STEER:-HELD_OUT])
    example = images[:1]
    row: dict[str, Any] = {
        "params": Params().of(net, example),
        "macs": Macs().of(net, example),
        "refused": {},
    }
    asked = job(net, images[:STEER])

    def tried(stage: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except NasctlError as error:
            row["refused"][stage] = str(error)
            return None

    even = tried("even", lambda: finish(baselines.load("uniform")(asked, SETTINGS)))
    pagcp = tried("PAGCP", lambda: finish(prune.prune(asked, SETTINGS)))
    for name, found in (("even", even), ("pagcp", pagcp)):
        row[name] = None if found is None else described(found)
    pruned = pagcp or even
    left = net if pruned is None else pruned.net
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        held = images[-HELD_OUT:]
        exact = tried("export", lambda: exported(left, path, held))
        row["onnx_error"] = exact and exact.error
        if exact is not None:
            calibration = images[STEER:-HELD_OUT].numpy()
            row["int8"] = tried("INT8", lambda: quantized(path, calibration, held.numpy()))
    return {**row, "seconds": round(time.perf_counter() - began, 1)}


def made_up(n: int, size: int) -> Tensor:
    """Images of blots and noise [n, 3, size, size], of mean 0 and deviation 1."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(n, 3, 4, 4, generator=generator)
    blots = F.interpolate(coarse, size=size, mode="bilinear")
    found = blots + 0.5 * torch.randn(n, 3, size, size, generator=generator)
    return (found - found.mean()) / found.std()


@torch.no_grad()
def settled(net: nn.Module, images: Tensor) -> nn.Module:
    """In eval mode, with norms' statistics of these images: with those that they are made with, a
    deep network's answers hardly depend on its inputs, and every comparison would hold."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the mean over all passes: here of one
    net.train()(images)
    return net.eval()


@torch.no_grad()
def job(net: nn.Module, images: Tensor) -> Job:
    """Half of the multiply-adds; the loss is 1 where the network answers what the whole one did,
    and 2 where it is as far from that as nothing at all."""
    whole = [t for t in tensors(net(images)) if t.is_floating_point()]

    def loss(outputs: Any, targets: Sequence[Tensor]) -> Tensor:
        found = [t for t in tensors(outputs) if t.is_floating_point()]
        apart = [
            (a - b).square().sum() / b.square().sum().clamp(min=1e-12)
            for a, b in zip(found, targets, strict=True)
        ]
        return 1 + torch.stack(apart).mean()

    macs = Macs()
    target = SHARE * macs.of(net, images[:1])
    objective = Objective("answers", loss, least=1.0)
    return Job(net, images[:1], [objective], [(images, whole)], macs, target)


def described(found: Pruned) -> dict[str, Any]:
    reasons = [left.reason for left in found.left_alone]
    return {
        "macs": found.cost,
        "params": sum(parameter.numel() for parameter in found.net.parameters()),
        "loss": found.losses["answers"],
        "units": len(found.rows),
        "pruned": sum(row.kept < row.width for row in found.rows),
        "left_alone": {reason: reasons.count(reason) for reason in reasons},
    }


def exported(net: nn.Module, path: Path, images: Tensor) -> Link:
    """torch = ONNX. Raises ParityFailed where they differ."""
    files.export(net, path, input_shape=images.shape[1:])
    with torch.no_grad():
        expected = {name: t.numpy() for name, t in named(net(images)).items()}
    found = chain.link("torch = ONNX", "fp32", expected, outputs(path, images.numpy()))
    chain.require([found])
    return found


def quantized(path: Path, calibration: np.ndarray, held: np.ndarray) -> dict[str, Any]:
    """ONNX = INT8, on images that it was not calibrated with. The nodes that change the answers
    most stay in float until they change by no more than BOUND. Raises ParityFailed where the files
    differ by too much all the same."""
    model = quantize.prepared(onnx.load(path))
    batches: list[Feeds] = [{"input": part} for part in np.split(calibration, 4)]

    def run(one: onnx.ModelProto, some: Sequence[Feeds]) -> list[list[np.ndarray]]:
        session = onnxruntime.load(one.SerializeToString())
        return [onnxruntime.run(session, batch) for batch in some]

    expected = run(model, batches)

    def spent(one: onnx.ModelProto) -> float:
        return guard.relative_error(expected, run(one, batches)) / BOUND

    found = Guard(model, batches, Scheme(), run, spent).guarded()
    made = path.with_name("model.int8.onnx")
    files.write(found.model, made)
    apart = chain.link("ONNX = INT8", "int8", outputs(path, held), outputs(made, held))
    chain.require([apart])
    return {
        "nodes": found.nodes,
        "in_float": [kept.kind for kept in found.kept],
        "without_guard": BOUND * found.spent_without,
        "computes_in": onnxruntime.observed_precision(onnxruntime.load(made)),
        "error": apart.error,
        "bytes": [path.stat().st_size, made.stat().st_size],
    }


def outputs(path: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.load(path)
    return dict(zip(session.outputs, onnxruntime.run(session, {"input": images}), strict=True))


def line(name: str, row: dict[str, Any]) -> list[object]:
    def left(method: str) -> str:
        return f"{row[method]['macs'] / row['macs']:.0%}" if row[method] else "refused"

    pruned, int8 = row["pagcp"] or row["even"], row.get("int8")
    layers = pruned["units"] + sum(pruned["left_alone"].values()) if pruned else 0
    return [
        *(name, row["params"] / 1e3, row["macs"] / 1e6, left("even"), left("pagcp")),
        *(f"{pruned['pruned']} of {pruned['units']}" if pruned else "", layers),
        "refused" if row["onnx_error"] is None else f"{row['onnx_error']:.0e}",
        int8["computes_in"] if int8 else "refused",
        f"{int8['error']:.0e}" if int8 else "",
        row["seconds"],
    ]


def figures(outcome: contract.Outcome, rows: Sequence[dict[str, Any]]) -> None:
    whole = [row for row in rows if not row["refused"]]
    outcome.figures |= {
        "networks": len(rows),
        "whole_chain": len(whole),
        "refused_by_pagcp": sum("PAGCP" in row["refused"] for row in rows),
        "refused_by_export": sum("export" in row["refused"] for row in rows),
        "refused_by_int8": sum("INT8" in row["refused"] for row in rows),
        "largest_fp32_error": max((row["onnx_error"] or 0.0 for row in rows), default=0.0),
        "largest_int8_error": max((row["int8"]["error"] for row in whole), default=0.0),
    }
    outcome.aim(
        "architectures that nobody here wrote, through the chain or refused with a reason",
        ">= 10",
        len(rows),
        len(rows) >= 10,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
