"""One network of a supernet: named on the command line, cut out and checked, written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cli import properties
from cli.training import Training, require_same, space_for
from deploy import interface, onnx
from hw_profiles import op
from nas import checkpoint, file, supernet, tasks
from nas import run as runs
from nas.data import module
from nas.elastic import Network, channels_last, extract, resize
from nas.errors import NasctlError, ParityFailed, UsageError
from nas.run import Run
from nas.space import Genes, SearchSpace, arch_to_dict

ARCH_FORMS = "largest, smallest, or JSON with genes (text or file), as an entry of pareto.json"
PARITY = 1e-4  # of the largest output: float rounding over a few dozen layers
COMPARED = 64  # images


def genes_of(space: SearchSpace, text: str) -> Genes:
    """The genes [G] that `--arch text` names.

    Raises UsageError if it names none, NasctlError if its architecture is not what its genes mean
    in this version of the space.
    """
    if text in ("largest", "smallest"):
        return space.largest if text == "largest" else space.smallest
    entry = _parsed(text)
    if not isinstance(entry, dict) or "genes" not in entry:
        hint = "Pass one of its entries." if isinstance(entry, list) else ""
        raise UsageError("names no network", where="--arch", allowed=ARCH_FORMS, next=hint)
    genes = _checked(space, entry["genes"])
    if "arch" in entry:
        meant = _through_json(arch_to_dict(space.decode(genes)))
        for name, value in meant.items():
            if (there := entry["arch"].get(name)) != value:
                raise NasctlError(
                    f"its genes mean {name} {value} in this space, its arch says {there}",
                    where="--arch",
                    next="It is of another space, of other images or of another version.",
                )
    return genes


def _parsed(text: str) -> Any:
    try:
        if text.lstrip().startswith(("{", "[")):
            return json.loads(text)
        return json.loads(Path(text).read_text())
    except OSError as error:
        what = f"cannot read '{text}' ({error.strerror})"
        raise UsageError(what, where="--arch", allowed=ARCH_FORMS) from error
    except ValueError as error:
        raise UsageError(f"not JSON ({error})", where="--arch", allowed=ARCH_FORMS) from error


def _checked(space: SearchSpace, row: Any) -> Genes:
    if not isinstance(row, list) or len(row) != len(space.genes):
        n = f"{len(row)} genes" if isinstance(row, list) else "something else"
        raise UsageError(f"{n} for a space of {len(space.genes)}", where="--arch")
    for gene, value in zip(space.genes, row, strict=True):
        if type(value) is not int or not 0 <= value < len(gene.options):
            allowed = f"0 to {len(gene.options) - 1}, for {gene.options}"
            raise UsageError(f"gene {gene.name} is {value}", where="--arch", allowed=allowed)
    return space.canonical(np.array(row, np.int64))


def _through_json(value: Any) -> Any:
    """As it is after being written and read: tuples are lists."""
    return json.loads(json.dumps(value))


@torch.no_grad()
def cut(training: Training, net: Network, genes: Genes) -> tuple[Network, float]:
    """The stand-alone network of `genes`, re-calibrated, and how far its outputs were from the
    supernet's own before that, as a share of the largest output.

    Raises ParityFailed if that is more than float rounding explains.
    """
    small, error = extracted(training, net, genes)
    if not error <= PARITY:
        raise ParityFailed(
            f"the extracted network differs from the supernet by {error:.1e} of its largest output",
            where=str(training.supernet_path),
            allowed=f"up to {PARITY:.0e}",
        )
    calibration = supernet.calibration_images(training.task)
    return supernet.calibrate(small, calibration, small.arch.resolution), error


@torch.no_grad()
def extracted(training: Training, net: Network, genes: Genes) -> tuple[Network, float]:
    """The stand-alone network of `genes` with the supernet's own statistics, and how far its
    outputs are from the supernet's, as a share of the largest."""
    space, arch = training.space, training.space.decode(genes)
    images = supernet.calibration_images(training.task)[:COMPARED]
    x = resize(images.to(training.accelerator), arch.resolution)
    inside = net.eval()(x, arch)
    small = channels_last(extract(net, space.build(arch).to(x.device))).eval()
    return small, float((small(x) - inside).abs().max() / inside.abs().max().clamp_min(1e-12))


def cost(space: SearchSpace, genes: Genes) -> dict[str, int]:
    ops = space.ops(space.decode(genes))
    return {"macs": op.macs(ops), "params": op.params(ops)}


def describe(training: Training, genes: Genes) -> dict[str, Any]:
    """What the file of a network says of itself: enough to build it, to feed it and to refuse it
    where the space or the data are others."""
    task, arch = training.task, training.space.decode(genes)
    return {
        **training.description,
        "network": {"genes": genes.tolist(), "arch": arch_to_dict(arch)},
        "task": {"data": training.spec.data, "size": training.spec.size, "classes": task.classes},
        "input": {"resolution": arch.resolution, "mean": task.mean, "std": task.std},
        "supernet": None if training.spec.alone else file.sha256(training.supernet_path),
        "written_by": f"nasctl {metadata.version('nasctl')}",
        **onnx.licensed(training.spec.licence),
    }


def said(training: Training, genes: Genes, metrics: Mapping[str, float]) -> dict[str, str]:
    """What the ONNX file of a network says of itself; `metrics` are of validation images."""
    spec, arch = training.spec, training.space.decode(genes)
    origin = {"space": spec.space, "genes": json.dumps(genes.tolist())}
    return properties.of(
        {**origin, "run": training.run.folder.name},
        arch=arch_to_dict(arch),
        fed=interface.of_task(training.task, spec.data, spec.size, arch.resolution),
        validation=metrics,
        licence=spec.licence,
    )


def read(path: Path, data: str | None) -> tuple[Training, Genes, Network]:
    """A network's file, with the data it was trained on (at `data`, if it is not where it was).

    Raises NasctlError naming the difference if the space or the data here are others, and for data
    that are code which the user did not name.
    """
    tensors, meta = checkpoint.read(path)
    said = checkpoint.description(meta, path)
    if "network" not in said:
        if "several" in said:  # see `cli.several`
            what = f"{path} is of a search for several tasks"
            raise UsageError(what, where="MODEL", next="nasctl verify judges its folder.")
        raise UsageError(
            f"{path} is a whole supernet", where="MODEL", next="Name its run directory instead."
        )
    module.require_typed(data, said["task"]["data"])
    fields = {"space": said["space"], "width": said["width"], "size": said["task"]["size"]}
    fields["licence"] = said.get("licence", "")  # of older files: in none
    given = {"epochs": 1, "threads": 1, "data": data or said["task"]["data"]}
    spec = runs.make_spec({**fields, **given})
    task = tasks.load(spec.data, size=spec.size)
    training = Training(spec, Run(path.parent), task, space_for(spec, task))
    require_same(training, meta, path)
    genes = genes_of(training.space, json.dumps(said["network"]))
    net = channels_last(training.space.build(training.space.decode(genes)))
    checkpoint.fill(net, tensors, path)
    return training, genes, net.to(training.accelerator).eval()
