"""The Optuna study as a search's only state: opening it safely, and slots instead of numbers.

A trial is one evaluated network; its place in the search's order is the user attribute `slot`
(trial numbers shift when a killed trial is retired). Objectives: validation cross-entropy, latency.

Imports without torch.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from nas.errors import NasctlError

if TYPE_CHECKING:
    from nas.search import Candidate
    from nas.space import Genes, SearchSpace

BEAT_S = 5.0  # between two signs of life of a worker that shares a study
PATIENCE_S = 60.0  # without one it is taken to be dead
POLL_S = 0.5  # between two looks at a study that others are at work on
CLAIM_S = 10.0  # how long a worker may take between starting a trial and naming its slot
#: what opening a damaged journal, a wrong URL or one without its driver raises besides OptunaError
DAMAGE: tuple[type[Exception], ...] = (
    KeyError,
    ValueError,
    AssertionError,
    ImportError,
    SQLAlchemyError,
)


def open_study(
    path: Path, fingerprint: str, *, storage: str | None = None, name: str = "nasctl"
) -> optuna.Study:
    """The study in the journal `path`, or `name` in the Optuna `storage` URL; made if absent.

    A journal belongs to one process (its run directory is locked), so every unfinished trial in it
    is a dead one, and one of another search is moved aside. In a shared storage a trial is dead
    when its worker gives no sign of life (`Watch`).

    Raises NasctlError if it is damaged, out of reach or, when shared, belongs to another search.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with reachable(storage or str(path), *DAMAGE):
        study = _create(storage or _journal(path), name)
        if storage is None and study.user_attrs.get("search", fingerprint) != fingerprint:
            # the run's supernet or latencies are not what this journal judged: search again
            path.replace(path.with_name(path.name + ".old"))
            study = _create(_journal(path), name)
        if study.user_attrs.get("search", fingerprint) != fingerprint:
            raise NasctlError(
                f"study '{name}' belongs to another search (other space, data, supernet, budgets "
                "or strategy)",
                where=storage or str(path),
                next="Use another --study-name.",
            )
        study.set_user_attr("search", fingerprint)
        study.set_user_attr("shared", storage is not None)
        if storage is None:
            for trial in _running(study):
                _retire(study, trial)
    return study


def _create(storage: str | optuna.storages.BaseStorage, name: str) -> optuna.Study:
    return optuna.create_study(
        study_name=name,
        storage=storage,
        directions=["minimize", "minimize"],
        sampler=_Given({}),
        load_if_exists=True,
    )


@contextlib.contextmanager
def reachable(where: str, *also: type[Exception]) -> Iterator[None]:
    """What a storage raises (damage, a full disk, a lost connection) as one clear line."""
    expected: tuple[type[Exception], ...] = (optuna.exceptions.OptunaError, OSError, *also)
    try:
        yield
    except expected as error:
        reason = str(error).splitlines()[0] if str(error) else "inconsistent"
        raise NasctlError(
            f"the study cannot be used ({type(error).__name__}: {reason})",
            where=where,
            next="Finished evaluations are kept. Check the disk or --storage; a damaged journal "
            "can be deleted to search again.",
        ) from error


def finished(path: Path, storage: str | None, name: str) -> list[Candidate]:
    """What a finished search evaluated, without taking part in it."""
    if storage is None and not path.exists():
        raise NasctlError("no search in this run yet", where=str(path))
    with reachable(storage or str(path), *DAMAGE):
        study = optuna.load_study(study_name=name, storage=storage or _journal(path))
        return candidates(study)


def _journal(path: Path) -> optuna.storages.JournalStorage:
    trim(path)
    # A process killed while it held Optuna's lock leaves it behind; the run directory's own lock,
    # which the system releases, says that nobody else is here.
    Path(f"{path}.lock").unlink(missing_ok=True)
    lock = JournalFileOpenLock(str(path))  # the symlink lock needs a file system that has symlinks
    return optuna.storages.JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def trim(path: Path) -> int:
    """Cut a torn tail (a line that a killed process did not finish); return the bytes cut.

    Optuna appends whole lines, so only what follows the last complete JSON line can be torn; left
    there, it breaks every later open. Damage before the tail is an error: results would be lost.
    """
    if not path.exists():
        return 0
    data = path.read_bytes()
    good = 0
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n") or not _is_json(line):
            break
        good += len(line)
    torn = data[good:]
    if b"\n" in torn[:-1]:
        line_number = data[:good].count(b"\n") + 1
        raise NasctlError(
            f"line {line_number} is not JSON, and complete lines follow it",
            where=str(path),
            next="The file is damaged: restore it, or delete it to search again.",
        )
    if torn:
        with path.open("r+b") as file:
            file.truncate(good)
            os.fsync(file.fileno())
    return len(torn)


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _running(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def _retire(study: optuna.Study, trial: FrozenTrial) -> None:
    """Mark a dead process's trial as failed, so that its slot is proposed again."""
    with contextlib.suppress(UpdateFinishedTrialError):  # another worker was quicker
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


class Watch:
    """Which trials of a shared study belong to workers that died.

    A worker changes a counter of its trial every BEAT_S (`alive`). Here it is noted when the change
    was seen, on the clock of the machine that watches: clocks of machines differ.
    """

    def __init__(self, study: optuna.Study) -> None:
        self.study = study
        self.seen: dict[int, tuple[object, float]] = {}  # trial -> its counter, and since when

    def complete(self, slots: int) -> bool:
        """Is nobody at work on the first `slots` slots? If somebody is, retires who is dead, lets
        POLL_S pass and says no: look again."""
        trials = [t for t in _running(self.study) if t.user_attrs.get("slot", slots) < slots]
        if not trials:
            return True
        now = time.monotonic()
        for trial in trials:
            beat = trial.user_attrs.get("beat")
            before, since = self.seen.setdefault(trial.number, (beat, now))
            if beat != before:
                self.seen[trial.number] = (beat, now)
            elif now - since > PATIENCE_S:
                _retire(self.study, trial)
        time.sleep(POLL_S)
        return False


@contextlib.contextmanager
def alive(study: optuna.Study, trial: Trial) -> Iterator[None]:
    """Signs of life while `trial` is evaluated, if others may be watching."""
    if not study.user_attrs.get("shared"):
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_beat, args=(trial, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _beat(trial: Trial, done: threading.Event) -> None:
    # whatever stops it (others gave this worker up, the storage is gone) the evaluating thread
    # meets too, and reports
    with contextlib.suppress(optuna.exceptions.OptunaError, SQLAlchemyError, OSError):
        for beat in itertools.count(1):
            if done.wait(BEAT_S):
                return
            trial.set_user_attr("beat", beat)


def candidates(study: optuna.Study) -> list[Candidate]:
    """Every evaluated network, by slot."""
    from nas.search import Candidate

    found: dict[int, Candidate] = {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        attrs = trial.user_attrs
        cross_entropy, latency_ms = trial.values
        found.setdefault(
            attrs["slot"],
            Candidate(
                slot=attrs["slot"],
                genes=tuple(attrs["genes"]),
                latency_ms=latency_ms,
                high_ms=attrs["high_ms"],
                cross_entropy=cross_entropy,
                accuracy=attrs["accuracy"],
            ),
        )
    return [found[slot] for slot in sorted(found)]


def next_slot(study: optuna.Study) -> int:
    """The first slot that nobody has evaluated or is evaluating."""
    taken = {
        trial.user_attrs.get("slot")
        for trial in study.get_trials(deepcopy=False)
        if trial.state in (TrialState.COMPLETE, TrialState.RUNNING)
    }
    return next(slot for slot in range(len(taken) + 1) if slot not in taken)


class _Given(optuna.samplers.BaseSampler):
    """Hands out the values it was made with: proposals are ours, the study keeps them."""

    def __init__(self, values: Mapping[str, int]) -> None:
        self.values = values

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, distribution: Any) -> int:
        return self.values[param_name]


def ask(study: optuna.Study, space: SearchSpace, slot: int, genes: Genes) -> Trial | None:
    """Start a trial for `genes` in `slot`; None if another worker has the slot."""
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        gene.name: optuna.distributions.CategoricalDistribution(gene.options)
        for gene in space.genes
    }
    study.sampler = _Given(space.values(genes))
    trial = study.ask(distributions)
    try:
        trial.set_user_attr("genes", genes.tolist())
        trial.set_user_attr("slot", slot)
    except UpdateFinishedTrialError:  # it took so long that another worker gave it up
        return None
    if _taken(study, slot, trial.number):
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        return None
    return trial


def _taken(study: optuna.Study, slot: int, number: int) -> bool:
    """Does another trial come before trial `number` in the slot?

    Of two workers that ask for one slot at one moment the lower number wins. A running trial with a
    lower number that has not said its slot yet is waited for, up to CLAIM_S: it may be this one.
    After that it is retired.
    """
    deadline = time.monotonic() + CLAIM_S
    while True:
        others = [t for t in study.get_trials(deepcopy=False) if t.number != number]
        running = [t for t in others if t.state == TrialState.RUNNING and t.number < number]
        complete = [t for t in others if t.state == TrialState.COMPLETE]
        if any(t.user_attrs.get("slot") == slot for t in running + complete):
            return True
        unnamed = [t for t in running if "slot" not in t.user_attrs]
        if not unnamed:
            return False
        if time.monotonic() > deadline:
            for other in unnamed:
                _retire(study, other)
        time.sleep(0.02)


def tell(study: optuna.Study, trial: Trial, candidate: Candidate) -> bool:
    """Finish a trial. False if others had taken this worker for dead: then its slot is evaluated
    again, to the same result, and this one is dropped."""
    try:
        trial.set_user_attr("high_ms", candidate.high_ms)
        trial.set_user_attr("accuracy", candidate.accuracy)
        values = [candidate.cross_entropy, candidate.latency_ms]
        told = study.tell(trial, values, skip_if_finished=True)
    except UpdateFinishedTrialError:
        return False
    return told.state == TrialState.COMPLETE
