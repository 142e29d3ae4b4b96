"""The Optuna study as a search's only state: opening it safely, and slots instead of numbers.

A trial is one evaluated network; its place in the search's order is the user attribute `slot`
(trial numbers shift when a killed trial is retired). Objectives: validation cross-entropy, latency.

Imports without torch.
"""

from __future__ import annotations

import json
import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import Trial, TrialState

from nas.errors import NasctlError

if TYPE_CHECKING:
    from nas.search import Candidate
    from nas.space import Genes, SearchSpace

#: after this long a shared study's unfinished trial is taken to be a dead process's
STALE = timedelta(minutes=30)


def open_study(
    path: Path, fingerprint: str, *, storage: str | None = None, name: str = "nasctl"
) -> optuna.Study:
    """The study in the journal `path`, or `name` in the Optuna `storage` URL; made if absent.

    A journal belongs to one process (its run directory is locked), so every unfinished trial in it
    is a dead one. In a shared storage only those older than STALE are.

    Raises NasctlError if it is damaged, out of reach or belongs to another search.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    where = storage or str(path)
    try:
        study = optuna.create_study(
            study_name=name,
            storage=storage or _journal(path),
            directions=["minimize", "minimize"],
            sampler=optuna.samplers.RandomSampler(seed=0),  # never asked: every trial is enqueued
            load_if_exists=True,
        )
    except (optuna.exceptions.OptunaError, KeyError, ValueError, OSError, ImportError) as error:
        raise NasctlError(
            f"cannot open the study ({type(error).__name__}: {error})",
            where=where,
            next="Check --storage, or delete the file to search again.",
        ) from error
    if study.user_attrs.setdefault("search", fingerprint) != fingerprint:
        raise NasctlError(
            f"study '{name}' belongs to another search (other space, data, supernet or budget)",
            where=where,
            next="Use another --study-name or --run.",
        )
    study.set_user_attr("search", fingerprint)
    _retire(study, STALE if storage else timedelta(0))
    return study


def finished(path: Path, storage: str | None, name: str) -> list[Candidate]:
    """What a finished search evaluated, without taking part in it."""
    if storage is None and not path.exists():
        raise NasctlError("no search in this run yet", where=str(path))
    study = optuna.load_study(study_name=name, storage=storage or _journal(path))
    return candidates(study)


def _journal(path: Path) -> optuna.storages.JournalStorage:
    trim(path)
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


def _retire(study: optuna.Study, age: timedelta) -> None:
    """Mark dead processes' trials as failed, so that their slots are proposed again."""
    for trial in study.get_trials(deepcopy=False):
        begun = trial.datetime_start or datetime.now()
        if trial.state == TrialState.RUNNING and datetime.now() - begun >= age:
            study.tell(trial.number, state=TrialState.FAIL)


def candidates(study: optuna.Study) -> list[Candidate]:
    """Every evaluated network, by slot."""
    from nas.search import Candidate

    found = {}
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
        trial.user_attrs["slot"]
        for trial in study.get_trials(deepcopy=False)
        if trial.state in (TrialState.COMPLETE, TrialState.RUNNING)
    }
    return next(slot for slot in range(len(taken) + 1) if slot not in taken)


def ask(
    study: optuna.Study, space: SearchSpace, slot: int, genes: Genes
) -> tuple[Trial, int, Genes]:
    """Start a trial for `genes`; with several workers it may be one another worker enqueued."""
    values = {
        k: v for k, v in space.values(genes).items() if len(space.genes[space.index[k]].options) > 1
    }
    distributions = {
        gene.name: optuna.distributions.CategoricalDistribution(gene.options)
        for gene in space.genes
        if gene.name in values
    }
    study.enqueue_trial(values, user_attrs={"slot": slot, "genes": genes.tolist()})
    trial = study.ask(distributions)
    return trial, trial.user_attrs["slot"], np.array(trial.user_attrs["genes"])


def tell(study: optuna.Study, trial: Trial, candidate: Candidate) -> None:
    trial.set_user_attr("high_ms", candidate.high_ms)
    trial.set_user_attr("accuracy", candidate.accuracy)
    study.tell(trial, [candidate.cross_entropy, candidate.latency_ms])
