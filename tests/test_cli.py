from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import toy
from PIL import Image

from cli import budgets, console, main
from nas import space as spaces
from nas import strategies, study
from nas.errors import BudgetInfeasible
from nas.search import Limit

SEARCH = ("search", "--no-alone", "--hw", "jetson", "--width", 0.25, "--threads", 1)
TINY = (*SEARCH, "--epochs", 0.2, "--batch", 64, "--evaluations", 3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, to be copied by whoever harms it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main.run([str(word) for word in (*TINY, "--run", folder)]) == 0
    return folder


@pytest.fixture
def copied(finished, workdir):
    return Path(shutil.copytree(finished, workdir / "run"))


def assert_one_line(outcome, code, *fragments):
    """One line of error, the last on stderr, and nothing on stdout."""
    lines = [line for line in outcome.err.splitlines() if line.startswith("nasctl: ")]
    assert outcome.code == code, outcome.err
    assert len(lines) == 1 and outcome.err.splitlines()[-1] == lines[0]
    assert "Traceback" not in outcome.err and outcome.out == ""
    for fragment in fragments:
        assert fragment in lines[0]


# ---- what is typed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("serch", ["serch", "Did you mean 'search'"]),
        ("search --latncy 5ms", ["--latncy", "--latency"]),
        ("search --space resnt", ["--space: unknown space 'resnt'", "Did you mean resnet?"]),
        ("search --hw jetsn", ["--hw: unknown device 'jetsn'", "Did you mean jetson?"]),
        ("search --data digts", ["--data: no such data 'digts'", "Did you mean digits?"]),
        ("search --data no.such.module:task", ["--data no.such.module:task"]),
        ("search --space no.such.module", ["--space: no module named 'no'"]),
        ("search --latency 5", ["--latency: '5' has no unit", "as in 5ms"]),
        ("search --latency 5MB", ["--latency: '5MB' is not a latency"]),
        ("search --latency -5ms", ["--latency"]),
        ("search --latency 0ms", ["--latency: a budget must be above zero"]),
        ("search --latency 1e999ms", ["--latency"]),
        ("search --macs 200", ["--macs: '200' has no unit", "as in 200MMACs"]),
        ("search --macs 200MB", ["--macs: '200MB' is not a number of MACs"]),
        ("search --params 2M", ["--params: '2M' is not", "as in 2Mparams"]),
        ("search --memory 8", ["--memory: '8' has no unit", "as in 8MB"]),
        ("search --energy 8", ["--energy: '8' has no unit", "as in 40mJ"]),
        ("search --memory 0MB", ["--memory: a budget must be above zero"]),
        ("search --memory 1e999MB", ["--memory: "]),
        ("search --strategy nsga", ["--strategy: unknown strategy 'nsga'", "Did you mean nsga2?"]),
        ("search --strategy no.such", ["--strategy: no module named 'no'"]),
        ("search --epochs 0", ["--epochs: ", "greater than 0"]),
        ("search --epochs inf", ["--epochs: "]),
        ("search --epochs many", ["--epochs"]),
        ("search --batch 100000", ["--batch: 100000 images per step"]),
        ("search --size 2", ["--size: "]),
        ("search --spec nowhere.toml", ["nowhere.toml: cannot read the spec"]),
        ("export nowhere --out x.onnx --slot 1", ["RUN: no run in nowhere"]),
        ("export nowhere --out x.onnx", ["name the network"]),
        ("export nowhere", ["--out"]),
        ("report nowhere", ["RUN: no run directory nowhere"]),
        ("report", ["run"]),
        ("spaces --size 2", ["--size"]),
    ],
)
def test_a_wrong_word_is_one_line_and_exit_code_2(words, fragments, nasctl, monkeypatch):
    monkeypatch.setattr("cli.stages.trained_supernet", lambda job: pytest.fail("it began to work"))
    typed = words.split()
    hardware = ("--hw", "jetson") if typed[0] == "search" and "--hw" not in typed else ()
    outcome = nasctl(*typed, *hardware)
    assert_one_line(outcome, outcome.code, *fragments)
    assert outcome.code == 2


def test_an_infeasible_budget_names_the_fastest_network(nasctl):
    outcome = nasctl(*TINY, "--latency", "1us", "--run", "r")
    assert_one_line(outcome, 3, "--latency: no network", "the fastest found needs", "Arch(")
    assert nasctl(*TINY, "--latency", "1us", "--run", "r").code == 3  # nothing was left behind


@pytest.mark.parametrize(
    ("flag", "budget"), [("--macs", "10kMACs"), ("--params", "1kparams"), ("--memory", "300B")]
)
def test_an_infeasible_budget_of_any_kind_says_what_would_do(flag, budget, nasctl, monkeypatch):
    def reached(job):
        raise KeyboardInterrupt

    monkeypatch.setattr("cli.stages.trained_supernet", reached)
    outcome = nasctl(*TINY, flag, budget, "--run", "r")
    assert_one_line(outcome, 3, f"{flag}: no network", "the smallest found needs", "Arch(")
    offered = re.search(r"Ask for ([0-9]+[A-Za-z]+)", outcome.err)[1]
    assert nasctl(*TINY, flag, offered, "--run", "s").code == 130


def test_an_energy_budget_takes_measured_energies(nasctl, monkeypatch):
    def reached(job):
        raise KeyboardInterrupt

    monkeypatch.setattr("cli.stages.trained_supernet", reached)
    assert_one_line(nasctl(*TINY, "--energy", "1mJ"), 1, "--energy: nobody", "allowed: jetson-tx2")
    measured = [word if word != "jetson" else "jetson-tx2" for word in TINY]
    outcome = nasctl(*measured, "--energy", "1uJ", "--run", "r")
    assert_one_line(outcome, 3, "--energy: no network", "the smallest found needs")
    offered = re.search(r"Ask for ([0-9]+mJ)", outcome.err)[1]
    assert nasctl(*measured, "--energy", offered, "--run", "s").code == 130


@pytest.mark.slow  # a search for each strategy
def test_every_strategy_keeps_every_budget_and_the_report_says_so(nasctl, workdir):
    """One supernet; what was evaluated is read back from the study."""
    asked = ("--latency", "6ms", "--macs", "120kMACs", "--params", "90kparams")
    flags = (*TINY[:-1], 18, *asked, "--memory", "8kB")
    trained = ()
    for strategy in strategies.names():
        outcome = nasctl(*flags, "--strategy", strategy, "--run", strategy, *trained, "--json")
        assert outcome.code == 0, outcome.err
        report = json.loads(outcome.out)
        assert report["budget"] == {
            "latency_ms": 6.0,
            "macs": 120e3,
            "params": 90e3,
            "activation_bytes": 8e3,
        }
        chosen = report["chosen"]
        assert chosen["activation_bytes"] <= 8e3 and chosen["latency"]["predicted"]["high_ms"] <= 6
        space = spaces.load("resnet", channels=1, classes=10, size=8, width=0.25)
        found = study.finished(workdir / strategy / "study.journal", None, "nasctl")
        assert len(found) == 18
        costs = space.costs(np.array([c.genes for c in found]))
        assert (costs <= [120e3, 90e3]).all()
        assert chosen["val_ce"] == min(c.cross_entropy for c in found)
        said = "accuracy predictor used in" in outcome.err
        assert said == (strategy == "predictor") == bool(report["predictor"])
        trained = ("--supernet", workdir / strategies.names()[0])


def test_budgets_that_fit_alone_and_not_together_name_the_nearest():
    up = Limit("macs", 10.0, lambda genes: genes.sum(1))
    down = Limit("params", 10.0, lambda genes: 30.0 - genes.sum(1))
    problem = toy.problem(limits=(up, down))
    job = SimpleNamespace(space=problem.space, spec=SimpleNamespace(space="toy"))
    together = "inside 10 MACs, 10 params together: the nearest has 15 MACs, 15 params"
    with pytest.raises(BudgetInfeasible, match=f"--macs, --params: .* {together}"):
        budgets.check(job, None, problem)


@pytest.mark.parametrize(
    ("text", "quantity", "value"),
    [
        ("200MMACs", budgets.MACS, 2e8),
        (" 1.5 gmacs", budgets.MACS, 1.5e9),
        ("2Mparams", budgets.PARAMS, 2e6),
        ("300params", budgets.PARAMS, 300),
        ("8MB", budgets.MEMORY, 8e6),
        ("1e-1 MiB", budgets.MEMORY, 0.1 * 2**20),
        ("640kB", budgets.MEMORY, 640e3),
    ],
)
def test_counts_have_units(text, quantity, value):
    assert budgets.parse(text, quantity, "--flag") == pytest.approx(value)


def test_the_budget_that_the_error_offers_is_accepted(nasctl, monkeypatch):
    outcome = nasctl(*TINY, "--latency", "1us", "--run", "r")
    asked = re.search(r"Ask for ([0-9.]+ms)", outcome.err)[1]

    def reached(job):
        raise KeyboardInterrupt

    monkeypatch.setattr("cli.stages.trained_supernet", reached)
    assert nasctl(*TINY, "--latency", asked, "--run", "s").code == 130


# ---- files that are not what they should be ------------------------------------------------------


def test_a_damaged_picture_is_one_line(nasctl, workdir):
    for name in ("cat", "dog"):
        (workdir / "pictures" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (8, 8), (i, i, i)).save(workdir / "pictures" / name / f"{i}.png")
    (workdir / "pictures" / "dog" / "7.png").write_bytes(b"\x89PNG no picture")
    assert_one_line(nasctl(*TINY, "--data", "pictures"), 1, "7.png")


def test_a_damaged_device_file_is_one_line(nasctl, workdir):
    (workdir / "mine.toml").write_text('name = "mine"\nsummary = 3\n')
    assert_one_line(nasctl("search", "--hw", "mine.toml"), 1, "mine.toml: field 'summary'")
    assert_one_line(nasctl("search", "--hw", "none.toml"), 1, "none.toml: cannot read")


def test_a_run_of_another_spec_is_one_line(nasctl, copied):
    outcome = nasctl(*TINY, "--seed", 5, "--run", copied)
    assert_one_line(outcome, 2, "another spec: seed 0 there, 5 here", "--force")


def test_a_damaged_manifest_is_one_line(nasctl, copied):
    (copied / "run.json").write_text('{"spec": ')
    assert_one_line(nasctl(*TINY, "--run", copied), 1, "run.json: missing or damaged")
    assert_one_line(nasctl("export", copied, "--out", "x.onnx", "--slot", 0), 1, "run.json")


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"{}"])
def test_a_damaged_supernet_is_one_line(content, nasctl, copied):
    (copied / "supernet.safetensors").write_bytes(content)
    outcome = nasctl(*TINY, "--supernet", copied, "--run", "new")
    assert_one_line(outcome, 1, "supernet.safetensors: damaged")


def test_a_supernet_of_another_space_or_of_no_run_is_one_line(nasctl, copied):
    words = ("search", "--hw", "jetson", "--supernet", copied, "--run", "new")
    assert_one_line(nasctl(*words), 1, "width is 0.25 there, None here")
    assert_one_line(nasctl(*TINY, "--supernet", "none", "--run", "b"), 1, "no trained supernet")


def test_a_run_whose_files_changed_is_not_exported(nasctl, copied):
    for name, stage in (("pareto.json", "search"), ("supernet.safetensors", "train")):
        (copied / name).write_text("[]")
        outcome = nasctl("export", copied, "--out", "x.onnx", "--slot", 0)
        assert_one_line(outcome, 1, f"stage '{stage}' is not finished, or its files were changed")


def test_a_damaged_report_is_one_line(nasctl, copied):
    for content in ("", "{", "{}", "[]"):
        (copied / "report.json").write_text(content)
        assert_one_line(nasctl("report", copied), 1, "report.json")
    (copied / "report.json").unlink()
    assert_one_line(nasctl("report", copied), 1, "report.json")


def test_a_damaged_journal_is_one_line(nasctl, copied):
    lines = (copied / "study.journal").read_bytes().splitlines(keepends=True)
    lines[2] = b"{\n"
    (copied / "study.journal").write_bytes(b"".join(lines))
    words = ("export", copied, "--out", "x.onnx", "--slot", 0)
    assert_one_line(nasctl(*words), 1, "study.journal: line 3 is not JSON")
    (copied / "study.journal").unlink()
    assert_one_line(nasctl(*words), 1, "study.journal: no search in this run yet")


def test_an_unknown_slot_lists_the_known_and_a_tight_budget_names_the_fastest(nasctl, copied):
    out = ("export", copied, "--out", "x.onnx")
    assert_one_line(nasctl(*out, "--slot", 99), 2, "--slot: no network 99", "allowed: ")
    assert_one_line(nasctl(*out, "--latency", "1us"), 3, "--latency: no evaluated network fits")


# ---- what works ----------------------------------------------------------------------------------


def test_a_finished_run_is_not_repeated_and_reports_again(nasctl, copied):
    before = (copied / "supernet.safetensors").stat().st_mtime_ns
    again = nasctl(*TINY, "--run", copied, "--json")
    assert again.code == 0 and json.loads(again.out)["chosen"]["val_ce"] > 0
    assert (copied / "supernet.safetensors").stat().st_mtime_ns == before
    shown = nasctl("report", copied, "--json")
    assert json.loads(shown.out) == json.loads((copied / "report.json").read_text())


def test_a_deleted_output_is_made_again(nasctl, copied):
    weights = (copied / "supernet.safetensors").read_bytes()
    (copied / "supernet.safetensors").unlink()
    assert nasctl(*TINY, "--run", copied).code == 0
    assert (copied / "supernet.safetensors").read_bytes() == weights


def test_another_network_is_exported(nasctl, copied, workdir, drafts):
    outcome = nasctl("export", copied, "--out", "new/x.onnx", "--slot", 1, "--json")
    assert outcome.code == 0 and json.loads(outcome.out)["slot"] == 1
    assert (workdir / "new" / "x.onnx").stat().st_size > 1000


def test_an_interrupt_says_that_the_same_command_goes_on(nasctl, monkeypatch):
    def interrupt(job):
        raise KeyboardInterrupt

    monkeypatch.setattr("cli.stages.trained_supernet", interrupt)
    assert_one_line(nasctl(*TINY), 130, "interrupted; the same command goes on from here")


@pytest.mark.parametrize("verb", ["devices", "spaces"])
def test_listings_are_json_on_request(verb, nasctl):
    outcome = nasctl(verb, "--json")
    assert outcome.code == 0 and outcome.err == ""
    assert {"resnet", "cpu"} & {row["name"] for row in json.loads(outcome.out)}
    assert nasctl(verb).code == 0


def test_no_arguments_show_the_help(nasctl):
    assert nasctl().out == nasctl("--help").out != ""


def test_a_reader_that_leaves_gets_no_traceback():
    words = f"{sys.executable} -m cli.main devices --json | head -c 1"
    found = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=True)
    assert found.stdout == "[" and found.stderr == ""


@pytest.mark.parametrize(
    ("text", "ms"),
    [("5ms", 5), ("300us", 0.3), ("300µs", 0.3), (" 0.1 s ", 100), ("1e-1ms", 0.1), (".5MS", 0.5)],
)
def test_latencies_have_units(text, ms):
    assert console.parse_latency(text) == pytest.approx(ms)
