from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest

from nas.errors import NasctlError, UsageError
from nas.file import sha256
from nas.run import MANIFEST, Run, Spec, digest, given_fields, make_spec

FLAGS = {"epochs": 1.0, "threads": 1}
SPEC = make_spec(FLAGS)


@pytest.fixture
def run(tmp_path):
    found = Run(tmp_path / "run")
    with found.locked(SPEC):
        pass
    return found


# ---- Spec ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("epochs", 0, "--epochs"),
        ("epochs", float("nan"), "--epochs"),
        ("epochs", float("inf"), "--epochs"),
        ("lr", -1.0, "--lr"),
        ("lr", float("inf"), "--lr"),
        ("batch", 1, "--batch"),
        ("size", 3, "--size"),
        ("width", 5.0, "--width"),
        ("evaluations", 0, "--evaluations"),
        ("threads", 0, "--threads"),
        ("seed", -1, "--seed"),
        ("latency_ms", 0.0, "--latency"),
        ("latency_ms", float("nan"), "--latency"),
        ("study_name", 7, "--study-name"),
    ],
)
def test_a_wrong_value_names_the_flag_and_the_value(field, value, flag):
    with pytest.raises(UsageError) as caught:
        make_spec({**FLAGS, field: value})
    assert caught.value.where == flag
    assert f"got {value!r}" in str(caught.value) and "\n" not in str(caught.value)


def test_flags_override_the_file(tmp_path):
    file = tmp_path / "spec.toml"
    file.write_text('space = "mobilenet"\nseed = 3\n')
    spec = make_spec(given_fields({**FLAGS, "seed": 4, "space": None}, file))
    assert (spec.space, spec.seed) == ("mobilenet", 4)


@pytest.mark.parametrize("content", [b"seed = ", b"\xff\xfe", None])
def test_an_unreadable_spec_file_is_one_clear_error(content, tmp_path):
    file = tmp_path / "spec.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match="spec.toml: cannot read the spec") as caught:
        given_fields(FLAGS, file)
    assert "\n" not in str(caught.value)


def test_an_unknown_field_lists_the_known_ones(tmp_path):
    (tmp_path / "spec.toml").write_text("epoch = 3\n")
    with pytest.raises(UsageError, match="--epoch: .*allowed: .*epochs.*, seed"):
        make_spec(given_fields(FLAGS, tmp_path / "spec.toml"))


def test_digests_see_values_and_not_their_order():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    other = make_spec({**FLAGS, "seed": 1})
    assert SPEC.digest("space", "size") == other.digest("space", "size")
    assert SPEC.digest() != other.digest() and SPEC.digest("seed") != other.digest("seed")


# ---- Run -----------------------------------------------------------------------------------------


def test_the_manifest_holds_the_spec_and_the_stages(run):
    run.write_text("out.txt", "result")
    run.finish("train", "key", 1.234, ["out.txt"])
    manifest = run.manifest()
    assert Spec(**manifest["spec"]) == SPEC
    record = {"key": "key", "seconds": 1.23, "files": {"out.txt": sha256(run.path("out.txt"))}}
    assert manifest["stages"] == {"train": record}


def test_a_stage_is_done_until_its_key_or_a_file_changes(run):
    run.write_text("out.txt", "result")
    run.finish("train", "key", 1.0, ["out.txt"])
    assert run.done("train", "key")
    assert not run.done("train", "other") and not run.done("search", "key")
    run.path("out.txt").write_text("resulT")
    assert not run.done("train", "key")
    run.path("out.txt").unlink()
    assert not run.done("train", "key")


def test_finishing_one_stage_keeps_the_others(run):
    run.finish("train", "a", 1.0, [])
    run.finish("search", "b", 1.0, [])
    with run.locked(SPEC):
        assert run.done("train", "a") and run.done("search", "b")


HOLD = """
import sys
from pathlib import Path
from nas.run import Run, make_spec
with Run(Path(sys.argv[1])).locked(make_spec({"epochs": 1.0, "threads": 1})):
    print("locked", flush=True)
    sys.stdin.readline()
"""


def test_a_directory_is_one_process_at_a_time_and_free_after_its_death(run):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, run.folder], **pipes) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(NasctlError, match="another process is at work"), run.locked(SPEC):
            pass
        other.kill()
    with run.locked(SPEC):
        assert run.manifest()["stages"] == {}


def test_another_spec_is_refused_with_the_differences(run):
    other = make_spec({**FLAGS, "seed": 5, "lr": 0.1})
    with pytest.raises(UsageError) as caught, run.locked(other):
        pass
    message = str(caught.value)
    assert "lr 0.2 there, 0.1 here; seed 0 there, 5 here" in message and "space" not in message
    assert Spec(**run.manifest()["spec"]) == SPEC


def test_force_starts_over(run):
    run.finish("train", "a", 1.0, [])
    run.path("training.safetensors").write_bytes(b"half")
    other = make_spec({**FLAGS, "seed": 5})
    with run.locked(other, force=True):
        assert run.manifest()["spec"]["seed"] == 5 and not run.done("train", "a")
    assert not run.path("training.safetensors").exists()


def test_a_finished_stage_is_unchanged_until_a_file_of_it_changes(run):
    assert not run.unchanged("train")
    run.write_text("a.txt", "one")
    run.finish("train", "a", 1.0, ["a.txt"])
    assert run.unchanged("train")
    run.write_text("a.txt", "two")
    assert not run.unchanged("train")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"spec": {}}', "null", "\0\0"])
def test_a_damaged_manifest_is_one_clear_error(content, run):
    run.path(MANIFEST).write_text(content)
    with pytest.raises(NasctlError, match="run.json") as caught, run.locked(SPEC):
        pass
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(NasctlError, match="--run: cannot use the run directory"),
        Run(tmp_path / "file" / "run").locked(SPEC),
    ):
        pass


def refuse(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["nas.file.os.fsync", "nas.file.os.replace"])
def test_a_full_disk_leaves_the_old_file(where, run, monkeypatch):
    run.write_json("report.json", {"old": True})
    before = sorted(run.folder.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(where, refuse)
        with pytest.raises(NasctlError, match="report.json: cannot write: .*No space left"):
            run.write_json("report.json", {"new": True})
    assert json.loads(run.path("report.json").read_text()) == {"old": True}
    assert sorted(run.folder.rglob("*")) == before


def test_text_is_written_into_folders_that_do_not_exist_yet(run):
    run.write_text("bundle/deep/page.html", "é")
    assert run.path("bundle/deep/page.html").read_text() == "é"
    assert not list(run.folder.rglob("*.part"))


def test_a_run_of_a_version_with_fewer_fields_goes_on(run):
    manifest = run.manifest()
    before = {k: v for k, v in manifest["spec"].items() if k not in ("strategy", "memory_bytes")}
    run.write_json(MANIFEST, {**manifest, "spec": before})
    with run.locked(SPEC):
        pass
    other = make_spec({**FLAGS, "strategy": "random"})
    said = "strategy 'predictor' there, 'random' here"
    with pytest.raises(UsageError, match=said), run.locked(other):
        pass


def test_where_it_was_trained_is_no_other_run(tmp_path):
    spec = make_spec({"epochs": 1, "threads": 1})
    there = make_spec({"epochs": 1, "threads": 1, "train_on": "cuda"})
    with Run(tmp_path).locked(spec):
        pass
    with Run(tmp_path).locked(there):  # what was begun on the processor goes on elsewhere
        assert Run(tmp_path).manifest()["spec"]["train_on"] == "cuda"
    assert spec.digest() != there.digest()  # but folders are not shared by accident
