"""Run the exported file and say what was promised beside what was measured.

Everything here works on the file that ships, in the runtime it ships for, not on the network that
it came from; only `parity` needs both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hw_profiles.energy import EnergyEstimate
from hw_profiles.latency import Estimate
from hw_profiles.measure import FRESH, Pace, Plan, Setting, Timing, fresh_session
from hw_profiles.runtimes import Session, onnxruntime
from nas import file
from nas.errors import NasctlError, ParityFailed

if TYPE_CHECKING:
    from torch import nn

#: allowed difference between network and file, relative to the largest value. Exporting reorders
#: float32 sums (1e-6 or so); a wrong constant, axis or mode is orders of magnitude above
TOLERANCE = 1e-4


def parity(
    net: nn.Module, path: Path, images: np.ndarray, *, batch_sizes: Sequence[int] = (1, 3, 32)
) -> float:
    """Largest absolute difference between any output of `net` (in eval mode) and of the file.

    `parity_inputs` for an image network, whose one input it is fed.
    """
    feeds = {"images": images.astype(np.float32)}
    return parity_inputs(net, path, feeds, batch_sizes=batch_sizes)


def parity_inputs(
    net: nn.Module,
    path: Path,
    feeds: Mapping[str, np.ndarray],
    *,
    batch_sizes: Sequence[int] = (1, 3, 32),
) -> float:
    """Largest absolute difference between any output of `net` (in eval mode) and of the file, over
    `feeds` [N, ...], which are the network's positional inputs in their order.

    Each output is held to its own largest value. Several batch sizes, because a file can be right
    at the one it was traced with and at no other.
    """
    import torch

    from nas.outputs import named

    if not all(len(values) for values in feeds.values()):
        raise ValueError("parity needs at least one example")
    session = onnxruntime.load(path)
    worst = 0.0
    training = {module: module.training for module in net.modules()}
    net.eval()
    try:
        for size in batch_sizes:
            # repeats when there are too few
            batch = [np.resize(each, (size, *each.shape[1:])) for each in feeds.values()]
            with torch.no_grad():
                expected = named(net(*map(torch.from_numpy, batch)))
            found = _outputs(session, batch)
            where = f"{path} at batch {size}"
            if list(found) != list(expected):
                raise ParityFailed(
                    f"the file's outputs are {list(found)}, the network's {list(expected)}",
                    where=where,
                )
            for name, tensor in expected.items():
                worst = max(worst, _difference(tensor.numpy(), found[name], f"{where}, {name}"))
    finally:
        for module, mode in training.items():
            module.training = mode
    return worst


def outputs(
    path: Path, images: np.ndarray, *, batch: int = 256, threads: int = 1
) -> dict[str, np.ndarray]:
    """The file's outputs by name for every image, run in batches."""
    session = onnxruntime.load(path, threads=threads)
    images = images.astype(np.float32)
    parts = [_outputs(session, [images[at : at + batch]]) for at in range(0, len(images), batch)]
    return {name: np.concatenate([part[name] for part in parts]) for name in session.outputs}


def latency(
    path: Path,
    *,
    rng: np.random.Generator,
    setting: Setting = Setting(),
    plan: Plan = Plan(),
    pace: Pace | None = None,
) -> Timing:
    """Time the file on this machine, batch 1, by the protocol that latency tables are made with.

    The middle one of several fresh processes: see `measure.fresh_session`.
    """
    sessions = (
        fresh_session([path], setting, rng=rng, plan=plan, pace=pace or Pace())
        for _ in range(FRESH)
    )
    timings = [session.timings[0] for session in sessions]
    return sorted(timings, key=lambda timing: timing.median_ms)[len(timings) // 2]


def _outputs(session: Session, batch: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    found = onnxruntime.run(session, dict(zip(session.inputs, batch, strict=True)))
    return dict(zip(session.outputs, found, strict=True))


def _difference(expected: np.ndarray, found: np.ndarray, where: str) -> float:
    if expected.shape != found.shape:
        raise ParityFailed(
            f"the file's output is {found.shape}, the network's {expected.shape}", where=where
        )
    difference = float(np.abs(expected - found).max())
    limit = TOLERANCE * max(float(np.abs(expected).max()), 1e-6)
    if not difference <= limit:  # also true of nan
        raise ParityFailed(
            f"file and network differ by {difference:.3g}",
            where=where,
            allowed=f"{limit:.3g} ({TOLERANCE:g} of the largest value)",
            next="Export again from the network as it is now; if it stays, this is a bug of ours.",
        )
    return difference


@dataclass(frozen=True, slots=True)
class Measured:
    """The file's latency, and on what it was measured."""

    timing: Timing
    on: str  # the device
    runtime: str  # with version and threads


@dataclass(frozen=True, slots=True)
class Chosen:
    """The network that was picked and what is known of it; None is "was not determined"."""

    arch: Mapping[str, Any]
    genes: Sequence[int]
    macs: int
    params: int
    activation_bytes: int | None = None  # largest sum of live tensors, at the device's precision
    val_ce: float | None = None
    val_accuracy: float | None = None
    extracted_val_accuracy: float | None = None  # before any fine-tuning
    torch_test_accuracy: float | None = None  # of the network before export
    test_accuracy: float | None = None  # of the exported file
    predicted: Estimate | None = None
    energy: EnergyEstimate | None = None  # where somebody measured energies of the device
    measured: Measured | None = None
    file: Mapping[str, str | int] | None = None
    parity_error: float | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """A step of the run; a stage that changes the network may state what it promised and got."""

    name: str
    seconds: float
    predicted: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """What a run found. `to_dict` is the content of report.json, which the page is made from."""

    nasctl: str
    created: str
    spec: Mapping[str, Any]
    device: Mapping[str, Any]
    chosen: Chosen
    budget: Mapping[str, float] | None = None
    front: Sequence[Mapping[str, Any]] = ()
    evaluated: Sequence[Sequence[float | None]] = ()
    predictor: Mapping[str, Any] | None = None  # how well accuracy was predicted, if it was
    stages: Sequence[Stage] = ()
    notes: Sequence[str] = ()  # further things that were not measured
    environment: Mapping[str, Any] = field(default_factory=dict)

    def not_measured(self) -> list[str]:
        """What a reader might believe was measured and was not."""
        chosen, device = self.chosen, self.device.get("name", "the target")
        gaps = {
            f"latency of the exported file on {device}": chosen.measured,
            "accuracy of the exported file on test data": chosen.test_accuracy,
            "agreement of the exported file with the network": chosen.parity_error,
        }
        found = [text for text, value in gaps.items() if value is None]
        if chosen.predicted and chosen.predicted.source == "analytic":
            found.append(f"any operator on {device}: predictions are analytic")
        return [*found, *self.notes]

    def to_dict(self) -> dict[str, Any]:
        out = {key: value for key, value in asdict(self).items() if key != "notes"}
        chosen = out["chosen"]
        measured = chosen.pop("measured")
        if measured:
            measured = {**measured.pop("timing"), **measured}
        chosen["latency"] = {"predicted": chosen.pop("predicted"), "measured": measured}
        error = chosen.pop("parity_error")
        chosen["parity"] = None if error is None else {"max_abs_error": error}
        return {**out, "not_measured": self.not_measured()}

    def write(self, path: Path) -> None:
        file.write(path, (json.dumps(self.to_dict(), indent=1) + "\n").encode())


def read(path: Path) -> dict[str, Any]:
    """The content of a report.json."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise NasctlError(
            f"cannot read the report: {error}",
            where=str(path),
            next="Of a run, the same command again finishes it; a bundle, get or make it again.",
        ) from error
    if not isinstance(report, dict):
        raise NasctlError("is no report: a JSON object is expected", where=str(path))
    return report


def environment() -> dict[str, str | int]:
    """What the numbers of a run depend on besides its settings."""
    import os
    import platform
    from importlib import metadata

    libraries = ("torch", "numpy", "onnx", "onnxruntime", "optuna")
    found: dict[str, str | int] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 0,
    }
    for library in libraries:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            found[library] = "absent"
    return found


def runs_in() -> dict[str, str]:
    """What a latency on this machine depends on most."""
    found = environment()
    return {name: str(found[name]) for name in ("cpu", "onnxruntime")}


def _cpu_name() -> str:
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
