"""Commands on another machine through the system's OpenSSH client, and its failures as one line.

The user's own configuration (keys, aliases, jump hosts) applies. Host keys are always checked and
never accepted here; nothing is ever asked for. A remote command is an argument vector: every word
is quoted for the shell at the other end.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nas.errors import NasctlError, UsageError

#: a word that cannot be taken for an option, of characters that names of hosts and users have
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.\-]*"
_TARGET = re.compile(rf"ssh://(?:({_WORD})@)?({_WORD}|\[[0-9A-Fa-f:.]+\])(?::(\d{{1,5}}))?/?")
_OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "10",  # a silent network counts as lost after three of these
    "ServerAliveCountMax": "3",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "PermitLocalCommand": "no",
    "RemoteCommand": "none",
    "UpdateHostKeys": "no",
}
_FAILED = 255  # ssh's own exit code; a remote command's codes are below


class Unreachable(NasctlError):
    """No connection, or none any more: worth trying again."""


@dataclass(frozen=True)
class Target:
    """A machine to log in to. An alias of the user's ssh configuration is a host too."""

    host: str
    user: str = ""
    port: int | None = None
    python: str = "python3"  # on that machine: a name on its PATH, or a path
    config: Path | None = None  # an ssh configuration file in place of the user's own

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        port = f":{self.port}" if self.port else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{user}{host}{port}"


def parse(text: str, *, python: str = "python3", config: Path | None = None) -> Target:
    """`ssh://[user@]host[:port]`; raises UsageError for anything else."""
    match = _TARGET.fullmatch(text)
    if match is None or not 0 < int(match[3] or 22) < 65536:
        raise UsageError(
            f"'{text}' is not a board's address",
            where="--on",
            allowed="local, ssh://[user@]host[:port]",
        )
    host = match[2].strip("[]")
    return Target(host, match[1] or "", int(match[3]) if match[3] else None, python, config)


def command(target: Target, words: Sequence[str]) -> list[str]:
    """The local command that runs `words` on the target."""
    options = [part for name, value in _OPTIONS.items() for part in ("-o", f"{name}={value}")]
    config = ["-F", str(target.config)] if target.config else []
    user = ["-l", target.user] if target.user else []
    port = ["-p", str(target.port)] if target.port else []
    return ["ssh", "-T", *config, *options, *user, *port, "--", target.host, shlex.join(words)]


@dataclass(frozen=True)
class Answer:
    """What a remote command did."""

    code: int
    out: bytes
    err: str

    @property
    def complaint(self) -> str:
        """The last line of its standard error: where a Python traceback says what happened."""
        return (self.err.splitlines() or ["failed without a word"])[-1]


def run(target: Target, words: Sequence[str], stdin: IO[bytes] | None = None) -> Answer:
    """Run to its end. Raises Unreachable or NasctlError when it could not be run at all."""
    with tempfile.TemporaryFile() as errors, _started(target, words, errors, stdin) as process:
        out, _ = process.communicate()
        return _answer(target, process, out, errors)


def lines(target: Target, words: Sequence[str]) -> Generator[bytes, None, None]:
    """Lines of standard output as they come. Standard input stays open and silent meanwhile, so
    that the command can tell that the connection is gone. Raises as `run` does, also half-way."""
    with (
        tempfile.TemporaryFile() as errors,
        _started(target, words, errors, subprocess.PIPE) as process,
    ):
        heard = False
        try:
            assert process.stdout is not None
            yield from process.stdout
            heard = True
        finally:
            if not heard:  # the caller stopped listening
                process.kill()
        answer = _answer(target, process, b"", errors)
    if answer.code:
        raise NasctlError(f"the board: {answer.complaint}", where=str(target))


def _started(
    target: Target, words: Sequence[str], errors: IO[bytes], stdin: IO[bytes] | int | None
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command(target, words),
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError as error:
        raise NasctlError("no ssh on this machine", next="Install the OpenSSH client.") from error


def _answer(
    target: Target, process: subprocess.Popen[bytes], out: bytes, errors: IO[bytes]
) -> Answer:
    code = process.wait()
    errors.seek(0)
    said = errors.read().decode(errors="replace")
    if code == _FAILED or code < 0:
        raise _failure(target, said)
    return Answer(code, out, said)


def _failure(target: Target, said: str) -> NasctlError:
    """What ssh's own message means to a user."""
    where, last = str(target), " ".join(said.split())[-200:]
    if "IDENTIFICATION HAS CHANGED" in said:
        return NasctlError(
            "the host key is not the one known for this host: another machine answers",
            where=where,
            next="If the board was installed anew, remove the old key with ssh-keygen -R, log in "
            "once by hand and compare the new key's fingerprint with the board's.",
        )
    if "Host key verification failed" in said:
        return NasctlError(
            "the host key is unknown",
            where=where,
            next="Log in once by hand with ssh, and compare the fingerprint with the board's.",
        )
    if "Permission denied" in said or "Too many authentication failures" in said:
        return NasctlError(
            "the board refused to let us in",
            where=where,
            next="No password is ever asked for: set up a key (ssh-copy-id).",
        )
    return Unreachable(
        f"no connection ({last or 'ended without a word'})",
        where=where,
        next="Is it switched on, on this network, and running sshd?",
    )
