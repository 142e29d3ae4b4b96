"""A table for a new device from few measurements and the tables of other devices.

`transfer` learns from devices that were measured at length; here what their tables predict stands
for such measurements, so that a table is all that must be kept or handed on. What `transfer` then
predicts for networks of the space is fitted again as a table (`calibrate`), because a search takes
latencies operator by operator. docs/methods/transfer.md has the evidence for the transfer; what is
lost on the way into a table is for benchmarks/fewshot.py to say.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student

from hw_profiles.device import Device
from hw_profiles.latency import Interval, LatencyTable
from hw_profiles.latency import transfer_intervals as between_devices
from hw_profiles.models import calibrate, transfer
from hw_profiles.models.structure import describe
from hw_profiles.models.transfer import Adapted, Sources
from hw_profiles.profile import Fit, Ops, Samples


def sources(
    tables: Sequence[LatencyTable], networks: Sequence[Ops], space: str, rng: np.random.Generator
) -> Sources:
    """What is known before the new device is seen: `tables` of others, on `networks` of `space`."""
    rows = describe(networks)
    known = []
    for table in tables:
        ms = np.array([table.estimate(ops, space).value_ms for ops in networks])
        known.append(transfer.source(table.device, table.device, rows, ms, rng))
    return transfer.learn(known, rng)


def fitter(known: Sources, networks: Sequence[Ops]) -> Fit:
    """For `profile.table`: what fits a table to measurements with the help of `known`."""

    def fit(mine: Samples, chains: Samples, device: Device, space: str) -> LatencyTable:
        samples = [*mine, *chains]
        ops, ms = zip(*samples, strict=True)
        adapted = transfer.adapt(known, describe(ops), np.array(ms))
        return table(adapted, samples, networks, device, space)

    return fit


def table(
    adapted: Adapted, samples: Samples, networks: Sequence[Ops], device: Device, space: str
) -> LatencyTable:
    """The table of `device`, on which `samples` (operators, ms) were measured; `networks` of the
    space, many and unmeasured, carry over what was learned."""
    value, deviation = adapted.predict(describe(networks))
    predicted = list(zip(networks, value.tolist(), strict=True))
    # what the table itself adds to the error: on predictions that it was not fitted on
    fitted = calibrate.fit([*samples, *predicted[::2]], device, space=space, source_text="")
    off = [fitted.estimate(ops, space).value_ms / ms for ops, ms in predicted[1::2]]
    each = np.hypot(np.quantile(deviation, 0.9), np.sqrt(np.mean(np.log(off) ** 2)))
    fitted = calibrate.fit([*samples, *predicted], device, space=space, source_text="")
    lenders = ", ".join(source.name for source in adapted.sources.devices)
    width = float(np.exp(student.ppf(0.95, len(samples) - 1) * each))
    same = Interval(
        low=1 / width,
        high=width,
        n=len(samples),
        how=f"predictive deviation after {len(samples)} measurements, with the tables of {lenders}",
    )
    cross = between_devices()[f"cross_{device.kind}"]
    measured = {op for ops, _ in samples for op in ops}
    learned = fitted.learned
    if learned is not None:
        only = tuple(at for at, op in enumerate(learned.ops) if op not in measured)
        learned = learned.model_copy(update={"predicted": only})
    return fitted.model_copy(
        update={
            "learned": learned,
            "fitted_kinds": tuple(sorted({op.kind for op in measured})),
            "origin": f"few-shot, with the tables of {lenders}",
            "intervals": {"same": same, "cross": cross, "analytic": cross},
        }
    )
