"""The loop of all trainings: what it saves, and when."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from nas import parallel, resumable
from nas.errors import NasctlError
from nas.parallel import Workers

STEPS = 6


@dataclass(frozen=True)
class Report:
    step: int


@dataclass
class Disk:
    """A state that remembers when it was saved; `held` is what a kill would leave."""

    held: int = 0
    saves: list[int] = field(default_factory=list)

    def load(self):
        return self.held

    def save(self, done):
        self.held = done
        self.saves.append(done)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(resumable.time, "monotonic", lambda: now[0])
    return now


def forward(done):
    return Report(done + 1)


def train(disk, step=forward, every=20.0):
    return resumable.train(step, disk, STEPS, every)


def test_steps_are_reported_in_order_and_the_last_is_saved_before_it_is_reported(clock):
    disk, seen = Disk(), []
    for report in train(disk):
        seen.append((report.step, list(disk.saves)))
    assert seen == [*((step, []) for step in range(1, STEPS)), (STEPS, [STEPS])]


def test_it_is_saved_when_the_seconds_are_over_and_the_count_begins_anew(clock):
    disk, seconds = Disk(), iter((15, 6, 19, 2, 0, 0))

    def step(done):
        clock[0] += next(seconds)
        return forward(done)

    assert len(list(train(disk, step))) == STEPS
    assert disk.saves == [2, 4, STEPS]


def test_reading_the_state_does_not_count(clock):
    class Slow(Disk):
        def load(self):
            clock[0] += 1000
            return super().load()

    disk = Slow()
    steps = train(disk)
    next(steps)
    assert disk.saves == []


@pytest.mark.parametrize("stop", range(1, STEPS + 1))
def test_closing_saves_once_where_it_stopped(stop, clock):
    disk = Disk()
    steps = train(disk)
    for _ in range(stop):
        next(steps)
    steps.close()
    assert disk.saves == [stop]
    assert [report.step for report in train(disk)] == list(range(stop + 1, STEPS + 1))


def test_closing_just_after_a_save_does_not_save_again(clock):
    disk = Disk()
    steps = train(disk, every=-1.0)
    next(steps)
    steps.close()
    assert disk.saves == [1]


def test_closing_before_the_first_step_writes_nothing(clock):
    disk = Disk()
    train(disk).close()
    assert disk.saves == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, NasctlError])
def test_what_stops_a_step_halfway_saves_nothing(kind, clock):
    """Weights and momentum may be of two moments."""
    disk, due = Disk(), 3

    def step(done):
        if done == 4:
            raise kind("halfway")
        clock[0] += 21 * (done + 1 == due)
        return forward(done)

    with pytest.raises(kind):
        list(train(disk, step))
    assert disk.saves == [due]


def test_what_a_caller_throws_between_two_steps_leaves_the_last_save(clock):
    disk = Disk()
    steps = train(disk)
    next(steps)
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt)
    assert disk.saves == []


def test_a_finished_state_takes_no_step(clock):
    disk = Disk(held=STEPS)
    assert list(train(disk)) == [] and disk.saves == []


def test_a_step_may_return_to_an_earlier_one(clock):
    disk, falls = Disk(), iter([True])

    def step(done):
        return Report(1) if done == 3 and next(falls, False) else forward(done)

    steps = train(disk, step)
    assert [next(steps).step for _ in range(4)] == [1, 2, 3, 1]
    steps.close()
    assert disk.saves == [1]
    assert [report.step for report in train(disk, step)] == [2, 3, 4, 5, 6]


# ---- the usual state -----------------------------------------------------------------------------


def weights(path, identity="this", seed=0):
    net = nn.Linear(3, 2)
    net.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
    return resumable.Weights(path, net, torch.optim.SGD(net.parameters(), 0.1, 0.9), identity)


def test_weights_come_back_and_others_are_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    first, second = weights(path), weights(path, seed=1)
    assert first.load() == 0
    first.save(7)
    assert second.load() == 7
    assert torch.equal(first.net.weight, second.net.weight)
    with pytest.raises(NasctlError, match="another recipe or other data"):
        weights(path, "other").load()


def test_without_a_path_nothing_is_written(workdir):
    state = weights(None)
    state.save(3)
    assert state.load() == 0 and not list(workdir.iterdir())


def test_of_several_processes_the_first_alone_writes(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    monkeypatch.setattr(parallel, "workers", lambda: Workers(rank=1, size=2))
    weights(path).save(3)
    assert not path.exists()
    monkeypatch.setattr(parallel, "workers", lambda: Workers(rank=0, size=2))
    weights(path).save(3)
    assert path.exists()
