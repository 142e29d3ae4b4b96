"""Measures a parcel of models on the machine it is started on: a board, over ssh.

`hw_profiles/remote/over_ssh.py` sends this file with what it imports and calls it in the parcel's
folder, as `python3 -m hw_profiles.remote.runner`:

    check RUNTIME    is all there that measuring takes?
    run ID OFFSET    measure on, apart from the connection, and print result lines from OFFSET
                     bytes on until it ends
    stop             end measuring
    group N SAID     measure one group (`run` starts these)

Models are measured in groups, each in a process of its own. A group's results are one line of
`results.jsonl`, written and synced when the group is finished: what is lost with the power is at
most the group at hand. Every line carries a checksum; a line that fails it counts as not there, and
its group is measured again.

Needs Python 3.8, its standard library and the runtime with its numpy, nothing else.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import hashlib
import json
import math
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Callable, Dict, Mapping, cast

from hw_profiles import clocks, protocol
from hw_profiles.fingerprint import fingerprint
from hw_profiles.runtimes import Clock, Compiled, Runtime, load_module, random_feeds
from nas.errors import NasctlError

MANIFEST, RESULTS, LOG, LOCK = "manifest.json", "results.jsonl", "log", "lock"
BEGIN = b"--- results\n"  # what a login shell may have printed ends here
REFUSED = 3  # exit code: one line on stderr says why
Record = Dict[str, Any]


# ---- result lines --------------------------------------------------------------------------------


def to_line(record: Record) -> bytes:
    text = json.dumps(record, sort_keys=True)
    return json.dumps({"crc": zlib.crc32(text.encode()), "record": record}).encode() + b"\n"


def from_lines(content: bytes) -> list[Record]:
    """The records whose lines are whole; the others are left out."""
    found = (_from_line(line) for line in content.splitlines())
    return [record for record in found if record is not None]


def _from_line(line: bytes) -> Record | None:
    try:
        outer = json.loads(line)
        record = outer["record"]
        whole = zlib.crc32(json.dumps(record, sort_keys=True).encode()) == outer["crc"]
    except (ValueError, TypeError, KeyError):
        return None
    return record if whole and isinstance(record, dict) and "kind" in record else None


def finished(records: list[Record]) -> set[str]:
    """Names of the models that these records hold results of."""
    return {name for one in records if one["kind"] == "group" for name in one["names"]}


# ---- measuring -----------------------------------------------------------------------------------


def spawned(folder: Path, number: int, said: bool) -> int:
    """`group` in a process of its own, as if somebody had started it: where a process lies in
    memory makes all that it runs some per cent faster or slower; a fork lies where its parent does.
    """
    module = "hw_profiles.remote.runner"
    words = [sys.executable, "-m", module, "group", str(number), str(int(said))]
    return subprocess.run(words, cwd=folder, check=False).returncode


def measure(folder: Path, run: Callable[[Path, int, bool], int] = spawned) -> int:
    """Measure the groups that have no results yet, appending to the folder's results."""
    manifest = json.loads((folder / MANIFEST).read_text())
    with _results(folder) as out:
        records = from_lines(out.read())
        done = finished(records)
        if records and records[-1]["kind"] == "done" and done.issuperset(_names(manifest)):
            return 0
        said = False  # what this machine is: once each time that measuring begins
        for number, group in enumerate(manifest["groups"]):
            names = [model["name"] for model in group]
            if done.issuperset(names):
                continue
            _log(f"measuring group {number + 1} of {len(manifest['groups'])}: {', '.join(names)}")
            if code := run(folder, number, said):
                return code
            said = True
        _append(out, {"kind": "done"})
    return 0


def _names(manifest: Mapping[str, Any]) -> list[str]:
    return [model["name"] for group in manifest["groups"] for model in group]


def group(folder: Path, number: int, said: bool) -> int:
    """Measure one group and append its records; the exit code. `said`: the session's is there."""
    manifest = json.loads((folder / MANIFEST).read_text())
    with _results(folder) as out:
        records = from_lines(out.read())
        paces = [one["pace_ms"] for one in records if one["kind"] == "group"]
        try:
            if not said:
                runtime = load_module(manifest["runtime"])
                here = fingerprint(f"{manifest['runtime']} {runtime.version()}")
                _append(out, {"kind": "session", "fingerprint": dict(here)})
            _append(out, _measured(folder, manifest, number, min(paces, default=math.inf)))
        except NasctlError as error:
            _append(out, {"kind": "failed", "why": str(error)})
            return REFUSED
    return 0


def _measured(folder: Path, manifest: Mapping[str, Any], number: int, pace_ms: float) -> Record:
    """The record of a group. `pace_ms`: the reference's so far."""
    runtime = load_module(manifest["runtime"])
    plan, clock = protocol.Plan.from_json(manifest["plan"]), Clock()
    read = clocks.read_nvidia if shutil.which("nvidia-smi") else clocks.read
    models = manifest["groups"][number]
    with protocol.pinned(manifest["cores"]):
        load = _loader(folder, runtime, manifest, clock)
        reference = load(manifest["reference"], "the reference")
        session = protocol.session(
            [load(model["file"], f"model '{model['name']}'") for model in models],
            rng=random.Random(manifest["seed"] + number),
            plan=plan,
            reference=reference,
            instruments=protocol.Instruments(
                clock, read, pace_ms * (1 + protocol.PROCESSES_DIFFER)
            ),
        )
    names = [model["name"] for model in models]
    return {"kind": "group", "names": names, **asdict(session)}


def _loader(
    folder: Path, runtime: Runtime, manifest: Mapping[str, Any], clock: Clock
) -> Callable[[str, str], protocol.Call]:
    """Makes calls on a fixed random batch of 1 out of files."""
    import numpy as np

    rng = np.random.default_rng(manifest["seed"])
    how = {"threads": manifest["threads"], "precision": manifest["precision"]}

    def load(file: str, name: str) -> protocol.Call:
        path = folder / file
        built = path.with_suffix(runtime.SUFFIX)
        try:
            if not built.exists():  # else it is what is run, or was built for an earlier group
                cast(Compiled, runtime).build(path, built, **how)
            path = built
            session = runtime.load(path, **how)
            return clock.of(runtime.timed(session, random_feeds(session, rng)))
        except NasctlError as error:  # the user knows the name, not our file
            raise NasctlError(error.what, where=name, next=error.next) from error

    return load


def _results(folder: Path) -> IO[bytes]:
    """The results file, positioned at its start, without the torn line a crash may have left."""
    out = (folder / RESULTS).open("r+b")
    out.truncate(out.read().rfind(b"\n") + 1)
    out.seek(0)
    return out


def _append(out: IO[bytes], record: Record) -> None:
    out.seek(0, os.SEEK_END)
    out.write(to_line(record))
    out.flush()
    os.fsync(out.fileno())


def verify(folder: Path, identity: str) -> None:
    """Every file is what was sent: its SHA-256 is the manifest's, the manifest's is `identity`."""
    content = (folder / MANIFEST).read_bytes()
    damaged = [MANIFEST] if _sha256(content) != identity else []
    for name, digest in {} if damaged else json.loads(content)["files"].items():
        with contextlib.suppress(FileNotFoundError):
            if _sha256((folder / name).read_bytes()) == digest:
                continue
        damaged.append(name)
    if damaged:
        raise NasctlError(
            f"{damaged[0]} is not what was sent (checksum mismatch)",
            next="Run the same command again; if it stays, check the board's disk.",
        )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _log(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


# ---- the commands, in the parcel's folder --------------------------------------------------------


def check(runtime: str) -> int:
    """Raises NasctlError with what is missing."""
    if missing := load_module(runtime).unavailable():
        raise NasctlError(missing)
    return 0


def run(identity: str, offset: str) -> int:
    """Measure in a process of its own, unless one does already, and print what it finds."""
    folder = Path.cwd()
    lock = _lock(folder)
    if lock is not None:
        verify(folder, identity)
        (folder / RESULTS).touch(mode=0o600)
        if os.fork() == 0:
            sys.exit(_apart(folder, lock))
        os.close(lock)  # the other process has it now
    return _follow(folder, int(offset))


def _apart(folder: Path, lock: int) -> int:
    """Measure without the terminal, streams and signals of the connection."""
    os.setsid()
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDWR)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    faulthandler.enable()
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return measure(folder)


def _follow(folder: Path, at: int) -> int:
    """Ends when measuring ends, or when standard input does: then the connection is gone."""
    sys.stdout.buffer.write(BEGIN)
    while True:
        running = _running(folder)  # asked before reading: what it wrote last is not missed
        with (folder / RESULTS).open("rb") as results:
            results.seek(at)
            content = results.read()
        whole = content[: content.rfind(b"\n") + 1]
        sys.stdout.buffer.write(whole)
        sys.stdout.buffer.flush()
        at += len(whole)
        gone = select.select([0], [], [], 0.1 if running else 0)[0] and not os.read(0, 1)
        if gone or not running:
            return 0


def stop() -> int:
    folder = Path.cwd()
    while _running(folder):
        with contextlib.suppress(ValueError, ProcessLookupError):
            os.killpg(int((folder / LOCK).read_text()), signal.SIGKILL)
        time.sleep(0.02)
    return 0


def _lock(folder: Path) -> int | None:
    """The lock, held until its last holder ends, also across a fork; None when somebody has it."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    for _ in range(5):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        time.sleep(0.02)  # a follower that looks holds it for a moment
    os.close(lock)
    return None


def _running(folder: Path) -> bool:
    try:
        lock = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _group(number: str, said: str) -> int:
    faulthandler.enable()
    return group(Path.cwd(), int(number), said == "1")


COMMANDS: dict[str, Callable[..., int]] = {
    "check": check,
    "run": run,
    "stop": stop,
    "group": _group,
}


def main(arguments: list[str]) -> int:
    command, *rest = arguments
    try:
        return COMMANDS[command](*rest)
    except NasctlError as error:
        _log(str(error))
        return REFUSED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
