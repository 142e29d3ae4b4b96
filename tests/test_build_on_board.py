"""`nasctl build --on`: an engine built on a board; an sshd on loopback plays the board."""

from __future__ import annotations

import hashlib
import json

import pytest
import sshd
from bundles import small

from deploy import bundle as bundles
from deploy import engine
from hw_profiles.measure import reference_model
from hw_profiles.protocol import Plan
from hw_profiles.remote import build, engines, place, ssh
from hw_profiles.remote.build import Request
from nas.errors import NasctlError

pytestmark = pytest.mark.usefixtures("nothing_left")

QUICK = Plan(rounds=4, max_rounds=4)
FACTS = {
    **{"runtime": "onnxruntime", "version": "1", "requested": None, "observed": "fp32"},
    **{"threads": 1, "inputs": {}, "outputs": [], "machine": {}},
}
GONE = ssh.Unreachable("no connection", where="ssh://board")


@pytest.fixture
def bundle(workdir):
    return small(workdir / "b")


def request(bundle, runtime="onnxruntime", precision=None):
    return Request(bundle.model.read_bytes(), reference_model(), runtime, precision, 1, QUICK)


@pytest.mark.slow
def test_the_verb_brings_engine_and_side_car_back(nasctl, board, bundle, workdir, monkeypatch):
    monkeypatch.setattr("hw_profiles.remote.ssh.parse", lambda text: board.target)
    words = ("build", "b", "--hw", "raspi4", "--engine", "ort", "--on", "ssh://board")
    done = nasctl(*words, "--json")
    assert done.code == 0, done.err
    car = json.loads(done.out)
    assert car["latency"]["median_ms"] > 0 and car["observed"] == "fp32"
    found = bundles.read(workdir / "b")
    (name,) = found.of("engine")
    assert name == "engines/model.raspi4.onnxruntime.ort"
    # the board is this machine, so that what came back can be loaded
    session, said = engine.load(found.path(name))
    assert session.outputs == ("logits",) and said.model_sha256 == car["model_sha256"]
    assert said.machine == engine.machine("onnxruntime")
    # so its budget can be measured on it, and under no other name
    words = ("verify", "b", "--engine", name, "--latency", "1s", "--hw")
    assert nasctl(*words, "raspi4").code == 0
    assert nasctl(*words, "jetson").code == 1


def test_what_the_board_cannot_build_is_one_line(board, bundle):
    with pytest.raises(NasctlError, match="cannot build it: .*asked to compute in int8, but"):
        build.build(board.target, request(bundle, precision="int8"))


def test_what_the_board_lacks_is_told_before_the_model_is_sent(board, bundle, monkeypatch):
    sent = []
    honest = place.Place.send

    def noting(there, files, script, *more):
        sent.extend(files)
        return honest(there, files, script, *more)

    monkeypatch.setattr(place.Place, "send", noting)
    with pytest.raises(NasctlError, match="cannot do it: .*TensorRT is not installed"):
        build.build(board.target, request(bundle, "tensorrt"))
    assert engines.MODEL not in sent and "hw_profiles/remote/engines.py" in sent


def test_a_board_without_python_and_one_that_does_not_answer(board, bundle):
    with pytest.raises(NasctlError, match="too old a .*python on the board"):
        build.build(board.with_python("exit 1"), request(bundle))
    nobody = ssh.parse(f"ssh://127.0.0.1:{sshd.free_port()}")
    with pytest.raises(ssh.Unreachable, match="no connection"):
        build.build(nobody, request(bundle))


@pytest.mark.slow
def test_an_engine_that_is_damaged_on_its_way_is_refused(board, bundle, monkeypatch):
    honest = place.Place.sh

    def damaging(there, script, *more, stdin=None):
        answer = honest(there, script, *more, stdin=stdin)
        return ssh.Answer(0, answer.out[:-1], "") if script == build._CAT else answer

    monkeypatch.setattr(place.Place, "sh", damaging)
    with pytest.raises(NasctlError, match="the engine was damaged on its way"):
        build.build(board.target, request(bundle))


class Pretended:
    """A board that says what a test states, an exit code for a number; its scripts are known by
    their text."""

    def __init__(self, monkeypatch, **answers):
        self.answers = {getattr(build, name): answer for name, answer in answers.items()}
        monkeypatch.setattr(
            place, "made", lambda target: place.Place(target, "/tmp/nasctl-12345678")
        )
        monkeypatch.setattr(place.Place, "send", lambda *_: None)
        monkeypatch.setattr(place.Place, "sh", self.sh)

    def sh(self, script, *more, stdin=None):
        answer = self.answers.get(script, b"")
        if isinstance(answer, NasctlError):
            raise answer
        if isinstance(answer, int):
            return ssh.Answer(answer, b"", "")
        return ssh.Answer(0, answer, "")


def built_record(engine):
    record = {"sha256": hashlib.sha256(engine).hexdigest(), "bytes": len(engine)}
    said = {"facts": FACTS, "latency": {"median_ms": 0.05}}
    return build.runner.to_line({"kind": "engine", **record, **said})


@pytest.mark.parametrize("banner", [b"", b"Welcome!\n"])
def test_a_login_shell_may_print_before_the_engine(bundle, monkeypatch, banner):
    run = banner + build.runner.BEGIN + built_record(b"engine")
    Pretended(monkeypatch, RUN=run, _CAT=banner + b"engine")
    assert build.build(ssh.Target("board"), request(bundle)).content == b"engine"


@pytest.mark.parametrize("lost", ["RUN", "_CAT"])
def test_a_folder_that_stays_on_the_board_is_named(bundle, monkeypatch, lost):
    said = {"RUN": build.runner.BEGIN + built_record(b"engine"), "_CAT": b"engine"}
    Pretended(monkeypatch, **{**said, "_REMOVE": GONE, lost: GONE})
    with pytest.raises(
        ssh.Unreachable, match="/tmp/nasctl-12345678, with the model, is still on the board"
    ):
        build.build(ssh.Target("board"), request(bundle))


@pytest.mark.parametrize("refused", [GONE, 1])
def test_an_engine_whose_folder_stays_on_the_board_is_kept(
    nasctl, bundle, workdir, monkeypatch, refused
):
    run = build.runner.BEGIN + built_record(b"engine")
    Pretended(monkeypatch, RUN=run, _CAT=b"engine", _REMOVE=refused)
    done = nasctl("build", "b", "--hw", "raspi4", "--engine", "ort", "--on", "ssh://board")
    assert done.code == 0, done.err
    (note,) = [line for line in done.err.splitlines() if line.startswith("note")]
    assert "/tmp/nasctl-12345678, with the model, is still on the board: remove it" in note
    found = bundles.read(workdir / "b")
    (name,) = found.of("engine")
    assert found.path(name).read_bytes() == b"engine"


def test_files_that_arrived_damaged_are_not_built(bundle, tmp_path):
    asked = request(bundle)
    folder = tmp_path / "there"
    folder.mkdir()
    for name, content in (
        (engines.REQUEST, asked.content()),
        (engines.MODEL, asked.model[:-1]),
        (engines.REFERENCE, asked.reference),
    ):
        (folder / name).write_bytes(content)
    identity = hashlib.sha256(asked.content()).hexdigest()
    with pytest.raises(NasctlError, match="model.onnx is not what was sent"):
        engines.build(folder, identity)
    with pytest.raises(NasctlError, match="the request is not what was sent"):
        engines.build(folder, "0" * 64)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--hw", "cpu", "--on", "ssh://board"), "cpu is this machine"),
        (("--hw", "raspi4", "--on", "board"), "'board' is not a board's address"),
        (("--hw", "raspi4", "--on", "files:x"), "engines are built over ssh or here"),
        (("--hw", "raspi4"), "Engines are built where they run: --on ssh://"),
    ],
)
def test_another_place_than_the_devices_is_refused(nasctl, bundle, arguments, said):
    outcome = nasctl("build", "b", "--engine", "ort", *arguments)
    assert outcome.code == 2 and said in " ".join(outcome.err.split())
