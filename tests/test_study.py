from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter

import numpy as np
import pytest
import toy
from optuna.trial import TrialState

from nas import search, study
from nas.errors import NasctlError
from nas.search import Candidate
from nas.strategies import evolution

SPACE = toy.Space(n=2, options=6)


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """Nothing here pulls the plug, so nothing needs to reach the disk."""
    monkeypatch.setattr(search, "POOL", 300)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def run(path, evaluations, **options):
    opened = study.open_study(path, "same", **options)
    return list(search.search(toy.problem(SPACE), opened, evaluations, evolution.propose))


@pytest.fixture
def journal(tmp_path):
    run(tmp_path / "study.journal", 4)
    return tmp_path / "study.journal"


def lines(path):
    return path.read_bytes().splitlines(keepends=True)


# ---- a file that a killed process left -----------------------------------------------------------


def test_cut_at_any_byte_the_whole_lines_are_kept(journal):
    data = b"".join(lines(journal)[:12])  # every kind of line
    for size in range(len(data) + 1):
        journal.write_bytes(data[:size])
        whole = data[:size].rfind(b"\n") + 1
        assert study.trim(journal) == size - whole
        assert journal.read_bytes() == data[:whole]


def assert_opens_with_a_prefix(journal, data, sizes):
    complete = study.candidates(study.open_study(journal, "same"))
    assert [c.slot for c in complete] == [0, 1, 2, 3]
    for size in sizes:
        journal.write_bytes(data[:size])
        found = study.candidates(study.open_study(journal, "same"))
        assert found == complete[: len(found)], size
        assert size < len(data) or found == complete


def test_cut_at_any_line_the_study_opens_with_a_prefix(journal):
    ends = np.cumsum([0, *map(len, lines(journal))])
    sizes = sorted({int(end + by) for end in ends for by in (-1, 0, 1) if end + by >= 0})
    assert_opens_with_a_prefix(journal, journal.read_bytes(), sizes)


@pytest.mark.slow
def test_cut_at_any_byte_the_study_opens_with_a_prefix(journal):
    data = journal.read_bytes()
    assert_opens_with_a_prefix(journal, data, range(len(data) + 1))


def test_cut_at_any_line_the_search_ends_as_if_it_had_not_stopped(journal):
    whole, data = run(journal, 6), journal.read_bytes()
    assert [c.slot for c in whole] == list(range(6))
    for size in np.cumsum([0, *map(len, lines(journal))]):
        journal.write_bytes(data[: size + 1])
        assert run(journal, 6) == whole, size


@pytest.mark.parametrize("tail", [b"\0" * 40, b'{"op_code": 5, "work', b"12\n", b"\xff\xfe", b"\n"])
def test_a_tail_of_rubbish_is_cut(tail, journal):
    data = journal.read_bytes()
    journal.write_bytes(data + tail)
    assert study.trim(journal) == len(tail)
    assert journal.read_bytes() == data
    assert study.trim(journal) == 0


@pytest.mark.parametrize("damage", [b"{\n", b"\0\0\0\n", b'{"op_code": \n'])
def test_damage_before_the_tail_is_an_error_that_names_the_line(damage, journal):
    every = lines(journal)
    every[3] = damage
    journal.write_bytes(b"".join(every))
    with pytest.raises(NasctlError, match="study.journal: line 4 is not JSON"):
        study.open_study(journal, "same")
    assert lines(journal) == every  # and nothing was cut


@pytest.mark.parametrize(
    "line", [b"{}\n", b'{"op_code": 5, "worker_id": "x"}\n', b'{"op_code": 99}\n']
)
def test_json_that_is_no_journal_is_one_clear_error(line, tmp_path):
    (tmp_path / "j").write_bytes(line * 2)
    with pytest.raises(NasctlError, match="cannot be used"):
        study.open_study(tmp_path / "j", "same")


def test_a_journal_of_another_search_is_moved_aside(journal):
    before = journal.read_bytes()
    assert study.candidates(study.open_study(journal, "other")) == []
    assert journal.with_name(journal.name + ".old").read_bytes().startswith(before)


def test_a_shared_study_of_another_search_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path}/s.db"
    study.open_study(tmp_path / "unused", "same", storage=url)
    with pytest.raises(NasctlError, match="belongs to another search"):
        study.open_study(tmp_path / "unused", "other", storage=url)


def test_an_unreachable_storage_is_one_clear_error(tmp_path):
    for url in (f"sqlite:///{tmp_path}/no/such/folder/s.db", "nosuchdb://x", "rubbish"):
        with pytest.raises(NasctlError, match="cannot be used") as caught:
            study.open_study(tmp_path / "j", "same", storage=url)
        assert "\n" not in str(caught.value)


def test_finished_reads_and_explains_what_is_missing(journal, tmp_path):
    assert [c.slot for c in study.finished(journal, None, "nasctl")] == [0, 1, 2, 3]
    with pytest.raises(NasctlError, match="no search in this run yet"):
        study.finished(tmp_path / "none", None, "nasctl")
    with pytest.raises(NasctlError):
        study.finished(journal, None, "another-name")


# ---- trials that a dead process left -------------------------------------------------------------


def states(path):
    return Counter(trial.state for trial in study.open_study(path, "same").trials)


def test_a_running_trial_is_retired_and_its_slot_proposed_again(journal):
    opened = study.open_study(journal, "same")
    study.ask(opened, SPACE, 4, SPACE.largest)
    assert study.next_slot(opened) == 5
    again = study.open_study(journal, "same")
    assert study.next_slot(again) == 4
    assert states(journal)[TrialState.FAIL] == 1
    assert [c.slot for c in run(journal, 6)] == list(range(6))


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """Opens one shared study, as often as called; its workers are hasty."""
    monkeypatch.setattr(study, "BEAT_S", 0.05)
    monkeypatch.setattr(study, "PATIENCE_S", 0.8)  # a busy disk holds a beat up
    monkeypatch.setattr(study, "POLL_S", 0.05)
    url = f"sqlite:///{tmp_path}/shared.db"
    return lambda: study.open_study(tmp_path / "unused", "same", storage=url)


def watched(watch, slots, looks):
    return (watch.complete(slots) for _ in range(looks))


def test_a_shared_trial_is_retired_when_its_worker_gives_no_sign_of_life(shared, tmp_path):
    mine = shared()
    held = study.ask(mine, SPACE, 0, SPACE.largest)
    watch = study.Watch(shared())
    assert mine.trials[0].state == TrialState.RUNNING  # not by opening: somebody may be at it
    with study.alive(mine, held):
        assert not any(watched(watch, 1, 24))  # longer than their patience
        assert mine.trials[0].state == TrialState.RUNNING
        assert watch.complete(0)  # what comes later is not waited for
    assert any(watched(watch, 1, 60))
    assert mine.trials[0].state == TrialState.FAIL
    assert not (tmp_path / "unused").exists()


def test_a_worker_that_was_given_up_drops_its_result(shared):
    mine, theirs = shared(), shared()
    held = study.ask(mine, SPACE, 0, SPACE.largest)
    assert any(watched(study.Watch(theirs), 1, 60))
    again = study.ask(theirs, SPACE, 0, SPACE.largest)
    found = Candidate(0, (5, 5), 1.0, 1.2, 0.5, 0.9)
    assert not study.tell(mine, held, found)
    assert study.tell(theirs, again, found)
    assert study.candidates(mine) == [found]
    assert Counter(t.state for t in mine.trials) == {TrialState.FAIL: 1, TrialState.COMPLETE: 1}


def test_a_worker_that_died_before_it_named_its_slot_holds_nobody_up(shared, monkeypatch):
    monkeypatch.setattr(study, "CLAIM_S", 0.1)
    mine = shared()
    mine.ask()
    assert study.ask(mine, SPACE, 0, SPACE.largest) is not None
    assert mine.trials[0].state == TrialState.FAIL


def test_a_generation_waits_for_the_slots_that_others_hold(shared, tmp_path):
    """The other finishes while this one waits: then the proposals are what one worker's are."""
    mine, theirs = shared(), shared()
    alone = run(tmp_path / "alone", 20)
    held = study.ask(theirs, SPACE, 0, np.array(alone[0].genes))
    found = []

    def propose(problem, generation, history):
        found.append((generation, len(history)))
        return evolution.propose(problem, generation, history)

    def finish():
        time.sleep(0.3)
        study.tell(theirs, held, alone[0])

    other = threading.Thread(target=finish)
    other.start()
    with study.alive(theirs, held):
        mine_found = list(search.search(toy.problem(SPACE), mine, 20, propose))
    other.join()
    assert found == [(0, 0), (1, 16)]
    assert [c.slot for c in mine_found] == list(range(1, 20))
    assert study.candidates(mine) == alone


def test_a_slot_that_another_worker_holds_is_left_to_it(tmp_path):
    url = f"sqlite:///{tmp_path}/shared.db"
    mine, theirs = (study.open_study(tmp_path / "j", "same", storage=url) for _ in range(2))
    held = study.ask(mine, SPACE, 0, SPACE.largest)
    assert study.ask(theirs, SPACE, 0, SPACE.largest) is None
    assert study.next_slot(theirs) == 1
    study.tell(mine, held, Candidate(0, (5, 5), 1.0, 1.2, 0.5, 0.9))
    assert study.ask(theirs, SPACE, 0, SPACE.largest) is None
    assert [c.slot for c in study.candidates(theirs)] == [0]


def test_a_trial_stores_the_values_of_its_genes(tmp_path):
    space = toy.Space(n=2, options=3)
    space.genes = (space.genes[0], toy.Gene("g1", (7,)))  # one option
    trial = study.ask(study.open_study(tmp_path / "j", "same"), space, 4, np.array([2, 0]))
    assert trial.user_attrs == {"slot": 4, "genes": [2, 0]}
    assert trial.params == {"g0": 2, "g1": 7}


def test_a_journal_is_json_lines(journal):
    assert all(isinstance(json.loads(line), dict) for line in lines(journal))
