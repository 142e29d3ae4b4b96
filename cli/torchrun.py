"""The processes that `torchrun` (or any launcher that sets its variables) started for one verb.

They find each other, check that they mean the same work, fail together and speak with one voice:
the first process writes for people, and of an error the first to meet it tells, once per machine.
Notes are passed through the launcher's key-value store, training data through the process group.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from nas.errors import NasctlError, UsageError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # it is, at run time

    from nas.parallel import Workers

SILENCE = timedelta(minutes=10)  # after which a process that says nothing is taken for lost
INPUTS, START = "inputs", "start"  # the notes, in the order in which they are passed
FAILED = "failed: "


@dataclass(frozen=True)
class Group:
    """The processes of one command; without a launcher there is one, and nothing is exchanged."""

    workers: Workers
    on_this_machine: int = 1
    store: Store | None = None

    def agree(self, inputs: Mapping[str, str]) -> None:
        """Raises NasctlError on every process, naming the first input that one has another."""
        for rank, note in enumerate(self._pass(INPUTS, json.dumps(inputs))):
            for name, value in json.loads(note).items():
                if value != inputs[name]:
                    raise NasctlError(
                        f"process {rank} has {name} {value}, process {self.workers.rank} has "
                        f"{inputs[name]}",
                        next="All need the same command, data and versions.",
                    )

    def follow_first(self, decide: Callable[[], str]) -> str:
        """What `decide`, which the first process alone runs, says."""
        return self._pass(START, decide() if self.workers.first else "")[0]

    def _pass(self, subject: str, note: str) -> list[str]:
        """Every process's note, by rank."""
        if self.store is None:
            return [note]
        try:
            self.store.set(f"{subject}/{self.workers.rank}", note)
            found = [
                self.store.get(f"{subject}/{rank}").decode() for rank in range(self.workers.size)
            ]
        except RuntimeError as error:  # torch's, of its store
            raise _lost() from error
        for rank, text in enumerate(found):
            if text.startswith(FAILED):
                raise NasctlError(f"process {rank} {text}")
        return found

    def fail(self, error: BaseException) -> bool:
        """Tell the others; is it for this process to say so to people? Of an error the first on its
        machine to meet it does; of Ctrl-C, which all get, the one with the progress bar."""
        if self.store is None:
            return True
        try:
            for subject in (INPUTS, START):
                self.store.set(
                    f"{subject}/{self.workers.rank}", f"{FAILED}{str(error) or 'stopped'}"
                )
            if isinstance(error, KeyboardInterrupt):
                return os.environ.get("LOCAL_RANK", "0") == "0"
            return self.store.add(f"said/{os.environ.get('GROUP_RANK', 0)}", 1) == 1
        except RuntimeError:  # the store went with the launcher: better said twice than never
            return True


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """The group of this process. An error inside ends all of them, and is told by one.

    Raises NasctlError if the others cannot be reached, SystemExit where another process tells why.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        from nas.parallel import Workers

        yield Group(Workers())
        return
    group = _found()
    try:
        with contextlib.nullcontext() if group.workers.first else _unheard():
            yield group
    except (NasctlError, KeyboardInterrupt) as error:
        if not group.fail(error):
            raise SystemExit(getattr(error, "exit_code", 130)) from error
        raise
    import torch.distributed as dist

    dist.destroy_process_group()


def _found() -> Group:
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from nas.parallel import workers

    try:
        store, rank, size = next(rendezvous("env://", timeout=SILENCE))
        gpu = torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=SILENCE)
        here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    except ValueError as error:  # a variable that is missing or no number
        raise UsageError(
            f"the launcher's variables are incomplete ({error})",
            where="WORLD_SIZE",
            next="Start it with torchrun.",
        ) from error
    except RuntimeError as error:
        raise _lost() from error
    return Group(workers(), here, store)


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """What a process other than the first would say to people, bars and notes, goes nowhere."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def _lost() -> NasctlError:
    return NasctlError(
        "the other processes cannot be reached",
        where=f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}",
        next="Start all of them together, with the same --nnodes and --rdzv-endpoint.",
    )
