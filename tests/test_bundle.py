"""deploy.bundle: what is listed is there, what is there is listed, and nothing reaches outside."""

import json
import stat
import zipfile

import pytest

from deploy import bundle
from nas.errors import NasctlError

ROLES = {"model.onnx": "model", "task.json": "task", "engines/a.pt2": "engine"}


def files(folder):
    for name in ROLES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 10)
    return folder


def sealed(folder, model="model.onnx"):
    return bundle.seal(files(folder), ROLES, nasctl="0", model=model)


def test_a_sealed_bundle_reads_back_and_is_verified(tmp_path):
    made = sealed(tmp_path / "b")
    again = bundle.read(tmp_path / "b")
    assert again == made and again.model == tmp_path / "b" / "model.onnx"
    assert again.of("engine") == ["engines/a.pt2"]
    with pytest.raises(NasctlError, match="no member 'x'; allowed: engines/a.pt2, model.onnx"):
        again.path("x")


@pytest.mark.parametrize("name", sorted(ROLES))
def test_a_changed_byte_or_a_missing_member_is_refused(tmp_path, name):
    sealed(tmp_path / "b")
    path = tmp_path / "b" / name
    whole = path.read_bytes()
    path.write_bytes(b"X" + whole[1:])
    with pytest.raises(NasctlError, match="not the file that the manifest lists"):
        bundle.read(tmp_path / "b")
    path.unlink()
    with pytest.raises(NasctlError, match="is missing"):
        bundle.read(tmp_path / "b")


def test_what_is_not_listed_is_refused(tmp_path):
    sealed(tmp_path / "b")
    (tmp_path / "b/engines/evil.so").write_bytes(b"")
    with pytest.raises(NasctlError, match="'engines/evil.so', which its manifest does not list"):
        bundle.read(tmp_path / "b")


@pytest.mark.parametrize("where", ["model.onnx", "link", "engines"])
def test_links_are_refused(tmp_path, where):
    sealed(tmp_path / "b")
    path = tmp_path / "b" / where
    if path.is_dir() or path.exists():
        path.rename(tmp_path / "moved")
    else:
        (tmp_path / "moved").write_bytes(b"")
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(NasctlError, match="no ordinary file"):
        bundle.read(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "field 'format'"),
        ({"more": 1}, "field 'more'"),
        ({"model": "other.onnx"}, "delivers 'other.onnx'"),
        ({"members": {"../x": {"sha256": "0" * 64, "bytes": 0, "role": "task"}}}, "lists a member"),
        ({"members": {"/x": {"sha256": "0" * 64, "bytes": 0, "role": "task"}}}, "lists a member"),
        ({"members": {"x": {"sha256": "0", "bytes": 0, "role": "task"}}}, "members.x.sha256"),
    ],
)
def test_a_manifest_that_is_odd_is_refused(tmp_path, change, said):
    sealed(tmp_path / "b")
    path = tmp_path / "b" / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(NasctlError, match=said):
        bundle.read(tmp_path / "b")


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path):
    with pytest.raises(NasctlError, match="is no bundle"):
        bundle.read(files(tmp_path / "b"))
    with pytest.raises(NasctlError, match="no such bundle"):
        bundle.read(tmp_path / "absent")


# ---- adding --------------------------------------------------------------------------------------


def test_members_are_added_and_replaced(tmp_path):
    made = sealed(tmp_path / "b")
    (tmp_path / "made.onnx").write_bytes(b"int8")
    new = {"model.int8.onnx": ("model", tmp_path / "made.onnx"), "task.json": ("task", b"{}")}
    more = bundle.add(made, new, model="model.int8.onnx")
    assert more.model.read_bytes() == b"int8"
    assert more.path("task.json").read_bytes() == b"{}"
    assert bundle.identity(more) != bundle.identity(made)


@pytest.mark.parametrize("step", range(5))
def test_a_kill_at_any_step_of_adding_leaves_old_or_new(tmp_path, monkeypatch, step):
    made, left = sealed(tmp_path / "b"), [step]

    def killing(function):
        def call(*arguments, **named):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return function(*arguments, **named)

        return call

    new = {"model.onnx": ("model", b"new"), "more.json": ("report", b"more")}
    with monkeypatch.context() as patched:
        patched.setattr(bundle.file, "write", killing(bundle.file.write))
        patched.setattr(type(tmp_path), "replace", killing(type(tmp_path).replace))
        with pytest.raises(KeyboardInterrupt):
            bundle.add(made, new)
    found = bundle.read(tmp_path / "b")
    assert (found.model.read_bytes() == b"new") is (step >= 3)  # the manifest is the third step
    assert ("more.json" in found.manifest.members) is (step >= 3)
    assert bundle.add(found, new).path("more.json").read_bytes() == b"more"


@pytest.mark.parametrize("step", range(3))
def test_members_are_dropped_whole_and_a_kill_leaves_old_or_new(tmp_path, monkeypatch, step):
    made = bundle.add(sealed(tmp_path / "b"), {"more.json": ("report", b"more")})
    names = [(type(tmp_path), "replace"), (bundle.file, "write"), (type(tmp_path), "unlink")]

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(*names[step], killed)
        with pytest.raises(KeyboardInterrupt):
            bundle.add(made, {}, drop=["more.json"])
    found = bundle.read(tmp_path / "b")
    assert ("more.json" in found.manifest.members) is (step < 2)
    if step < 2:
        found = bundle.add(found, {}, drop=["more.json"])
    assert "more.json" not in found.manifest.members
    assert not (tmp_path / "b" / "more.json").exists()


# ---- archives ------------------------------------------------------------------------------------


def test_an_archive_unfolds_to_the_same_bundle_without_engines(tmp_path):
    made = sealed(tmp_path / "b")
    bundle.pack(made, tmp_path / "one.zip")
    bundle.pack(made, tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    back = bundle.unpack(tmp_path / "one.zip", tmp_path / "back")
    assert set(back.manifest.members) == {"model.onnx", "task.json"}
    assert back.model.read_bytes() == made.model.read_bytes()
    with pytest.raises(NasctlError, match="exists already"):
        bundle.unpack(tmp_path / "one.zip", tmp_path / "back")


def rewritten(path, change):
    """The archive with its entries changed: `change` takes and returns [(ZipInfo, bytes)]."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in change(entries):
            archive.writestr(entry, content)
    return path


def named(name, mode=stat.S_IFREG | 0o644):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = mode << 16
    return entry


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: [*e, (named("../evil"), b"")], "has an entry '../evil'"),
        (lambda e: [*e, (named("/etc/evil"), b"")], "has an entry '/etc/evil'"),
        (lambda e: [*e, (named("a/b/c"), b"")], "has an entry 'a/b/c'"),
        (lambda e: [*e, (named("more"), b"")], "'more' is not both"),
        (lambda e: e[:-1], "'task.json' is not both"),
        (lambda e: e[1:], "has no bundle.json"),
        (lambda e: [*e, (named("l", stat.S_IFLNK | 0o777), b"/etc")], "'l' is no ordinary file"),
        (lambda e: [(one, b"X" + data[1:]) if one.filename == "task.json" else (one, data)
                    for one, data in e], "not the file that the manifest lists"),
        (lambda e: [(one, data * 9) if one.filename == "task.json" else (one, data)
                    for one, data in e], "larger than listed"),
    ],
)  # fmt: skip
def test_archives_of_strangers(tmp_path, change, said):
    bundle.pack(sealed(tmp_path / "b"), tmp_path / "b.zip")
    with pytest.raises(NasctlError, match=said):
        bundle.unpack(rewritten(tmp_path / "b.zip", change), tmp_path / "to" / "back")
    assert not (tmp_path / "to").exists() or not list((tmp_path / "to").iterdir())


def test_archives_that_are_too_large_or_cut_are_refused(tmp_path):
    path = tmp_path / "b.zip"
    bundle.pack(sealed(tmp_path / "b"), path)
    with pytest.raises(NasctlError, match="unfolds to .* allowed: 100"):
        bundle.unpack(path, tmp_path / "back", limit=100)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(NasctlError, match="no archive of a bundle"):
            bundle.unpack(path, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_an_archive_with_a_damaged_stream_is_refused(tmp_path):
    path = tmp_path / "b.zip"
    bundle.pack(sealed(tmp_path / "b"), path)
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("model.onnx")
    start = entry.header_offset + 30 + len(entry.filename)
    whole[start : start + entry.compress_size] = b"\xff" * entry.compress_size
    path.write_bytes(whole)
    with pytest.raises(NasctlError, match="no archive of a bundle .*Error -3"):
        bundle.unpack(path, tmp_path / "back")
