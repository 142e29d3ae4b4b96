"""The pruning benchmark's own parts: networks, rows that resume, how rivals are chosen, tables."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import (
    contract,
    multitask_nets,
    pagcp_experiment,
    pagcp_latency,
    pagcp_parts,
    pagcp_rows,
    pagcp_tables,
)
from benchmarks.pagcp_experiment import Experiment
from benchmarks.pagcp_latency import Target
from cli.pruning import MARGIN
from compress.history import History, Step
from compress.job import OutOfReach
from nas import checkpoint
from nas.data.examples import Examples
from nas.errors import BudgetInfeasible, NasctlError
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
            (48, 64),
            {"seg": (2, 11, 48, 64), "edge": (2, 1, 48, 64), "presence": (2, 11)},
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
    assert set(row) == {"test", "val", "loss", "macs", "params", "seconds"}
    assert row["loss"]["class"] > 0


@pytest.mark.parametrize("kind", ["net", "test", "val"])
def test_a_row_whose_files_are_gone_is_made_again(experiment, kind):
    pagcp_rows.dense(experiment, 0)
    file = experiment.path(experiment.key("dense", 0), f"{kind}.safetensors")
    file.unlink()
    assert experiment.known(experiment.key("dense", 0)) is None
    pagcp_rows.dense(experiment, 0)
    assert file.exists()
    assert len(experiment.rows.path.read_text().splitlines()) == 2


def test_every_training_between_rounds_has_batches_of_its_own(experiment):
    net, key = experiment.network(1), experiment.key("uniform", 1, cost="flops")
    for number in (0, 1):
        pagcp_rows.Rounds(experiment, key)._recovered(net, number)
        path = experiment.path({**key, "round": number}, "net.safetensors")
        assert f"seed={100 * (number + 1) + 1})" in checkpoint.read(path)[1]["schedule"]


def test_more_images_judge_and_fewer_train(experiment, monkeypatch):
    monkeypatch.setattr(pagcp_experiment, "TO_TEST", 12)
    task = experiment.task
    found = pagcp_experiment._more_to_test(task)
    assert (len(found.train), len(found.val), len(found.test)) == (20, 16, 28)
    assert torch.equal(torch.cat([found.train.images, found.test.images[16:]]), task.train.images)
    assert torch.equal(found.test.images[:16], task.test.images)


def test_val_is_of_blocks_of_frames_and_the_published_one_trains(experiment, monkeypatch):
    split = {
        part: Examples(
            torch.full((n, 3, 8, 8), at * 100, dtype=torch.uint8), {"y": torch.arange(n)}
        )
        for at, (part, n) in enumerate({"train": 100, "val": 10, "test": 7}.items())
    }
    monkeypatch.setattr(pagcp_experiment.camvid, "in_order", lambda path, size: split)
    found = pagcp_experiment._blocks_of(experiment.task, experiment.folder)
    held = [*range(12), *range(48, 60), *range(96, 100)]
    assert found.val.targets["y"].tolist() == held
    assert torch.equal(found.test.targets["y"], torch.arange(7)), "in the order of frames"
    trained = {
        value: sorted(found.train.targets["y"][found.train.images[:, 0, 0, 0] == value].tolist())
        for value in (0, 100)
    }
    assert trained == {0: sorted(set(range(100)) - set(held)), 100: list(range(10))}


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
    assert set(ours["cut"]) == {"test", "val", "loss", "change"}
    assert ours["ms_shares"] == [0.4, 0.5, 0.6] and ours["ms"] == 0.5 * 2.0
    assert ours["prune_seconds"] >= 0
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
    assert "infeasible" in pagcp_rows.small(experiment, 0, "flops")


def unreached(error):
    def prune(*_, **__):
        raise error
        yield

    return prune


def test_bounds_that_end_too_early_stop_nothing_else(experiment, unmeasured, monkeypatch):
    error = BudgetInfeasible("as far as it goes")
    monkeypatch.setattr(pagcp_rows.prune, "prune", unreached(error))
    row = pagcp_rows.pruned(experiment, "pagcp", 0, "latency")
    assert row["infeasible"] == "as far as it goes" and pagcp_rows.missed(row, "latency")
    scratch = pagcp_rows.scratch(experiment, 0, "latency")
    assert scratch["infeasible"] == "PAGCP came to no network"
    outcome = contract.Outcome("pagcp")
    pagcp_tables.report(experiment, outcome)
    assert {name: aim["met"] for name, aim in outcome.aims.items()} == dict.fromkeys(
        (f"toy_latency {aim}" for aim in ("removed", "worst goal", "speed", "rivals")), False
    )


def test_the_network_that_was_reached_is_judged_like_others(experiment, unmeasured, monkeypatch):
    history = History((Step("conv", (0, 1, 2, 3)),))
    net = history.replay(experiment.network(0), experiment.example)
    reached = pagcp_rows.Pruned(net, history, 2.0, 1.75, {}, {})
    error = OutOfReach("as far as it goes", where="target", reached=reached)
    monkeypatch.setattr(pagcp_rows.prune, "prune", unreached(error))
    row = pagcp_rows.pruned(experiment, "pagcp", 0, "flops")
    assert row["macs_share"] > 0.8 and pagcp_rows.missed(row, "flops")
    assert row["infeasible"] == "target: as far as it goes" and "change" in row
    assert pagcp_rows.scratch(experiment, 0, "flops")["macs"] == row["macs"]


def test_multiply_adds_steer_to_a_target_in_milliseconds(experiment, unmeasured, monkeypatch):
    def timed(target, files):
        """As the files' sizes are."""
        sizes = [path.stat().st_size for path in files]
        return [size / sizes[0] for size in sizes]

    monkeypatch.setattr(Target, "_rough", timed)
    monkeypatch.setitem(pagcp_rows.TARGETS, "latency", 0.8)
    monkeypatch.setitem(pagcp_rows.TILES, "latency", 8)
    rounds = pagcp_rows.Rounds(experiment, experiment.key(pagcp_rows.BY_MACS, 0, cost="latency"))
    dense = experiment.network(0)
    found = rounds.rival(dense)
    assert rounds.done == pagcp_rows.ROUNDS - 1
    assert found.cost < found.cost_before and found.cost_before == pytest.approx(
        pagcp_rows.Macs().of(dense, experiment.example)
    )
    device = pagcp_rows.target(experiment, 0).cost()
    assert device.of(found.net, experiment.example) <= 0.8 * 2.0


def test_fine_tunings_are_compared_on_validation_images_only(experiment, unmeasured, monkeypatch):
    def seen_of(net, task, split):
        assert split is task.val
        return evidence(net, task, split)

    pagcp_rows.dense(experiment, 0)
    evidence = pagcp_rows.multitask.evidence
    monkeypatch.setattr(pagcp_rows.multitask, "evidence", seen_of)
    for epochs in (1, 2):
        row = pagcp_rows.pilot(experiment, epochs)
        assert set(row["val"]) == {"class"} and "test" not in row
    assert pagcp_rows.pilot(experiment, 2) == row


def test_sessions_of_many_networks_are_kept_and_verdicts_taken_anew(experiment, monkeypatch):
    clock = itertools.count(1)
    monkeypatch.setattr(pagcp_latency, "_session", lambda files, *_, **__: [float(next(clock))])
    files = [experiment.folder / name for name in "abc"]
    first, second = (Target(experiment, nn.Identity()) for _ in range(2))
    assert [first._rough(files), first._rough(files)] == [[1.0], [2.0]]
    assert [second._rough(files), second._rough(files)] == [[1.0], [2.0]]
    assert [first._rough(files[:2]), second._rough(files[:2])] == [[3.0], [4.0]]


def rows_of(experiment):
    return [json.loads(line)["key"] for line in experiment.rows.path.read_text().splitlines()]


def kept(experiment, method, seed=0, right=0.5, **more):
    """A row with its files; `right` is the share of the test images that are."""
    key = experiment.key(method, seed, **({"cost": "latency"} if more else {}))
    for kind in ("net", "test", "val"):
        seen = (torch.arange(200) * 37 % 200 < 200 * right).float()
        checkpoint.write(experiment.path(key, f"{kind}.safetensors"), {"class": seen}, {})
    score = {"class": right}
    experiment.rows.add(key, {"test": score, "val": score, "loss": {"class": 2 - right}, **more})
    return key


def pruned(experiment, method, seed=0, right=0.5, ms=0.44, macs=0.4):
    change = {"class": [right / 0.8 - 1, right / 0.8 - 1.01, 0.0]}
    shares = {"macs_share": macs, "params_share": 0.3, "ms_shares": [ms, ms, 9.0], "ms": 2 * ms}
    return kept(experiment, method, seed, right, **shares, change=change, cut={"change": change})


def test_rivals_are_chosen_by_their_worst_goal_on_validation_images(experiment):
    for method in ("dense", "dense tuned"):
        kept(experiment, method, right=0.8)
    for method in pagcp_parts.RIVALS:
        experiment.rows.add(experiment.key(method, 0, cost="latency"), {"infeasible": "no"})
    for method, right, ms in (
        ("halp", 0.5, 0.44),
        ("taylor", 0.6, 0.45),  # over by less than sessions differ
        ("random", 0.7, 0.4),
        ("fpgm", 0.8, 0.46),  # best, and over the target
    ):
        pruned(experiment, method, right=right, ms=ms)
    assert pagcp_parts.strongest(experiment, "latency") == ["random", "taylor"]


def reported(experiment):
    outcome = contract.Outcome("pagcp")
    pagcp_tables.report(experiment, outcome)
    return outcome, {name: aim["met"] for name, aim in outcome.aims.items()}


def test_the_table_names_what_was_not_met(experiment, capsys):
    for seed in range(3):
        kept(experiment, "dense tuned", seed, right=0.8)
        pruned(experiment, "pagcp", seed, right=0.79)
    kept(experiment, "dense", right=0.8)
    pruned(experiment, "halp", right=0.795)
    pruned(experiment, "pagcp equal D", right=0.8)  # an ablation, and no rival
    pruned(experiment, "fpgm", right=0.8, ms=0.46)
    experiment.rows.add(experiment.key("random", 0, cost="latency"), {"infeasible": "no"})
    outcome, met = reported(experiment)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["random", "(!)", *["-"] * 10] in printed
    ours = ["pagcp", "40", "30", "0.88", "44", "0.909", "-1.25", "-1.25", "-2.25", "0.833", "-"]
    assert ours in printed
    assert ["fpgm", "(!)"] in [line[:2] for line in printed]
    assert ["halp", "1", "class", "-0.63"] in [line[:4] for line in printed]
    assert met == {
        "toy_latency removed": True,
        "toy_latency worst goal": False,  # 200 images do not tell
        "toy_latency speed": True,
        "toy_latency rivals": False,
    }
    assert outcome.aims["toy_latency rivals"]["got"] == pytest.approx(-0.005 / 0.8)
    assert "toy_latency_over_fpgm_class" not in outcome.figures


def test_one_seed_meets_no_aim(experiment):
    for method in ("dense", "dense tuned"):
        kept(experiment, method, right=0.8)
    pruned(experiment, "pagcp", right=0.9)
    pruned(experiment, "halp", right=0.8)
    outcome, met = reported(experiment)
    assert outcome.aims["toy_latency worst goal"]["got"] > 0
    assert outcome.aims["toy_latency rivals"]["got"] == pytest.approx(0.1 / 0.8)
    assert set(met.values()) == {False}


@pytest.mark.parametrize(
    ("right", "goes_on", "converged"), [(0.8, True, True), (0.79, True, False), (0.7, False, False)]
)
def test_a_network_that_surely_gains_by_training_goes_no_further(
    experiment, capsys, right, goes_on, converged
):
    kept(experiment, "dense half as long", right=right)
    kept(experiment, "dense", right=0.8)
    assert pagcp_parts.converged(experiment) is goes_on
    assert ("no other part is run" in capsys.readouterr().out) is not goes_on
    outcome, met = reported(experiment)
    assert met == {"toy converged": converged}
    assert "toy_half_test_class_points" in outcome.figures


def test_every_method_has_the_same_target_in_milliseconds(experiment, unmeasured, monkeypatch):
    """Whatever a session says of the dense network against itself; a little below, as nasctl."""
    clock = itertools.cycle([1.0, 1.07, 0.95])
    monkeypatch.setattr(Target, "_rough", lambda target, files: [next(clock) for _ in files])
    net = experiment.network(0)
    keys = [experiment.key(method, 0, cost="latency") for method in ("pagcp", "uniform", "halp")]
    targets = [pagcp_rows._job(experiment, key, net).target for key in keys]
    assert targets == [0.44 * 2.0 / MARGIN] * 3


def test_equal_factors_are_still_there(experiment):
    rounds = pagcp_rows.Rounds(experiment, experiment.key("pagcp equal D", 0, cost="flops"))
    found = rounds.pagcp(experiment.network(0))
    assert found.bounds == ({"class": 6.0},) * pagcp_rows.ROUNDS


@pytest.mark.parametrize("tile", [8, 16])
def test_narrower_networks_come_from_the_widest_one_width_at_a_time(tile):
    found = [pagcp_experiment.WIDTHS, *pagcp_rows.narrower(tile)]
    for wide, narrow in itertools.pairwise(found):
        assert sorted(a - b for a, b in zip(wide, narrow, strict=True)) == [0, 0, 0, tile]
    assert found[-1] == (tile,) * 4
    assert (16, 16, 32, 64) in found, "all halved"
