"""What `nasctl verify` says of what it found, and with which exit code it ends."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cli import bundling, console, gate, judging
from cli.verifying import Asked
from deploy import chain
from deploy.chain import Link
from nas import file
from nas.errors import BudgetMissed, NasctlError, ParityFailed


def beside(named: Path) -> Path:
    """Where the report goes: never into the bundle, which it would change."""
    named = named.resolve()
    folder = named if (named / bundling.FOLDER).is_dir() else named.parent
    return folder / ("verify.json" if folder == named else f"{named.stem}.verify.json")


def write(content: Mapping[str, Any], path: Path) -> None:
    text = json.dumps(strict(content), indent=1, allow_nan=False)
    file.write(path, (text + "\n").encode())


def strict(value: Any) -> Any:
    """`value` with null for what is no number or not finite: JSON has neither."""
    if isinstance(value, Mapping):
        return {key: strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say_outcome(content: Mapping[str, Any], path: Path) -> None:
    for one in content["chain"]:
        sign = "holds" if one["holds"] else "DOES NOT HOLD"
        console.say(
            f"{one['name']}: {one['error']:.1e} of the outputs' size, up to "
            f"{one['tolerance']:g} in {one['precision']}: {sign}",
            "chain",
        )
    for name, both in (content["metric"] or {}).items():
        console.say(
            f"{name} {both['delivered']:.4f} on {both['images']} {content['split']} images "
            f"(float file {both['float']:.4f})",
            "metric",
        )
    for name, both in content["bound"].items():
        console.say(
            f"{name} {both['delivered']:.4f} on the {both['images']} images that it was quantized "
            f"by (float file {both['float']:.4f}, of which {100 * both['max_drop']:.3g} % may go)",
            "bound",
        )
        if beyond := _beyond(name, both):
            console.say(beyond, "note")
    if (found := content["measured"]) is not None:
        budget = content["budget"]["latency_ms"]
        against = f", budget {console.format_ms(budget)}" if budget else ""
        console.say(
            f"median {console.format_ms(found['median_ms'])}, p95 "
            f"{console.format_ms(found['p95_ms'])}{against}",
            "latency",
        )
        if found["noisy"]:
            console.say(f"in doubt: {found['noisy']}")
        console.say(f"{found['memory_bytes'] / 1e6:.1f} MB more than the library alone", "memory")
    for note in content["not_measured"]:
        console.say(f"not verified: {note}")
    console.say(str(path), "report")


def _beyond(name: str, both: Mapping[str, Any]) -> str:
    """Where the images that decided nothing say that more is lost than the bound: no error, as it
    was held on others, but what to expect of new images."""
    told = both["told"]
    if told is None or not math.isfinite(told["float"]):
        return ""
    sides = ({name: value} for value in (told["float"], told["delivered"], both["max_drop"]))
    if judging.spent(*sides) <= 1:
        return ""
    return (
        f"{name} {told['delivered']:.4f} on the {told['images']} other validation images (float "
        f"file {told['float']:.4f}): there it is beyond that bound"
    )


def require(content: Mapping[str, Any], asked: Asked, where: str) -> None:
    """Raises ParityFailed for a broken chain or a metric that is a number of the float file only,
    BudgetMissed for a bound or a budget missed, NasctlError for a budget that was typed and could
    not be checked, or that a busy machine leaves in doubt."""
    said = ("name", "precision", "error", "gain", "tolerance")
    chain.require([Link(*(one[key] for key in said)) for one in content["chain"]])
    _require_metrics(content, where)
    found, budget = content["measured"], content["budget"]
    if found is None:
        if asked.latency_ms is not None or asked.memory_bytes is not None:
            raise NasctlError(
                "nothing was measured, so the budget was not checked",
                where=where,
                next="Its not_measured says why. Verify it where it runs, or leave the budget out.",
            )
        return
    limit, memory = budget["latency_ms"], budget["memory_bytes"]
    if limit is not None:
        _require_latency(found, limit, where)
    if memory is not None and found["memory_bytes"] > memory:
        raise BudgetMissed(
            f"needs {found['memory_bytes'] / 1e6:.1f} MB, the budget is {memory / 1e6:.1f} MB",
            where=where,
        )


def _require_latency(found: Mapping[str, Any], limit: float, where: str) -> None:
    """On a busy machine the quartiles have to agree, else that is an error of its own."""
    middle, half, noisy = found["median_ms"], found["spread_ms"] / 2, found["noisy"]
    ends = (middle - half, middle + half) if noisy else (middle, middle)
    answer = gate.budget(gate.Span(ends[0], middle, ends[1], noisy), limit)
    took = f"took {console.format_ms(middle)}, the budget is {console.format_ms(limit)}"
    if answer == "missed":
        raise BudgetMissed(took, where=where)
    if answer == "in doubt":
        raise NasctlError(
            f"not decided, {took}; {noisy}", where=where, next="Verify again on a quiet machine."
        )


def _require_metrics(content: Mapping[str, Any], where: str) -> None:
    for name, both in {**(content["metric"] or {}), **content["bound"]}.items():
        if math.isfinite(both["float"]) and not math.isfinite(both["delivered"]):
            raise ParityFailed(
                f"{name} of the delivered file is {both['delivered']}",
                where=where,
                next="What it gives is no number on some images: export or quantize it again.",
            )
    for name, both in content["bound"].items():
        if not math.isfinite(both["float"]):
            continue  # a note says so: there is nothing that a share could be lost of
        sides = ({name: both[side]} for side in ("float", "delivered", "max_drop"))
        if judging.spent(*sides) > 1:
            raise BudgetMissed(
                f"{name} is {both['delivered']:.4f} on the images that it was quantized by, the "
                f"float file has {both['float']:.4f}, of which {100 * both['max_drop']:.3g} % may "
                "go",
                where=where,
                next="Quantize it again, or deliver the float file.",
            )
