"""Proxy scores of many networks of a space: a matrix [N, proxies], NaN where missing.

Every network is initialised from (seed, genes), so that its scores depend neither on the order nor
on the number of processes. What is finished is a line of an append-only file: kill it anywhere and
the same call goes on, and asking for more proxies or networks computes only what is new.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hw_profiles import lines, processes
from nas import proxies as shipped
from nas.elastic import Network, channels_last, resize
from nas.errors import NasctlError
from nas.passes import Batch, Missing, Score, attempt, measure
from nas.space import Genes, SearchSpace
from nas.tasks import Task

FORMAT = 1  # of the file; also to be raised when a proxy's formula changes
Key = tuple[int, ...]  # genes


@dataclass(frozen=True)
class Row:
    genes: Key
    scores: Mapping[str, Score]  # by proxy


@dataclass(frozen=True)
class Job:
    """What scores depend on."""

    space: SearchSpace
    batch: Batch  # its inputs are resized to each network's resolution
    proxies: tuple[str, ...]  # names as `nas.proxies.load` takes them


def batch_of(task: Task, n: int, seed: int) -> Batch:
    """`n` training images (all, if there are fewer), drawn by the seed and normalised."""
    order = np.random.default_rng((seed, 17)).permutation(len(task.train))[:n]
    rows = torch.from_numpy(order)
    images = task.normalise(task.train.images[rows])
    return Batch(images, task.train.labels[rows], seed, task.loss)


def fresh(space: SearchSpace, genes: Sequence[int] | Genes, seed: int) -> Network:
    """The stand-alone network of one row, initialised from (seed, genes).

    Norms scale by 1: spaces that begin with a block's last norm at 0, for training, would hide the
    block from every gradient.
    """
    row = np.array(genes, np.int64)
    state = np.random.SeedSequence((seed, 18, *map(int, row))).generate_state(2, np.uint32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(state[0]) << 32 | int(state[1]))  # initialisers know no generator
        net = space.build(space.decode(row))
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.ones_(module.weight)
    return channels_last(net)


def scored(
    job: Job,
    rows: Genes,
    *,
    path: Path | None = None,
    workers: int = 1,
    devices: Sequence[str] = ("cpu",),
) -> Generator[Row, None, None]:
    """Scores of the distinct rows of [N, G], one after the other, those in the file first.

    `workers` processes of one thread each share the work, and the `devices` in turn. With `path`
    finished rows are appended there as they come. Raises NasctlError if the file is of other
    inputs, or if a process died.
    """
    values = {name: shipped.load(name) for name in job.proxies}  # raises before any work
    known = _read(path, job) if path else {}
    wanted = dict.fromkeys(tuple(map(int, row)) for row in job.space.canonical(rows))
    todo: list[tuple[Key, tuple[str, ...]]] = []
    for key in wanted:
        have = known.get(key, {})
        lacking = tuple(name for name in values if name not in have)
        if lacking:
            todo.append((key, lacking))
        else:
            yield Row(key, {name: have[name] for name in values})
    if path and not path.exists():
        lines.append(path, _inputs(job))
    for key, found in _measured(job, todo, workers, devices):
        if path:
            lines.append(path, {"genes": key, "scores": _to_json(found)})
        every = {**known.get(key, {}), **found}
        yield Row(key, {name: every[name] for name in values})


def matrix(rows: Iterable[Row], genes: Genes, names: Sequence[str]) -> NDArray[np.float64]:
    """[N, len(names)] in the order of `genes` (canonical); NaN is missing."""
    by_key = {row.genes: row.scores for row in rows}
    values = [[by_key[tuple(map(int, row))][name].value for name in names] for row in genes]
    return np.array(values, np.float64).reshape(len(genes), len(names))


# ---- the work ------------------------------------------------------------------------------------


def _measured(
    job: Job,
    todo: Sequence[tuple[Key, tuple[str, ...]]],
    workers: int,
    devices: Sequence[str],
) -> Iterator[tuple[Key, dict[str, Score]]]:
    if workers == 1 or len(todo) < 2:
        with _one_thread():
            for key, names in todo:
                yield key, _measure(job, key, names, devices[0])
        return
    spawn = multiprocessing.get_context("spawn")  # forks of a process with threads may hang
    turns = spawn.SimpleQueue()
    for device in islice(cycle(devices), workers):
        turns.put(device)
    payload = _payload(job)
    pool = ProcessPoolExecutor(workers, spawn, _begin, (os.getcwd(), payload, turns))
    try:
        keys = [key for key, _ in todo]
        yield from zip(keys, pool.map(_in_worker, todo), strict=True)
    except BrokenProcessPool as error:
        raise NasctlError(
            "a worker process died (out of memory?)",
            where="--workers",
            next="The same command goes on from here; try fewer workers or a smaller batch.",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _payload(job: Job) -> bytes:
    try:
        return pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise NasctlError(
            f"the space or the task's loss cannot be sent to other processes ({error})",
            where="--workers",
            next="Define them at the top of a module, or use one worker.",
        ) from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums of floats depend on how many threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_worker: dict[str, Any] = {}  # what a process was given: its job and its device


def _begin(here: str, payload: bytes, turns: Any) -> None:
    """In each new process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    processes.end_with_parent()
    torch.set_num_threads(1)
    sys.path.append(here)  # a space or proxy of the user's own
    # bytes of the parent's own, never a file's; loaded here because the path had to be set first
    _worker.update(job=pickle.loads(payload), device=turns.get())


def _in_worker(task: tuple[Key, tuple[str, ...]]) -> dict[str, Score]:
    return _measure(_worker["job"], *task, _worker["device"])


def _measure(job: Job, key: Key, names: Sequence[str], device: str) -> dict[str, Score]:
    def made() -> tuple[Network, Tensor]:
        net = fresh(job.space, key, job.batch.seed).to(device)
        return net, resize(job.batch.inputs, net.arch.resolution)

    built = attempt(made)
    if isinstance(built, Missing):
        return {name: Score(math.nan, f"not built: {built}") for name in names}
    net, inputs = built
    values = {name: shipped.load(name) for name in names}
    return measure(net, replace(job.batch, inputs=inputs), values)


# ---- the file ------------------------------------------------------------------------------------


def _inputs(job: Job) -> dict[str, Any]:
    """What every score in a file depends on: its first line."""
    digest = hashlib.sha256()
    for tensor in (job.batch.inputs, job.batch.labels):
        digest.update(tensor.cpu().contiguous().numpy().data)
    fields = {k: v for k, v in vars(job.space).items() if isinstance(v, int | float | str)}
    return {
        "format": FORMAT,
        "space": type(job.space).__module__,
        "of": fields,
        "genes": {gene.name: list(gene.options) for gene in job.space.genes},
        "images": f"{len(job.batch.inputs)}, sha256 {digest.hexdigest()[:16]}",
        "seed": job.batch.seed,
    }


def _read(path: Path, job: Job) -> dict[Key, dict[str, Score]]:
    """What the file has; a line that a kill tore is cut off. Raises NasctlError if it is of other
    inputs or damaged."""
    try:
        first, *rest = map(json.loads, lines.whole(path))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        if not path.read_bytes():  # nothing but a torn first line
            path.unlink()
            return {}
        raise NasctlError(f"not a file of scores ({error})", where=str(path)) from error
    here = json.loads(json.dumps(_inputs(job)))
    if first != here:
        named = first if isinstance(first, dict) else {}
        other = next(k for k in here if named.get(k) != here[k])
        raise NasctlError(
            f"these scores are of something else: {other} {named.get(other)} there, "
            f"{here[other]} here",
            where=str(path),
            next="Name another file.",
        )
    found: dict[Key, dict[str, Score]] = {}
    for line in rest:
        found.setdefault(tuple(line["genes"]), {}).update(_from_json(line["scores"]))
    return found


def _to_json(scores: Mapping[str, Score]) -> dict[str, list[Any]]:
    """[value or its reason, seconds]: JSON has no NaN."""
    return {
        name: [score.reason or score.value, round(score.seconds, 4)]
        for name, score in scores.items()
    }


def _from_json(scores: Mapping[str, list[Any]]) -> dict[str, Score]:
    return {
        name: Score(math.nan, said, s) if isinstance(said, str) else Score(said, "", s)
        for name, (said, s) in scores.items()
    }
