"""Part `stranger`: are delivered files inside their budgets when somebody else measures them?

One search on the digits; for each budget of a grid the network that `nasctl export --latency`
delivers, which was timed by us. Then examples/measure_latency.py, which imports nothing of ours,
times the file in a fresh process, 20 times. Held is a budget by the middle of the 20 medians; the
worst median and the p95s, which on a shared core say what else ran there, are told beside it. A
file that missed its budget when we timed it ourselves (exit code 4) is measured all the same: ours
is then a dash.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import contract
from benchmarks.pipeline_rows import load, machine, typed
from deploy import bundle as bundles
from deploy import verify
from nas import file
from nas.errors import NasctlError

SCRIPT = Path(__file__).parents[1] / "examples" / "measure_latency.py"
TIMES = 20
#: of the way from the fastest network to the slowest
SHARES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
HEADER = ("budget ms", "ours", "middle of 20", "worst of 20", "p95, middle", "p95, worst", "inside")


def run(
    outcome: contract.Outcome, rows: contract.Rows, folder: Path, *, quick: bool = False
) -> None:
    """A row per budget; the same call goes on where it was stopped."""
    shares, times = (SHARES[-1:], 2) if quick else (SHARES, TIMES)
    found = []
    for share in shares:
        try:
            found.append(row(rows, searched(folder, quick), share, times))
        except NasctlError as error:
            print(f"{share:.0%} of the way: not measured: {error}", flush=True)
    if not found:
        return
    print(contract.table(HEADER, [line(each) for each in found]))
    medians, p95s = (
        np.array([each[name] / each["budget_ms"] for each in found])
        for name in ("middle_ms", "p95_ms")
    )
    outcome.figures |= {
        "budgets held": float(np.mean(medians <= 1)),
        "largest share of a budget, median": float(medians.max()),
        "largest share of a budget, p95": float(p95s.max()),
        "budgets held at the p95": float(np.mean(p95s <= 1)),
    }
    if theirs := [each["middle_ms"] / each["ours_ms"] for each in found if each["ours_ms"]]:
        outcome.figures["theirs over ours"] = float(np.median(theirs))
    held = len(found) == len(shares) and bool((medians <= 1).all())
    aim = f"inside each of {len(shares)} budgets"
    outcome.aim("stranger_median", aim, float(medians.max()), held)


def searched(folder: Path, quick: bool) -> Path:
    """The run of the search, from an earlier call where there is one."""
    search = folder / "digits"
    if not (search / "report.json").is_file():
        words = ["search", "--data", "digits", "--space", "resnet", "--quick"]
        words += ["--strategy", "predictor", "--threads", "1", "--run", str(search), "--json"]
        words += ["--epochs", "1"] if quick else []
        typed(words, search / "bundle" / bundles.MANIFEST)
    return search


def row(rows: contract.Rows, search: Path, share: float, times: int) -> dict[str, Any]:
    report = search / "report.json"
    key = {"part": "stranger", "share": share, "times": times}
    key |= {"search": file.sha256(report), "machine": machine()}
    if (known := rows.get(key)) is not None:
        return known
    ends = [entry["high_ms"] for entry in verify.read(report)["front"]]
    budget = min(ends) + share * (max(ends) - min(ends))
    path = search.parent / f"digits-{share}.onnx"
    code, ours = delivered(search, path, budget)
    theirs = [stranger(path) for _ in range(times)]
    medians, p95s = (sorted(each[name] for each in theirs) for name in ("median_ms", "p95_ms"))
    made = {
        "budget_ms": budget,
        "ours_ms": ours,
        "code": code,
        "sha256": file.sha256(path),
        "middle_ms": float(np.median(medians)),
        "worst_ms": medians[-1],
        "p95_ms": float(np.median(p95s)),
        "worst_p95_ms": p95s[-1],
        "load": load(),
    }
    rows.add(key, made)
    return made


def delivered(search: Path, path: Path, budget_ms: float) -> tuple[int, float | None]:
    """Write the file of a budget from a finished search; returns the exit code and the median that
    we measured, None where that was above the budget. Raises NasctlError where none fits."""
    path.unlink(missing_ok=True)  # an earlier one is not what is delivered now
    words = ["export", search, "--latency", f"{budget_ms:.6g}ms", "--out", path, "--json"]
    code, said = typed(words, path)
    return code, None if code else float(json.loads(said)["measured"]["timing"]["median_ms"])


def stranger(path: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(path)], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def line(each: dict[str, Any]) -> list[object]:
    names = ("budget_ms", "ours_ms", "middle_ms", "worst_ms", "p95_ms", "worst_p95_ms")
    inside = "yes" if each["middle_ms"] <= each["budget_ms"] else "NO"
    return [*(f"{each[name]:.4f}" if each[name] else "-" for name in names), inside]
