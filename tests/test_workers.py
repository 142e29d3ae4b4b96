"""Several workers of one study, on real servers; one of them is killed."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import optuna
import pytest
import toy
from optuna.trial import TrialState

from nas import search, strategies, study
from nas.strategies import predictor

WORKER = """
import sys
import time
from dataclasses import replace
from pathlib import Path
import toy
from nas import search, strategies, study
from nas.strategies import predictor

url, evaluations, strategy, pause = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
search.POOL = predictor.POOL = 300
study.BEAT_S, study.PATIENCE_S, study.POLL_S = 0.2, 2.0, 0.1
opened = study.open_study(Path("unused"), "same", storage=url)
problem = toy.problem(toy.Space(n=6, options=4), budget_ms=8.0)

def evaluate(genes):
    print("evaluating", flush=True)
    time.sleep(pause)
    return toy.problem(problem.space).evaluate(genes)

print("ready", flush=True)
sys.stdin.readline()
slowly = replace(problem, evaluate=evaluate)
for candidate in search.search(slowly, opened, evaluations, strategies.load(strategy)):
    print(candidate.slot, flush=True)
"""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """As in the workers."""
    for module in (search, predictor):
        monkeypatch.setattr(module, "POOL", 300)


def make_tables(url):
    """Two workers that meet an empty database would both try."""
    optuna.storages.RDBStorage(url).engine.dispose()


def start(url, evaluations, strategy="nsga2", pauses=(0.01, 0.01)):
    """One worker per pause (seconds per evaluation); all begin at the same moment."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", WORKER, url, str(evaluations), strategy]
    processes = [
        subprocess.Popen([*command, str(pause)], env=environment, **pipes) for pause in pauses
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    return processes


def finish(processes):
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return outputs


def stored(url):
    """Trials by state, and the candidates, read by somebody who did not take part."""
    storage = optuna.storages.RDBStorage(url)
    found = optuna.load_study(study_name="nasctl", storage=storage)
    everything = Counter(trial.state for trial in found.trials), study.candidates(found)
    storage.engine.dispose()
    return everything


def one_worker(path, evaluations, strategy="nsga2"):
    problem = toy.problem(toy.Space(n=6, options=4), budget_ms=8.0)
    opened = study.open_study(path, "same")
    return list(search.search(problem, opened, evaluations, strategies.load(strategy)))


def assert_every_slot_once(url, evaluations, tmp_path):
    make_tables(url)
    outputs = finish(start(url, evaluations))
    states, found = stored(url)
    assert states[TrialState.COMPLETE] == evaluations and not states[TrialState.RUNNING]
    assert found == one_worker(tmp_path / "alone", evaluations)
    assert all("evaluating" in output for output in outputs)  # both took part


@pytest.mark.slow
def test_two_workers_of_one_sqlite_file_evaluate_every_slot_once(tmp_path):
    assert_every_slot_once(f"sqlite:///{tmp_path}/shared.db", 40, tmp_path)


def server_programs():
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    found = shutil.which("initdb") or (folders and shutil.which("initdb", path=folders[-1]))
    return Path(found).parent if found else None


@pytest.fixture
def postgresql():
    """A server of the test's own on a socket in a temporary folder; gives its URL."""
    programs = server_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server programs on this machine")
    if not importlib.util.find_spec("psycopg"):
        pytest.skip("no PostgreSQL driver: pip install 'psycopg[binary]'")
    owner = pwd.getpwnam("postgres") if os.getuid() == 0 else pwd.getpwuid(os.getuid())
    folder = Path(tempfile.mkdtemp(prefix="nasctl-pg-"))
    os.chown(folder, owner.pw_uid, owner.pw_gid)
    as_owner = {"cwd": folder, "check": True, "stdout": subprocess.DEVNULL}
    if os.getuid() == 0:  # the server refuses to run as root
        as_owner |= {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    data, options = folder / "data", f"-k {folder} -c listen_addresses=''"
    initialise = [programs / "initdb", "-D", data, "-A", "trust", "-U", "nasctl", "-N"]
    control = [programs / "pg_ctl", "-D", data, "-w", "-l", folder / "log"]
    try:
        subprocess.run(initialise, **as_owner)
        subprocess.run([*control, "-o", options, "start"], **as_owner)
        yield f"postgresql+psycopg://nasctl@/postgres?host={folder}"
        subprocess.run([*control, "-m", "immediate", "stop"], **as_owner)
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
def test_two_workers_of_one_postgresql_evaluate_every_slot_once(postgresql, tmp_path):
    assert_every_slot_once(postgresql, 40, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["nsga2", "predictor"])
def test_a_worker_of_two_killed_in_an_evaluation_costs_nothing(strategy, postgresql, tmp_path):
    """With kill -9, in the first generation: every slot is evaluated exactly once all the same,
    and what is stored is what one worker finds; so is the front."""
    make_tables(postgresql)
    killed, survivor = start(postgresql, 48, strategy, pauses=(0.15, 0.05))
    begun = 0
    while begun < 6:
        begun += killed.stdout.readline() == "evaluating\n"
    killed.kill()
    killed.communicate()
    (output,) = finish([survivor])
    states, found = stored(postgresql)
    assert states[TrialState.COMPLETE] == 48 and not states[TrialState.RUNNING]
    assert begun + output.count("evaluating") == 48 + 1  # the killed one's last, twice
    assert found == one_worker(tmp_path / "alone", 48, strategy)
    points = np.array([(c.latency_ms, c.cross_entropy) for c in found])
    undominated = [
        c
        for c, point in zip(found, points, strict=True)
        if not ((points <= point).all(1) & (points < point).any(1)).any()
    ]
    assert {c.slot for c in search.front(found)} <= {c.slot for c in undominated}
    assert {(c.latency_ms, c.cross_entropy) for c in search.front(found)} == {
        (c.latency_ms, c.cross_entropy) for c in undominated
    }
