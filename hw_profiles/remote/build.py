"""Building an engine on a board over ssh: the ONNX file goes there, the engine comes back.

What runs there is `hw_profiles/remote/engines.py`, in a fresh private folder, of which nothing is
left afterwards. A lost connection ends it: the error names the folder, and the same command builds
it again in another. Lost after the engine came back, it costs nothing but that folder.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

from hw_profiles import runtimes
from hw_profiles.engines import Facts
from hw_profiles.protocol import Plan
from hw_profiles.remote import engines, place, runner, ssh
from hw_profiles.remote.engines import MODEL, REFERENCE, REQUEST
from hw_profiles.remote.parcel import code
from hw_profiles.remote.place import CHECK, RUN, UNPACK, Place
from hw_profiles.runtimes import Options
from nas.errors import NasctlError

_CAT = 'cat "$1/$3"'
_REMOVE = 'cd / && rm -rf "$1"'


@dataclass(frozen=True)
class Request:
    """An engine that is wanted; `reference` is what it is timed in turn with."""

    model: bytes  # serialised ONNX
    reference: bytes  # likewise
    runtime: str
    precision: str | None
    threads: int
    plan: Plan
    seed: int = 0
    options: Options | None = None  # TensorRT's; caches stay here, and nothing stays there

    def content(self) -> bytes:
        files = {MODEL: self.model, REFERENCE: self.reference}
        digests = {name: hashlib.sha256(each).hexdigest() for name, each in files.items()}
        how = {"runtime": self.runtime, "precision": self.precision, "threads": self.threads}
        more = {"plan": self.plan.to_json(), "seed": self.seed, "files": digests}
        if self.options is not None:
            said = {"compatible": self.options.compatible, "shapes": self.options.shapes}
            more["options"] = said
        return json.dumps({**how, **more}, sort_keys=True).encode()


@dataclass(frozen=True)
class Built:
    """An engine of another machine, with what was said of it there."""

    content: bytes
    facts: Facts  # as `hw_profiles.engines.built` returns them
    latency: dict[str, Any]  # the fields of a Timing
    left: str = ""  # the folder, with the model, that is still there; empty when nothing is


def build(target: ssh.Target, request: Request) -> Built:
    """Raises NasctlError with what the board lacks or said, ssh.Unreachable where the connection
    is lost; both name the folder that is still there where it cannot be removed. An engine that
    came back is returned all the same, and names it in `left`."""
    there = place.made(target)
    try:
        built = _built(there, request)
    except NasctlError as error:
        if _removed(there):
            raise
        what = f"{error.what}; {there.path}, with the model, is still on the board"
        raise type(error)(
            what, where=error.where, allowed=error.allowed, next=error.next
        ) from error
    except BaseException:  # whoever interrupts it
        _removed(there)
        raise
    return built if _removed(there) else replace(built, left=there.path)


def _removed(there: Place) -> bool:
    try:
        return not there.sh(_REMOVE).code
    except NasctlError:
        return False


def _built(there: Place, request: Request) -> Built:
    sources = code("hw_profiles.remote.engines", f"hw_profiles.runtimes.{request.runtime}")
    # the code first, and a look at what is there for it: models may be large
    there.send(sources, f"{UNPACK}; {RUN}", *CHECK, request.runtime)
    content = request.content()
    models = {MODEL: request.model, REFERENCE: request.reference}
    there.send({**models, REQUEST: content}, UNPACK)
    suffix = runtimes.compiled(request.runtime).ENGINE
    return _fetched(there, hashlib.sha256(content).hexdigest(), suffix)


def _fetched(there: Place, identity: str, suffix: str) -> Built:
    answer = there.sh(RUN, "engines", "build", identity)
    if answer.code:
        raise there.failure(f"the board cannot build it: {answer.complaint}")
    records = runner.from_lines(answer.out.partition(runner.BEGIN)[2])
    if len(records) != 1 or records[0]["kind"] != "engine":
        raise there.failure("what it says of the engine is damaged", next="Run it again.")
    (record,) = records
    # the last bytes: a login shell may print others before
    fetched = there.sh(_CAT, engines.ENGINE + suffix).out[-record["bytes"] :]
    if hashlib.sha256(fetched).hexdigest() != record["sha256"]:
        raise there.failure("the engine was damaged on its way", next="Run the command again.")
    return Built(fetched, record["facts"], record["latency"])
