"""What the rows of the AutoDistil benchmark say: tables, intervals and aims."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import contract
from nas import correlation

DRAWS = 2000
Milliseconds = dict[str, Any]  # network -> median, and why it is in doubt
Right = NDArray[np.float64]  # [seeds, sentences]: 1 where right


def show(rows: contract.Rows, size: str, outcome: contract.Outcome) -> None:
    """Prints the tables of the rows of these sizes; figures and aims go to `outcome`."""
    every = [(json.loads(name), value) for name, value in rows.done.items()]
    keyed = [(key, value) for key, value in every if key["size"] == size]
    right = _right(keyed)
    ranked = {
        (key["source"], key["space"]): value["members"]
        for key, value in keyed
        if key["part"] == "ranked"
    }
    timed = [value["ms"] for key, value in keyed if key["part"] == "latency"]
    milliseconds: Milliseconds = timed[0] if timed else {}
    alone = {key["source"]: value["loss"] for key, value in keyed if key["part"] == "loss"}
    _table_of_students(right, ranked, alone, milliseconds)
    _claim(ranked, right, outcome)
    _controls(right, outcome)
    _whole(right, ranked, milliseconds, outcome)
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


def _member(ranked: Any, source: str, student: str) -> dict[str, float]:
    space, genes = student.split()
    for member in ranked.get((source, space), []):
        if "".join(map(str, member["genes"])) == genes:
            return dict(member)
    return {"loss": float("nan"), "macs": float("nan")}


def _table_of_students(
    right: Any, ranked: Any, alone: dict[str, float], milliseconds: Milliseconds
) -> None:
    """Costs are of the student that the row is about, whoever stands in for it."""
    lines = []
    for (source, student), bits in sorted(right.items()):
        scores = 100 * bits.mean(1)
        ms = milliseconds.get(student, [float("nan")])[0]
        loss = macs = float("nan")
        if " " in student:
            loss = alone.get(source, _member(ranked, source, student)["loss"])
            macs = _member(ranked, f"k3 {student.split()[0]}", student)["macs"] / 1e6
        name = source or "fine-tuned"
        spread = float(scores.std(ddof=1)) if len(scores) > 1 else float("nan")
        values = [float(scores.mean()), spread, float(scores.min())]
        lines.append([name, student, loss, macs, float(ms), *values, len(scores)])
    header = ("source", "student", "relation loss", "MMACs", "ms", "SST-2 %", "sd", "worst", "n")
    print(contract.table(header, lines))


def difference(a: Right, b: Right) -> tuple[float, float, float]:
    """Points of accuracy by which a is better than b, and its 95 % interval: paired bootstrap of
    the sentences, and of the fine-tuning seeds of each. Supernets are trained once."""
    rng, n = np.random.default_rng(0), a.shape[1]
    drawn = []
    for _ in range(DRAWS):
        rows = rng.integers(n, size=n)
        some = [x[rng.integers(len(x), size=len(x))][:, rows].mean() for x in (a, b)]
        drawn.append(some[0] - some[1])
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(100 * (a.mean() - b.mean())), float(100 * low), float(100 * high)


def together(students: Sequence[Right]) -> Right:
    """The mean of several students, sentence by sentence: they answer the same sentences, so that
    these are drawn once for all of them."""
    found: Right = np.mean(students, axis=0)
    return found


def _controls(right: Any, outcome: contract.Outcome) -> None:
    """What each rival of a student gets less than the student of the three sub-spaces."""
    lines = []
    for (source, student), bits in sorted(right.items()):
        ours = right.get((f"k3 {student.split()[0]}", student)) if " " in student else None
        if ours is None or source.startswith("k3"):
            continue
        seeds = min(len(ours), len(bits))
        points, low, high = difference(ours[:seeds], bits[:seeds])
        lines.append([student, source, points, low, high, seeds])
        outcome.figures[f"{student} over {source}"] = points
    if lines:
        print(contract.table(("student", "over", "points", "from", "to", "seeds"), lines))


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
            found = difference(*map(together, zip(*pairs, strict=True)))
            name = f"points over {rival}"
            outcome.figures[name] = found[0]
            outcome.aim(name, "interval above 0", round(found[1], 2), found[1] > 0)
            print(f"K=3 over {rival}: {found[0]:+.2f} points ({found[1]:+.2f} to {found[2]:+.2f})")
    header = ("rival", "sub-space", "mean loss K=3", "mean loss K=1", "share of members better")
    if lines:
        print(contract.table(header, lines))


def _whole(right: Any, ranked: Any, milliseconds: Milliseconds, outcome: contract.Outcome) -> None:
    """The student that the method would choose at twice the teacher's speed: of those timed so
    fast, the one of the lowest held-out loss. The task's test sentences choose nothing."""
    if ("", "teacher") not in right or "teacher" not in milliseconds:
        return
    teacher, limit = right["", "teacher"], milliseconds["teacher"][0] / 2
    fast = {
        (source, student): _member(ranked, source, student)["loss"]
        for source, student in right
        if source.startswith("k3") and milliseconds.get(student, [np.inf])[0] <= limit
    }
    if fast:
        chosen = min(fast, key=lambda name: fast[name])
        points, low, high = difference(right[chosen], teacher)
        whole = 100 * teacher.mean()
        share = 1 + points / whole
        outcome.figures["share of the teacher's accuracy at twice its speed"] = share
        outcome.aim("share at 2x", ">= 0.97", round(share, 4), share >= 0.97)
        print(
            f"at twice the teacher's speed {chosen[1]}: {share:.1%} of its accuracy "
            f"({1 + low / whole:.1%} to {1 + high / whole:.1%})"
        )


def _correlation(right: Any, ranked: Any, outcome: contract.Outcome) -> None:
    """Does the loss that ranks say what the task will say? Among all students, where size alone
    says much, and among those of one sub-space."""
    known = [
        (student.split()[0], _member(ranked, source, student)["loss"], float(bits.mean()))
        for (source, student), bits in right.items()
        if source.startswith(("k3", "k1", "ranked")) and not source.endswith("own")
    ]
    for name in ("all", *dict.fromkeys(space for space, _, _ in known)):
        some = [row[1:] for row in known if name in ("all", row[0])]
        if len(some) < correlation.LEAST:
            continue
        loss, accuracy = np.array(some).T
        found = correlation.interval(-loss, accuracy)
        outcome.figures[f"rank correlation of loss and accuracy, {name}"] = found.value
        print(
            f"rank correlation of -loss and accuracy, {name}, {len(some)} students: "
            f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
        )


def _images(keyed: list[tuple[dict[str, Any], dict[str, Any]]], outcome: contract.Outcome) -> None:
    """Fronts by as many evaluations on validation images, judged on test images."""
    for key, value in keyed:
        if key["part"] != "images":
            continue
        lines = [
            [method, *found["hypervolume"], len(found["test"]), found["test"][-1]]
            for method, found in value["fronts"].items()
        ]
        print(contract.table(("vit", "val volume", "test volume", "on front", "best test"), lines))
        searched, random = (value["fronts"][m]["hypervolume"][1] for m in ("search", "random"))
        outcome.figures["vit hypervolume, search over random"] = searched / random
        outcome.aim("vit front", "no worse than random", searched / random, searched >= random)
