"""A finished run in a few lines, from the content of its report.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cli import budgets, console


def summarise(content: dict[str, Any], folder: Path, seconds: float) -> None:
    """The result in a few lines, on stderr."""
    chosen, predictor = content["chosen"], content.get("predictor")
    predicted, measured = chosen["latency"]["predicted"], chosen["latency"]["measured"]
    device = content["device"]["name"]
    say, ms = console.say, console.format_ms
    say()
    say(", ".join(f"{k} {v}" for k, v in chosen["arch"].items()), "chosen")
    say(
        f"{chosen['macs'] / 1e6:.2f} MMACs, {chosen['params'] / 1e3:.0f} k parameters, "
        f"{chosen['activation_bytes'] / 1e3:.3g} kB of activations at the peak"
    )
    say(
        f"{ms(predicted['value_ms'])} on {device} ({predicted['source']}; interval "
        f"{ms(predicted['low_ms'])} to {ms(predicted['high_ms'])}), "
        f"{budgets.goal(content['budget'])}",
        "latency",
    )
    if measured:
        doubt = f"; in doubt: {measured['noisy']}" if measured["noisy"] else ""
        say(
            f"measured on the exported file: median {ms(measured['median_ms'])}, "
            f"p95 {ms(measured['p95_ms'])} ({measured['runtime']}{doubt})"
        )
    for note in content["not_measured"]:
        say(f"not measured, or weaker than it looks: {note}")
    say(
        f"{chosen['test_accuracy']:.2%} on test, the exported file "
        f"({chosen['torch_test_accuracy']:.2%} before export, "
        f"{chosen['val_accuracy']:.2%} on validation)",
        "accuracy",
    )
    say(
        f"{folder / chosen['file']['path']}, {chosen['file']['bytes'] / 1e6:.2f} MB, "
        f"differs from torch by {chosen['parity']['max_abs_error']:.1e}",
        "file",
    )
    macs = [row["macs"] for row in content["front"]]
    say(
        f"{len(macs)} networks, {min(macs) / 1e6:.2f} to {max(macs) / 1e6:.2f} MMACs; "
        f"why this one: {folder / 'report.html'}",
        "front",
    )
    if predictor:
        say(predictor["text"])
    say(f"finished in {console.format_seconds(seconds)}")
