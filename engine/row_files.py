"""Rows as one file on this machine's disk, Parquet or CSV, written in a stream: a file is there whole, or not at all.

Not for: tables of ours, whose parts are objects of a store.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from engine.copies import csv_rows
from engine.errors import AlreadyExists, ObjectNotFound, StorageError

ROWS_PER_GROUP = 122_880  # of Parquet files for people: DuckDB's own default
BYTES_PER_GROUP = 64 << 20  # before compression; what is held in memory


def require_new(path: Path, overwrite: bool = False) -> None:
    """Refuse, before anything is computed, a file that cannot be made there.

    Raises:
        AlreadyExists: there is one.
        ObjectNotFound: there is no folder for it.
    """
    if path.is_dir() or (os.path.lexists(path) and not overwrite):
        raise AlreadyExists(f"{path}: there is something already", way_out="name another, or say --overwrite")
    if not path.absolute().parent.is_dir():
        raise ObjectNotFound(f"{path}: no folder to write it into", way_out="make the folder first")


def make_folder(path: Path) -> None:
    """Make a folder, and those it lies in, if it is not there.

    Raises:
        StorageError: the disk refuses, or a file has that name.
    """
    with _own_words(path):
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def whole_file(path: Path, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A file to write to, which gets its name only after the block has ended well, and its bytes are on the disk.

    Raises:
        AlreadyExists: somebody has made a file of that name since.
        StorageError: the disk refuses.
    """
    with _own_words(path):
        handle, temporary = tempfile.mkstemp(prefix=".engine-", suffix=".tmp", dir=path.absolute().parent)
        try:
            with open(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp lets nobody else read it
            if overwrite:
                os.replace(temporary, path)
            else:
                os.link(temporary, path)  # unlike a rename it fails where the name is taken
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


@contextlib.contextmanager
def _own_words(path: Path) -> Iterator[None]:
    """Say what the disk refused in the words of `engine.errors`."""
    try:
        yield
    except FileExistsError:
        way_out = "name another, or say --overwrite"
        raise AlreadyExists(f"{path}: there is a file now", way_out=way_out) from None
    except OSError as error:
        found = f"{type(error).__name__}: {error.strerror or error}"
        way_out = "check the disk: space, mount, rights"
        raise StorageError(f"cannot write {path}", found=found, way_out=way_out) from error


def write_parquet(file: BinaryIO, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """Write batches as one Parquet file, in row groups of some size; the number of rows."""
    rows = 0
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for group in _row_groups(schema, batches):
            writer.write_table(group, row_group_size=max(1, group.num_rows))
            rows += group.num_rows
    return rows


def _row_groups(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Batches as they come, put together: a group is full by its rows or by its bytes."""
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        held.append(batch)
        rows, size = rows + batch.num_rows, size + batch.nbytes
        if rows >= ROWS_PER_GROUP or size >= BYTES_PER_GROUP:
            yield pa.Table.from_batches(held, schema)
            held, rows, size = [], 0, 0
    if rows:
        yield pa.Table.from_batches(held, schema)


def write_csv(file: BinaryIO, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """Write batches as CSV (RFC 4180, UTF-8, a line of column names), lists as JSON and bytes in hexadecimal digits;
    the number of rows."""
    rows = 0
    text = io.TextIOWrapper(file, "utf-8", newline="")
    writer = csv.writer(text)
    writer.writerow(schema.names)
    for batch in batches:
        writer.writerows(csv_rows(pa.Table.from_batches([batch])))
        rows += batch.num_rows
    text.detach()  # what it holds goes to the file, which stays open
    return rows
