"""`nasctl evaluate`: accuracy and loss of one network on validation or test images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from nas.errors import UsageError

if TYPE_CHECKING:
    from cli.training import Training
    from nas.elastic import Network
    from nas.space import Genes


def command(
    what: Annotated[
        Path, typer.Argument(metavar="RUN|MODEL", help="Run directory, or a network's safetensors.")
    ],
    arch: Annotated[
        str | None,
        typer.Option(help="Of a run: as for `nasctl extract`. [what its search chose]"),
    ] = None,
    split: Annotated[str, typer.Option(help="val or test.")] = "val",
    data: Annotated[
        str | None, typer.Option(help="Of a model: the same data at another place.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Judge one network: cut from a run's supernet and re-calibrated, or a file of its own.

    On validation images, unless the test split is asked for by name.
    """
    if split not in ("val", "test"):
        raise UsageError(f"unknown split '{split}'", where="--split", allowed="val, test")
    training, genes, net = _model(what, arch, data) if what.is_file() else _child(what, arch, data)
    content = _judged(training, genes, net, split)
    if json:
        return console.emit_json(content)
    console.say(", ".join(f"{k} {v}" for k, v in content["arch"].items()), "network")
    console.say(
        f"{content['accuracy']:.2%}, loss {content['loss']:.4f} on {content['images']} "
        f"{'test' if split == 'test' else 'validation'} images",
        "accuracy",
    )
    if split == "test":
        console.say("test images: read once, for a network that is chosen already, they are fair")
    return None


def _model(path: Path, arch: str | None, data: str | None) -> tuple[Training, Genes, Network]:
    from cli import child

    if arch is not None:
        raise UsageError("a model's file is one network", where="--arch", next="Leave it out.")
    return child.read(path, data)


def _child(folder: Path, arch: str | None, data: str | None) -> tuple[Training, Genes, Network]:
    from cli import child, training

    if data is not None:
        raise UsageError("a run knows its data", where="--data", next="Leave it out.")
    if not folder.is_dir():
        raise UsageError(f"no run and no model {folder}", where="RUN|MODEL")
    opened = training.opened(folder)
    if arch is None and not opened.run.path(training.ARCH).is_file():
        raise UsageError(
            "no search has chosen a network in this run",
            where="--arch",
            allowed=child.ARCH_FORMS,
        )
    genes = child.genes_of(opened.space, arch or str(opened.run.path(training.ARCH)))
    net, _ = child.cut(opened, training.finished_supernet(opened), genes)
    return opened, genes, net


def _judged(training: Training, genes: Genes, net: Network, split: str) -> dict[str, Any]:
    from cli import child
    from nas import supernet
    from nas.space import arch_to_dict

    images = training.task.splits[split]
    score = supernet.evaluate(net, training.task, images, net.arch.resolution)
    return {
        "split": split,
        "images": len(images),
        "accuracy": score.accuracy,
        "loss": score.cross_entropy,
        "genes": genes.tolist(),
        "arch": arch_to_dict(net.arch),
        **child.cost(training.space, genes),
    }
