"""Bundle: one portable directory, or archive, with everything that a model is delivered as.

`bundle.json` lists every member with its size, digest and role: ONNX files (float, INT8 ...), the
architecture, what surrounds the network (`task.json`), a sample of inputs, how engines are built
per device, the report. `read` verifies all of it and refuses whatever is not listed; it loads
nothing, and looks into ONNX files only for the names of the files that hold their weights. What is
delivered is an ONNX file. Members of the role "engine" are native code that runs when it is loaded:
only who names one (`nasctl verify --engine`) loads it, and archives leave them out, as they belong
to one machine.

A member is added in three steps: its content under a temporary name, the manifest, the rename. A
kill between the last two leaves a manifest that the next `read` finishes the rename for.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deploy import external
from nas import file
from nas.errors import NasctlError

MANIFEST = "bundle.json"
LIMIT = 8 << 30  # bytes that an archive may unfold to
LARGEST_MANIFEST = 1 << 20
NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
#: what `_part` and `nas.file.write` call a member that is not there yet
UNFINISHED = re.compile(r"([A-Za-z0-9][\w.-]*/)?\.{1,2}[A-Za-z0-9][\w.-]*\.part", re.ASCII)
ONNX = ".onnx"
CHUNK = 1 << 20

Role = Literal[
    "model",
    "weights",
    "arch",
    "task",
    "calibration",
    "inputs",
    "recipes",
    "report",
    "history",
    "engine",
    "sidecar",
]
#: what belongs to one machine: not part of an archive
MADE_HERE = ("engine", "sidecar")


class Member(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)
    role: Role


class Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1  # of bundles; others are refused
    nasctl: str  # the version that wrote it
    model: str  # the member that is delivered: the fastest inside the bounds
    latency_table: str = ""  # sha256 of the table that its latency was predicted with
    licence: str = ""  # of the weights, as their owner stated it
    members: dict[str, Member]


@dataclass(frozen=True)
class Bundle:
    """A verified bundle."""

    folder: Path
    manifest: Manifest

    @property
    def model(self) -> Path:
        """The file that is delivered."""
        return self.folder / self.manifest.model

    def path(self, name: str) -> Path:
        """Of a member. Raises NasctlError naming those there are."""
        if name not in self.manifest.members:
            raise NasctlError(
                f"has no member '{name}'", where=str(self.folder), allowed=self.manifest.members
            )
        return self.folder / name

    def onnx(self, name: str) -> Path:
        """Of a member that is a model: no other may be run unless somebody names it. Raises
        NasctlError naming those there are."""
        path = self.path(name)
        if self.manifest.members[name].role != "model":
            raise NasctlError(
                f"'{name}' is no ONNX file", where=str(self.folder), allowed=self.of("model")
            )
        return path

    def of(self, role: Role) -> list[str]:
        """Names of the members of a role."""
        return [name for name, member in self.manifest.members.items() if member.role == role]


def seal(
    folder: Path,
    roles: Mapping[str, Role],
    *,
    nasctl: str,
    model: str,
    latency_table: str = "",
    licence: str = "",
) -> Bundle:
    """Make a bundle of files that are in `folder`, in place of the one that was there; whatever
    else is there makes it invalid."""
    if (folder / MANIFEST).is_file():
        before = _manifest((folder / MANIFEST).read_bytes(), str(folder))
        for name in before.members.keys() - roles.keys():
            (folder / name).unlink(missing_ok=True)
    members = {name: _member(folder / name, role) for name, role in sorted(roles.items())}
    found = Manifest(
        nasctl=nasctl, model=model, latency_table=latency_table, licence=licence, members=members
    )
    _write(folder, found)
    return read(folder)


def add(
    bundle: Bundle,
    sources: Mapping[str, tuple[Role, bytes | Path]],
    *,
    model: str | None = None,
    drop: Collection[str] = (),
) -> Bundle:
    """The bundle with further members, or others in their place, and without those of the names
    `drop`; `model` is then delivered.

    Whoever opens it sees the old members or the new ones, also after a kill.
    """
    folder, members = bundle.folder, dict(bundle.manifest.members)
    for left in filter(UNFINISHED.fullmatch, list(_files(folder))):  # by one that was killed
        (folder / left).unlink()
    for name in drop:
        (folder / name).replace(_part(folder / name))  # as if it were to be added still
        del members[name]
    for name, (role, source) in sources.items():
        part = _part(folder / name)
        if isinstance(source, Path):
            _copy(source, part)
        else:
            file.write(part, source)
        members[name] = _member(part, role)
    changed = {"members": dict(sorted(members.items())), "model": model or bundle.manifest.model}
    _write(folder, bundle.manifest.model_copy(update=changed))
    for name in set(drop) - sources.keys():
        _part(folder / name).unlink()
    return read(folder)


def read(folder: Path) -> Bundle:
    """Verify the bundle in a folder; loads nothing.

    Raises NasctlError for links, files that the manifest does not list, members that are missing
    or changed, and models whose weights are in a file that is no member.
    """
    if not folder.is_dir():
        raise NasctlError("no such bundle", where=str(folder), allowed="a folder, or its .zip")
    path = folder / MANIFEST
    try:
        if path.is_symlink() or path.stat().st_size > LARGEST_MANIFEST:
            raise NasctlError("is no manifest of a bundle", where=str(path))
        manifest = _manifest(path.read_bytes(), str(path))
    except OSError as error:
        raise NasctlError(
            f"is no bundle: {error.strerror}: {MANIFEST}",
            where=str(folder),
            next="A run's bundle is complete once the run is: run its command again.",
        ) from error
    found = {name for name in _files(folder) if not UNFINISHED.fullmatch(name)}
    if extra := sorted(found - {MANIFEST} - manifest.members.keys()):
        raise NasctlError(
            f"holds '{extra[0]}', which its manifest does not list",
            where=str(folder),
            next="Whoever put it there: take it away.",
        )
    for name, member in manifest.members.items():
        _verify(folder / name, member)
    bundle = Bundle(folder, manifest)
    for name in bundle.of("model"):
        external.require(folder / name, {folder / each for each in manifest.members})
    return bundle


# ---- archives ------------------------------------------------------------------------------------


def pack(bundle: Bundle, path: Path) -> None:
    """Write a bundle as one .zip, the same bytes for the same bundle; engines are left out."""
    members = {
        name: member
        for name, member in bundle.manifest.members.items()
        if member.role not in MADE_HERE
    }
    manifest = bundle.manifest.model_copy(update={"members": members})
    part = _part(path)
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(part, "w") as archive:
            archive.writestr(_entry(MANIFEST), _text(manifest))
            for name in members:
                _store(archive, name, bundle.folder / name)
        part.replace(path)
    except OSError as error:
        raise NasctlError(f"cannot write: {error.strerror}", where=str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def _store(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    entry = _entry(name)
    entry.file_size = path.stat().st_size  # from 2 GiB on the format has other headers
    with archive.open(entry, "w") as out, path.open("rb") as content:
        shutil.copyfileobj(content, out)


def unpack(archive: Path, folder: Path, *, limit: int = LIMIT) -> Bundle:
    """Unfold an archive of anybody's into a new folder: whole, or not at all.

    Raises NasctlError for what is no bundle, for members that the manifest does not list, that are
    links, of another size or digest, and for more than `limit` bytes.
    """
    if folder.exists():
        raise NasctlError("exists already", where=str(folder), next="Name a new folder.")
    try:
        with zipfile.ZipFile(archive) as found:
            entries = _entries(found, str(archive), limit)
            manifest = _manifest(found.read(entries.pop(MANIFEST)), str(archive))
            if entries.keys() != manifest.members.keys():
                odd = sorted(entries.keys() ^ manifest.members.keys())[0]
                raise NasctlError(f"'{odd}' is not both listed and there", where=str(archive))
            return _unfold(found, entries, manifest, folder)
    except OSError as error:
        raise NasctlError(f"cannot unpack: {error.strerror}", where=str(archive)) from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
        raise NasctlError(f"is no archive of a bundle ({error})", where=str(archive)) from error


def _unfold(
    archive: zipfile.ZipFile,
    entries: Mapping[str, zipfile.ZipInfo],
    manifest: Manifest,
    folder: Path,
) -> Bundle:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        whole = Path(made) / "bundle"
        for name, entry in entries.items():
            _extract(archive, entry, whole / name, manifest.members[name].bytes)
        _write(whole, manifest)
        bundle = read(whole)
        whole.rename(folder)
    return Bundle(folder, bundle.manifest)


def _entries(archive: zipfile.ZipFile, where: str, limit: int) -> dict[str, zipfile.ZipInfo]:
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        mode = entry.external_attr >> 16
        if not NAME.fullmatch(entry.filename) or entry.filename in found:
            raise NasctlError(f"has an entry '{entry.filename}'", where=where)
        if entry.flag_bits & 1 or (stat.S_IFMT(mode) not in (0, stat.S_IFREG)):
            raise NasctlError(f"'{entry.filename}' is no ordinary file", where=where)
        found[entry.filename] = entry
    total = sum(entry.file_size for entry in found.values())
    if total > limit:
        raise NasctlError(f"unfolds to {total:.3g} bytes", where=where, allowed=f"{limit:.3g}")
    if MANIFEST not in found or found[MANIFEST].file_size > LARGEST_MANIFEST:
        raise NasctlError(f"has no {MANIFEST}", where=where)
    return found


def _extract(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, size: int) -> None:
    """At most `size` bytes, whatever the entry's own header says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    left = size
    with archive.open(entry) as source, path.open("wb") as out:
        while data := source.read(min(CHUNK, left + 1)):
            left -= len(data)
            if left < 0:
                raise NasctlError(f"'{entry.filename}' is larger than listed", where=str(path))
            out.write(data)


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    return entry


# ---- files ---------------------------------------------------------------------------------------


def _manifest(content: bytes, where: str) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise NasctlError(f"field '{field}': {first['msg']}", where=where) from error
    for name, member in manifest.members.items():
        if not NAME.fullmatch(name) or name == MANIFEST:
            raise NasctlError(f"lists a member '{name}'", where=where)
        if member.role == "model" and not name.endswith(ONNX):
            raise NasctlError(f"lists a model '{name}'", where=where, allowed=f"*{ONNX}")
    if manifest.model not in manifest.members:
        raise NasctlError(f"delivers '{manifest.model}', which is no member", where=where)
    if (role := manifest.members[manifest.model].role) != "model":
        raise NasctlError(f"delivers '{manifest.model}', of the role '{role}'", where=where)
    return manifest


def _files(folder: Path) -> Iterator[str]:
    """Every file, relative to the folder. Raises NasctlError for what is no ordinary one."""
    for root, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(root, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise NasctlError("is no ordinary file", where=str(path))
            if stat.S_ISREG(mode):
                yield path.relative_to(folder).as_posix()


def _verify(path: Path, member: Member) -> None:
    part = _part(path)
    if part.is_file() and _same(part, member):  # `add` was killed before its last step
        part.replace(path)
    if not path.is_file():
        raise NasctlError("is missing", where=str(path), next="Get or export the bundle again.")
    if not _same(path, member):
        raise NasctlError(
            "is not the file that the manifest lists",
            where=str(path),
            next="It was damaged or changed: get or export the bundle again.",
        )


def _same(path: Path, member: Member) -> bool:
    return path.stat().st_size == member.bytes and file.sha256(path) == member.sha256


def _member(path: Path, role: Role) -> Member:
    try:
        return Member(sha256=file.sha256(path), bytes=path.stat().st_size, role=role)
    except OSError as error:
        raise NasctlError(f"cannot read: {error.strerror}", where=str(path)) from error


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _copy(source: Path, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as of, path.open("wb") as out:
            shutil.copyfileobj(of, out)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise NasctlError(f"cannot write: {error.strerror}", where=str(path)) from error


def _text(manifest: Manifest) -> bytes:
    return (manifest.model_dump_json(indent=1) + "\n").encode()


def _write(folder: Path, manifest: Manifest) -> None:
    file.write(folder / MANIFEST, _text(manifest))


def identity(bundle: Bundle) -> str:
    """sha256 of the manifest, and so of every member."""
    return hashlib.sha256(_text(bundle.manifest)).hexdigest()
