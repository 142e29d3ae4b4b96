"""Networks measured where nasctl cannot reach: a folder to carry to a board and back.

`write` makes the folder: the networks as ONNX files and a script that times each of them with
trtexec, in shuffled rounds with a reference between them. It needs a shell and TensorRT on the
board, no Python. `measured` reads the times that came back: `--exportTimes` files or, from any
other tool, a file `measured.csv` of lines "name,median_ms".
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hw_profiles import half, measure, trtexec
from hw_profiles.graph import onnx_graph
from hw_profiles.ingest import read_json
from hw_profiles.op import Op
from hw_profiles.profile import Group, Ops, digest
from hw_profiles.protocol import Timing
from nas.errors import NasctlError

ROUNDS = 3
BETWEEN_REFERENCES = 8  # networks
REFERENCE, ORDER, SCRIPT, TABLE = "reference", "order.txt", "measure.sh", "measured.csv"
SETTING = "setting.json"
HEADER = ["name", "median_ms"]
ROUNDS_DIFFER = 0.05  # relative: a network whose rounds differ more is in doubt
PRECISIONS = ("fp32", "fp16")  # int8 needs calibrated files, which random weights cannot have

_SCRIPT = f"""#!/bin/sh
# Times the networks of this folder with trtexec. Copy the folder to the board, run this there, copy
# the folder back. After an interruption run it again: what has been timed is skipped.
cd "$(dirname "$0")" || exit 1
trtexec=${{TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}}
words=$("$trtexec" --help </dev/null 2>/dev/null) ||
  {{ echo "no trtexec; set TRTEXEC to its path" >&2; exit 1; }}
typed=
case $words in *--stronglyTyped*) typed=--stronglyTyped ;; esac
if [ -z "$typed" ] && grep -q '"precision": "fp16"' {SETTING}; then
  echo "this TensorRT takes no precision from files; profile it in fp32" >&2; exit 1
fi
only=--buildOnly
case $words in *--skipInference*) only=--skipInference ;; esac
while read -r round name; do
  times=$name.$round.times.json
  [ -s "$times" ] && continue
  if [ ! -s "$name.engine" ]; then
    "$trtexec" --onnx="$name.onnx" $typed $only --saveEngine=engine.part </dev/null >>log 2>&1 &&
      mv engine.part "$name.engine" || {{ echo "$name cannot be built, see log" >&2; continue; }}
  fi
  "$trtexec" --loadEngine="$name.engine" --useCudaGraph --noDataTransfers --warmUp=300 \\
    --duration=1 --exportTimes=times.part </dev/null >>log 2>&1 &&
    mv times.part "$times" || echo "$name cannot be run, see log" >&2
done < {ORDER}
"""


@dataclass(frozen=True)
class Board:
    """What a folder is measured on, and in what."""

    device: str
    runtime: str
    precision: str
    batch: int = 1


def check(folder: Path, board: Board) -> None:
    """Raises NasctlError where the folder was made for something else."""
    path = folder / SETTING
    there = read_json(path)
    if there != asdict(board):
        theirs, ours = _words(there if isinstance(there, dict) else {}), _words(asdict(board))
        raise NasctlError(
            f"is for {theirs}", where=str(path), next=f"Use another folder for {ours}."
        )


def _words(setting: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items())


def write(folder: Path, networks: Sequence[Ops], board: Board, rng: np.random.Generator) -> None:
    """Make the folder, or add what it lacks. Networks are named by their digests."""
    batch, precision = board.batch, board.precision
    if precision not in PRECISIONS:
        raise NasctlError(f"no random network in {precision}", where="--on", allowed=PRECISIONS)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / SETTING).exists():
        check(folder, board)
    (folder / SETTING).write_text(json.dumps(asdict(board), indent=1) + "\n")
    named: dict[str, tuple[Sequence[Op], int]] = {REFERENCE: (measure.reference_ops(), 1)}
    named |= {digest(ops): (ops, batch) for ops in networks}
    for name, (ops, images) in named.items():
        path = folder / f"{name}.onnx"
        if not path.exists():
            model = onnx_graph(ops, batch=images)
            model = half.half(model, name) if precision == "fp16" else model
            whole = path.with_suffix(".part")
            whole.write_bytes(model.SerializeToString())
            os.replace(whole, path)
    (folder / ORDER).write_text("".join(f"{at} {name}\n" for at, name in _order(named, rng)))
    (folder / SCRIPT).write_text(_SCRIPT)
    (folder / SCRIPT).chmod(0o755)


def _order(names: Iterable[str], rng: np.random.Generator) -> list[tuple[str, str]]:
    """(round, network), the reference before every few of them."""
    others = [name for name in names if name != REFERENCE]
    order = []
    for turn in range(ROUNDS):
        for at, which in enumerate(rng.permutation(len(others))):
            if at % BETWEEN_REFERENCES == 0:
                order.append((f"{turn}-{at}", REFERENCE))
            order.append((str(turn), others[which]))
    return order


def there(folder: Path, networks: Sequence[Ops]) -> list[Ops]:
    """Those of the networks that came back with a time."""
    names = _names(folder, _listed(folder))
    return [ops for ops in networks if digest(ops) in names]


def _names(folder: Path, listed: Iterable[str]) -> set[str]:
    return {path.name.split(".")[0] for path in folder.glob("*.times.json")} | set(listed)


def measured(folder: Path, networks: Sequence[Ops]) -> Group:
    """The timings of networks that are `there`. For the noise floor stand the reference's rounds
    or, without them, how far rounds of the same network lie apart, over all that came back.

    Raises NasctlError for damaged or impossible files (see `trtexec.times`), or when nothing was
    timed twice.
    """
    listed = _listed(folder)
    rounds = [_rounds(folder, digest(ops), listed) for ops in networks]
    repeats = [statistics.median(calls) for calls in _rounds(folder, REFERENCE, listed)]
    if len(repeats) < 2:
        # differences of consecutive rounds vary by sqrt(2) times what a round does
        every_name = sorted(_names(folder, listed))
        medians = (
            [statistics.median(calls) for calls in _rounds(folder, name, listed)]
            for name in every_name
        )
        pairs = (pair for own in medians for pair in itertools.pairwise(own))
        repeats = [1 + math.sqrt(2) * (a - b) / (a + b) for a, b in pairs]
    if not repeats:
        raise NasctlError(
            "no network was timed twice, so nobody knows how well the board repeats itself",
            where=str(folder),
            next="Time each of them two or three times, in another order each time.",
        )
    return Group([_timing(every) for every in rounds], repeats)


def _rounds(folder: Path, name: str, listed: Mapping[str, list[float]]) -> list[list[float]]:
    """The calls of each round, in ms."""
    paths = sorted(folder.glob(f"{name}.*.times.json"))
    return [trtexec.times(path) for path in paths] + [[ms] for ms in listed.get(name, ())]


def _timing(rounds: Sequence[Sequence[float]]) -> Timing:
    medians = [statistics.median(calls) for calls in rounds]
    apart = max(medians) / min(medians) - 1
    every = [ms for calls in rounds for ms in calls]
    low, high, p90, p95, p99 = (float(q) for q in np.percentile(every, [25, 75, 90, 95, 99]))
    doubt = f"its rounds differ by {apart:.0%}" if apart > ROUNDS_DIFFER else ""
    doubt = "it was timed once only" if len(rounds) < 2 else doubt
    return Timing(statistics.median(medians), high - low, p90, p95, p99, len(rounds), doubt)


def _listed(folder: Path) -> dict[str, list[float]]:
    """name -> ms of the folder's TABLE, where there is one; a line is a round."""
    path = folder / TABLE
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise NasctlError(f"cannot be read as UTF-8: {error}", where=str(path)) from error
    header, *rows = [row for row in csv.reader(lines) if row] or [[]]
    if header != HEADER:
        raise NasctlError(f"begins with '{','.join(header)}'", where=str(path), allowed=HEADER)
    found: dict[str, list[float]] = defaultdict(list)
    for at, row in enumerate(rows, start=2):
        try:
            name, text = row
            ms = float(text)
        except ValueError as error:
            raise NasctlError(
                f"is '{','.join(row)}'", where=f"{path}, line {at}", allowed="name,median_ms"
            ) from error
        if not 0 < ms < math.inf:
            raise NasctlError(f"says {ms} ms", where=f"{path}, line {at}", allowed="above 0")
        found[name.strip().removesuffix(".onnx")].append(ms)
    return found
