"""A board to log in to: an sshd of the test's own on loopback, with its own keys and folders."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hw_profiles.remote import ssh

PRIVILEGE_SEPARATION = Path("/run/sshd")  # what Debian's sshd insists on when it is run by root

SERVER = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
AuthenticationMethods publickey
PermitRootLogin prohibit-password
AllowUsers {user}
AllowTcpForwarding no
X11Forwarding no
SetEnv TMPDIR={folder}/board
"""
# the default key exchange, safe against quantum computers, costs 0.3 s of processor per connection
CLIENT = """
IdentityFile {folder}/user_key
IdentitiesOnly yes
IdentityAgent none
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile none
KexAlgorithms curve25519-sha256
"""


@dataclass(frozen=True)
class Board:
    folder: Path  # keys and configuration
    target: ssh.Target

    @property
    def disk(self) -> Path:
        """Where temporary folders on the board are made."""
        return self.folder / "board"

    @property
    def found(self) -> list[Path]:
        return sorted(self.disk.iterdir())

    def with_known_hosts(self, text: str) -> ssh.Target:
        """The target seen by a client that knows only these host keys."""
        (self.folder / "other_hosts").write_text(text)
        return self.with_options(f"UserKnownHostsFile {self.folder}/other_hosts")

    def with_options(self, options: str) -> ssh.Target:
        """The target with client options that win over the usual ones: ssh takes the first."""
        path = self.folder / "other_client"
        path.write_text(f"{options}\n{(self.folder / 'client').read_text()}")
        return replace(self.target, config=path)

    def with_python(self, script: str) -> ssh.Target:
        """The target with this shell script as its Python."""
        path = self.folder / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return replace(self.target, python=str(path))


def keygen(path: Path) -> str:
    """A fresh key pair; returns the public one."""
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)]
    subprocess.run(command, check=True)
    return path.with_name(f"{path.name}.pub").read_text().strip()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def board(folder: Path) -> Iterator[Board]:
    """Started, and torn down afterwards. Skips the test where there is no sshd."""
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    program = shutil.which("sshd", path=places)
    if program is None or shutil.which("ssh") is None:
        pytest.skip("no sshd on this machine: apt-get install openssh-server")
    (folder / "board").mkdir()
    port, user = free_port(), getpass.getuser()
    host_key, _ = keygen(folder / "host_key"), keygen(folder / "user_key")
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}\n")
    (folder / "client").write_text(CLIENT.format(folder=folder))
    (folder / "server").write_text(SERVER.format(folder=folder, port=port, user=user))
    target = ssh.parse(
        f"ssh://{user}@127.0.0.1:{port}", python=sys.executable, config=folder / "client"
    )
    _make_privilege_separation()
    with (folder / "server.log").open("wb") as log:
        command = [program, "-D", "-e", "-f", str(folder / "server")]
        server = subprocess.Popen(command, stderr=log)
        try:
            _wait_for(port, server, folder / "server.log")
            yield Board(folder, target)
        finally:
            server.terminate()
            server.wait()


def _make_privilege_separation() -> None:
    """Left there: other processes of the tests may be running a server of their own."""
    if os.geteuid() == 0:
        PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)


def _wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        if server.poll() is not None:
            pytest.skip(f"sshd does not start: {log.read_text().strip()}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError("sshd does not listen")
