"""Where a measurement is made: on this machine, on a board over ssh, or by hand elsewhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import UsageError

if TYPE_CHECKING:
    from hw_profiles.device import Device
    from hw_profiles.measure import Setting
    from hw_profiles.profile import Group, Measure

LOCAL, FILES = "local", "files:"
GROUP_S = 60.0  # at most, for the networks of a session


def here_or_there(board: Device, on: str) -> None:
    """Refuse to file this machine's latencies under a board's name, or a board's under ours."""
    from hw_profiles.remote import ssh

    if on != LOCAL and files(on) is None:
        ssh.parse(on)  # raises for what is no address
    if board.local != (on == LOCAL):
        raise UsageError(
            f"{board.name} is {'' if board.local else 'not '}this machine",
            where="--on" if not board.local else "--hw",
            allowed="ssh://[user@]host[:port] or files:FOLDER"
            if not board.local
            else "the board's device file",
        )


def files(on: str) -> Path | None:
    """The folder of `files:FOLDER`; None where `on` is something else."""
    if not on.startswith(FILES):
        return None
    if not (folder := on.removeprefix(FILES)):
        raise UsageError("names no folder", where="--on", allowed="files:FOLDER")
    return Path(folder)


def backend(on: str, setting: Setting, seed: int, folder: Path) -> Measure:
    """What measures networks in groups, at `on`."""
    from functools import partial

    import numpy as np

    from hw_profiles import measure
    from hw_profiles.graph import onnx_graph
    from hw_profiles.profile import Group, digest
    from hw_profiles.protocol import Plan
    from hw_profiles.remote import offline, over_ssh, ssh
    from hw_profiles.remote.bundle import Bundle

    plan = Plan(rounds=12, precision=0.03, time_limit_s=GROUP_S)
    if (carried := files(on)) is not None:
        return partial(offline.measured, carried)
    if on == LOCAL:
        rng, paces = np.random.default_rng((seed, 9)), [math.inf]

        def here(networks: Any) -> Group:
            session = measure.fresh_session(
                networks, setting, rng=rng, plan=plan, pace_ms=min(paces)
            )
            paces.append(session.pace_ms)
            return Group(session.timings, session.reference_ms)

        return here
    target = ssh.parse(on)

    def there(networks: Any) -> Group:
        models = {
            digest(ops): onnx_graph(ops, batch=setting.batch).SerializeToString()
            for ops in networks
        }
        bundle = Bundle(
            models,
            measure.reference_model(),
            plan=plan,
            threads=setting.threads,
            runtime=setting.runtime,
            # the graphs are fp32 as they are; anything else must be demanded
            precision=None if setting.precision == "fp32" else setting.precision,
            seed=seed,
        )
        found = over_ssh.measure_models(target, bundle, workdir=folder / "remote")
        return Group([found.timings[digest(ops)] for ops in networks], found.reference_ms)

    return there
