"""Whether one classifier is better than another on the same rows. Not for: how good either is.

Shape letters: N rows, K classes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Comparison:
    """Before and after, on the rows of one split.

    Attributes:
        split: the rows' name; empty where there are none.
        rows: how many.
        before, after: share of right answers (of several classes: of all questions).
        low, high: of the difference, by a paired bootstrap over rows (Efron and Tibshirani, 1993): 95 % of the
            resamples lie between them.
    """

    split: str
    rows: int
    before: float
    after: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        """After less before."""
        return self.after - self.before

    @property
    def is_better(self) -> bool:
        """By however little."""
        return self.difference > 0

    def to_json(self) -> dict[str, Any]:
        """For metrics.json."""
        return {**asdict(self), "difference": self.difference}

    def in_words(self) -> str:
        """For a person."""
        return (
            f"{self.after:.4f} after, {self.before:.4f} before on {self.rows:,} {self.split} images: "
            f"{100 * self.difference:+.2f} points, {100 * self.low:+.2f} to {100 * self.high:+.2f}"
        )


def compare(
    split: str,
    before_NK: NDArray[np.floating[Any]],
    after_NK: NDArray[np.floating[Any]],
    targets_N: NDArray[np.integer[Any]],
    seed: int = 0,
) -> Comparison:
    """Compare the answers of two classifiers.

    Args:
        before_NK, after_NK: logits.
        targets_N: (N,) classes, or (N, K) with 1 where a row has the class.
    """
    right = [_right(logits_NK, targets_N) for logits_NK in (before_NK, after_NK)]
    change_N = right[1] - right[0]
    changes, counts = np.unique(change_N, return_counts=True)
    random = np.random.default_rng(seed)
    # Of so many equal changes it does not matter which is drawn.
    drawn = random.multinomial(len(change_N), counts / len(change_N), RESAMPLES)
    means = drawn @ changes / len(change_N)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Comparison(
        split,
        len(change_N),
        before=float(right[0].mean()),
        after=float(right[1].mean()),
        low=float(low),
        high=float(high),
    )


def _right(logits_NK: NDArray[np.floating[Any]], targets_N: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Of each row the share of right answers, 0 or 1 where there is one question."""
    if targets_N.ndim == 2:
        shares: NDArray[np.float64] = ((logits_NK > 0) == (targets_N > 0)).mean(axis=1)
        return shares
    is_right_N: NDArray[np.float64] = (logits_NK.argmax(axis=1) == targets_N).astype(np.float64)
    return is_right_N
