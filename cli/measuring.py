"""Where a measurement is made: on this machine, on a board over ssh, or by hand elsewhere."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hw_profiles.device import Device
    from hw_profiles.measure import Pace, Setting
    from hw_profiles.profile import Group, Measure
    from hw_profiles.protocol import Plan, Timing
    from hw_profiles.remote.over_ssh import RemoteResult

LOCAL, FILES = "local", "files:"
GROUP_S = 60.0  # at most, for the networks of a session
FILES_S = 20.0  # likewise, for a few files
ROUGH_S = 4.0  # where hundreds of such sessions are needed


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


def backend(on: str, setting: Setting, seed: int, folder: Path, pace: Pace) -> Measure:
    """What measures networks in groups, at `on`; `pace` is this machine's."""
    from functools import partial

    import numpy as np

    from hw_profiles import measure
    from hw_profiles.graph import onnx_graph
    from hw_profiles.profile import Group, digest
    from hw_profiles.protocol import Plan
    from hw_profiles.remote import offline

    plan = Plan(rounds=12, precision=0.03, time_limit_s=GROUP_S)
    if (carried := files(on)) is not None:
        return partial(offline.measured, carried)
    if on == LOCAL:
        rng = np.random.default_rng((seed, 9))

        def here(networks: Any) -> Group:
            session = measure.fresh_session(networks, setting, rng=rng, plan=plan, pace=pace)
            return Group(session.timings, session.reference_ms, session.pace_ms)

        return here

    def there(networks: Any) -> Group:
        models = {
            digest(ops): onnx_graph(ops, batch=setting.batch).SerializeToString()
            for ops in networks
        }
        found = on_board(models, on, _demanded(setting), plan, seed, folder / "remote")
        return Group([found.timings[digest(ops)] for ops in networks], found.reference_ms)

    return there


def timer(
    on: str, board: Device, seed: int, *, rough: bool = False, as_written: bool = False
) -> Callable[[Sequence[Path]], list[Timing]]:
    """What times ONNX files, in turn with each other, at `on`: of each the middle one of several
    processes here, or of one session on a board over ssh. `rough`: of one short session.
    `as_written`: files of several precisions, each in its own and not in the device's."""
    import numpy as np

    from hw_profiles import measure
    from hw_profiles.measure import Pace, Setting
    from hw_profiles.protocol import Plan

    plan = Plan(rounds=10, precision=0.02, time_limit_s=ROUGH_S if rough else FILES_S)
    setting, pace = Setting(board.runtime, None if as_written else board.precision), Pace()
    times = 1 if rough else measure.FRESH

    def here(paths: Sequence[Path]) -> list[Timing]:
        rng = np.random.default_rng((seed, 22))
        sessions = [
            measure.fresh_session(paths, setting, rng=rng, plan=plan, pace=pace).timings
            for _ in range(times)
        ]
        every = zip(*sessions, strict=True)
        return [sorted(each, key=lambda t: t.median_ms)[times // 2] for each in every]

    def there(paths: Sequence[Path]) -> list[Timing]:
        models = {str(place): path.read_bytes() for place, path in enumerate(paths)}
        found = on_board(models, on, _demanded(setting), plan, seed, cache())
        return [found.timings[str(place)] for place in range(len(paths))]

    return here if on == LOCAL else there


def cache() -> Path:
    """The folder for what a later command need not make again."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "nasctl"


def _demanded(setting: Setting) -> Setting:
    """For graphs of ours, which are fp32 as they are: anything else must be demanded."""
    return replace(setting, precision=None) if setting.precision == "fp32" else setting


def on_board(
    models: dict[str, bytes], on: str, setting: Setting, plan: Plan, seed: int, folder: Path
) -> RemoteResult:
    """Serialised models by name, timed in one session on the board at `on`; a lost connection
    goes on from `folder`."""
    from hw_profiles import measure
    from hw_profiles.remote import over_ssh, ssh
    from hw_profiles.remote.parcel import Parcel

    parcel = Parcel(
        models,
        measure.reference_model(),
        plan=plan,
        threads=setting.threads,
        runtime=setting.runtime,
        precision=setting.precision,
        seed=seed,
    )
    return over_ssh.measure_models(ssh.parse(on), parcel, workdir=folder)
