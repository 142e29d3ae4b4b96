"""deploy.bundle: what is listed is there, what is there is listed, and nothing reaches outside."""

import json
import stat
import zipfile

import pytest
from onnx import ModelProto, TensorProto, helper
from onnx.external_data_helper import set_external_data

from deploy import bundle
from nas.errors import NasctlError

ROLES = {"model.onnx": "model", "task.json": "task", "engines/a.pt2": "engine"}


def model(text):
    """An ONNX file of no network that says `text`."""
    return ModelProto(producer_name=text).SerializeToString()


def files(folder):
    for name in ROLES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(model(name * 10) if name.endswith(".onnx") else name.encode() * 10)
    return folder


def sealed(folder):
    return bundle.seal(files(folder), ROLES, nasctl="0", model="model.onnx")


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


@pytest.mark.parametrize("name", [".part", "x.part", ".x.part.so", "engines/..part"])
def test_what_is_only_called_like_an_unfinished_member_is_refused(tmp_path, name):
    sealed(tmp_path / "b")
    (tmp_path / "b" / name).write_bytes(b"")
    with pytest.raises(NasctlError, match=f"'{name}', which its manifest does not list"):
        bundle.read(tmp_path / "b")


def weighty(held, *, inside):
    """A model with weights in the file `held`, of the graph or inside one of its nodes."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], raw_data=bytes(8))
    set_external_data(weight, held, 0, 8)
    weight.ClearField("raw_data")
    nodes = [helper.make_node("Constant", [], ["w"], value=weight)] if inside else []
    graph = helper.make_graph(nodes, "g", [], [], [] if inside else [weight])
    return helper.make_model(graph).SerializeToString()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("held", ["w.data", ".w.part"])
def test_weights_in_a_file_that_is_no_member_are_refused(tmp_path, held, inside):
    made = sealed(tmp_path / "b")
    heavy = {"heavy.onnx": ("model", weighty(held, inside=inside))}
    with pytest.raises(NasctlError, match=f"weights are in {held}, which the bundle does not list"):
        bundle.add(made, heavy)
    (tmp_path / "b" / held).write_bytes(bytes(8))
    with pytest.raises(NasctlError, match="which (its manifest|the bundle) does not list"):
        bundle.read(tmp_path / "b")


def test_weights_that_are_a_member_are_read(tmp_path):
    heavy = {"heavy.onnx": ("model", weighty("w.data", inside=False))}
    made = bundle.add(sealed(tmp_path / "b"), {"w.data": ("weights", bytes(8)), **heavy})
    assert bundle.read(tmp_path / "b") == made


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
        ({"model": "engines/a.pt2"}, "delivers 'engines/a.pt2', of the role 'engine'"),
        ({"model": "task.json"}, "delivers 'task.json', of the role 'task'"),
        ({"members": {"x.pt2": {"sha256": "0" * 64, "bytes": 0, "role": "model"}}}, "a model 'x.p"),
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
    (tmp_path / "made.onnx").write_bytes(model("int8"))
    new = {"model.int8.onnx": ("model", tmp_path / "made.onnx"), "task.json": ("task", b"{}")}
    more = bundle.add(made, new, model="model.int8.onnx")
    assert more.model.read_bytes() == model("int8")
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

    new = {"model.onnx": ("model", model("new")), "more.json": ("report", b"more")}
    with monkeypatch.context() as patched:
        patched.setattr(bundle.file, "write", killing(bundle.file.write))
        patched.setattr(type(tmp_path), "replace", killing(type(tmp_path).replace))
        with pytest.raises(KeyboardInterrupt):
            bundle.add(made, new)
    found = bundle.read(tmp_path / "b")
    assert (found.model.read_bytes() == model("new")) is (
        step >= 3
    )  # the manifest is the third step
    assert ("more.json" in found.manifest.members) is (step >= 3)
    assert bundle.add(found, new).path("more.json").read_bytes() == b"more"


@pytest.mark.parametrize("name", [".a.json.part", "engines/..b.json.part.k3_x9abc.part"])
def test_what_killed_ones_left_is_no_member_and_goes_with_the_next(tmp_path, name):
    sealed(tmp_path / "b")
    left = tmp_path / "b" / name
    left.write_bytes(b"half")
    made = bundle.read(tmp_path / "b")
    assert left.exists()  # it may be another process's, which is still at it
    bundle.add(made, {"more.json": ("report", b"more")})
    assert not left.exists()


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


def test_a_member_above_what_an_archive_holds_without_zip64_is_packed(tmp_path, monkeypatch):
    made = bundle.add(sealed(tmp_path / "b"), {"w.data": ("weights", bytes(2000))})
    bundle.pack(made, tmp_path / "usual.zip")
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)  # 2 GiB
    bundle.pack(made, tmp_path / "b.zip")
    back = bundle.unpack(tmp_path / "b.zip", tmp_path / "back")
    assert back.path("w.data").read_bytes() == bytes(2000)
    assert (tmp_path / "usual.zip").read_bytes() != (tmp_path / "b.zip").read_bytes()


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
