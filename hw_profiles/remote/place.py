"""A private folder of ours on another machine: made, filled, worked in, removed.

All words of a command are arguments, never part of a script: in every script $1 is the folder and
$2 the machine's Python.
"""

from __future__ import annotations

import io
import re
import tarfile
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

from hw_profiles.remote import ssh
from nas.errors import NasctlError

#: what a folder's name on a board must look like before anything in it is touched
FOLDER = re.compile(r"/[\w./-]*/nasctl-[A-Za-z0-9]{8,}")

_MAKE = (
    'command -v "$2" >/dev/null || exit 21; '
    '"$2" -c "import sys; sys.exit(sys.version_info < (3, 8))" || exit 22; '
    'umask 077 && mktemp -d "${TMPDIR:-/var/tmp}/nasctl-XXXXXXXX"'
)
UNPACK = 'umask 077 && tar -x -f - -C "$1" || exit 31'
# ONNX Runtime leaves a session file in TMPDIR: so that is our folder, too
RUN = (
    'cd "$1" && TMPDIR=$1 && export TMPDIR && python=$2 && shift 2 && '
    'exec "$python" -m "hw_profiles.remote.$@"'
)
CHECK = ("runner", "check")  # for RUN, with a runtime's name: is all there that it takes?


@dataclass(frozen=True)
class Place:
    """A folder on a machine; `path` is empty before `make` has given one."""

    target: ssh.Target
    path: str = ""

    def words(self, script: str, *more: str) -> list[str]:
        return ["sh", "-c", script, "nasctl", self.path, self.target.python, *more]

    def sh(self, script: str, *more: str, stdin: IO[bytes] | None = None) -> ssh.Answer:
        return ssh.run(self.target, self.words(script, *more), stdin)

    def send(self, files: Mapping[str, bytes], script: str, *more: str) -> None:
        """Files by path as an archive on the script's standard input. Raises NasctlError with what
        the machine lacks."""
        with tempfile.TemporaryFile() as packed:
            with tarfile.open(fileobj=packed, mode="w") as archive:
                for name, content in files.items():
                    entry = tarfile.TarInfo(name)
                    entry.size, entry.mode, entry.mtime = len(content), 0o600, time.time()
                    archive.addfile(entry, io.BytesIO(content))
            packed.seek(0)
            answer = self.sh(script, *more, stdin=packed)
        if "No space left on device" in answer.err:
            raise self.failure("the board's disk is full", next="Make room in its TMPDIR.")
        if answer.code == 31:
            raise self.failure(f"cannot write on the board: {answer.complaint}")
        if answer.code:
            raise self.failure(f"the board cannot do it: {answer.complaint}")

    def failure(self, what: str, next: str = "") -> NasctlError:
        return NasctlError(what, where=str(self.target), next=next)


def made(target: ssh.Target) -> Place:
    """A new folder. Raises NasctlError where there is no Python, or no room for one."""
    nowhere = Place(target)
    answer = nowhere.sh(_MAKE)
    if answer.code in (21, 22):
        what = "no" if answer.code == 21 else "too old a"
        raise nowhere.failure(f"{what} {target.python} on the board; it takes 3.8 or later")
    # the last line: a login shell may print others before
    folder = (answer.out.decode(errors="replace").splitlines() or [""])[-1]
    if answer.code or not FOLDER.fullmatch(folder):
        raise nowhere.failure(f"cannot make a folder on the board: {answer.complaint or folder}")
    return Place(target, folder)
