"""Which rows train, which are held out: decided once per data set, the same on every machine.

Only the raw words of PCG64 are used, not `Generator.permutation`: numpy promises the first for good
and the second only within a release.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nas.errors import NasctlError

SEED = 20240229  # any constant will do; changing it changes every split ever reported


def shuffled(n: int, *stream: int) -> np.ndarray:
    """A fixed permutation of range(n); `stream` tells independent ones apart."""
    keys = np.random.PCG64([SEED, *stream]).random_raw(n)
    return np.argsort(keys, kind="stable")


def fractions(n: int, has_val: bool, has_test: bool) -> tuple[float, float]:
    """Shares of val and test to take out of `n` training rows.

    60/20/20 under 5,000 images and 80/10/10 from there on; 10 % of train where the source brings
    its own test split; nothing where it brings the split itself.
    """
    share = 0.2 if n < 5000 and not has_test else 0.1
    return (0.0 if has_val else share), (0.0 if has_test else share)


def stratified(
    labels: np.ndarray, classes: Sequence[str], val: float, test: float, where: str = ""
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Disjoint row numbers for train, val and test; each class is cut in the same proportion.

    A share above zero takes at least one row of every class, and train keeps at least one.
    """
    _check_counts(np.bincount(labels, minlength=len(classes)), classes, (val, test), where)
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    for label in range(len(classes)):
        rows = np.flatnonzero(labels == label)
        rows = rows[shuffled(len(rows), 0, label)]
        n_val, n_test = (max(1, round(len(rows) * share)) if share else 0 for share in (val, test))
        for part, cut in zip(
            parts, np.split(rows, [len(rows) - n_val - n_test, len(rows) - n_test]), strict=True
        ):
            part.append(cut)
    train, held_val, held_test = (np.sort(np.concatenate(part)) for part in parts)
    return train, held_val, held_test


def _check_counts(
    counts: np.ndarray, classes: Sequence[str], shares: tuple[float, float], where: str
) -> None:
    least = 1 + sum(share > 0 for share in shares)
    small = [f"'{name}' ({n})" for name, n in zip(classes, counts, strict=True) if n < least]
    if small:
        more = f" and {len(small) - 3} more" if len(small) > 3 else ""
        raise NasctlError(
            f"too few images to split in class {', '.join(small[:3])}{more}",
            where=where,
            allowed=f"at least {least} images in every class",
            next="Add images, remove the class, or provide train, val and test yourself",
        )
