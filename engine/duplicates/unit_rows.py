"""Embeddings of unit length in a temporary file, to be read again in any order. Not for: the table's own files.

A table's parts hold them in the order of the shards, and at a store that answers in 50 ms; what is compared is asked
for many times, in the order of cells. Shape letters: B rows of one call, N rows in all, D embedding width.
"""

from __future__ import annotations

import mmap
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engine.errors import RecipeError, StorageError

NO_ROOM_LEFT = 1 << 30  # bytes that stay free on the disk
# Pages that were read count as this process's memory until they are given back; the kernel keeps them while it can.
_HELD_BYTES = 256 << 20


class UnitRows:
    """Rows are appended, then read. The file has no name, so that it goes with this process however that ends.

    Args:
        width: D.
        num_bytes: that will come, at least: refused where the disk has no room for them.
        folder: where the file lies; None: the system's folder for temporary files.

    Raises:
        RecipeError: there is no such folder.
        StorageError: the disk has no room.
    """

    def __init__(self, width: int, num_bytes: int, folder: Path | None = None) -> None:
        self._width, self._count = width, 0
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        if not self._folder.is_dir():
            raise RecipeError(f"{self._folder}: no such folder", wanted="a folder for temporary files")
        free = shutil.disk_usage(self._folder).free
        if free < num_bytes + NO_ROOM_LEFT:
            raise StorageError(
                f"{self._folder}: no room for a copy of the table's embeddings",
                found=f"{free / 1e9:.1f} GB free",
                wanted=f"{(num_bytes + NO_ROOM_LEFT) / 1e9:.1f} GB, of which one stays free",
                way_out="name a folder of a larger disk: --scratch",
            )
        self._file = tempfile.TemporaryFile(dir=self._folder, prefix="engine-duplicates-")  # noqa: SIM115 - __exit__
        self._map: mmap.mmap | None = None
        self._rows_ND: NDArray[np.float32] | None = None
        self._bytes_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows_ND = None  # a map cannot be closed while an array lies over it
        if self._map is not None:
            self._map.close()
        self._file.close()

    def __len__(self) -> int:
        return self._count

    def append(self, units_BD: NDArray[np.float32]) -> None:
        """Write further rows.

        Raises:
            StorageError: the disk is full, or broken.
        """
        try:
            self._file.write(np.ascontiguousarray(units_BD).data)
            self._file.flush()
        except OSError as error:
            raise StorageError(
                f"{self._folder}: the copy of the table's embeddings cannot be written",
                found=str(error),
                way_out="name a folder of another disk: --scratch",
            ) from None
        self._count += len(units_BD)

    def read(self, numbers_B: NDArray[np.int64]) -> NDArray[np.float32]:
        """(B, D), a new array; nothing may be appended any more."""
        if self._map is None or self._rows_ND is None:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            self._rows_ND = np.frombuffer(self._map, np.float32).reshape(-1, self._width)
        units_BD: NDArray[np.float32] = self._rows_ND[numbers_B]
        self._bytes_read += units_BD.nbytes
        if self._bytes_read > _HELD_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._bytes_read = 0
        return units_BD
