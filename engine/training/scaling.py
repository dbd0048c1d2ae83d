"""Embeddings whose every number has mean 0 and deviation 1, or less, for training. Not for: what published heads take.

Shape letters: N rows, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS_AT_ONCE = 8192  # bounds what is held in float64
# What moves less, beside its mean, is noise of float32, and would be blown up to the size of all others.
LEAST_RELATIVE_DEVIATION = 1e-6
LEAST_DEVIATION = 1e-20  # one over it, times a weight, is far from the end of float32
# A number that is 0 in all training rows but one may be anything in another row: over its own deviation it was 10,000
# there, and that one row decided when training stopped (handwritten digits, 1 of 5 splits).
LEAST_MOVED_ROWS = 10


@dataclass(frozen=True, slots=True)
class Scaling:
    """(embeddings - subtract) * multiply.

    Attributes:
        subtract_D: means.
        multiply_D: one over the deviations; 0 for a number that is the same in all rows, or all but a few.
    """

    subtract_D: NDArray[np.float64]
    multiply_D: NDArray[np.float64]

    @staticmethod
    def of(embeddings_ND: NDArray[np.floating[Any]], rows: NDArray[np.int64]) -> Scaling:
        """As some of the rows, at least one, have it."""
        width = embeddings_ND.shape[1]
        portions = [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]
        mean_D, square_D, fourth_D = np.zeros(width), np.zeros(width), np.zeros(width)
        for portion in portions:
            mean_D += embeddings_ND[portion].sum(axis=0, dtype=np.float64) / len(rows)
        for portion in portions:
            squares_ND = (embeddings_ND[portion] - mean_D) ** 2
            square_D += squares_ND.sum(axis=0)
            fourth_D += (squares_ND**2).sum(axis=0)
        deviation_D = np.sqrt(square_D / len(rows))
        moves_D = deviation_D > np.maximum(LEAST_DEVIATION, LEAST_RELATIVE_DEVIATION * np.abs(mean_D))
        # As many rows as would have these moments if all of them moved by as much and the others not at all.
        moved_D = np.divide(square_D**2, fourth_D, out=np.zeros(width), where=fourth_D > 0)
        moves_D &= moved_D >= min(LEAST_MOVED_ROWS, len(rows) / 10)
        return Scaling(mean_D, np.divide(1.0, deviation_D, out=np.zeros(width), where=moves_D))

    def apply(
        self, embeddings_ND: NDArray[np.floating[Any]], scaled_ND: NDArray[np.floating[Any]] | None = None
    ) -> NDArray[np.floating[Any]]:
        """A float32 array of the same shape: the given one, or a new one."""
        if scaled_ND is None:
            scaled_ND = np.empty(embeddings_ND.shape, np.float32)
        for start in range(0, len(embeddings_ND), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            scaled_ND[rows] = (embeddings_ND[rows] - self.subtract_D) * self.multiply_D
        return scaled_ND
