"""Runtimes: one file each behind one signature, used by profiling and by deployment alike.

A runtime is a file here; its name is what device files say. A file that begins with
an underscore is a part of several runtimes. Each gives the names of `Runtime`, and one with a file
format of its own also those of `Compiled`; where SUFFIX is not ".onnx", it runs nothing else.
tests/test_runtimes.py runs over every file found. Importing a runtime's file imports no library:
`unavailable()` says what is missing, and every other function raises one clear line if it is called
all the same.

Precision is a demand, never a hint. Not stated (None), a model runs as it is written. Stated, a
runtime converts the model or its arithmetic where it can, and where what was loaded computes in
something else it refuses: a figure for fp16 that was measured in fp32 is worse than none. "fp32"
means 24 bits of mantissa everywhere: TF32 and automatic bf16 are off.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Tuple, Union, cast

from nas.errors import NasctlError, UsageError, unknown

if TYPE_CHECKING:
    import numpy as np

    Feeds = Mapping[str, np.ndarray]
    #: of inputs by name: the smallest, the usual and the largest shape that an engine takes
    Ranges = Mapping[str, Sequence[Sequence[int]]]

#: property of ONNX files: what free dimensions measure where nothing else is said, as JSON
SIZES = "free_sizes"
Shape = Tuple[Union[int, str], ...]  # a string is a free dimension's name


@dataclass(frozen=True)  # slots are newer than the Python of some boards
class Session:
    """A loaded model: what goes in and what comes out."""

    inner: Any  # the runtime's own objects; nobody else looks inside
    where: str  # the file, for messages
    inputs: dict[str, Shape]
    outputs: tuple[str, ...]
    dtypes: dict[str, str] = field(default_factory=dict)  # of inputs; float32 where not named
    #: of free dimensions by name, where the file says what it was made for
    sizes: dict[str, int] = field(default_factory=dict)


class Runtime(Protocol):
    """What each file here gives, as module-level names."""

    PRECISIONS: tuple[str, ...]  # what `precision=` may demand
    SUFFIX: str  # of the files that `load` takes besides serialised ONNX
    TIMED: str  # what one figure of `timed` includes: the header of every table made with it

    def unavailable(self) -> str:
        """Empty when usable on this machine, else one line: what is missing, how to get it."""

    def version(self) -> str:
        """The library's version. Raises NasctlError when it is absent, as all below do."""

    def load(
        self, model: bytes | Path, *, threads: int = 1, precision: str | None = None
    ) -> Session:
        """A session over an ONNX file (path or content) or over what `build` wrote.

        `threads` are the processor's; where the work is on a GPU they change nothing.
        """

    def run(self, session: Session, feeds: Feeds) -> list[np.ndarray]:
        """The outputs for arrays by input name, in the file's order."""

    def timed(self, session: Session, feeds: Feeds) -> Callable[[], float]:
        """One inference per call on these inputs, prepared once; returns its seconds (TIMED).

        The call keeps alive what it needs: the session may be dropped.
        """

    def observed_precision(self, session: Session) -> str:
        """What the multiplying operators of the loaded model really compute in, as far as the
        library tells: "fp16", or "int8 18, fp32 3" for a mixture; "?" where it does not tell."""


class Compiled(Runtime, Protocol):
    """A runtime with files of its own, made on the machine that will run them: engines."""

    ENGINE: str  # suffix of what `build` writes, which `load` takes

    def build(
        self, model: bytes | Path, path: Path, *, threads: int = 1, precision: str | None = None
    ) -> Path:
        """Write the runtime's own file for an ONNX model to `path`, whole or not at all."""


@dataclass(frozen=True)
class Options:
    """What TensorRT's `build` alone takes."""

    compatible: Sequence[str] = ()  # "version": runs in later ones, "hardware": on other GPUs
    shapes: Ranges = field(default_factory=dict)  # 1 for every free size of an input not named
    cache: Path | None = None  # folder of timing caches
    #: the model's weights are in files beside it that the caller has looked at
    beside: bool = False


class Clock:
    """Seconds for `measure.interleaved(calls, clock=clock)` that trust a call's own figure.

    It is the wall clock, but a call from `of` moves it by exactly what that call says it took: on a
    GPU the time between two events, which the host's clock does not see.

    >>> clock = Clock()
    >>> call, before = clock.of(lambda: 2.0), clock()
    >>> call()
    >>> round(clock() - before, 2)
    2.0
    """

    def __init__(self) -> None:
        self._ahead = 0.0

    def __call__(self) -> float:
        return time.perf_counter() + self._ahead

    def of(self, timed: Callable[[], float]) -> Callable[[], None]:
        """The same call, for `interleaved`."""

        def call() -> None:
            began = time.perf_counter()
            seconds = timed()
            self._ahead += seconds - (time.perf_counter() - began)

        return call


def names() -> list[str]:
    """Every runtime, by file name; here or not."""
    folder = Path(__file__).parent
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def load_module(name: str) -> Runtime:
    """The runtime of that name. Raises UsageError with the known names for any other."""
    if name not in names():
        raise unknown("runtime", name, names())
    return cast(Runtime, importlib.import_module(f"hw_profiles.runtimes.{name}"))


def random_feeds(session: Session, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Normal noise for every input, small numbers above 0 where it takes integers (0 is often
    padding); free dimensions are taken as the file says (`Session.sizes`), else as 1."""
    found = {}
    for name, shape in session.inputs.items():
        sizes = [n if isinstance(n, int) else session.sizes.get(n, 1) for n in shape]
        dtype = session.dtypes.get(name, "float32")
        integers = dtype.startswith(("int", "uint"))
        noise = rng.integers(1, 8, sizes) if integers else rng.standard_normal(sizes)
        found[name] = noise.astype(dtype)
    return found


def compiled(name: str) -> Compiled:
    """The runtime of that name. Raises UsageError for one without a file format of its own."""
    module = load_module(name)
    if not hasattr(module, "build"):
        every = [one for one in names() if hasattr(load_module(one), "build")]
        raise UsageError(f"{name} has no engines", where="--engine", allowed=every)
    return cast(Compiled, module)


# ---- for the runtimes ----------------------------------------------------------------------------


def wall(call: Callable[[], object]) -> Callable[[], float]:
    """`timed` of a runtime that computes while it is called."""

    def seconds() -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    return seconds


def where(model: bytes | Path) -> str:
    """How to call a model in messages. Raises NasctlError when its file is absent."""
    if isinstance(model, Path) and not model.is_file():
        raise NasctlError("no such file", where=str(model))
    return str(model) if isinstance(model, Path) else "model in memory"


def offered(precision: str | None, precisions: tuple[str, ...], runtime: str) -> None:
    """Refuse a precision that a runtime does not offer."""
    if precision is not None and precision not in precisions:
        raise NasctlError(f"{runtime} offers no {precision}", where="precision", allowed=precisions)


def obeyed(precision: str | None, observed: str, model: str) -> None:
    """Refuse a loaded model that does not compute in the stated precision.

    Of fp32, fp16 and bf16 every multiplication must be in it, as far as the library tells. Of int8
    some must: nodes that would lose too much stay in float.
    """
    found = {part.split()[0] for part in observed.split(", ")}
    held = precision in found and (precision == "int8" or found <= {precision, "?"})
    if precision is not None and not held:
        raise NasctlError(
            f"asked to compute in {precision}, but it computes in {observed}",
            where=model,
            next="Export the model in that precision, or ask for the one it has.",
        )


def fitting(inputs: Mapping[str, Shape], feeds: Feeds, where: str) -> None:
    """Refuse feeds that are not exactly a model's inputs in its sizes; free ones may be any."""
    given = {name: tuple(value.shape) for name, value in feeds.items()}
    wanted = {
        name: tuple(
            m if isinstance(n, str) else n for n, m in zip_longest(shape, given.get(name, ()))
        )
        for name, shape in inputs.items()
    }
    if given != wanted:
        told = ", ".join(f"{name} {list(shape)}" for name, shape in given.items())
        raise NasctlError(
            f"feeds do not fit ({told or 'none'})",
            where=where,
            allowed=(f"{name} {list(shape)}" for name, shape in inputs.items()),
        )


def summary(counts: Mapping[str, int]) -> str:
    """Operators per precision as `observed_precision` puts it, the most frequent first."""
    if len(counts) < 2:
        return next(iter(counts), "?")
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count}" for name, count in ranked)


def short(error: BaseException) -> str:
    """A library's message on one line of readable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."
