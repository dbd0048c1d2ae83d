"""Where the rows of a fit lie: in memory, or in a file of this machine where they are too many.

Shape letters: N rows, D embedding width, E numbers of side features.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.errors import EngineError, TableDamaged
from engine.strategies.base import Agreed

log = logging.getLogger(__name__)

Rows = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class RowSource:
    """Where embeddings come from, and where they go.

    Attributes:
        columns: reads the embedding column of the table, portion by portion, in the table's order.
        wants_disk: whether so many bytes of rows are better held in a file than in memory.
        folder: where that file is made.
    """

    columns: Callable[[], Iterable[pa.ChunkedArray]]
    wants_disk: Callable[[int], bool]
    folder: Path

    @staticmethod
    def of(table: pa.Table) -> RowSource:
        """A table that is in memory."""
        return RowSource(lambda: [table["embedding"]], lambda size: False, Path())

    def place_for(self, size: int, agreed: Agreed) -> Path | None:
        """The folder, or None for memory: as the first worker wants it.

        Workers that went over their rows in different ways would wait for each other.

        Raises:
            EngineError: there is no room for two files of that size.
        """
        if not agreed(np.array([float(self.wants_disk(size))]))[0]:
            return None
        free = shutil.disk_usage(self.folder).free
        if 2 * size > free:  # as they are read, and as they are trained on
            raise EngineError(
                f"training.rows: no room for the embeddings on {self.folder} of a worker",
                found=f"{free / 1e9:.1f} GB free there",
                wanted=f"twice {size / 1e9:.1f} GB",
                way_out="set TMPDIR to a larger disk, or give the workers more memory",
            )
        log.warning(
            "%.1f GB of embeddings are read from a file in %s, batch by batch", size / 1e9, self.folder
        )
        return self.folder


def empty_rows(shape: tuple[int, int], dtype: Any, folder: Path | None) -> Rows:
    """Room for rows: an array, or one of `numpy.memmap` in a file without a name, which goes when this process does.

    Args:
        folder: where the file is made; None: in memory.
    """
    if folder is None or not shape[0]:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(dir=folder, prefix="engine-rows-") as file:
        return np.memmap(file, dtype, "w+", shape=shape)  # it holds the file open by itself


def is_on_disk(rows_ND: Rows) -> bool:
    """Whether `empty_rows` put them there."""
    return isinstance(rows_ND, np.memmap)


def fill_rows(
    rows_ND: Rows, columns: Iterable[pa.ChunkedArray], positions_N: NDArray[np.int64], width: int
) -> None:
    """Put embeddings of some rows of a table into the first D numbers of the given rows.

    Args:
        columns: the embedding column, portion by portion, in the table's order.
        positions_N: rows of the table, ascending.
        width: D.

    Raises:
        TableDamaged: the column has another width.
    """
    first_row = 0
    for column in columns:
        if column.type.list_size != width:
            raise TableDamaged(
                "embedding table: the embeddings do not have the width that _table.json says",
                found=str(column.type.list_size),
                wanted=str(width),
                way_out="the table was not written by one contract: extract it again to a new output.uri",
            )
        for chunk in column.chunks:
            low, high = np.searchsorted(positions_N, [first_row, first_row + len(chunk)])
            chunk_CD = chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(chunk), width)
            rows_ND[low:high, :width] = chunk_CD[positions_N[low:high] - first_row]
            first_row += len(chunk)
