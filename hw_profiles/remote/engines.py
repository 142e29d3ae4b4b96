"""Builds and times one engine on the machine it is started on: a board, over ssh.

`hw_profiles/remote/build.py` sends this file with what it imports and calls it in its folder, as
`python3 -m hw_profiles.remote.engines build SHA256`, the digest being the request's. It prints one
record line (see `runner.to_line`) and leaves the engine beside the model.

Needs Python 3.8, its standard library and the runtime with its numpy, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hw_profiles import clocks, engines, protocol
from hw_profiles.remote import runner
from hw_profiles.runtimes import Clock, Options, compiled, random_feeds
from nas.errors import NasctlError

REQUEST, MODEL, REFERENCE, ENGINE = "request.json", "model.onnx", "reference.onnx", "model"


def build(folder: Path, identity: str) -> runner.Record:
    """The record of the engine that `request.json` asks for, built in the folder.

    Raises NasctlError for files that are not what was sent, and as `engines.built` does.
    """
    content = (folder / REQUEST).read_bytes()
    if _sha256(content) != identity:
        raise NasctlError("the request is not what was sent (checksum mismatch)")
    asked = json.loads(content)
    for name, digest in asked["files"].items():
        if _sha256((folder / name).read_bytes()) != digest:
            raise NasctlError(f"{name} is not what was sent (checksum mismatch)")
    path = folder / (ENGINE + compiled(asked["runtime"]).ENGINE)
    how = (asked["runtime"], asked["precision"], asked["threads"])
    options = Options(**asked["options"]) if "options" in asked else None
    facts = engines.built(folder / MODEL, path, *how, options)
    whole = path.read_bytes()
    record = {"kind": "engine", "sha256": _sha256(whole), "bytes": len(whole)}
    return {**record, "facts": facts, "latency": _timed(folder, path, asked)}


def _timed(folder: Path, path: Path, asked: Mapping[str, Any]) -> Mapping[str, Any]:
    """The engine in turn with the reference network."""
    import numpy as np

    runtime, clock = compiled(asked["runtime"]), Clock()
    rng = np.random.default_rng(asked["seed"])
    read = clocks.read_nvidia if shutil.which("nvidia-smi") else clocks.read

    def call(file: Path, precision: str | None) -> protocol.Call:
        session = runtime.load(file, threads=asked["threads"], precision=precision)
        return clock.of(runtime.timed(session, random_feeds(session, rng)))

    # ONNX Runtime's own format says nothing of what it computes in
    demanded = None if asked["runtime"] == "onnxruntime" else asked["precision"]
    session = protocol.session(
        [call(path, demanded)],
        rng=random.Random(asked["seed"]),
        plan=protocol.Plan.from_json(asked["plan"]),
        reference=call(folder / REFERENCE, None),
        instruments=protocol.Instruments(clock, read),
    )
    return asdict(session.timings[0])


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main(arguments: list[str]) -> int:
    _, identity = arguments
    try:
        record = build(Path.cwd(), identity)
    except NasctlError as error:
        sys.stderr.write(f"{error}\n")
        return runner.REFUSED
    sys.stdout.buffer.write(runner.BEGIN + runner.to_line(record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
