"""A table as files for people's own programs: a NumPy array with its rows beside it, or CSV, on this machine's disk.

Rows come in the order of (shard, index), a few parts at a time: memory does not grow with the table. Not for: copies in
Parquet (`engine.compaction`), or models (`engine.export`).

Shape letters: N rows of the table, D embedding width.
"""

from __future__ import annotations

import dataclasses
import io
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from engine.errors import ContractMismatch, TableDamaged
from engine.parts import PartName
from engine.row_files import make_folder, require_new, whole_file, write_csv, write_parquet
from engine.storage import ObjectInfo
from engine.storage.object_file import object_file
from engine.tables import READ_THREADS, Table, embeddings_matrix, read_part, require_apart

EMBEDDINGS_FILE = "embeddings.npy"
ROWS_FILE = "rows.parquet"  # appears last: without it there is no export
Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ExportedRows:
    """What was written.

    Attributes:
        files: paths.
        rows: N.
        width: D; None where no embeddings were written.
        bytes_written: of all files.
        incomplete_shards: of the table: shards whose end is not written yet.
    """

    files: tuple[str, ...]
    rows: int
    width: int | None
    bytes_written: int
    incomplete_shards: int


def export_arrays(
    table: Table, folder: Path, overwrite: bool = False, report: Report = lambda done, total: None
) -> ExportedRows:
    """Write `embeddings.npy`, (N, D) in the table's own precision, and `rows.parquet`, the other columns of each row.

    Both are written under other names first; `rows.parquet` gets its name last, so where it stands both are whole.

    Args:
        folder: is made if it is not there; what else lies in it stays.
        overwrite: the two files may be replaced.
        report: told parts done, parts in all.

    Raises:
        ContractMismatch: it is no embedding table.
        RecipeError: the folder lies in the table.
        AlreadyExists: there is a file of one of these names, or of the folder's.
        StorageError: the disk refuses.
        TableDamaged: a part cannot be read, or its rows are not in the order of their shard.
    """
    if table.record["kind"] != "embeddings":
        raise ContractMismatch(
            f"{table.store.uri}: has no embeddings",
            found=f"a table of {table.record['kind']}",
            wanted="an embedding table",
            way_out="export it with --to csv",
        )
    require_apart(table, str(folder))
    schema, width = _schema(table), int(table.record["width"])
    make_folder(folder)
    array_path, rows_path = folder / EMBEDDINGS_FILE, folder / ROWS_FILE
    for path in (array_path, rows_path):
        require_new(path, overwrite)
    kept = schema.remove(schema.get_field_index("embedding"))
    with whole_file(rows_path, overwrite) as rows_file, whole_file(array_path, overwrite) as array_file:
        array = _ArrayWriter(array_file, width, schema.field("embedding").type.value_type.to_pandas_dtype())

        def rows_without_embeddings() -> Iterator[pa.RecordBatch]:
            for part in _in_order(table, schema.names, report):
                array.append(embeddings_matrix(part["embedding"]))
                yield from part.select(kept.names).to_batches()

        rows = write_parquet(rows_file, kept, rows_without_embeddings())
        array.finish()
        rows_path.unlink(missing_ok=True)  # an older export ends where its array does
    return _exported(table, (array_path, rows_path), rows, width)


def export_csv(
    table: Table,
    path: Path,
    with_embeddings: bool = False,
    overwrite: bool = False,
    report: Report = lambda done, total: None,
) -> ExportedRows:
    """Write the columns of an embedding or prediction table as one CSV file.

    Args:
        path: of the file.
        with_embeddings: each as a JSON array in a cell of its own, 10 bytes a number or more.
        overwrite: the file may be replaced.
        report: told parts done, parts in all.

    Raises:
        AlreadyExists, ObjectNotFound: there is a file, or no folder for it.
        RecipeError, TableDamaged: as of `export_arrays`.
    """
    require_apart(table, str(path))
    require_new(path, overwrite)
    schema = _schema(table)
    if "embedding" in schema.names and not with_embeddings:
        schema = schema.remove(schema.get_field_index("embedding"))
    parts = _in_order(table, schema.names, report)
    batches = (batch for part in parts for batch in part.to_batches())
    with whole_file(path, overwrite) as file:
        rows = write_csv(file, schema, batches)
    return _exported(
        table, (path,), rows, int(table.record["width"]) if "embedding" in schema.names else None
    )


def parts_by_shard(table: Table) -> list[tuple[PartName, ObjectInfo]]:
    """The parts in the order of (shard, index) of their rows, from one row of each shard; names have another order."""
    shards: dict[str, list[tuple[PartName, ObjectInfo]]] = defaultdict(list)
    for name, info in table.parts:
        shards[name.path16].append((name, info))
    for parts in shards.values():
        parts.sort(key=lambda part: part[0].number)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        paths = pool.map(lambda parts: _shard_of(table, parts), shards.values())
        by_path = sorted(zip(paths, shards.values(), strict=True), key=lambda pair: pair[0])
    return [part for _, parts in by_path for part in parts]


def _shard_of(table: Table, parts: list[tuple[PartName, ObjectInfo]]) -> str:
    """The path of a shard, from the first of its parts that has rows; "" where none has."""
    for _, info in parts:
        column = read_part(table.store, info, ["shard"])["shard"]
        if len(column):
            path: str = column[0].as_py()
            return path
    return ""


def _schema(table: Table) -> pa.Schema:
    """The columns of the table's parts; TableDamaged where it has none."""
    table.column_names()
    return pq.read_schema(object_file(table.store, table.parts[0][1])).remove_metadata()


def _in_order(table: Table, columns: list[str], report: Report) -> Iterator[pa.Table]:
    """Columns of each part, in the order of `parts_by_shard`, which is checked row by row."""
    parts = parts_by_shard(table)
    ordered = dataclasses.replace(table, parts=tuple(parts))
    before: tuple[str, int] = ("", -1)
    report(0, len(parts))
    for done, ((_, info), part) in enumerate(zip(parts, ordered.read_by_part(columns), strict=True), 1):
        before = _checked_order(part, before, f"{table.store.uri}/{info.path}")
        yield part
        report(done, len(parts))


def _checked_order(part: pa.Table, before: tuple[str, int], uri: str) -> tuple[str, int]:
    """Where the part ends.

    Raises:
        TableDamaged: a row is not behind the one before it.
    """
    if not part.num_rows:
        return before
    indices_N = part["index"].to_numpy()
    shards = part["shard"].unique()
    first = (shards[0].as_py(), int(indices_N[0]))
    if len(shards) != 1 or first <= before or (np.diff(indices_N) <= 0).any():
        raise TableDamaged(
            f"{uri}: its rows are not in the order of their shard",
            found=f"{first[0]}, index {first[1]}, behind {before[0]}, index {before[1]}",
            way_out="engine verify TABLE names what is damaged",
        )
    return first[0], int(indices_N[-1])


@final
class _ArrayWriter:
    """A .npy file of (N, D) whose N is known at its end."""

    def __init__(self, file: BinaryIO, width: int, dtype: type[np.generic]) -> None:
        self._file, self._width, self._dtype = file, width, np.dtype(dtype).newbyteorder("<")
        self._rows = 0
        self._write_header()
        self._begin = file.tell()

    def append(self, embeddings_ND: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(embeddings_ND, self._dtype).data)
        self._rows += len(embeddings_ND)

    def finish(self) -> None:
        """Write the header again; NumPy pads it so that it is as long for any number of rows."""
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._begin
        self._file.seek(0, io.SEEK_END)

    def _write_header(self) -> None:
        fields = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._rows, self._width)}
        np.lib.format.write_array_header_1_0(self._file, fields)


def _exported(table: Table, paths: tuple[Path, ...], rows: int, width: int | None) -> ExportedRows:
    size = sum(path.stat().st_size for path in paths)
    return ExportedRows(tuple(map(str, paths)), rows, width, size, table.incomplete_shards)
