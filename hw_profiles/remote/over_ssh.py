"""Measuring models on a board over ssh, by the same protocol as here.

A parcel goes to a fresh private folder on the board, its runner measures there apart from the
connection, and results come back line by line as groups finish. `workdir` keeps what has come back
and where the board's folder is, so that after a lost connection, a crash or a power cut the same
call goes on with what is missing. Afterwards nothing is left on the board.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from hw_profiles import protocol
from hw_profiles.protocol import Progress, Timing
from hw_profiles.remote import runner, ssh
from hw_profiles.remote.parcel import Parcel
from hw_profiles.remote.place import CHECK, FOLDER, RUN, UNPACK, Place, made
from hw_profiles.remote.runner import BEGIN, LOG, MANIFEST, RESULTS, Record
from nas.errors import NasctlError

#: how long to wait before each attempt to find a lost board again; about five minutes
RETRY_S: Sequence[float] = (1, 2, 4, 8, 15, 30, 60, 60, 60, 60)
# What runs on the board, besides what `place` has
_HAS = '[ -O "$1" ] || exit 11; [ -f "$1/$3" ] || exit 12'
_TAIL = 'df -P -k "$1" | tail -n 1; tail -n 20 "$1/$3"'
_REMOVE = 'cd "$1" && "$2" -m hw_profiles.remote.runner stop; cd / && rm -rf "$1"'


@dataclass(frozen=True, slots=True)
class RemoteResult:
    """Timings by model name, and what they rest on."""

    timings: dict[str, Timing]
    rounds_ms: dict[str, list[float]]  # of each model: the rounds its timing rests on
    reference_ms: list[float]  # the reference's block medians, of all groups
    fingerprint: dict[str, str | int | float]  # hw_profiles/fingerprint.py, of the board
    left: str = ""  # the folder that is still on the board; empty when nothing is

    @property
    def noise(self) -> float:
        """The noise floor, relative; see protocol.noise."""
        return protocol.noise(self.reference_ms)


def measure_models(
    target: ssh.Target,
    parcel: Parcel,
    *,
    workdir: Path,
    progress: Progress | None = None,
    keep: bool = False,
) -> RemoteResult:
    """Time a parcel's models on the target.

    `workdir` holds one folder per unfinished (parcel, target), removed when it is finished. When
    the connection is lost for longer than RETRY_S, ssh.Unreachable is raised, the board goes on
    measuring, and the same call collects the results. Any other failure stops the board and cleans
    it; finished groups are not measured again then either. With `keep` the board's folder stays.
    """
    job = _Job.of(target, parcel, workdir)
    try:
        job.prepare()
        result = job.measured(progress or (lambda share: None))
    except ssh.Unreachable:
        raise
    except (NasctlError, KeyboardInterrupt):
        if not keep:
            job.clean()
        raise
    left = job.folder if keep else job.clean()
    shutil.rmtree(job.state)
    return replace(result, left=left)


@dataclass(frozen=True, slots=True)
class _Job:
    """One parcel on one target: what is here (`state`) and, once made, its folder there."""

    target: ssh.Target
    parcel: Parcel
    state: Path

    @classmethod
    def of(cls, target: ssh.Target, parcel: Parcel, workdir: Path) -> _Job:
        key = hashlib.sha256(f"{target} {parcel.identity}".encode()).hexdigest()[:16]
        state = workdir / f"remote-{key}"
        state.mkdir(parents=True, exist_ok=True)
        return cls(target, parcel, state)

    @property
    def results(self) -> Path:
        return self.state / RESULTS

    @property
    def folder(self) -> str:
        """On the board; empty when there is none."""
        with contextlib.suppress(FileNotFoundError):
            found = (self.state / "folder").read_text().strip()
            if FOLDER.fullmatch(found):
                return found
        return ""

    # ---- on the board ----------------------------------------------------------------------------

    @property
    def place(self) -> Place:
        return Place(self.target, self.folder)

    def failure(self, what: str, next: str = "") -> NasctlError:
        return self.place.failure(what, next)

    def prepare(self) -> None:
        """A folder on the board with all of the parcel in it; the one from before if there is."""
        found = self.place.sh(_HAS, MANIFEST).code if self.folder else 11
        if found == 0:
            return
        if found == 11:
            (self.state / "folder").write_text(made(self.target).path)
        # the code first, and a look at what is there for it: models may be large
        self.place.send(self.parcel.code, f"{UNPACK}; {RUN}", *CHECK, self.parcel.runtime)
        # the manifest last: where it is, all is
        earlier, manifest = {RESULTS: self.earlier()}, {MANIFEST: self.parcel.manifest}
        self.place.send(self.parcel.data | earlier | manifest, UNPACK)

    def earlier(self) -> bytes:
        """The groups that have been measured before, in the file here as they will be there."""
        content = self.results.read_bytes() if self.results.is_file() else b""
        known = ("session", "group")
        records = [one for one in runner.from_lines(content) if one["kind"] in known]
        kept = b"".join(map(runner.to_line, records))
        self.results.write_bytes(kept)
        return kept

    def clean(self) -> str:
        """Stop and remove what is on the board; returns the folder where that failed."""
        folder = self.folder
        if not folder:
            return ""
        try:
            if self.place.sh(_REMOVE).code:
                return folder
        except NasctlError:  # the connection is gone: the caller is told what is left
            return folder
        (self.state / "folder").unlink()
        return ""

    # ---- measuring -------------------------------------------------------------------------------

    def measured(self, tell: Progress) -> RemoteResult:
        """Have the board measure until every model has a result here.

        A line that was damaged on its way is fetched again; one that was damaged on the board is
        found there by the runner, which measures its group again.
        """
        for _ in range(2):
            records = self.follow(tell)
            if not self.parcel.models.keys() - runner.finished(records):
                tell(1.0)
                return self.result(records)
            self.results.unlink()
        raise self.failure("results are damaged again and again", next="Check the board's disk.")

    def follow(self, tell: Progress) -> list[Record]:
        """Have the runner run and fetch its results until it ends; find a lost board again."""
        waits, size = iter(RETRY_S), 0
        while True:
            try:
                self.fetch(tell)
                return self.ended()
            except ssh.Unreachable as error:
                if self.results.is_file() and self.results.stat().st_size > size:
                    waits, size = iter(RETRY_S), self.results.stat().st_size
                wait = next(waits, None)
                if wait is None:
                    raise ssh.Unreachable(
                        f"the connection is lost; the board goes on measuring ({error.what})",
                        where=str(self.target),
                        next="Run the same command again to collect the results.",
                    ) from error
                time.sleep(wait)

    def fetch(self, tell: Progress) -> None:
        with self.results.open("a+b") as results:
            results.seek(0)
            done = runner.finished(runner.from_lines(results.read()))
            words = self.place.words(
                RUN, "runner", "run", self.parcel.identity, str(results.tell())
            )
            with contextlib.closing(ssh.lines(self.target, words)) as said:
                lines = itertools.islice(itertools.dropwhile(BEGIN.__ne__, said), 1, None)
                # one that is cut off with the connection comes again
                for line in (line for line in lines if line.endswith(b"\n")):
                    results.write(line)
                    results.flush()
                    done |= runner.finished(runner.from_lines(line))
                    tell(min(0.99, len(done) / len(self.parcel.models)))

    def ended(self) -> list[Record]:
        """The records, of a runner that ended well. Raises NasctlError with why it did not."""
        records = runner.from_lines(self.results.read_bytes())
        last = records[-1] if records else {}
        if last.get("kind") == "done":
            return records
        if last.get("kind") == "failed":
            raise self.failure(str(last.get("why")))
        answer = self.place.sh(_TAIL, LOG)
        disk, *log = answer.out.decode(errors="replace").split("\n")
        said = [line for line in log if line.strip()]
        fatal = [line for line in said if line.startswith("Fatal Python error")]
        done = len(runner.finished(records))
        what = f"the runner crashed with {done} of {len(self.parcel.models)} models measured"
        if _free_kb(disk) < 64:
            what = f"the board's disk is full; {what}"
        raise self.failure(
            f"{what}; the last it said: {(fatal or said or ['nothing'])[-1]}",
            next="Run the same command again to go on.",
        )

    # ---- results ---------------------------------------------------------------------------------

    def result(self, records: Sequence[Record]) -> RemoteResult:
        """Groups' records as values; the last counts where a group was measured twice."""
        try:
            return self.read(records)
        except (KeyError, IndexError, TypeError, StopIteration) as error:
            raise self.failure(
                f"its results are not what our runner writes ({error!r})",
                next="Does something else write to its TMPDIR?",
            ) from error

    def read(self, records: Sequence[Record]) -> RemoteResult:
        timings: dict[str, Timing] = {}
        rounds: dict[str, list[float]] = {}
        reference: list[float] = []
        for record in (one for one in records if one["kind"] == "group"):
            reference += self.positive(record["reference_ms"], "the reference")
            for at, name in enumerate(record["names"]):
                values = {field.name: record["timings"][at][field.name] for field in fields(Timing)}
                self.positive([values["median_ms"], values["p99_ms"], values["n"]], name)
                timings[name] = Timing(**values)
                rounds[name] = self.positive(record["rounds_ms"][at], name)
        first = next(one for one in records if one["kind"] == "session")
        return RemoteResult(timings, rounds, reference, first["fingerprint"])

    def positive(self, values: Sequence[Any], name: str) -> list[float]:
        for value in values:
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise self.failure(f"it reports {value} for '{name}'", next="Is its clock running?")
        return list(values)


def _free_kb(line: str) -> float:
    """The fourth column of df -P; unknown is plenty."""
    columns = line.split()
    return float(columns[3]) if len(columns) > 3 and columns[3].isdigit() else math.inf
