"""A small parcel and the folder that it is on a board, without a connection."""

from __future__ import annotations

from hw_profiles.graph import onnx_graph
from hw_profiles.measure import reference_model
from hw_profiles.op import Tape
from hw_profiles.protocol import Plan
from hw_profiles.remote import runner
from hw_profiles.remote.parcel import Parcel

QUICK = Plan(rounds=2, max_rounds=2)


def network(channels):
    tape = Tape(channels, 8)
    tape.conv(tape.input, channels, kernel=3)
    return onnx_graph(tape.ops).SerializeToString()


def three():
    """Of three networks, each a group."""
    models = {name: network(size) for name, size in (("a", 2), ("b", 4), ("c", 8))}
    return Parcel(models, reference_model(), QUICK, group=1)


def unpacked(parcel, folder):
    for name, content in {**parcel.code, **parcel.data, "manifest.json": parcel.manifest}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / runner.RESULTS).touch()
    return folder


def records_in(folder):
    return runner.from_lines((folder / runner.RESULTS).read_bytes())


def kinds(folder):
    return [one["kind"] for one in records_in(folder)]
