"""Rows that stand for those near to them: the one rule by which near duplicates are told.

Rows come in an order. One that is nearer than a cosine to a representative before it is near to that one; any other
becomes a representative itself. So no two representatives are near to each other, and every other row is near to a
representative itself: chains, in which each is near to the next and the ends are strangers, are never one group.
Not for: tables, or which order is the right one.

Shape letters: B rows of one call, R representatives until now, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

COMPARED_AT_ONCE = 8192  # representatives: their cosines to 1,024 rows are 34 MB
_FIRST_ROOM = 64


@dataclass(frozen=True, slots=True)
class NearPairs:
    """Rows, each with a representative before it that it is near to; a row may have several.

    Attributes:
        rows: numbers of the rows, as they came, from 0.
        representatives: likewise.
        cosines: float32, between the two.
    """

    rows: NDArray[np.int64]
    representatives: NDArray[np.int64]
    cosines: NDArray[np.float32]

    @staticmethod
    def joined(several: list[NearPairs]) -> NearPairs:
        """Those of several calls."""
        none = NearPairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
        found = several or [none]
        return NearPairs(
            np.concatenate([pairs.rows for pairs in found]),
            np.concatenate([pairs.representatives for pairs in found]),
            np.concatenate([pairs.cosines for pairs in found]),
        )


class Representatives:
    """Those among the rows until now, in memory.

    Args:
        threshold: cosine above which a row is near to a representative; at 1.0 none is, whatever rounding makes of it.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold if threshold < 1.0 else np.inf
        self._units_RD: NDArray[np.float32] | None = None
        self._numbers = np.empty(0, np.int64)
        self._count = 0

    def __len__(self) -> int:
        return len(self._numbers)

    def is_near(self, unit_D: NDArray[np.float32]) -> bool:
        """Whether a row of unit length is near to one of them."""
        if self._units_RD is None:
            return False
        return bool((self._units_RD[: len(self)] @ unit_D).max(initial=-1.0) > self._threshold)

    def take(self, units_BD: NDArray[np.float32]) -> NearPairs:
        """Go through further rows; of each that is no representative all pairs with those before it.

        Args:
            units_BD: rows of unit length, float32.
        """
        pairs = [self._pairs_with(begin, units_BD) for begin in range(0, len(self), COMPARED_AT_ONCE)]
        stands_B = np.ones(len(units_BD), np.bool_)
        for older in pairs:
            stands_B[older.rows - self._count] = False
        cosines_BB = units_BD @ units_BD.T
        near_BB = np.tril(cosines_BB > self._threshold, -1)  # to rows before them
        for row in np.flatnonzero(near_BB.any(axis=1) & stands_B):
            stands_B[row] = not (near_BB[row] & stands_B).any()
        rows, columns = np.nonzero(near_BB & stands_B[None, :] & ~stands_B[:, None])
        pairs.append(NearPairs(self._count + rows, self._count + columns, cosines_BB[rows, columns]))
        self._keep(units_BD[stands_B], self._count + np.flatnonzero(stands_B))
        self._count += len(units_BD)
        return NearPairs.joined(pairs)

    def _pairs_with(self, begin: int, units_BD: NDArray[np.float32]) -> NearPairs:
        """Of the representatives from one number on, some."""
        assert self._units_RD is not None
        some = slice(begin, min(begin + COMPARED_AT_ONCE, len(self)))
        cosines_BR = units_BD @ self._units_RD[some].T
        rows, columns = np.nonzero(cosines_BR > self._threshold)
        return NearPairs(self._count + rows, self._numbers[some][columns], cosines_BR[rows, columns])

    def _keep(self, units_BD: NDArray[np.float32], numbers: NDArray[np.int64]) -> None:
        wanted = len(self) + len(units_BD)
        if self._units_RD is None:
            self._units_RD = np.empty((max(_FIRST_ROOM, wanted), units_BD.shape[1]), np.float32)
        elif wanted > len(self._units_RD):
            room = np.empty((max(wanted, 2 * len(self._units_RD)), units_BD.shape[1]), np.float32)
            room[: len(self)] = self._units_RD[: len(self)]
            self._units_RD = room
        self._units_RD[len(self) : wanted] = units_BD
        self._numbers = np.concatenate([self._numbers, numbers])


def of_unit_length(rows_BD: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Rows with their lengths divided out, float32, new; a row of zeros stays."""
    units_BD = rows_BD.astype(np.float32)
    lengths_B = np.sqrt(np.einsum("bd,bd->b", units_BD, units_BD))
    lengths_B[lengths_B == 0] = 1
    units_BD /= lengths_B[:, None]
    return units_BD
