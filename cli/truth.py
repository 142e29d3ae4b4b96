"""`--truth FILE[:COLUMN]`: accuracies that somebody measured, of networks of the space."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.errors import NasctlError, UsageError
from nas.space import Genes, SearchSpace

COLUMN = "accuracy"
ARCHS = ("genes", "arch", "arch_str")  # JSON lists of genes, or the space's own text


def read(text: str, space: SearchSpace) -> tuple[Genes, NDArray[np.float64]]:
    """Genes [N, G] and accuracies [N] (higher is better) of a CSV or parquet file's rows that have
    both; of several rows of one network the first.

    Raises UsageError naming the column that is absent, NasctlError the row that is wrong.
    """
    path, column = _split(text)
    table = _table(path)
    named = next((name for name in ARCHS if name in table), None)
    if named is None or column not in table:
        what = f"no column '{column}'" if named else "no column with architectures"
        allowed = ", ".join(ARCHS) if named is None else ", ".join(map(str, table))
        hint = "Name it as FILE:COLUMN." if named else ""
        raise UsageError(f"{path.name} has {what}", where="--truth", allowed=allowed, next=hint)
    found: dict[tuple[int, ...], float] = {}
    for at, (arch, value) in enumerate(zip(table[named], table[column], strict=True)):
        try:
            truth = float("nan" if value is None else value)
            genes = _genes(arch, named, space)
        except (NasctlError, ValueError, TypeError) as error:
            raise NasctlError(f"row {at + 1}: {error}", where=f"--truth {path}") from error
        if np.isfinite(truth):
            found.setdefault(tuple(genes.tolist()), truth)
    if not found:
        raise NasctlError(f"no row has a number in '{column}'", where=f"--truth {path}")
    return np.array(list(found), np.int64), np.array(list(found.values()), np.float64)


def _split(text: str) -> tuple[Path, str]:
    if Path(text).is_file():
        return Path(text), COLUMN
    path, _, column = text.rpartition(":")
    if path and Path(path).is_file():
        return Path(path), column
    raise UsageError(f"no such file '{text}'", where="--truth", allowed="FILE or FILE:COLUMN")


def _table(path: Path) -> dict[str, list[Any]]:
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path).to_pydict()
        return pyarrow.csv.read_csv(path).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise NasctlError(
            f"cannot read it as a table ({first})", where=f"--truth {path}"
        ) from error


def _genes(arch: Any, column: str, space: SearchSpace) -> Genes:
    if column != "genes":
        from_string = getattr(sys.modules[type(space).__module__], "from_string", None)
        if from_string is None:
            raise ValueError("the space has no text of its own: give a column 'genes'")
        return from_string(arch)
    genes = np.array(json.loads(arch) if isinstance(arch, str) else arch)
    if genes.shape != (len(space.genes),) or genes.dtype.kind != "i":
        raise ValueError(f"{arch} is no list of {len(space.genes)} genes")
    if (genes < 0).any() or (genes >= space.sizes).any():
        raise ValueError(f"{genes.tolist()} is outside the genes' options")
    return space.canonical(genes)
