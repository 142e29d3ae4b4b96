"""Device: what is known about a target before anything is measured, from `<name>.toml`.

Every figure in a device file says in `sources` where it comes from. A field that nobody knows is
left out, never guessed: without a peak there is no roofline, and the device must be measured.
"""

from __future__ import annotations

import contextlib
import os
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from nas.errors import NasctlError, unknown

FOLDER = Path(__file__).parent
ENV = "NASCTL_PROFILES"  # a user's own folder of device files and tables; wins over the shipped one
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
PRECISIONS = tuple(ITEMSIZE)


class Device(BaseModel):
    """One target. Rates count multiply-adds; `peak_gmacs_per_s` has one entry per precision."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    summary: str
    kind: Literal["cpu", "gpu"]
    runtime: str
    precision: str = Field(pattern="^(" + "|".join(PRECISIONS) + ")$")
    sources: tuple[str, ...] = Field(min_length=1)
    aliases: tuple[str, ...] = ()
    local: bool = False  # it is the machine that nasctl runs on
    tile: PositiveInt = 8  # channel counts offered to a search are multiples of this
    clocks: str = ""
    memory_mb: PositiveInt | None = None
    peak_gmacs_per_s: dict[str, PositiveFloat] = {}
    bandwidth_gb_per_s: PositiveFloat | None = None
    #: a measured device of the same kind: its overheads stand in for ours, its rates are scaled
    relative: str = ""

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.precision]

    @property
    def peak(self) -> float | None:
        """GMACs per second at this device's precision."""
        return self.peak_gmacs_per_s.get(self.precision)


def names() -> list[str]:
    return sorted({path.stem for folder in folders() for path in folder.glob("*.toml")})


def folders() -> list[Path]:
    """Where device files and tables live, the user's own folder first."""
    own = os.environ.get(ENV)
    return ([Path(own)] if own else []) + [FOLDER]


def load(name_or_path: str | Path) -> Device:
    """By name, by alias, or from a path that ends in .toml: of what a user typed."""
    path = Path(name_or_path)
    return _read(path) if path.suffix == ".toml" else named(str(name_or_path))


def named(text: str) -> Device:
    """By name or by alias: of what a file says, which may be a stranger's with a device file of
    its own."""
    for folder in folders():
        if (found := folder / f"{text}.toml").is_file() and Path(text).name == text:
            return _read(found)
    aliases: dict[str, Device] = {}
    for name in names():
        with contextlib.suppress(NasctlError):  # a user's broken file must not take `jetson` away
            device = named(name)
            aliases |= dict.fromkeys(device.aliases, device)
    if text in aliases:
        return aliases[text]
    raise unknown("device", text, [*names(), *aliases], where="--hw")


def _read(path: Path) -> Device:
    try:
        return Device.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise NasctlError(
            f"cannot read the device file: {error.strerror}", where=str(path)
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise NasctlError(f"not valid TOML: {error}", where=str(path)) from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise NasctlError(
            f"field '{field}': {first['msg']}",
            where=str(path),
            next="docs/add_a_device.md lists the fields.",
        ) from error
