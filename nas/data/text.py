"""Plain text as fixed-length token sequences on disk: any amount of it in little memory.

A file is read line by line, tokenised piece by piece and packed: every sequence is an opening
token, a run of the text's tokens across line ends, and a closing token; what is left over at the
end is dropped. The sequences are written to one file of 32-bit numbers, which training maps into
memory. A few hundred megabytes of text never have more than a few megabytes in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nas import file
from nas.errors import NasctlError, UsageError

LINES = 1024  # at a time
Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]  # texts to numbers, nothing added


@dataclass(frozen=True)
class Wrapping:
    """The tokens that every sequence begins and ends with."""

    opening: int
    closing: int


def pack(paths: Sequence[Path], length: int, encode: Encode, wrap: Wrapping, to: Path) -> int:
    """Write sequences of `length` tokens to the file `to`, whole or not at all; how many.

    Raises NasctlError for a file that is absent, no UTF-8 (saying where), or too short for one
    sequence, and where there is no space for the sequences.
    """
    if length < 4:
        raise UsageError(f"{length} tokens", where="--sequence", allowed="4 or more")
    part = to.with_suffix(".part")
    try:
        written, left = _write(part, _tokens(paths, encode), length, wrap)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise file.unwritable(to, error) from error
    if not written:
        part.unlink()
        raise NasctlError(
            f"{left} tokens in all, too few for one sequence of {length}",
            where=", ".join(map(str, paths)),
            next="Give more text, or a smaller --sequence.",
        )
    part.replace(to)
    return written


def _write(path: Path, tokens: Iterator[list[int]], length: int, wrap: Wrapping) -> tuple[int, int]:
    """How many sequences were written, and how many tokens were left over."""
    written, room = 0, length - 2
    pending: list[int] = []
    with path.open("wb") as out:
        for numbers in tokens:
            pending += numbers
            while len(pending) >= room:
                row = [wrap.opening, *pending[:room], wrap.closing]
                out.write(np.array(row, "<i4").tobytes())
                del pending[:room]
                written += 1
        out.flush()
        os.fsync(out.fileno())
    return written, len(pending)


def sequences(path: Path, length: int) -> NDArray[np.int32]:
    """What `pack` wrote, [number, length], mapped and not read."""
    return np.memmap(path, "<i4", "r").reshape(-1, length)


def sampled(paths: Sequence[Path], encode: Encode) -> tuple[int, float]:
    """Tokens of the first lines of every file, and the share of all bytes that these are (1 where
    there is nothing else). Raises NasctlError as `pack` does."""
    tokens, read = 0, 0
    for path in paths:
        some = list(islice(_lines(path), LINES))
        read += sum(len(line.encode()) for line in some)
        tokens += sum(map(len, encode([line for line in some if line.strip()])))
    whole = sum(path.stat().st_size for path in paths)
    return tokens, read / whole if whole else 1.0


def _tokens(paths: Sequence[Path], encode: Encode) -> Iterator[list[int]]:
    for path in paths:
        lines = _lines(path)
        while some := list(islice(lines, LINES)):
            for numbers in encode([line for line in some if line.strip()]):
                yield list(numbers)


def _lines(path: Path) -> Iterator[str]:
    at = 0
    try:
        with path.open("rb") as content:
            for number, line in enumerate(content, 1):
                yield _decoded(line, f"{path}, line {number}", at)
                at += len(line)
    except OSError as error:
        raise NasctlError(f"cannot read: {error.strerror}", where=str(path)) from error


def _decoded(line: bytes, where: str, at: int) -> str:
    """`at` is the line's first byte in its file."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NasctlError(
            f"no UTF-8 at byte {at + error.start}",
            where=where,
            next="Convert it (iconv -t UTF-8), or leave the file out.",
        ) from error
