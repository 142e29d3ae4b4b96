"""Where networks are trained and judged: on this machine's processor, or on its GPU."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nas.errors import UsageError

if TYPE_CHECKING:
    import torch

FLAG = "--train-on"


def named(name: str) -> torch.device:
    """The device that torch calls `name`; of several GPUs without a number the first, under a
    launcher the process's own. Raises UsageError, naming what there is, where it is not there."""
    import torch

    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if there else 0
    names = ["cpu", *([there.type] if there else []), *(f"{there}:{at}" for at in range(count))]
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"no device '{name}'", where=FLAG, allowed=", ".join(names)) from error
    if found.type == "cpu":
        return torch.device("cpu")
    own = int(os.environ.get("LOCAL_RANK", "0")) if found.index is None else found.index
    if there is None or found.type != there.type or own >= count:
        raise UsageError(f"no {name} here", where=FLAG, allowed=", ".join(names))
    return torch.device(found.type, own)
