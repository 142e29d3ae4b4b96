"""The pruning benchmark's own parts: networks, rows that resume, how rivals are chosen, tables."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import contract, multitask_nets, pagcp_experiment, pagcp_parts, pagcp_rows
from benchmarks.pagcp_experiment import Experiment
from benchmarks.pagcp_latency import Target
from cli.pruning import MARGIN
from compress.history import History, Step
from nas.data.examples import Examples
from nas.errors import NasctlError
from nas.goals import classes
from nas.multitask import MultiTask
from nas.multitask_training import Schedule


class Net(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.conv = nn.Conv2d(3, widths[0], 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.head = nn.Linear(widths[0], 2)

    def forward(self, x):
        return {"class": self.head(self.norm(self.conv(x)).relu().mean((2, 3)))}


def examples(n, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 8, 8), generator=generator).to(torch.uint8)
    return Examples(images, {"label": torch.arange(n) % 2})


@pytest.fixture
def experiment(tmp_path):
    goal = classes("class", target="label")
    task = MultiTask("toy", (goal,), examples(32, 0), examples(16, 1), examples(16, 2))
    schedule = Schedule(steps=3, batch=8)
    rows = contract.Rows(tmp_path / "rows.jsonl")
    return Experiment("toy", task, Net, schedule, schedule, rows, tmp_path)


@pytest.mark.parametrize(
    ("build", "shape", "answers"),
    [
        (multitask_nets.class_box, (48, 48), {"class": (2, 20), "box": (2, 4)}),
        (
            multitask_nets.street,
            (96, 128),
            {"seg": (2, 11, 96, 128), "edge": (2, 1, 96, 128), "presence": (2, 11)},
        ),
    ],
)
def test_the_networks_answer_every_goal(build, shape, answers):
    net = build().eval()
    outputs = net(torch.zeros(2, 3, *shape))
    assert {name: tuple(out.shape) for name, out in outputs.items()} == answers
    inner = [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d) and m.bias is None]
    assert inner and all(width % 16 == 0 for width in inner)


def test_a_training_is_done_once_and_kept(experiment):
    key = experiment.key("dense", 0)
    first = experiment.network(0)
    assert experiment.path(key, "net.safetensors").exists()
    assert not experiment.path(key, "state.safetensors").exists()
    again = experiment.network(0)
    assert torch.equal(first.conv.weight, again.conv.weight)
    assert not torch.equal(first.conv.weight, experiment.network(1).conv.weight)


def test_a_network_of_another_schedule_is_refused(experiment):
    experiment.network(0)
    with pytest.raises(NasctlError, match=r"trained by .*steps=3.*, not .*steps=4"):
        replace(experiment, dense=Schedule(steps=4, batch=8)).network(0)


def test_rows_are_worked_out_once(experiment):
    calls = []
    for _ in range(2):
        row = pagcp_rows.dense(experiment, 0)
        calls.append(row)
    assert calls[0] == calls[1]
    assert len(experiment.rows.path.read_text().splitlines()) == 1
    assert set(row) == {"test", "val", "macs", "params", "seconds"}


def test_the_control_starts_from_the_dense_network(experiment):
    pagcp_rows.dense(experiment, 0)
    row = pagcp_rows.tuned(experiment, 0)
    assert set(row["test"]) == {"class"}
    changes = experiment.changes([experiment.key("dense", 0)], [experiment.key("dense tuned", 0)])
    value, low, high = changes["class"]
    assert low <= value <= high


def test_a_pruned_network_is_rebuilt_from_its_history(experiment, monkeypatch):
    """Pruning is done once; a run that was stopped in the fine-tuning does not repeat it."""
    calls = []

    def pagcp(rounds, net):
        calls.append(rounds.key)
        history = History((Step("conv", (0, 1, 2, 3)),))
        pruned = history.replay(net, experiment.example)
        nn.init.constant_(pruned.head.bias, 7)  # trained between rounds
        return pagcp_rows.Pruned(pruned, history, 2.0, 1.0, {}, {})

    monkeypatch.setattr(pagcp_rows.Rounds, "pagcp", pagcp)
    key = experiment.key("pagcp", 0, cost="flops")
    for _ in range(2):
        net, said = pagcp_rows._prune(experiment, key)
        assert net.conv.out_channels == pagcp_experiment.WIDTHS[0] - 4
        assert said["cost"] == 0.5
        assert said["rounds"] == 1
        assert (net.head.bias == 7).all()
    assert len(calls) == 1
    assert torch.equal(net.conv.weight, experiment.network(0).conv.weight[4:])


def test_rivals_reach_the_target_in_rounds_with_fine_tuning_between(experiment):
    """Each round asks for an equal share of what is to go, of the network tuned after the last."""
    rounds = pagcp_rows.Rounds(experiment, experiment.key("uniform", 0, cost="flops"))
    dense = experiment.network(0)
    found = rounds.rival(dense)
    assert rounds.done == pagcp_rows.ROUNDS - 1
    assert found.cost <= 0.4 * found.cost_before
    widths = [step.indices for step in found.history.steps]
    assert len(widths) > 1
    assert sum(map(len, widths)) == 32 - found.net.conv.out_channels
    shape = found.history.replay(dense, experiment.example)
    assert shape.conv.weight.shape == found.net.conv.weight.shape


@pytest.fixture
def unmeasured(monkeypatch):
    """Every network as fast as its multiply-adds say."""
    monkeypatch.setattr(Target, "dense_milliseconds", lambda target: 2.0)
    monkeypatch.setattr(Target, "relative", lambda target, net: [0.4, 0.5, 0.6])


def test_pruned_rows_and_controls_from_beginning_to_end(experiment, unmeasured):
    ours = pagcp_rows.pruned(experiment, "pagcp", 0, "flops")
    assert ours["macs_share"] <= 0.4
    assert ours["cost"] == pytest.approx(ours["macs_share"])
    assert len(ours["bounds"]) == pagcp_rows.ROUNDS
    assert all(set(bounds) == {"class"} for bounds in ours["bounds"])
    assert set(ours["untuned"]) == {"test", "val", "change"}
    assert ours["ms_shares"] == [0.4, 0.5, 0.6]
    scratch = pagcp_rows.scratch(experiment, 0, "flops")
    assert scratch["macs"] == ours["macs"], "the same shape"
    assert scratch["test"] != {} and "untuned" not in scratch
    small = pagcp_rows.small(experiment, 0, "flops")
    assert small["macs_share"] <= 0.4
    methods = [row["method"] for row in rows_of(experiment)]
    assert methods == [
        "dense",
        "dense tuned",
        "milliseconds",
        "pagcp",
        "pruned shape from scratch",
        "small uniform distilled",
    ]
    assert pagcp_rows.pruned(experiment, "pagcp", 0, "flops") == ours
    assert len(rows_of(experiment)) == 6


def test_a_target_out_of_reach_is_a_row_that_says_so(experiment, unmeasured, monkeypatch):
    monkeypatch.setitem(pagcp_rows.TARGETS, "flops", 0.01)
    row = pagcp_rows.pruned(experiment, "uniform", 0, "flops")
    assert "is the least that this method comes to" in row["infeasible"]


def rows_of(experiment):
    return [json.loads(line)["key"] for line in experiment.rows.path.read_text().splitlines()]


def test_rivals_are_chosen_by_their_worst_goal_on_validation_images(experiment):
    tuned = {"val": {"a": 0.5, "b": 0.8}, "test": {"a": 0.0, "b": 0.0}}
    experiment.rows.add(experiment.key("dense tuned", 0), tuned)
    found = {"halp": (0.5, 0.6), "taylor": (0.4, 0.8), "random": (0.45, 0.76), "fpgm": (0.5, 0.8)}
    for method in pagcp_parts.RIVALS:
        value = {"infeasible": "no"}
        if method in found:
            value = {"val": dict(zip("ab", found[method], strict=True)), "ms_shares": [0.5]}
        if method == "fpgm":  # best, and over the target
            value["ms_shares"] = [0.6]
        experiment.rows.add(experiment.key(method, 0, cost="latency"), value)
        experiment.rows.add(experiment.key("dense", 0), {})
    # worst: -25 %, -20 %, -10 %
    assert pagcp_parts.strongest(experiment, "latency") == ["random", "taylor"]


def row(worst, low, ms=0.5, macs=0.4):
    change = {"a": [worst, low, 0.0], "b": [0.01, 0.0, 0.02]}
    return {
        "macs_share": macs,
        "params_share": 0.3,
        "ms_shares": [ms, ms, 9.0],
        "change": change,
        "val": {},
        "test": {},
    }


def test_the_table_names_what_was_not_met(experiment, capsys):
    score = {"test": {"a": 0.5}, "val": {"a": 0.5}}
    for method in ("dense", "dense tuned"):
        experiment.rows.add(experiment.key(method, 0), score)
    moved = {"test": {"a": 0.51}, "val": {"a": 0.504}}
    experiment.rows.add(experiment.key("dense twice as long", 0), moved)
    for method, found in (
        ("pagcp", row(-0.01, -0.015, ms=0.45)),
        ("halp", row(-0.005, -0.03)),
        ("random", {"infeasible": "as far as it goes"}),
    ):
        experiment.rows.add(experiment.key(method, 0, cost="flops"), found)
    outcome = contract.Outcome("pagcp")
    pagcp_parts.report(experiment, outcome)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["random", *["-"] * 8] in printed
    assert ["pagcp", "40", "30", "45", "0.889", "-", "-1", "-1.5", "-"] in printed
    met = {name: aim["met"] for name, aim in outcome.aims.items()}
    assert met == {
        "toy converged": True,
        "toy_flops removed": True,
        "toy_flops worst goal": True,
        "toy_flops speed": True,
        "toy_flops rivals": False,
    }
    assert outcome.figures["toy_flops_halp_worst"] == -0.005
    assert outcome.figures["toy_longer_test_points"] == pytest.approx(1.0)


def test_a_rival_over_the_target_is_marked_and_no_rival(experiment, capsys):
    for method in ("dense", "dense tuned"):
        score = {"test": {"a": 0.5}, "val": {"a": 0.5}}
        experiment.rows.add(experiment.key(method, 0), score)
    found = {"pagcp": row(-0.02, -0.03, ms=0.5), "halp": row(-0.01, -0.03, ms=0.51)}
    found["fpgm"] = row(-0.03, -0.04, ms=0.49)
    for method, content in found.items():
        experiment.rows.add(experiment.key(method, 0, cost="latency"), content)
    outcome = contract.Outcome("pagcp")
    pagcp_parts.report(experiment, outcome)
    printed = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert ["halp", "(!)"] in printed and ["fpgm", "(!)"] not in printed
    aim = outcome.aims["toy_latency rivals"]
    assert aim["met"] and aim["got"] == pytest.approx(0.01)


def test_paid_for_with_milliseconds_nothing_is_won(experiment):
    outcome = contract.Outcome("pagcp")
    rows = {"pagcp": row(-0.01, -0.03, ms=0.52), "fpgm": row(-0.03, -0.04, ms=0.49)}
    over = {method for method, row in rows.items() if pagcp_rows.missed(row, "latency")}
    pagcp_parts.compared("toy", rows, outcome, over)
    assert over == {"pagcp"} and not outcome.aims["toy rivals"]["met"]
    assert not pagcp_rows.missed(rows["pagcp"], "flops")  # those are counted


def test_every_method_has_the_same_target_in_milliseconds(experiment, unmeasured, monkeypatch):
    """Whatever a session says of the dense network against itself; a little below, as nasctl."""
    clock = itertools.cycle([1.0, 1.07, 0.95])
    monkeypatch.setattr(Target, "_rough", lambda target, files: [next(clock) for _ in files])
    net = experiment.network(0)
    keys = [experiment.key(method, 0, cost="latency") for method in ("pagcp", "uniform", "halp")]
    targets = [pagcp_rows._job(experiment, key, net).target for key in keys]
    assert targets == [0.5 * 2.0 / MARGIN] * 3


def test_equal_factors_are_still_there(experiment):
    rounds = pagcp_rows.Rounds(experiment, experiment.key("pagcp equal D", 0, cost="flops"))
    found = rounds.pagcp(experiment.network(0))
    assert found.bounds == ({"class": 6.0},) * pagcp_rows.ROUNDS


def test_narrower_networks_come_from_the_widest():
    found = pagcp_rows._narrower()
    sizes = [sum(widths) for widths in found]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) < sum(pagcp_experiment.WIDTHS)
    assert all(width % 8 == 0 for widths in found for width in widths)
