"""The rows of the pruning benchmark: a network pruned by one method to one target, and controls."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from benchmarks.pagcp_experiment import WIDTHS, Experiment, Key
from benchmarks.pagcp_latency import Target
from cli.pruning import MARGIN
from compress import baselines, prune, room
from compress.cost import Cost, Macs, Params
from compress.history import History
from compress.job import Job, Pruned, Settings, finish
from compress.objective import Objective
from compress.record import Record
from nas import checkpoint, file
from nas.errors import BudgetInfeasible

FLOPS, LATENCY = "flops", "latency"
#: of the dense network's, what is left
TARGETS = {FLOPS: 0.4, LATENCY: 0.5}
#: every method prunes in so many rounds of equal shares, with a little of the fine-tuning between
ROUNDS = 4
#: what may go of each task's metric, in nasctl's terms (--max-drop): the aim
MAX_DROP = 0.02
#: kept widths are multiples of it. Milliseconds of fp32 convolutions on CPUs with AVX-512 fall in
#: steps of 16; multiply-adds know of no steps, and see what ignoring them costs
TILES = {FLOPS: 8, LATENCY: 16}

DENSE, TUNED, LONGER = "dense", "dense tuned", "dense twice as long"
PAGCP, SUMMED, ONE_SHOT = "pagcp", "pagcp summed", "pagcp one shot"
EQUAL = "pagcp equal D"  # as published: 6 for every task
SCRATCH, SMALL = "pruned shape from scratch", "small uniform distilled"
OURS = (PAGCP, SUMMED, ONE_SHOT, EQUAL)
RIVALS = ("halp", "isomorphic", "group_norm", "taylor", "magnitude", "uniform", "fpgm", "random")


# ---- dense ---------------------------------------------------------------------------------------


def dense(experiment: Experiment, seed: int) -> Key:
    key = experiment.key(DENSE, seed)

    def work() -> Key:
        net = experiment.network(seed)
        return {**experiment.judged(key, net), **_size(experiment, net)}

    return experiment.row(key, work)


def longer(experiment: Experiment, seed: int) -> Key:
    """What is left to gain: the same network, trained twice as long."""
    key = experiment.key(LONGER, seed)
    schedule = replace(experiment.dense, steps=2 * experiment.dense.steps)

    def work() -> Key:
        net = experiment.trained(key, experiment.initial(seed), schedule)
        return experiment.judged(key, net)

    return experiment.row(key, work)


def tuned(experiment: Experiment, seed: int) -> Key:
    """The control that all are compared with: nothing pruned, the same fine-tuning."""
    key = experiment.key(TUNED, seed)

    def work() -> Key:
        teacher, net = experiment.network(seed), experiment.network(seed)
        experiment.trained(key, net, experiment.tuning, teacher)
        return experiment.judged(key, net)

    return experiment.row(key, work)


def target(experiment: Experiment, seed: int) -> Target:
    """The device; the dense network's milliseconds are measured once."""
    found = Target(experiment, experiment.network(seed))
    key = experiment.key("milliseconds", 0)
    return replace(
        found, dense_ms=experiment.row(key, lambda: {"ms": found.dense_milliseconds()})["ms"]
    )


# ---- pruned --------------------------------------------------------------------------------------


def pruned(experiment: Experiment, method: str, seed: int, cost: str) -> Key:
    """Pruned by `method` to the target of `cost`, judged, fine-tuned and judged again."""
    dense(experiment, seed)
    tuned(experiment, seed)
    key = experiment.key(method, seed, cost=cost)
    before = {**key, "state": "untuned"}

    def work() -> Key:
        try:
            net, said = _prune(experiment, key)
        except BudgetInfeasible as error:
            return {"infeasible": str(error)}
        untuned: Key = {**experiment.judged(before, net)}
        untuned |= {"change": experiment.changes([experiment.key(DENSE, seed)], [before])}
        spent = (said["rounds"] - 1) * share_of_tuning(experiment)
        rest = replace(experiment.tuning, steps=experiment.tuning.steps - spent)
        experiment.trained(key, net, rest, experiment.network(seed))
        found = {**experiment.judged(key, net), **_compared(experiment, key, net)}
        return {**found, "untuned": untuned, **said}

    return experiment.row(key, work)


def _prune(experiment: Experiment, key: Key) -> tuple[nn.Module, dict[str, Any]]:
    """The pruned network before its last fine-tuning and what there is to say of it; kept, so that
    a stop costs no pruning."""
    net = experiment.network(key["seed"])
    path, weights = (experiment.path(key, kind) for kind in ("history.json", "pruned.safetensors"))
    if not path.exists():
        began = time.monotonic()
        rounds = Rounds(experiment, key)
        found = rounds.pagcp(net) if key["method"] in OURS else rounds.rival(net)
        said = {
            "history": found.history.to_json(),
            "said": {
                "prune_seconds": round(time.monotonic() - began - rounds.tuning_s, 1),
                "cost": found.cost / found.cost_before,
                "bounds": [dict(bounds) for bounds in found.bounds],
                "rounds": rounds.done + 1,
                "limiting": [row.limiting for row in found.rows],
                "losses": [dict(found.losses_before), dict(found.losses)],
            },
        }
        checkpoint.write(weights, found.net.state_dict(), {})
        file.write(path, json.dumps(said).encode())
    said = json.loads(path.read_text())
    net = History.from_json(said["history"]).replay(net, experiment.example)
    checkpoint.fill(net, checkpoint.read(weights)[0], weights)
    return net.eval(), said["said"]


@dataclass
class Rounds:
    """Prune, fine-tune a little, prune on: the same for every method, so that what differs is what
    they remove."""

    experiment: Experiment
    key: Key
    done: int = 0  # fine-tunings
    tuning_s: float = 0.0

    @property
    def settings(self) -> Settings:
        return Settings(divisor=TILES[self.key["cost"]], seed=self.key["seed"])

    def pagcp(self, net: nn.Module) -> Pruned:
        """In rounds of its own."""
        method = self.key["method"]
        settings = replace(self.settings, summed=method == SUMMED, one_shot=method == ONE_SHOT)
        job = _job(self.experiment, self.key, net)
        if method != EQUAL:
            drops = {objective.name: MAX_DROP for objective in job.objectives}
            settings = replace(settings, bound=room.of(net, job.objectives, job.batches, drops))
        record = self.experiment.path(self.key, "record.jsonl")
        return finish(prune.prune(job, settings, record, rounds=ROUNDS, recover=self._recovered))

    def rival(self, net: nn.Module) -> Pruned:
        """To the target in rounds of equal shares."""
        method, result = baselines.load(self.key["method"]), None
        first = _job(self.experiment, self.key, net)
        full = first.cost.of(net, self.experiment.example)
        while True:
            share = (first.target / full) ** ((self.done + 1) / ROUNDS)
            job = replace(first, net=net, target=share * full)
            record = self.experiment.path(self.key, f"record-{self.done}.jsonl")
            found = finish(method(job, self.settings, Record(record, job.inputs())))
            result = result.then(found) if result else found
            if self.done + 1 == ROUNDS:
                return result
            net = self._recovered(found.net, self.done)

    def _recovered(self, net: nn.Module, number: int) -> nn.Module:
        began = time.monotonic()
        key = {**self.key, "round": number}
        schedule = replace(self.experiment.tuning, steps=share_of_tuning(self.experiment))
        net = self.experiment.trained(key, net, schedule, self.experiment.network(key["seed"]))
        self.done = number + 1
        self.tuning_s += time.monotonic() - began
        return net


def share_of_tuning(experiment: Experiment) -> int:
    """Steps after each round but the last, which takes what is left of the fine-tuning."""
    return experiment.tuning.steps // (2 * ROUNDS)


def _job(experiment: Experiment, key: Key, net: nn.Module) -> Job:
    """Losses are measured on val, which is held out of train; what is reported is test. As in
    `nasctl prune`, a target in milliseconds is aimed a little below."""
    cost: Cost = Macs()
    if key["cost"] == LATENCY:
        cost = target(experiment, key["seed"]).cost()
    left = TARGETS[key["cost"]] * cost.of(net, experiment.example)
    return Job(
        net,
        experiment.example,
        [Objective(goal.name, goal.loss) for goal in experiment.task.goals],
        list(experiment.task.batches(experiment.task.val)),
        cost,
        left / MARGIN if key["cost"] == LATENCY else left,
    )


def missed(row: Key, cost: str) -> bool:
    """Is the network over the target as it was measured afterwards?"""
    share = np.median(row["ms_shares"]) if cost == LATENCY else row["macs_share"]
    return bool(share > TARGETS[cost])


# ---- controls ------------------------------------------------------------------------------------


def scratch(experiment: Experiment, seed: int, cost: str) -> Key:
    """PAGCP's shape from random weights, for as many images as dense training and fine-tuning."""
    pruned(experiment, PAGCP, seed, cost)
    key = experiment.key(SCRATCH, seed, cost=cost)

    def work() -> Key:
        path = experiment.path(experiment.key(PAGCP, seed, cost=cost), "history.json")
        history = History.from_json(json.loads(path.read_text())["history"])
        net = history.replay(experiment.initial(seed), experiment.example)
        return _from_random(experiment, key, net, None)

    return experiment.row(key, work)


def small(experiment: Experiment, seed: int, cost: str) -> Key:
    """The network with all widths smaller alike, the widest that meets the target, taught by the
    dense one for the same images."""
    tuned(experiment, seed)
    key = experiment.key(SMALL, seed, cost=cost)

    def work() -> Key:
        teacher = experiment.network(seed)
        job = _job(experiment, key, teacher)
        nets = (experiment.initial(seed, widths) for widths in _narrower())
        fitting = (net for net in nets if job.cost.of(net.eval(), job.example_inputs) <= job.target)
        return _from_random(experiment, key, next(fitting), teacher)

    return experiment.row(key, work)


def _narrower() -> list[tuple[int, ...]]:
    """From the widest; in multiples of 8, because those of the tile would be two networks."""
    return [tuple(max(8, round(w * s / 128) * 8) for w in WIDTHS) for s in range(15, 0, -1)]


def _from_random(
    experiment: Experiment, key: Key, net: nn.Module, teacher: nn.Module | None
) -> Key:
    steps = experiment.dense.steps + experiment.tuning.steps
    experiment.trained(key, net, replace(experiment.dense, steps=steps), teacher)
    return {**experiment.judged(key, net), **_compared(experiment, key, net)}


# ---- what every row says -------------------------------------------------------------------------


def _compared(experiment: Experiment, key: Key, net: nn.Module) -> Key:
    """Size, speed, and the changes on test against the dense network with the same fine-tuning."""
    seed = key["seed"]
    device = target(experiment, seed)
    full, here = _size(experiment, device.dense), _size(experiment, net)
    reference = [experiment.key(TUNED, seed)]
    return {
        **here,
        "macs_share": here["macs"] / full["macs"],
        "params_share": here["params"] / full["params"],
        "ms_shares": device.relative(net),
        "change": experiment.changes(reference, [key]),
    }


def _size(experiment: Experiment, net: nn.Module) -> dict[str, float]:
    costs: dict[str, Cost] = {"macs": Macs(), "params": Params()}
    return {name: cost.of(net, experiment.example) for name, cost in costs.items()}
