"""Labels that are probably wrong, by confident learning on answers of heads that have not seen the row.

Northcutt, Jiang and Chuang, Confident Learning: Estimating Uncertainty in Dataset Labels (2021). Shape letters: N rows,
K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.training.split import hash_fraction

_FOLD_SEED = 7_919  # beside the split's seed, so that folds and splits have nothing to do with each other


@dataclass(frozen=True, slots=True)
class Suspects:
    """Rows whose label is doubted, the most doubtful first.

    Attributes:
        rows: their numbers.
        suggested: the class that each seems to be, in the same order.
        margins: probability of that class less that of the label, the same.
    """

    rows: NDArray[np.int64]
    suggested: NDArray[np.int64]
    margins: NDArray[np.float64]

    def to_json(
        self,
        keys: Sequence[str],
        shards: Sequence[str],
        indexes: Sequence[int],
        classes_N: NDArray[np.integer[Any]],
        names: Sequence[str],
    ) -> list[dict[str, Any]]:
        """One entry for each row: key, shard, index, label, suggested, margin."""
        return [
            {
                "key": keys[row],
                "shard": shards[row],
                "index": indexes[row],
                "label": names[classes_N[row]],
                "suggested": names[suggested],
                "margin": margin,
            }
            for row, suggested, margin in zip(
                self.rows.tolist(), self.suggested.tolist(), self.margins.tolist(), strict=True
            )
        ]


def find_suspects(
    probabilities_NK: NDArray[np.floating[Any]], classes_N: NDArray[np.integer[Any]]
) -> Suspects:
    """Rows that are confidently of another class than they are labelled.

    Confident is a probability of at least what rows with that label have on average. Beyond the paper, the other class
    must also be more probable than the label.

    Args:
        probabilities_NK: of heads that were not fitted on the row.
        classes_N: as labelled.
    """
    count, num_classes = probabilities_NK.shape
    own_N = np.take_along_axis(probabilities_NK, classes_N[:, None], axis=1)[:, 0]
    rows_K = np.bincount(classes_N, minlength=num_classes)
    sums_K = np.bincount(classes_N, weights=own_N, minlength=num_classes)
    thresholds_K = np.divide(sums_K, rows_K, out=np.full(num_classes, np.inf), where=rows_K > 0)
    confident_NK = np.where(probabilities_NK >= thresholds_K, probabilities_NK, -np.inf)
    suggested_N = confident_NK.argmax(axis=1)
    margins_N = confident_NK[np.arange(count), suggested_N] - own_N
    rows = np.flatnonzero((margins_N > 0) & (suggested_N != classes_N))
    rows = rows[np.argsort(-margins_N[rows], kind="stable")]
    return Suspects(rows, suggested_N[rows], margins_N[rows].astype(np.float64))


def assign_folds(keys: Sequence[str], num_folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of each row: of its key alone, so that rows of one key are never on both sides."""
    return np.fromiter(
        (int(num_folds * hash_fraction(seed + _FOLD_SEED, key)) for key in keys), np.int64, len(keys)
    )
