"""Labelled sentences from TSV, CSV or parquet files with columns `sentence` and `label`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nas.errors import NasctlError

COLUMNS = ("sentence", "label")
DELIMITERS = {".tsv": "\t", ".csv": ","}


@dataclass(frozen=True)
class Sentences:
    """Texts and their labels as written."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)


def load(path: Path) -> Sentences:
    """Raises NasctlError for a file that is absent, empty, of another kind or without a column."""
    rows = _parquet(path) if path.suffix == ".parquet" else _separated(path)
    if not rows[0]:
        raise NasctlError("no sentences", where=str(path))
    return Sentences(*rows)


def classes(sentences: Sentences) -> tuple[str, ...]:
    """The labels that occur, sorted. Raises NasctlError for fewer than two."""
    found = tuple(sorted(set(sentences.labels)))
    if len(found) < 2:
        raise NasctlError(f"one label only ({found[0]})", where="--finetune")
    return found


def numbers(sentences: Sentences, known: Sequence[str], where: str) -> list[int]:
    """Labels as positions among the known ones. Raises NasctlError for one that is not known."""
    at = {label: place for place, label in enumerate(known)}
    for line, label in enumerate(sentences.labels, 1):
        if label not in at:
            raise NasctlError(
                f"row {line} has the label '{label}', which the training rows lack",
                where=where,
                allowed=known,
            )
    return [at[label] for label in sentences.labels]


def shared(some: Sentences, others: Sentences) -> int:
    """How many of `some` have a text that `others` have too."""
    there = set(others.texts)
    return sum(text in there for text in some.texts)


def _parquet(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path, columns=list(COLUMNS))
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, str(error).splitlines()[0]) from error
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise _unreadable(path, f"no column '{missing[0]}'")
    texts, labels = (table[name].to_pylist() for name in COLUMNS)
    return tuple(map(str, texts)), tuple(map(str, labels))


def _separated(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if path.suffix not in DELIMITERS:
        raise NasctlError("unknown kind of file", where=str(path), allowed=".tsv, .csv, .parquet")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            # in a TSV a quotation mark is a character like any other
            quoting: Literal[0, 3] = csv.QUOTE_NONE if path.suffix == ".tsv" else csv.QUOTE_MINIMAL
            reader = csv.DictReader(file, delimiter=DELIMITERS[path.suffix], quoting=quoting)
            rows = [(row.get("sentence"), row.get("label")) for row in reader]
            names = reader.fieldnames or []
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, str(error)) from error
    if missing := [name for name in COLUMNS if name not in names]:
        raise _unreadable(path, f"no column '{missing[0]}'")
    for line, (text, label) in enumerate(rows, 2):
        if text is None or label is None:
            raise _unreadable(path, f"line {line} has too few columns")
    return tuple(str(text) for text, _ in rows), tuple(str(label) for _, label in rows)


def _unreadable(path: Path, why: str) -> NasctlError:
    return NasctlError(
        f"cannot read labelled sentences ({why})",
        where=str(path),
        next=f"The first line names the columns {' and '.join(COLUMNS)}.",
    )
