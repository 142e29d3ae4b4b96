"""Measuring networks on this machine, by the one protocol (`hw_profiles/protocol.py`)."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from hw_profiles import protocol
from hw_profiles.graph import onnx_graph
from hw_profiles.op import Op, Tape
from hw_profiles.protocol import Call, Instruments
from hw_profiles.protocol import Plan as Plan
from hw_profiles.protocol import Progress as Progress
from hw_profiles.protocol import Timing as Timing
from hw_profiles.runtimes import Session, onnxruntime, random_feeds
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


def measure_ops(
    networks: Sequence[Sequence[Op]],
    *,
    rng: np.random.Generator,
    threads: int = 1,
    plan: Plan = Plan(),
    progress: Progress | None = None,
) -> list[Timing]:
    """Time whole op lists as networks in ONNX Runtime, batch 1; results in their order.

    Many networks are measured in groups drawn at random, each with the same reference network and
    its share of `plan.time_limit_s`.
    """
    order = rng.permutation(len(networks))
    groups = np.array_split(order, -(-len(order) // GROUP)) if len(order) else []
    reference = ops_call(reference_ops(), threads, rng)
    dice, pace_ms = random.Random(int(rng.integers(2**63))), math.inf
    timings: dict[int, Timing] = {}
    for number, group in enumerate(groups):

        def report(share: float, number: int = number) -> None:
            if progress:
                progress((number + share) / len(groups))

        session = protocol.session(
            [ops_call(networks[at], threads, rng) for at in group],
            rng=dice,
            plan=replace(plan, time_limit_s=plan.time_limit_s / len(groups)),
            reference=reference,
            pace_ms=pace_ms,
            progress=report,
        )
        pace_ms = min(pace_ms, session.pace_ms)
        timings.update(zip(group.tolist(), session.timings, strict=True))
    return [timings[at] for at in range(len(networks))]


def ops_call(ops: Sequence[Op], threads: int, rng: np.random.Generator) -> Call:
    """One call of an op list as a network in ONNX Runtime, batch 1."""
    session = onnxruntime.load(onnx_graph(ops).SerializeToString(), threads=threads)
    return session_call(session, rng)


def session_call(session: Session, rng: np.random.Generator) -> Call:
    """One call of a session on a fixed random batch of 1 (free dimensions are taken as 1)."""
    feeds = random_feeds(session, rng)
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
