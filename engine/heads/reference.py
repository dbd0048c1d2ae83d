"""What a bundle remembers of the embeddings it was fitted on, so that new ones can be compared without the old table.

Of each class the mean direction of its training rows, and how near to one of these directions rows lie that were not
trained on. Not for: judging the difference, which is `engine.gate`.

Shape letters: N rows, B rows of one portion, D embedding width, K classes, C classes with a centroid, E edges.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.heads.confidence import Calibration, sigmoid

Embeddings = NDArray[np.floating[Any]]

MOST_CENTROIDS = 4096  # 21 MB at width 1,280
ROWS_PER_CLASS = 256  # a mean of so many is off by a sixteenth of their spread
MOST_COMPARED_ROWS = 1 << 17  # a hundredth of them is 1,300 rows
ROWS_AT_ONCE = 8192  # 42 MB of float32 at width 1,280
# Every hundredth of the rows has a bin, wherever a network puts its cosines: those of EfficientNet-Lite0 lay between
# 0.4 and 0.96 for crops of photos, where 40 equal bins from -1 to 1 would leave twelve to tell nights apart by.
BINS = 100
EDGE_DECIMALS = 4  # and half a unit more: a last bit of many equal cosines must not move them across an edge


@dataclass(frozen=True, slots=True)
class Reference:
    """Centroids, and the cosines and answers of rows that a head was not fitted on.

    Attributes:
        centroids_CD: of unit length: the mean direction of at most 256 training rows of each class, evenly taken. Of
            several labels a row counts for each. Classes without rows have none, and where there are more than 4,096
            classes, those with the fewest rows have none; their rows are near to others, then as now.
        classes_C: which class each centroid is of, as a number from 0 to K - 1.
        edges_E: between the bins of the cosines: the hundredths of the compared rows, ascending.
        cosine_counts: (E + 1,) compared rows in each bin.
        label_counts_K: rows by the class that the head gives them, whatever its confidence; of several labels by each.
        unlabelled: rows that no class is given to; 0 where each has one.
        rows: that the head was asked about.
        is_held_out: whether compared rows and answers are those of validation and test. Else there were none, and they
            are the training rows, which lie nearer to their own means, so that drift looks larger than it is.
    """

    centroids_CD: NDArray[np.float32]
    classes_C: NDArray[np.int64]
    edges_E: NDArray[np.float64]
    cosine_counts: NDArray[np.int64]
    label_counts_K: NDArray[np.int64]
    unlabelled: int
    rows: int
    is_held_out: bool

    @staticmethod
    def of(
        embeddings_ND: Embeddings,
        targets_N: NDArray[np.integer[Any]],
        train: NDArray[np.int64],
        held_out: NDArray[np.int64],
        given_MK: NDArray[np.bool_],
    ) -> Reference:
        """From the rows of a fit; a portion of them is in memory at a time.

        Args:
            embeddings_ND: without side features; float32 or float16, in memory or in a file.
            targets_N: (N,) classes, or (N, K) with 1 where a row has the class.
            train: numbers of the training rows, one at least.
            held_out: of rows that were not trained on; none: the training rows are compared.
            given_MK: what the head answers for the held-out rows, or else for the training rows: see `given_classes`.
        """
        compared = held_out if len(held_out) else train
        if len(given_MK) != len(compared):
            raise ValueError(f"answers for {len(given_MK)} rows, wanted those of {len(compared)}")
        classes_C, centroids_CD = _centroids(embeddings_ND, targets_N, train, given_MK.shape[1])
        some = compared[_evenly(len(compared), MOST_COMPARED_ROWS)]
        portions = [nearest_cosines(rows_BD, centroids_CD) for rows_BD in _portions(embeddings_ND, some)]
        cosines_N = np.concatenate(portions).astype(np.float64)
        edges_E = np.round(np.quantile(cosines_N, np.arange(1, BINS) / BINS), EDGE_DECIMALS)
        edges_E += 0.5 * 10.0**-EDGE_DECIMALS
        return Reference(
            centroids_CD,
            classes_C,
            edges_E,
            _counted(cosines_N, edges_E),
            given_MK.sum(axis=0, dtype=np.int64),
            unlabelled=int((~given_MK.any(axis=1)).sum()),
            rows=len(compared),
            is_held_out=bool(len(held_out)),
        )

    def cosines(self, embeddings_ND: Embeddings) -> NDArray[np.float32]:
        """(N,) of each row, the largest cosine to a centroid.

        One matrix product: 1,024 rows x 1,280 took 1.5 to 13 ms against 100 centroids and 36 to 51 ms against 1,000
        (two cores that others used too, NumPy 2.4).
        """
        if embeddings_ND.ndim != 2 or embeddings_ND.shape[1] != self.centroids_CD.shape[1]:
            raise ValueError(
                f"embeddings of shape {embeddings_ND.shape}, wanted (N, {self.centroids_CD.shape[1]})"
            )
        return nearest_cosines(embeddings_ND, self.centroids_CD)

    def histogram(self, cosines_N: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """(E + 1,) rows in each bin, as `cosine_counts` has them; those of several parts may be added up."""
        return _counted(cosines_N, self.edges_E)

    def label_mix(self, classes: Sequence[str]) -> dict[str, int]:
        """Rows by the name of the class that the head gives them; classes without rows too."""
        return dict(zip(classes, self.label_counts_K.tolist(), strict=True))

    def to_bytes(self) -> bytes:
        """A .npz file."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            centroids_CD=self.centroids_CD,
            classes_C=self.classes_C,
            edges_E=self.edges_E,
            cosine_counts=self.cosine_counts,
            label_counts_K=self.label_counts_K,
            unlabelled=np.int64(self.unlabelled),
            rows=np.int64(self.rows),
            is_held_out=np.bool_(self.is_held_out),
        )
        return buffer.getvalue()

    @staticmethod
    def from_bytes(content: bytes) -> Reference:
        """What `to_bytes` made; nothing in it is run as code."""
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return Reference(
                file["centroids_CD"],
                file["classes_C"],
                file["edges_E"],
                file["cosine_counts"],
                file["label_counts_K"],
                unlabelled=int(file["unlabelled"]),
                rows=int(file["rows"]),
                is_held_out=bool(file["is_held_out"]),
            )


def given_classes(
    logits_NK: NDArray[np.floating[Any]], calibration: Calibration, thresholds: Sequence[float]
) -> NDArray[np.bool_]:
    """(N, K) which classes a head gives each row, whatever its confidence.

    Args:
        thresholds: of several labels, K of them; none: a row has the class with the largest logit.
    """
    if len(thresholds):
        probabilities_NK = sigmoid(calibration.apply(logits_NK))
        return np.asarray(probabilities_NK >= np.asarray(thresholds, np.float32))
    given_NK = np.zeros(logits_NK.shape, np.bool_)
    np.put_along_axis(given_NK, logits_NK.argmax(axis=1)[:, None], True, axis=1)
    return given_NK


def nearest_cosines(embeddings_ND: Embeddings, centroids_CD: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N,) the largest cosine of each row to a centroid of unit length; 0 for a row of zeros, or without centroids."""
    if not len(centroids_CD):
        return np.zeros(len(embeddings_ND), np.float32)
    rows_ND = embeddings_ND.astype(np.float32, copy=False)
    largest_N = (rows_ND @ centroids_CD.T).max(axis=1)
    cosines_N: NDArray[np.float32] = largest_N / _lengths(rows_ND)
    return cosines_N


def representatives(
    targets_N: NDArray[np.integer[Any]], train: NDArray[np.int64], num_classes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The training rows that centroids are made of: their numbers, and the class that each stands for, ascending.

    At most 256 of each class, evenly taken, of the 4,096 classes with the most rows.
    """
    given = targets_N[train]
    if given.ndim == 2:
        places, classes = np.nonzero(given)
    else:
        places, classes = np.arange(len(train)), given.astype(np.int64)
    order = np.argsort(classes, kind="stable")
    rows, classes = train[places[order]], classes[order]
    counts_K = np.bincount(classes, minlength=num_classes)
    with_centroid = np.sort(np.argsort(-counts_K, kind="stable")[:MOST_CENTROIDS])
    ends_K = np.cumsum(counts_K)
    taken = [
        ends_K[one] - counts_K[one] + _evenly(int(counts_K[one]), ROWS_PER_CLASS) for one in with_centroid
    ]
    chosen = np.concatenate(taken)
    return rows[chosen], classes[chosen]


def _centroids(
    embeddings_ND: Embeddings, targets_N: NDArray[np.integer[Any]], train: NDArray[np.int64], num_classes: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Classes (C,) and their mean directions (C, D)."""
    rows, classes = representatives(targets_N, train, num_classes)
    present, places = np.unique(classes, return_inverse=True)
    sums_CD = np.zeros((len(present), embeddings_ND.shape[1]))
    start = 0
    for rows_BD in _portions(embeddings_ND, rows):
        own_B = places[start : start + len(rows_BD)]
        units_BD = rows_BD.astype(np.float32, copy=False)
        units_BD = units_BD / _lengths(units_BD)[:, None]
        firsts = np.flatnonzero(np.diff(own_B, prepend=-1))
        sums_CD[own_B[firsts]] += np.add.reduceat(units_BD, firsts, axis=0, dtype=np.float64)
        start += len(rows_BD)
    lengths_C = np.linalg.norm(sums_CD, axis=1)
    points = lengths_C > 0  # opposite rows cancel
    return present[points], (sums_CD[points] / lengths_C[points, None]).astype(np.float32)


def _portions(embeddings_ND: Embeddings, rows: NDArray[np.int64]) -> Iterator[Embeddings]:
    for start in range(0, len(rows), ROWS_AT_ONCE):
        yield embeddings_ND[rows[start : start + ROWS_AT_ONCE]]


def _evenly(count: int, most: int) -> NDArray[np.int64]:
    """Numbers below `count`, ascending, at most so many and as far apart as they can be."""
    if count <= most:
        return np.arange(count)
    return np.arange(most) * count // most


def _lengths(rows_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N,), 1 for a row of zeros."""
    lengths_N: NDArray[np.float32] = np.sqrt(np.einsum("nd,nd->n", rows_ND, rows_ND))
    lengths_N[lengths_N == 0] = 1
    return lengths_N


def _counted(cosines_N: NDArray[np.floating[Any]], edges_E: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.bincount(np.searchsorted(edges_E, cosines_N, side="right"), minlength=len(edges_E) + 1)
