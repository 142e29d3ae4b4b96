"""Free sizes: what one TensorRT engine serves where its file leaves a dimension free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from nas.errors import UsageError

#: smallest, usual and largest, of free dimensions by their names in the file
Sizes = Mapping[str, tuple[int, int, int]]
#: smallest, usual and largest shape, of inputs with a free dimension
Shapes = Mapping[str, Sequence[Sequence[int]]]
Inputs = Mapping[str, Sequence[int | str]]  # a free dimension is its name

WHERE = "--sizes"
FORM = "NAME=SMALLEST:USUAL:LARGEST, as batch=1:8:32"


def parse(text: str | None) -> dict[str, tuple[int, int, int]]:
    """`batch=1:8:32,length=16:64:128`. Raises UsageError for anything else."""
    found: dict[str, tuple[int, int, int]] = {}
    for word in text.split(",") if text is not None else ():
        said = re.fullmatch(r"(.+)=(\d+):(\d+):(\d+)", word.strip(), re.ASCII)
        if said is None:
            raise UsageError(f"'{word.strip()}'", where=WHERE, allowed=FORM)
        name, (low, usual, high) = said[1], (int(said[at]) for at in (2, 3, 4))
        if name in found:
            raise UsageError(f"{name} is there twice", where=WHERE)
        if not 1 <= low <= usual <= high:
            raise UsageError(
                f"{name} is {low}:{usual}:{high}",
                where=WHERE,
                allowed="1 <= smallest <= usual <= largest",
            )
        found[name] = low, usual, high
    return found


def shapes(inputs: Inputs, examples: Mapping[str, Sequence[int]], sizes: Sizes) -> Shapes:
    """Of inputs with a free dimension, by `sizes`; where these say nothing the batch is 1 and the
    rest as in the bundle's own `examples` (without the batch).

    Raises UsageError for a name that none of the model's free dimensions has.
    """
    free = {size for shape in inputs.values() for size in shape if isinstance(size, str)}
    if unknown := sorted(sizes.keys() - free):
        raise UsageError(
            f"the model has no free size '{unknown[0]}'",
            where=WHERE,
            allowed=sorted(free) or "none: its sizes are fixed",
        )
    found = {}
    for name, shape in inputs.items():
        own = (1, *examples[name])
        each = [_range(size, held, sizes) for size, held in zip(shape, own, strict=True)]
        if any(isinstance(size, str) for size in shape):
            found[name] = list(zip(*each, strict=True))
    return found


def _range(size: int | str, held: int, sizes: Sizes) -> tuple[int, int, int]:
    if isinstance(size, int):
        return size, size, size
    return sizes.get(size, (held, held, held))
