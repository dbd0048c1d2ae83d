"""Cells of rows that lie in one direction, so that a row need not be compared with every other. Not for: small tables.

k-means on the sphere over some of the rows; every row then belongs to the cells of the centres that are nearest to it.
Near duplicates have nearly the same nearest centres, so that they meet in at least one cell; what share of them does is
measured by whoever looks for them (`engine.duplicates.find`).

Shape letters: U rows, S rows of the sample, C cells, D embedding width, P cells of a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from engine.duplicates.unit_rows import UnitRows
from engine.representatives import of_unit_length

# Each row is compared with about ROWS_PER_CELL * P others: more cost time, fewer cost recall.
ROWS_PER_CELL = 4096
CELLS_OF_A_ROW = 3
SAMPLED_PER_CELL = 32
SAMPLED_MOST = 65_536  # 335 MB at width 1,280
ROUNDS = 5
BLOCK_ROWS = 4096


def cells_of(
    units: UnitRows, numbers_U: NDArray[np.int64], random: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Of each cell the places in `numbers_U` of its rows, ascending; a row is in several.

    Args:
        units: all rows.
        numbers_U: of those that are to be told apart.
        random: draws the sample and the first centres.
    """
    centres_DC = _centres(units, numbers_U, random).T.copy()
    nearest_UP = np.empty((len(numbers_U), min(CELLS_OF_A_ROW, centres_DC.shape[1])), np.int32)
    for begin in range(0, len(numbers_U), BLOCK_ROWS):
        block = slice(begin, begin + BLOCK_ROWS)
        nearest_UP[block] = _nearest(units.read(numbers_U[block]) @ centres_DC, nearest_UP.shape[1])
    cells = nearest_UP.reshape(-1)
    order = np.argsort(cells, kind="stable")
    borders = np.searchsorted(cells[order], np.arange(centres_DC.shape[1] + 1))
    for begin, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        if end - begin > 1:
            yield order[begin:end] // nearest_UP.shape[1]


def num_cells(rows: int) -> int:
    """C for so many rows."""
    return -(-rows // ROWS_PER_CELL)


def _centres(
    units: UnitRows, numbers_U: NDArray[np.int64], random: np.random.Generator
) -> NDArray[np.float32]:
    """(C, D) of unit length."""
    count = num_cells(len(numbers_U))
    sampled = min(len(numbers_U), max(count, min(SAMPLED_PER_CELL * count, SAMPLED_MOST)))
    sample_SD = units.read(np.sort(random.choice(numbers_U, sampled, replace=False)))
    centres_CD = sample_SD[np.sort(random.choice(sampled, count, replace=False))]
    for _ in range(ROUNDS):
        own_S = np.concatenate(
            [
                (sample_SD[begin : begin + BLOCK_ROWS] @ centres_CD.T).argmax(axis=1)
                for begin in range(0, sampled, BLOCK_ROWS)
            ]
        )
        order = np.argsort(own_S, kind="stable")
        filled, firsts = np.unique(own_S[order], return_index=True)
        centres_CD[filled] = of_unit_length(np.add.reduceat(sample_SD[order], firsts, axis=0))
    return centres_CD


def _nearest(cosines_BC: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """(B, count) cells with the largest cosines, in any order."""
    if count == cosines_BC.shape[1]:
        return np.tile(np.arange(count), (len(cosines_BC), 1))
    nearest_BP: NDArray[np.int64] = np.argpartition(-cosines_BC, count - 1, axis=1)[:, :count]
    return nearest_BP
