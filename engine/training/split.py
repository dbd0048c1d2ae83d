"""Which labelled rows train, validate and test. Not for: reading labels.

A row's split is a pure function of the seed and its key, so tomorrow's rows never move yesterday's, and rows
that share a key never sit on two sides. Shape letters: N labelled rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.errors import LabelError
from engine.training.kinds import SPLIT_NAMES, SplitConfig, SplitName


def hash_fraction(seed: int, key: str) -> float:
    """Where a key lies in [0, 1): the first 8 bytes, big-endian, of sha-256(f"{seed}\\n{key}") over 2**64.

    This is a file format in all but name: changing it would move test rows into training.
    """
    digest = hashlib.sha256(f"{seed}\n{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def assign_splits(
    keys: Sequence[str], values: Sequence[str | None] | None, config: SplitConfig
) -> NDArray[np.str_]:
    """Each row's split, by hash or by an explicit column.

    Args:
        keys: N sample keys, or names of the groups that stay together.
        values: N cells of the split column, or None to split by hash.
        config: fractions and seed.

    Returns:
        N texts out of train, validation, test, and with slices "" for rows outside of all. Validation and test may have
        no rows.

    Raises:
        LabelError: a cell is none of the three words, or no row is left to train on.
    """
    if config.slices:
        splits = _by_slices(keys, values, config)
    elif values is None:
        fractions = config.fractions
        splits = [_pick(hash_fraction(config.seed, key), fractions) for key in keys]
    else:
        splits = _checked(values, config.column)
        if "validation" not in splits:
            splits = _with_validation(splits, keys, config)
    if "train" not in splits:
        raise LabelError(
            "split: no rows to train on",
            found=f"{len(splits)} labelled rows: {_counted(splits)}",
            way_out="give more labelled rows, a larger split.train or another split.seed",
        )
    return np.array(splits, dtype=np.str_)


def _by_slices(keys: Sequence[str], values: Sequence[str | None] | None, config: SplitConfig) -> list[str]:
    """The split whose slice holds the row, "" where none does.

    Raises:
        LabelError: a slice is of a value that no row has.
    """
    names = ["all"] * len(keys) if values is None else values
    absent = sorted({one.name for one in config.slices.values()} - {name or "" for name in names})
    if absent:
        raise LabelError(
            f"split: no row is of {', '.join(absent)}",
            found=", ".join(sorted({name or "(empty)" for name in names})[:5]),
            way_out=f"correct the slices, or split.column {config.column}",
        )
    splits = []
    for key, name in zip(keys, names, strict=True):
        place = hash_fraction(config.seed, key)
        inside = (
            split for split, one in config.slices.items() if one.name == name and one.begin <= place < one.end
        )
        splits.append(next(inside, ""))
    return splits


def _pick(place: float, fractions: Mapping[SplitName, float]) -> str:
    """The split whose interval holds `place`; rounding of the sum never opens an interval of width 0."""
    names = [name for name, fraction in fractions.items() if fraction > 0]
    upper = 0.0
    for name in names[:-1]:
        upper += fractions[name]
        if place < upper:
            return name
    return names[-1]


def _checked(values: Sequence[str | None], column: str | None) -> list[str]:
    wrong = sorted({value or "(empty)" for value in values if value not in SPLIT_NAMES})
    if wrong:
        raise LabelError(
            f"split.column {column}: {len(wrong)} unknown values",
            found=", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else ""),
            wanted=", ".join(SPLIT_NAMES),
        )
    return [str(value) for value in values]


def _with_validation(splits: Sequence[str], keys: Sequence[str], config: SplitConfig) -> list[str]:
    """Take validation / (train + validation) of the train rows, by hash, for validation."""
    total = config.fractions["train"] + config.fractions["validation"]
    shares: dict[SplitName, float] = {
        "train": config.fractions["train"] / total,
        "validation": config.fractions["validation"] / total,
    }
    return [
        _pick(hash_fraction(config.seed, key), shares) if split == "train" else split
        for split, key in zip(splits, keys, strict=True)
    ]


def _counted(splits: Sequence[str]) -> str:
    return (
        ", ".join(
            f"{count} {name or 'outside of all slices'}" for name, count in sorted(Counter(splits).items())
        )
        or "none"
    )
