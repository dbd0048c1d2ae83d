"""A copy of a table in few large Parquet files, sorted by key, for programs that read whole tables.

The copy lies elsewhere and is no table of ours: nothing here changes the table, and no job adds to the copy. Parts are
read once, sorted a run at a time and put on this machine's disk; each file is then merged from its slice of every run.
Memory holds a run or a file, whatever the size of the table; the disk holds the table once. At the end the files are
read again, and the copy counts only if it has the rows that were read: as many, and the same by a checksum.

Shape letters: N rows, D embedding width.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from engine.errors import AlreadyExists, ObjectNotFound, RecipeError, StorageError, TableDamaged
from engine.storage import ObjectInfo, Store
from engine.storage.object_file import object_file
from engine.tables import Table, embeddings_matrix, parquet_options, require_apart

RECORD = "_compaction.json"  # written first as unfinished, and again when the copy is whole
FILE_BYTES = 512 << 20
MOST_FILE_BYTES = 4 << 30  # S3 takes 5 GiB in one PUT
RUN_BYTES = 256 << 20  # of rows that are sorted at once
GROUP_BYTES = 64 << 20  # of a row group
GROUP_ROWS = 122_880  # likewise: DuckDB's own default
SAMPLES_PER_FILE = (
    256  # of keys, to put borders between files: files are within some hundredths of each other
)
ORDER = (("key", "ascending"), ("shard", "ascending"), ("index", "ascending"))
_SORTED_BY = [name for name, _ in ORDER]
_FILE_NAME = re.compile(r"rows-\d{5,}\.parquet")
_BATCH_ROWS = 8_192  # of a run, as it lies on the disk
_MODULUS = 1 << 128
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Compacted:
    """What was written, and read again.

    Attributes:
        uri: of the copy.
        source_uri: of the table.
        kind: of the table.
        files: of the copy.
        rows: of both.
        bytes_written: of all files.
        checksum: sum of the rows' digests, of both.
        parts: of the table that were read.
        incomplete_shards: of the table: shards whose end is not written yet.
    """

    uri: str
    source_uri: str
    kind: str
    files: int
    rows: int
    bytes_written: int
    checksum: str
    parts: int
    incomplete_shards: int


def compact_table(
    table: Table,
    target: Store,
    file_bytes: int = FILE_BYTES,
    scratch: Path | None = None,
    report: Report = lambda step, done, total: None,
) -> Compacted:
    """Copy the rows of an embedding or prediction table into `rows-00000.parquet` and so on, sorted by key.

    Rows with the same key are sorted by shard and index. Work of this command that was interrupted is begun again.

    Args:
        target: an empty place outside the table.
        file_bytes: of one file, about, and seldom more; one is in memory at a time.
        scratch: folder with room for the table; None: the system's own for temporary files.
        report: told the step, how much of it is done, and of how much.

    Raises:
        RecipeError: the target is in the table, or files would be too large.
        AlreadyExists: there is something at the target.
        TableDamaged: the table has no parts, one cannot be read, or the copy is not what was read.
        StorageError: there is no room, or the store refuses.
    """
    if not 0 < file_bytes <= MOST_FILE_BYTES:
        raise RecipeError(
            "file size: a file is made in memory and written in one request",
            found=f"{file_bytes:,} bytes",
            wanted=f"1 to {MOST_FILE_BYTES:,}",
        )
    require_apart(table, target.uri)
    table.column_names()  # refuses a table without parts
    size = sum(info.size for _, info in table.parts)
    _claim(table, target)
    with _scratch_folder(scratch) as folder:
        _require_room(folder, size)
        runs, source = _sorted_runs(table, folder, report)
        num_files = max(1, -(-size // file_bytes))
        written = list(_write_files(runs, target, num_files, report))
    copy = _read_again(target, written, report)
    if copy != source:
        raise TableDamaged(
            f"{target.uri}: the copy is not what was read from {table.store.uri}",
            found=f"{copy.rows:,} rows, checksum {copy.checksum:032x}",
            wanted=f"{source.rows:,} rows, checksum {source.checksum:032x}",
            way_out="run the command again; if it fails again, suspect this machine's disk or memory",
        )
    done = Compacted(
        uri=target.uri,
        source_uri=table.store.uri,
        kind=table.record["kind"],
        files=len(written),
        rows=source.rows,
        bytes_written=sum(info.size for info in written),
        checksum=f"{source.checksum:032x}",
        parts=len(table.parts),
        incomplete_shards=table.incomplete_shards,
    )
    target.write(RECORD, _record(table, {"state": "whole", **asdict(done)}))
    return done


# ---------------------------------------------------------------- the place


def _claim(table: Table, target: Store) -> None:
    """Say whose work it is, and clear away what an interrupted run of it has left."""
    mine = _record(table, {"state": "unfinished"})
    try:
        found = target.read(RECORD)
    except ObjectNotFound:
        found = None
    if found is None and next(iter(target.names()), None) is None and target.create(RECORD, mine):
        return
    if found != mine:
        state = "a whole copy" if found and _state_of(found) == "whole" else "other files"
        raise AlreadyExists(
            f"{target.uri}: not empty",
            found=state if found is None or state == "a whole copy" else "unfinished work on another table",
            wanted="an empty place, or this command's own unfinished work",
            way_out="remove what is there, or name another place",
        )
    left = [path for path in target.names() if path != RECORD]
    if others := [path for path in left if not _FILE_NAME.fullmatch(path)]:
        raise AlreadyExists(
            f"{target.uri}: has files beside this command's unfinished work",
            found=", ".join(others[:3]) + (f" and {len(others) - 3:,} more" if others[3:] else ""),
            wanted="nothing that it has not written itself: all of that is removed",
            way_out="put them elsewhere, or name another place",
        )
    for path in left:
        target.delete(path)


def _record(table: Table, fields: dict[str, Any]) -> bytes:
    record = {"source": table.store.uri, "fingerprint": table.record.get("fingerprint"), **fields}
    return json.dumps(record, indent=1, sort_keys=True).encode()


def _state_of(record: bytes) -> str | None:
    try:
        state: str | None = json.loads(record)["state"]
    except (ValueError, KeyError, TypeError):
        return None
    return state


@contextlib.contextmanager
def _scratch_folder(within: Path | None) -> Iterator[Path]:
    """A folder of this machine for the runs, which goes with them; what its disk refuses is told in our words."""
    try:
        with tempfile.TemporaryDirectory(prefix="engine-compact-", dir=within) as folder:
            yield Path(folder)
    except OSError as error:
        found = f"{type(error).__name__}: {error.strerror or error}"
        raise StorageError(
            f"cannot sort on {within or tempfile.gettempdir()}",
            found=found,
            wanted="a folder of this machine with room for the whole table",
            way_out="name another: --scratch FOLDER",
        ) from error


def _require_room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise StorageError(
            f"{folder.parent}: no room to sort the table",
            found=f"{free:,} bytes free",
            wanted=f"{wanted:,} bytes, as many as the table has",
            way_out="name a larger disk: --scratch FOLDER",
        )


# ---------------------------------------------------------------- what must be the same


@dataclass(frozen=True, slots=True)
class RowSum:
    """How many rows, and the sum of their digests modulo 2^128, which does not hang on their order; a row that is
    lost, doubled or changed in one bit changes it."""

    rows: int = 0
    checksum: int = 0

    def __add__(self, other: RowSum) -> RowSum:
        return RowSum(self.rows + other.rows, (self.checksum + other.checksum) % _MODULUS)


def row_sum(rows: pa.Table) -> RowSum:
    """Of all columns, the numbers of embeddings bit by bit."""
    plain = [name for name in rows.column_names if name != "embedding"]
    values = zip(*(rows[name].to_pylist() for name in plain), strict=True)
    digests = [hashlib.blake2b(repr(row).encode("utf-8", "surrogatepass"), digest_size=16) for row in values]
    if "embedding" in rows.column_names:
        embeddings_ND = np.ascontiguousarray(embeddings_matrix(rows["embedding"]))
        for digest, row in zip(digests, embeddings_ND, strict=True):
            digest.update(row.data)
    total = sum(int.from_bytes(digest.digest(), "little") for digest in digests)
    return RowSum(rows.num_rows, total % _MODULUS)


def _read_again(target: Store, written: Sequence[ObjectInfo], report: Report) -> RowSum:
    """Every row of the copy as the store gives it.

    Raises:
        TableDamaged: it is not in the order of its keys.
    """
    total, before = RowSum(), None
    for done, info in enumerate(written, 1):
        # Without Arrow's own threads, which may outlive this process's end (`engine.tables.read_part`).
        for batch in pq.ParquetFile(object_file(target, info)).iter_batches(_BATCH_ROWS, use_threads=False):
            rows = pa.Table.from_batches([batch])
            total += row_sum(rows)
            first, last = (_place_at(rows, row) for row in (0, rows.num_rows - 1))
            if before is not None and first <= before:
                raise TableDamaged(f"{target.uri}/{info.path}: not sorted", found=f"{first} behind {before}")
            before = last
        report("files read again", done, len(written))
    return total


def _place_at(rows: pa.Table, row: int) -> tuple[str, str, int]:
    key, shard, index = (rows[name][row].as_py() for name in _SORTED_BY)
    return key, shard, index


# ---------------------------------------------------------------- runs


def _sorted_runs(table: Table, folder: Path, report: Report) -> tuple[list[Path], RowSum]:
    """Every row of the table in sorted runs on the disk, and what they come to."""
    paths: list[Path] = []
    held: list[pa.Table] = []
    total, size = RowSum(), 0
    for done, part in enumerate(table.read_by_part(table.column_names()), 1):
        total += row_sum(part)
        held.append(part.replace_schema_metadata(None))
        size += part.nbytes
        if size >= RUN_BYTES or done == len(table.parts):
            paths.append(folder / f"{len(paths):05d}.arrow")
            _write_run(held, paths[-1])
            held, size = [], 0
        report("parts read", done, len(table.parts))
    return paths, total


def _write_run(parts: list[pa.Table], path: Path) -> None:
    rows = pa.concat_tables(parts).combine_chunks()
    parts.clear()
    order_N = pc.sort_indices(rows, list(ORDER))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
        for begin in range(0, rows.num_rows, _BATCH_ROWS):
            writer.write_table(rows.take(order_N[begin : begin + _BATCH_ROWS]))


def _open_run(path: Path) -> pa.Table:
    """Its rows, in memory only as far as they are looked at."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


# ---------------------------------------------------------------- files


def _write_files(runs: Sequence[Path], target: Store, num_files: int, report: Report) -> Iterator[ObjectInfo]:
    """Merge the runs into about so many files."""
    tables = [_open_run(path) for path in runs]
    borders = _borders(tables, num_files)
    cuts_RB = [_cuts(table, borders) for table in tables]  # of each run where each file begins
    for number in range(borders.num_rows + 1):
        slices = [
            table.slice(cuts[number], cuts[number + 1] - cuts[number])
            for table, cuts in zip(tables, cuts_RB, strict=True)
        ]
        yield target.write(f"rows-{number:05d}.parquet", _merged(slices))
        report("files written", number + 1, borders.num_rows + 1)


def _borders(runs: Sequence[pa.Table], num_files: int) -> pa.Table:
    """First keys of all files but the first, from samples: as many rows lie between two as between any others."""
    rows = sum(run.num_rows for run in runs)
    step = max(1, rows // (num_files * SAMPLES_PER_FILE))
    samples = [run.select(_SORTED_BY).take(np.arange(step // 2, run.num_rows, step)) for run in runs]
    sample = pa.concat_tables(samples).sort_by(list(ORDER))
    places = np.unique(np.linspace(0, sample.num_rows, num_files + 1).astype(np.int64)[1:-1])
    return sample.take(places[(places > 0) & (places < sample.num_rows)])


def _cuts(run: pa.Table, borders: pa.Table) -> list[int]:
    """Where in a sorted run each file begins, and the run ends."""
    both = pa.concat_tables([borders, run.select(_SORTED_BY)])
    order = pc.sort_indices(both, list(ORDER)).to_numpy()  # stable: a border comes before the row that it is
    at_borders = np.flatnonzero(order < borders.num_rows)
    return [0, *(at_borders - np.arange(borders.num_rows)).tolist(), run.num_rows]


def _merged(slices: Sequence[pa.Table]) -> bytes:
    """One Parquet file of the rows of sorted slices; of the rows one group is in memory."""
    schema = slices[0].schema
    keys = pa.concat_tables([piece.select(_SORTED_BY) for piece in slices])
    order = pc.sort_indices(keys, list(ORDER)).to_numpy().astype(np.int64)
    starts = np.cumsum([0, *(piece.num_rows for piece in slices)])
    size = sum(piece.nbytes for piece in slices)
    step = max(1, min(GROUP_ROWS, GROUP_BYTES * len(order) // max(1, size)))
    sink = io.BytesIO()
    sorting = [pq.SortingColumn(schema.get_field_index(name)) for name in _SORTED_BY]
    with pq.ParquetWriter(sink, schema, sorting_columns=sorting, **parquet_options(schema.names)) as writer:
        for begin in range(0, len(order), step):
            group = _gathered(slices, starts, order[begin : begin + step])
            writer.write_table(group, row_group_size=group.num_rows)
    return sink.getvalue()


def _gathered(slices: Sequence[pa.Table], starts: NDArray[np.int64], wanted_N: NDArray[np.int64]) -> pa.Table:
    """Rows by their place in all slices; of a sorted slice they are neighbours, so that no other row is copied."""
    in_order_N = np.sort(wanted_N)
    cuts = np.searchsorted(in_order_N, starts)
    pieces = [
        piece.slice(int(in_order_N[low] - start), high - low)
        for piece, start, low, high in zip(slices, starts, cuts, cuts[1:], strict=False)
        if high > low
    ]
    return pa.concat_tables(pieces).combine_chunks().take(np.searchsorted(in_order_N, wanted_N))
