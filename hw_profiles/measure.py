"""Measuring networks on this machine, by the one protocol (`hw_profiles/protocol.py`)."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hw_profiles import protocol, runtimes
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


def measure_ops(
    networks: Sequence[Sequence[Op]],
    *,
    rng: np.random.Generator,
    setting: Setting = Setting(),
    plan: Plan = Plan(),
    progress: Progress | None = None,
) -> list[Timing]:
    """Time whole op lists as networks on this machine; results in their order.

    Many networks are measured in groups drawn at random, each with the same reference network and
    its share of `plan.time_limit_s`.
    """
    order = rng.permutation(len(networks))
    groups = np.array_split(order, -(-len(order) // GROUP)) if len(order) else []
    plan = replace(plan, time_limit_s=plan.time_limit_s / max(1, len(groups)))
    measure = measurer(setting, rng=rng, plan=plan)
    timings: dict[int, Timing] = {}
    for number, group in enumerate(groups):

        def report(share: float, number: int = number) -> None:
            if progress:
                progress((number + share) / len(groups))

        session = measure([networks[at] for at in group], report)
        timings.update(zip(group.tolist(), session.timings, strict=True))
    return [timings[at] for at in range(len(networks))]


def measurer(
    setting: Setting, *, rng: np.random.Generator, plan: Plan
) -> Callable[[Sequence[Sequence[Op]], Progress | None], protocol.Session]:
    """A function that times a group of op lists in one session; it remembers between groups how
    fast the reference is when nothing else runs."""
    runtime, clock = runtimes.load_module(setting.runtime), runtimes.Clock()
    dice, pace_ms = random.Random(int(rng.integers(2**63))), math.inf

    def call(ops: Sequence[Op], batch: int) -> Call:
        model = onnx_graph(ops, batch=batch).SerializeToString()
        loaded = runtime.load(model, threads=setting.threads, precision=setting.precision)
        return clock.of(runtime.timed(loaded, runtimes.random_feeds(loaded, rng)))

    reference = call(reference_ops(), 1)

    def measure(networks: Sequence[Sequence[Op]], progress: Progress | None) -> protocol.Session:
        nonlocal pace_ms
        session = protocol.session(
            [call(ops, setting.batch) for ops in networks],
            rng=dice,
            plan=plan,
            reference=reference,
            instruments=Instruments(clock=clock, pace_ms=pace_ms),
            progress=progress,
        )
        pace_ms = min(pace_ms, session.pace_ms)
        return session

    return measure


def ops_call(ops: Sequence[Op], rng: np.random.Generator) -> Call:
    """One call of an op list as a network in ONNX Runtime, one thread, batch 1."""
    return session_call(onnxruntime.load(onnx_graph(ops).SerializeToString()), rng)


def session_call(session: Session, rng: np.random.Generator) -> Call:
    """One call of an ONNX Runtime session on a fixed random batch of 1."""
    feeds = runtimes.random_feeds(session, rng)
    return lambda: onnxruntime.run(session, feeds)


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
