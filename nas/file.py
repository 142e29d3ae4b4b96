"""Files that are either whole or not there, and their digests. Imports without torch."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from nas.errors import NasctlError


def write(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step: whoever looks sees the old file or the new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # in the same folder, because a rename across file systems is a copy and not atomic
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())  # a full disk may complain only here
        os.chmod(name, 0o644)  # mkstemp's 0600 would hide the file from who deploys it
        os.replace(name, path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise unwritable(path, error) from error


def record(path: Path) -> dict[str, str | int]:
    """What a report says of a file."""
    try:
        return {"path": path.name, "sha256": sha256(path), "bytes": path.stat().st_size}
    except OSError as error:
        raise NasctlError(f"cannot read: {error.strerror}", where=str(path)) from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def commit() -> str:
    """The git commit of this code where it runs from a checkout; empty where it was installed."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
        tracked = subprocess.run(
            ["git", "-C", str(here), "ls-files", "--error-unmatch", __file__],
            capture_output=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):  # no git
        return ""
    # an environment inside somebody's own repository is not that repository's code
    return found.stdout.strip() if found.returncode == tracked.returncode == 0 else ""


def unwritable(path: Path, error: OSError) -> NasctlError:
    """The error for a file that a full disk, or whatever it was, kept from being written."""
    return NasctlError(
        f"cannot write: {error.strerror or error}",
        where=str(path),
        next="What was there before is intact; the folder must exist, be writable and have space.",
    )
