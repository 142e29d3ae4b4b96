"""Measuring networks on this machine, by the one protocol (`hw_profiles/protocol.py`)."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hw_profiles import alignment, processes, protocol, runtimes
from hw_profiles.alignment import Alignment
from hw_profiles.graph import onnx_graph
from hw_profiles.op import Op, Tape
from hw_profiles.protocol import Call, Instruments
from hw_profiles.protocol import Plan as Plan
from hw_profiles.protocol import Progress as Progress
from hw_profiles.protocol import Timing as Timing
from hw_profiles.runtimes import Session, onnxruntime
from nas.errors import NasctlError

#: how many networks are in memory and in turn at once
GROUP = 48
ATTEMPTS = 2  # at groups that were measured while the machine was slow
PROCESSES_OF_SWEEP = 2
FRESH = 3  # processes that a set of networks is measured in, at least


def interleaved(
    calls: Sequence[Call],
    *,
    rng: np.random.Generator,
    plan: Plan = Plan(),
    reference: Call | None = None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress | None = None,
) -> list[Timing]:
    """Time each callable, in turn with the others and the reference; results in their order.

    `protocol.session` is the same with the noise floor, the rounds and the clocks in its result.
    `clock` returns seconds.
    """
    session = protocol.session(
        calls,
        rng=random.Random(int(rng.integers(2**63))),
        plan=plan,
        reference=reference,
        instruments=Instruments(clock=clock),
        progress=progress,
    )
    return session.timings


@dataclass(frozen=True)
class Setting:
    """In what a network is run: what a latency table holds for."""

    runtime: str = "onnxruntime"  # a file of hw_profiles/runtimes/
    precision: str | None = None  # None: as the model is written, which is fp32
    threads: int = 1
    batch: int = 1


@dataclass
class Pace:
    """The fastest that the reference was seen in one setting on this machine. Sessions that are
    given the same one are held to it, and lower it: one that somebody else's work slows down from
    beginning to end knows so by nothing else."""

    ms: float = math.inf


def measure_ops(
    networks: Sequence[Sequence[Op]],
    *,
    rng: np.random.Generator,
    setting: Setting = Setting(),
    plan: Plan = Plan(),
    pace: Pace | None = None,
    progress: Progress | None = None,
) -> list[Timing]:
    """Time whole op lists as networks on this machine; results in their order.

    Networks are measured in groups drawn at random, in at least FRESH processes, each with the same
    reference network and its share of `plan.time_limit_s`.
    """
    if not networks:
        return []
    order = rng.permutation(len(networks))
    groups = np.array_split(order, min(len(order), max(FRESH, -(-len(order) // GROUP))))
    plan = replace(plan, time_limit_s=plan.time_limit_s / len(groups))
    timings: dict[int, Timing] = {}
    paces: dict[int, float] = {}
    pace = pace or Pace()
    waiting = list(range(len(groups)))
    for attempt in range(ATTEMPTS):
        for done, number in enumerate(waiting):
            wanted = [networks[at] for at in groups[number]]
            session = fresh_session(wanted, setting, rng=rng, plan=plan, pace=pace)
            timings.update(zip(groups[number].tolist(), session.timings, strict=True))
            paces[number] = session.pace_ms
            if progress and attempt == 0:
                progress((done + 1) / len(groups))
        # what was slow from beginning to end is known by the faster ones only
        waiting = [number for number in waiting if paces[number] > protocol.SLOW * pace.ms]
    for number in waiting:
        doubt = f"the reference never was as fast as at other times ({paces[number] / pace.ms:.2f})"
        for at in groups[number].tolist():
            timings[at] = replace(timings[at], noisy=timings[at].noisy or doubt)
    return [timings[at] for at in range(len(networks))]


def fresh_session(
    networks: Sequence[Sequence[Op] | Path],
    setting: Setting = Setting(),
    *,
    rng: np.random.Generator,
    plan: Plan,
    pace: Pace | None = None,
) -> protocol.Session:
    """Time op lists as networks, or model files, in one session in a process of its own.

    Where a process happens to lie in memory makes all that it runs some per cent faster or slower
    (2 to 7 % here), for as long as it lives: several processes average that, one never does. So
    this one's pace may differ by as much from that of others.
    """
    seed = int(rng.integers(2**63))
    with processes.fresh() as pool:
        known = math.inf if pace is None else pace.ms * (1 + protocol.PROCESSES_DIFFER)
        session = pool.submit(_session, list(networks), setting, seed, plan, known).result()
    if pace is not None:
        pace.ms = min(pace.ms, session.pace_ms)
    return session


def _session(
    networks: Sequence[Sequence[Op] | Path], setting: Setting, seed: int, plan: Plan, pace_ms: float
) -> protocol.Session:
    runtime, clock = runtimes.load_module(setting.runtime), runtimes.Clock()
    rng = np.random.default_rng(seed)

    def call(network: Sequence[Op] | Path, batch: int) -> Call:
        model: bytes | Path
        if isinstance(network, Path):
            model = network
        else:
            model = onnx_graph(network, batch=batch).SerializeToString()
        loaded = runtime.load(model, threads=setting.threads, precision=setting.precision)
        return clock.of(runtime.timed(loaded, runtimes.random_feeds(loaded, rng)))

    return protocol.session(
        [call(ops, setting.batch) for ops in networks],
        rng=random.Random(seed),
        plan=plan,
        reference=call(reference_ops(), 1),
        instruments=Instruments(clock=clock, pace_ms=pace_ms),
    )


def ops_call(ops: Sequence[Op], rng: np.random.Generator) -> Call:
    """One call of an op list as a network in ONNX Runtime, one thread, batch 1."""
    return session_call(onnxruntime.load(onnx_graph(ops).SerializeToString()), rng)


def session_call(session: Session, rng: np.random.Generator) -> Call:
    """One call of an ONNX Runtime session on a fixed random batch of 1."""
    feeds = runtimes.random_feeds(session, rng)
    return lambda: onnxruntime.run(session, feeds)


def sweep(
    device: str,
    setting: Setting = Setting(),
    *,
    rng: np.random.Generator,
    seconds: float = 12.0,
) -> Alignment:
    """Time the chains of `hw_profiles.alignment` on this machine, all of them in each of two
    processes, whose offsets cancel in the line that widths are held against. Starting them comes
    on top of `seconds`."""
    networks = [alignment.chain(width) for width in alignment.WIDTHS]
    plan = Plan(time_limit_s=seconds / PROCESSES_OF_SWEEP, rounds=10, max_rounds=40)
    sessions = [
        fresh_session(networks, setting, rng=rng, plan=plan) for _ in range(PROCESSES_OF_SWEEP)
    ]
    return alignment.fitted(
        device,
        setting.runtime,
        setting.precision or "fp32",
        setting.threads,
        [session.timings for session in sessions],
    )


def reference_ops() -> list[Op]:
    """A fixed small network, about a tenth of a millisecond: it runs before and after all else."""
    tape = Tape(channels=16, size=16)
    x = tape.input
    for _ in range(2):
        x = tape.conv(x, 32, kernel=3, bias=True, act="relu")
    return tape.ops


def reference_model() -> bytes:
    """`reference_ops` as serialised ONNX, for boards."""
    return onnx_graph(reference_ops()).SerializeToString()


def require_quiet(noise: float, target: float) -> None:
    """Raise NasctlError when a session's noise floor is above what the caller wants to promise.

    Both relative: 0.01 is 1 %.
    """
    if not noise <= target:  # also true of nan
        raise NasctlError(
            f"this machine repeats itself to {noise:.1%} only, {noise - target:.1%} above the "
            f"{target:.1%} asked for",
            next="Stop what else runs, fix the clocks, or ask for less.",
        )
