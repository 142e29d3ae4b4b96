"""What the rows of the AutoDistil benchmark say: tables, intervals and aims."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import contract
from nas import correlation

DRAWS = 2000
Milliseconds = dict[str, Any]  # network -> median, and why it is in doubt
Right = NDArray[np.float64]  # [seeds, sentences]: 1 where right


def show(rows: contract.Rows, outcome: contract.Outcome) -> None:
    """Prints the tables; figures and aims go to `outcome`."""
    keyed = [(json.loads(name), value) for name, value in rows.done.items()]
    right = _right(keyed)
    ranked = {
        (key["source"], key["space"]): value["members"]
        for key, value in keyed
        if key["part"] == "ranked"
    }
    timed = [value["ms"] for key, value in keyed if key["part"] == "latency"]
    milliseconds: Milliseconds = timed[0] if timed else {}
    _table_of_students(right, ranked, milliseconds)
    _claim(ranked, right, outcome)
    _whole(right, milliseconds, outcome)
    _correlation(right, ranked, outcome)
    _images(keyed, outcome)


def _right(keyed: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[tuple[str, str], Right]:
    """(source, network) -> which sentences each seed gets right."""
    found: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(dict)
    for key, value in keyed:
        if key["part"] == "task":
            bits = [float(bit) for bit in value["right"]]
            found[key.get("source", ""), key["net"]][key["seed"]] = bits
    return {name: np.array([seeds[s] for s in sorted(seeds)]) for name, seeds in found.items()}


def _loss(ranked: Any, source: str, student: str) -> float:
    space, genes = student.split()
    for member in ranked.get((source, space), []):
        if "".join(map(str, member["genes"])) == genes:
            return float(member["loss"])
    return float("nan")


def _table_of_students(right: Any, ranked: Any, milliseconds: Milliseconds) -> None:
    lines = []
    for (source, student), bits in sorted(right.items()):
        scores = 100 * bits.mean(1)
        ms = milliseconds.get(student, [float("nan")])[0]
        loss = _loss(ranked, source, student) if " " in student else float("nan")
        name = source or "fine-tuned"
        spread = float(scores.std(ddof=1)) if len(scores) > 1 else float("nan")
        values = [float(scores.mean()), spread, float(scores.min())]
        lines.append([name, student, loss, float(ms), *values, len(scores)])
    header = ("source", "student", "relation loss", "ms", "SST-2 %", "sd", "worst", "seeds")
    print(contract.table(header, lines))


def difference(a: Right, b: Right) -> tuple[float, float, float]:
    """Points of accuracy by which a is better than b, and its 95 % interval: paired bootstrap of
    the sentences, and of the seeds of each."""
    rng, n = np.random.default_rng(0), a.shape[1]
    drawn = []
    for _ in range(DRAWS):
        rows = rng.integers(n, size=n)
        some = [x[rng.integers(len(x), size=len(x))][:, rows].mean() for x in (a, b)]
        drawn.append(some[0] - some[1])
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(100 * (a.mean() - b.mean())), float(100 * low), float(100 * high)


def _claim(ranked: Any, right: Any, outcome: contract.Outcome) -> None:
    """Three sub-spaces against one supernet: all members' losses, and the students' accuracies."""
    lines = []
    spaces = [space for source, space in ranked if source.startswith("k3")]
    for rival in ("k1 tokens", "k1 compute"):
        for space in spaces:
            if (rival, space) in ranked:
                ours, theirs = (
                    np.array([m["loss"] for m in ranked[source, space]])
                    for source in (f"k3 {space}", rival)
                )
                values = [float(ours.mean()), float(theirs.mean()), float((ours < theirs).mean())]
                lines.append([rival, space, *values])
                outcome.figures[f"members better, {space} vs {rival}"] = values[2]
        pairs = [
            (bits, right[rival, student])
            for (source, student), bits in right.items()
            if source.startswith("k3") and (rival, student) in right
        ]
        pairs = [pair for pair in pairs if len(pair[0]) == len(pair[1])]
        if pairs:
            found = difference(*(np.concatenate(each, 1) for each in zip(*pairs, strict=True)))
            name = f"points over {rival}"
            outcome.figures[name] = found[0]
            outcome.aim(name, "interval above 0", round(found[1], 2), found[1] > 0)
            print(f"K=3 over {rival}: {found[0]:+.2f} points ({found[1]:+.2f} to {found[2]:+.2f})")
    header = ("rival", "sub-space", "mean loss K=3", "mean loss K=1", "share of members better")
    if lines:
        print(contract.table(header, lines))


def _whole(right: Any, milliseconds: Milliseconds, outcome: contract.Outcome) -> None:
    """The best student at twice the teacher's speed."""
    if ("", "teacher") not in right or "teacher" not in milliseconds:
        return
    teacher, limit = right["", "teacher"].mean(), milliseconds["teacher"][0] / 2
    shares = {
        student: float(bits.mean() / teacher)
        for (source, student), bits in right.items()
        if source.startswith("k3") and milliseconds.get(student, [np.inf])[0] <= limit
    }
    if shares:
        best = max(shares, key=lambda name: shares[name])
        outcome.figures["share of the teacher's accuracy at twice its speed"] = shares[best]
        outcome.aim("share at 2x", ">= 0.97", round(shares[best], 4), shares[best] >= 0.97)


def _correlation(right: Any, ranked: Any, outcome: contract.Outcome) -> None:
    """Does the loss that ranks say what the task will say?"""
    known = [
        (_loss(ranked, source, student), float(bits.mean()))
        for (source, student), bits in right.items()
        if source.startswith(("k3", "k1", "ranked"))
    ]
    if len(known) >= correlation.LEAST:
        loss, accuracy = np.array(known).T
        found = correlation.interval(-loss, accuracy)
        outcome.figures["rank correlation of loss and accuracy"] = found.value
        print(
            f"rank correlation of -loss and accuracy, {len(known)} students: "
            f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
        )


def _images(keyed: list[tuple[dict[str, Any], dict[str, Any]]], outcome: contract.Outcome) -> None:
    """The front of random vit members is made of the best at every cost: how many are on it, and
    by how much the median of the others is worse."""
    for key, value in keyed:
        if key["part"] != "images":
            continue
        accuracy = np.array(value["accuracy"])
        outcome.figures["vit largest accuracy"] = float(accuracy[1])
        outcome.figures["vit smallest accuracy"] = float(accuracy[0])
        outcome.figures["vit median accuracy of random members"] = float(np.median(accuracy[2:]))
        outcome.figures["vit best accuracy on the front"] = float(accuracy[value["front"]].max())
