"""Embeddings as points of a plane, by principal components, for a person to look at. Not for: judging them.

Two directions of many hundreds keep a part of what tells rows apart, and the document says how large a part. Shape
letters: N rows, P of them that become points, D embedding width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.heads.reference import Embeddings

MOST_POINTS = 2_000  # 20 kB of a page; more would lie on each other, and cost a fit more than a second
_SEED = 0


def embedding_map(
    embeddings_ND: Embeddings, rows: NDArray[np.int64], targets_N: NDArray[np.integer[Any]]
) -> dict[str, Any] | None:
    """For embedding_map.json; None of fewer than three rows.

    Args:
        embeddings_ND: in memory or in a file; of more rows than MOST_POINTS those of a lot are read, the same each
            time.
        rows: numbers of the rows that may be shown.
        targets_N: (N,) classes; or (N, K) with 1 where a row has the class: it counts as the first of them.

    Returns:
        of_rows (how many there are), explained (share of the points' variance along each axis), and x, y and class of
        each point; -1: it has none.
    """
    if len(rows) < 3:
        return None
    lot = np.random.default_rng(_SEED).choice(len(rows), min(MOST_POINTS, len(rows)), replace=False)
    shown = rows[np.sort(lot)]
    points_P2, explained = principal_plane(np.asarray(embeddings_ND[shown], np.float64))
    targets = targets_N[shown]
    classes_P = targets if targets.ndim == 1 else np.where(targets.any(axis=1), targets.argmax(axis=1), -1)
    return {
        "of_rows": len(rows),
        "explained": [round(share, 4) for share in explained],
        "x": [float(f"{value:.4g}") for value in points_P2[:, 0]],
        "y": [float(f"{value:.4g}") for value in points_P2[:, 1]],
        "class": classes_P.tolist(),
    }


def principal_plane(rows_PD: NDArray[np.float64]) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """(P, 2) along the two directions of most variance, and the share of all variance that each has.

    The largest coordinate of each direction points up or to the right, so that the same rows give the same picture.
    """
    centred_PD = rows_PD - rows_PD.mean(axis=0)
    # The smaller of the two Gram matrices has the same eigenvalues.
    is_wide = centred_PD.shape[1] > len(centred_PD)
    gram = centred_PD @ centred_PD.T if is_wide else centred_PD.T @ centred_PD
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1][:2].clip(min=0), vectors[:, ::-1][:, :2]
    points_P2 = vectors * np.sqrt(values) if is_wide else centred_PD @ vectors
    if points_P2.shape[1] < 2:  # of width 1
        points_P2 = np.column_stack([points_P2, np.zeros(len(points_P2))])
        values = np.append(values, 0.0)
    largest = points_P2[np.abs(points_P2).argmax(axis=0), (0, 1)]
    total = float(np.square(centred_PD).sum()) or 1.0
    return points_P2 * np.where(largest < 0, -1.0, 1.0), (float(values[0] / total), float(values[1] / total))
