"""`nasctl profile --alignment`: which channel counts a device runs well."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cli import console, measuring
from nas.errors import UsageError

if TYPE_CHECKING:
    from hw_profiles.alignment import Alignment
    from hw_profiles.device import Device
    from hw_profiles.measure import Setting


def swept(board: Device, setting: Setting, on: str, seed: int, folder: Path) -> dict[str, Any]:
    """Sweep, and keep the result in `folder` beside the device's table."""
    if measuring.files(on) is not None:
        raise UsageError("the sweep needs two sessions", where="--on", allowed="local or ssh://...")
    console.say(f"{board.name}, {setting.runtime} {setting.precision}, {on}", "device")
    found = _found(board, setting, on, seed, folder)
    path = found.save(folder)
    console.say(f"channels in multiples of {found.tile}", "alignment")
    for tile, over in found.excess.items():
        console.say(f"  multiples of {tile} and of no more: {100 * over:+.0f} % time per MAC")
    doubt = (
        f"; {len(found.doubtful)} of {len(found.ms)} widths are in doubt" if found.doubtful else ""
    )
    console.say(f"sessions {100 * found.noise:.1f} % apart{doubt}", "noise")
    console.say(str(path), "file")
    return {"path": str(path), "tile": found.tile, "excess": found.excess, **found.model_dump()}


def _found(board: Device, setting: Setting, on: str, seed: int, folder: Path) -> Alignment:
    from hw_profiles import alignment, measure
    from hw_profiles.measure import Pace

    if on == measuring.LOCAL:
        return measure.sweep(board.name, setting, rng=np.random.default_rng((seed, 23)))
    there = measuring.backend(on, setting, seed, folder, Pace())
    chains = [alignment.chain(width) for width in alignment.WIDTHS]
    sessions = [there(chains).timings for _ in range(2)]
    precision = setting.precision or "fp32"
    return alignment.fitted(board.name, setting.runtime, precision, setting.threads, sessions)
