"""`nasctl proxies`: what is typed, what is printed, what is dropped."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from test_cli import TINY, assert_one_line

from cli import main
from nas import correlation, scores
from nas import space as spaces
from nas.passes import Score
from nas.search_spaces import nasbench201

FAST = ("proxies", "--space", "nasbench201")


@pytest.fixture
def told(monkeypatch):
    """Networks are scored without being built: by their genes. Returns the networks scored."""
    calls = []
    space = spaces.load("nasbench201")

    def measured(job, key, names, device):
        calls.append(key)
        macs, params = space.costs(np.array([key]))[0]
        noise = float(np.random.default_rng(key).normal())
        values = {
            "macs": macs,
            "params": params,
            "synflow": math.log(macs),
            "snip": sum(key) + 0.5 * noise,
            "zen": noise,
        }
        found = {name: Score(float(values[name]), "", 0.01) for name in names if name in values}
        dead = Score(math.nan, "dead: as it happens", 0.01)
        return {**{name: dead for name in names}, **found}

    monkeypatch.setattr(scores, "_measure", measured)
    monkeypatch.setattr(correlation, "RESAMPLES", 200)
    return calls


def asked(nasctl, *words):
    outcome = nasctl(*FAST, *words, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    return found, {row["proxy"]: row for row in found["proxies"]}


def truth_file(folder, n=60, name="truth.csv"):
    """Networks whose accuracy is the sum of their genes."""
    genes = np.random.default_rng(3).integers(0, 5, (n, 6))
    lines = [f'"{nasbench201.to_string(row)}",{row.sum()}' for row in genes]
    (folder / name).write_text("arch,accuracy\n" + "\n".join(lines) + "\n")
    return name


def test_without_a_truth_counts_in_disguise_are_dropped(nasctl, told, workdir):
    found, rows = asked(nasctl, "--networks", 40, "--proxies", "synflow,snip,zen,grasp")
    assert found["networks"] == 40 and found["truth"] is None
    assert list(rows) == ["macs", "params", "synflow", "snip", "zen", "grasp"]
    assert rows["synflow"]["verdict"] == "a count in disguise"
    assert rows["synflow"]["with_macs"]["value"] == 1
    assert rows["grasp"]["missing"] == {"dead: as it happens": 40}
    assert rows["grasp"]["verdict"] == "too few networks to tell"
    assert found["kept"] == ["macs", "params", "snip", "zen"]
    assert (workdir / found["file"]).is_file()


def test_with_a_truth_what_is_no_better_than_counting_is_dropped(nasctl, told, workdir):
    words = ("--proxies", "synflow,snip,zen", "--truth", truth_file(workdir), "--networks", 60)
    found, rows = asked(nasctl, *words)
    assert found["truth"] == "truth.csv" and found["kept"] == ["macs", "params", "snip"]
    assert rows["snip"]["verdict"] == "better than counting" and rows["snip"]["gain"]["low"] > 0
    assert rows["synflow"]["verdict"] == "no better than counting"
    assert rows["zen"]["verdict"] == "worse than counting"
    shown = nasctl(*FAST, *words)
    assert "dropped   no better than counting: synflow" in shown.err
    assert "kept      better than counting: snip" in shown.err
    assert all(len(line) <= 80 and "…" not in line for line in shown.out.splitlines())


def test_the_same_command_goes_on_and_more_networks_add_to_it(nasctl, told):
    asked(nasctl, "--networks", 20, "--proxies", "snip")
    assert len(told) == 20
    asked(nasctl, "--networks", 20, "--proxies", "snip")
    assert len(told) == 20
    asked(nasctl, "--networks", 30, "--proxies", "snip", "--seed", 1)
    assert len(told) == 50


def test_a_dry_run_keeps_nothing(nasctl, told, workdir):
    outcome = nasctl(*FAST, "--networks", 20, "--dry-run", "--json")
    assert outcome.code == 0 and json.loads(outcome.out)["networks"] == 20
    assert len(told) == 2 and not (workdir / "runs").exists()


def test_real_networks_of_a_real_space(nasctl):
    words = ("--width", 0.25, "--networks", 12, "--batch", 16, "--proxies", "snip,naswot,l2_norm")
    outcome = nasctl("proxies", "--space", "resnet", *words, "--json")
    assert outcome.code == 0, outcome.err
    rows = {row["proxy"]: row for row in json.loads(outcome.out)["proxies"]}
    space = spaces.load("resnet", channels=1, classes=10, size=8, width=0.25)
    low, high = (space.costs(row[None])[0, 0] for row in (space.smallest, space.largest))
    assert low <= rows["macs"]["range"][0] <= rows["macs"]["range"][1] <= high
    assert not any(row["missing"] for row in rows.values())
    assert all(row["with_params"]["low"] <= row["with_params"]["high"] for row in rows.values())


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("--proxies snp", ["--proxies: unknown proxy 'snp'", "Did you mean snip?"]),
        ("--proxies no.such", ["--proxies: no module named 'no'"]),
        ("--space resnt", ["--space: unknown space 'resnt'", "Did you mean resnet?"]),
        ("--data digts", ["--data: no such data 'digts'"]),
        ("--run r --space resnet", ["--run: a run knows its space"]),
        ("--run nowhere", ["RUN: no run in nowhere"]),
        ("--truth nowhere.csv", ["--truth: no such file 'nowhere.csv'"]),
        ("--truth truth.csv:top1 --space nasbench201", ["no column 'top1'", "allowed: arch,"]),
        ("--truth other.csv", ["no column with architectures", "allowed: genes, arch"]),
        ("--networks 0", ["--networks"]),
        ("--devices cuda:77", ["--devices: no device 'cuda:77'"]),
        ("--devices gpu", ["--devices: no device 'gpu'"]),
    ],
)
def test_a_wrong_word_is_one_line_and_exit_code_2(words, fragments, nasctl, told, workdir):
    truth_file(workdir)
    (workdir / "other.csv").write_text("name,accuracy\na,1\n")
    outcome = nasctl("proxies", *words.split())
    assert_one_line(outcome, 2, *fragments)
    assert not told


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ('genes,accuracy\n"[0, 1, 2]",3\n', "row 1: [0, 1, 2] is no list of 6 genes"),
        ('genes,accuracy\n"[0, 1, 2, 3, 4, 9]",3\n', "row 1: [0, 1, 2, 3, 4, 9] is outside"),
        ("arch,accuracy\nresnet50,3\n", "row 1: no NAS-Bench-201 cell: 'resnet50'"),
        ('genes,accuracy\n"[0, 1, 2, 3, 4, 4]",good\n', "row 1: could not convert"),
        ("genes,accuracy\n", "no row has a number in 'accuracy'"),
        ("genes,accuracy\n1,2,3\n", "cannot read it as a table"),
    ],
)
def test_a_truth_that_is_none_names_its_row(text, fragment, nasctl, told, workdir):
    (workdir / "t.csv").write_text(text)
    assert_one_line(nasctl(*FAST, "--truth", "t.csv"), 1, "--truth t.csv: ", fragment)


@pytest.mark.slow  # a search
def test_a_finished_search_is_a_truth(nasctl, workdir):
    assert main.run([str(word) for word in (*TINY[:-1], 12, "--run", "r")]) == 0
    outcome = nasctl("proxies", "--run", "r", "--proxies", "snip", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["networks"] == 12 and "validation loss" in found["truth"]
    assert found["proxies"][0]["with_truth"] is not None
    assert (workdir / "r" / "scores-32-0.jsonl").is_file()
    assert torch.get_num_threads() >= 1
