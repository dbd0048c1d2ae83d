"""A CSV or Parquet list of files with their labels, and its join with what a store has; not for reading the files.

A list is parsed once per process and version, into an Arrow table sorted by folder and name: the rows of one folder
are a slice, and become Python objects only while somebody goes through them.
"""

from __future__ import annotations

import io
import itertools
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple, final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from engine.errors import ObjectNotFound, RecipeError
from engine.schema import RejectReason
from engine.shards.image_bytes import Problem
from engine.shards.kinds import FilesSource
from engine.shards.member_text import BadText
from engine.shards.parquet_columns import TextColumn
from engine.shards.parquet_file import shortened
from engine.storage import ObjectInfo, Store, open_store, uri_in_full

MAX_FOLDERS_ASKED = (
    1000  # as many listings as a million objects take pages; above, the whole source is listed
)
_ROWS_AT_ONCE = 4096
_NO_PATH = r"^$|^/|/$|(^|/)\.\.?(/|$)|\x00|^[A-Za-z][A-Za-z0-9+.-]*:/"  # `checked_path`, and foreign URIs
_FOLDER_AND_NAME = r"(?s)^(?P<folder>.*/)?(?P<name>[^/]*)$"

Texts = tuple[str | None, ...]


class Row(NamedTuple):
    """What the list says of a file."""

    label: str | None
    bad_label: str | None
    """Why its label is none."""
    metadata: Texts


@final
@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file that the list names, and what the store has of it."""

    path: str
    rows: tuple[Row, ...]
    """The different things that the list says of it: one, if all is well."""
    info: ObjectInfo | None
    """None: it is not there."""

    @property
    def size(self) -> int:
        """Bytes; 0 if it is not there."""
        return self.info.size if self.info is not None else 0

    @property
    def identity(self) -> str:
        """Differs when the file or what the list says of it does."""
        return f"{self.info.identity if self.info is not None else 'missing'} {_in_json(self.rows)}"

    def label_problem(self, label_column: str | None, metadata_columns: tuple[str, ...]) -> Problem | None:
        """Why it has no label that could be used; None if it has one, or needs none."""
        if len(self.rows) > 1:
            names = (label_column or "label", "label", *metadata_columns)
            several = ((row.label, row.bad_label, *row.metadata) for row in self.rows[:2])
            name, one, other = next(
                (name, one, other)
                for name, one, other in zip(names, *several, strict=True)
                if one != other  # rows that differ in nothing are one
            )
            sentence = f"the list names it more than once, with {name} {_shown(one)} and {_shown(other)}"
            return RejectReason.BAD_LABEL, sentence
        if self.rows[0].bad_label is not None:
            return RejectReason.BAD_LABEL, f"column {label_column} of the list: {self.rows[0].bad_label}"
        return None


@lru_cache(maxsize=10_000)
def _in_json(rows: tuple[Row, ...]) -> str:
    """Many files share a label."""
    return json.dumps(rows)


@final
class FileList:
    """A list in memory.

    Args:
        paths: relative to the source, shape (rows,), large_string; each a path that a store takes.
        texts: columns `label` (if the recipe names one), `metadata0`, `metadata1` ..., shape (rows, columns).
        config: of the source.
    """

    def __init__(self, paths: pa.Array, texts: pa.Table, config: FilesSource) -> None:
        steps = pc.extract_regex(paths, _FOLDER_AND_NAME)
        folders = steps.field("folder").dictionary_encode()
        order = np.argsort(np.array(folders.dictionary.to_pylist(), dtype=object))
        number_of = np.empty(len(order), np.int64)
        number_of[order] = np.arange(len(order))
        numbers = number_of[folders.indices.to_numpy(zero_copy_only=False)]
        names = pa.table({"folder": numbers, "name": steps.field("name")})
        sorting = pc.sort_indices(names, sort_keys=[("folder", "ascending"), ("name", "ascending")])
        self.folders: list[str] = folders.dictionary.take(order).to_pylist()
        """Every folder that it names a file of, sorted; with its slash, "" for the top."""
        self._ends: NDArray[np.int64] = np.cumsum(np.bincount(numbers, minlength=len(order)))
        self._names = names["name"].take(sorting).combine_chunks()
        self._texts = texts.take(sorting).combine_chunks()
        self._label = TextColumn("label", ("label",), None) if config.label is not None else None
        self._metadata = tuple(
            TextColumn(f"metadata{place}", (f"metadata{place}",), None)
            for place in range(len(config.metadata))
        )

    @property
    def num_rows(self) -> int:
        """Rows of the list, repetitions included."""
        return len(self._names)

    def __contains__(self, folder: str) -> bool:
        place = bisect_left(self.folders, folder)
        return place < len(self.folders) and self.folders[place] == folder

    def listing(self, store: Store) -> Iterator[ObjectInfo]:
        """At least what the store has in the folders of the list; a folder comes with all that is below it."""
        if len(self.folders) >= MAX_FOLDERS_ASKED:
            yield from store.list()
            return
        asked = None
        for folder in self.folders:
            if asked is None or not folder.startswith(asked):
                asked = folder
                yield from store.list(folder)

    def joined(self, present: Iterable[ObjectInfo], only: str | None = None) -> Iterator[ListedFile]:
        """Each file that the list names, once, whether the store has it or not.

        Args:
            present: what the store has, in the order of a listing; files that the list does not name are passed over.
            only: the folder that is asked about; None: all.

        Returns:
            An iterator in bounded memory. A folder's files come in the order of their names.
        """
        unseen = {only} if only is not None else set(self.folders)
        opened: list[
            tuple[str, _FolderJoin]
        ] = []  # the folders that the listing is inside of, outermost first
        for file in present:
            folder = folder_of(file.path)
            while opened and not folder.startswith(opened[-1][0]):
                yield from opened.pop()[1].rest()
            if not opened or opened[-1][0] != folder:
                opened.append((folder, _FolderJoin(self._files_in(folder))))
                unseen.discard(folder)
            yield from opened[-1][1].up_to(file)
        while opened:
            yield from opened.pop()[1].rest()
        for folder in sorted(unseen):
            yield from _FolderJoin(self._files_in(folder)).rest()

    def _files_in(self, folder: str) -> Iterator[tuple[str, tuple[Row, ...]]]:
        """Path and different rows of each file, sorted by path."""
        for path, said in itertools.groupby(self._rows_in(folder), itemgetter(0)):
            rows = tuple(row for _, row in said)
            if (
                len(rows) > 1
            ):  # in an order that does not follow the list's: one that is sorted anew changes nothing
                rows = tuple(sorted(set(rows), key=repr))
            yield path, rows

    def _rows_in(self, folder: str) -> Iterator[tuple[str, Row]]:
        if folder not in self:
            return
        place = bisect_left(self.folders, folder)
        begin, end = int(self._ends[place - 1]) if place else 0, int(self._ends[place])
        for first in range(begin, end, _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, end - first)
            names = self._names.slice(first, count).to_pylist()
            for name, row in zip(names, self._rows(first, count), strict=True):
                yield folder + name, row

    def _rows(self, first: int, count: int) -> Iterator[Row]:
        if not self._texts.num_columns:
            yield from itertools.repeat(Row(None, None, ()), count)
            return
        (batch,) = self._texts.slice(first, count).to_batches()
        labels = self._label.values(batch) if self._label else [None] * count
        texts = [[column.text(value) for value in column.values(batch)] for column in self._metadata]
        metadata: Iterable[Texts] = zip(*texts, strict=True) if texts else itertools.repeat((), count)
        for value, carried in zip(labels, metadata, strict=True):
            try:
                yield Row(self._label.label(value) if self._label else None, None, carried)
            except BadText as error:
                yield Row(None, str(error), carried)


@final
class _FolderJoin:
    """Walks the files that a list names in one folder beside those that are there."""

    def __init__(self, wanted: Iterator[tuple[str, tuple[Row, ...]]]) -> None:
        self._wanted = wanted
        self._next = next(wanted, None)

    def up_to(self, file: ObjectInfo) -> Iterator[ListedFile]:
        """Those before a file that is there, and itself if it is wanted."""
        while self._next is not None and self._next[0] <= file.path:
            path, rows = self._next
            self._next = next(self._wanted, None)
            yield ListedFile(path, rows, file if path == file.path else None)

    def rest(self) -> Iterator[ListedFile]:
        """Those behind the last file that is there."""
        while self._next is not None:
            path, rows = self._next
            self._next = next(self._wanted, None)
            yield ListedFile(path, rows, None)


def folder_of(path: str) -> str:
    """With its slash; "" for the top."""
    folder, slash, _ = path.rpartition("/")
    return folder + slash


# ---------------------------------------------------------------- from the list's bytes to a table

# Only the last one of this process: parsing a million rows takes seconds, and holds their bytes.
_kept: dict[object, FileList] = {}


def read_list(config: FilesSource, store: Store) -> FileList:
    """The list of a source as it is now.

    Args:
        config: of the source; it has a list.
        store: of the source; the list is reached with the same settings.

    Raises:
        RecipeError: it is not there, cannot be parsed, lacks a column, or names what is not below the source.
        ObjectChanged: it was replaced at this very moment.
        StorageError: it cannot be fetched.
    """
    assert config.list is not None
    folder, _, name = config.list.rpartition("/")
    place = open_store(folder or "/", store.config)
    try:
        info = place.info(name)
        asked = (config, store.uri, store.config, info)
        if asked in _kept:
            return _kept[asked]
        content = place.read(name, expected=info)
    except ObjectNotFound as error:
        raise RecipeError(
            f"source.list {config.list}: not there",
            found=error.thing,
            way_out="check source.list (a typo, a disk that is not mounted)",
        ) from None
    _kept.clear()
    _kept[asked] = _file_list(config, content, store.uri)
    pa.default_memory_pool().release_unused()  # parsing takes six times what is kept
    return _kept[asked]


def _file_list(config: FilesSource, content: bytes, source_uri: str) -> FileList:
    table = _parsed(config, content)
    columns = {f"metadata{place}": table[name] for place, name in enumerate(config.metadata)}
    columns |= {"label": table[config.label]} if config.label is not None else {}
    return FileList(
        _paths(config, table[config.path].combine_chunks(), source_uri), pa.table(columns), config
    )


def _parsed(config: FilesSource, content: bytes) -> pa.Table:
    """The wanted columns; text as large_binary, because nobody has checked yet that it is UTF-8."""
    assert config.list is not None
    try:
        if config.list.lower().endswith(".parquet"):
            table = _parquet_table(config, content)
        else:
            table = _csv_table(config, content)
        return pa.table({name: _plain(config, name, table[name]) for name in table.column_names})
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"source.list {config.list}: cannot be read",
            found=shortened(" ".join(str(error).split())),
            wanted="a table whose name says what it is: .csv, .csv.gz, .tsv, .tsv.gz or .parquet",
        ) from None


def _csv_table(config: FilesSource, content: bytes) -> pa.Table:
    """Values as they are written: the class "01" stays "01", and "NA" stays a word."""
    assert config.list is not None
    name = config.list.lower()

    def stream() -> Any:
        return pa.input_stream(io.BytesIO(content), compression="gzip" if name.endswith(".gz") else None)

    delimiter = "\t" if name.removesuffix(".gz").endswith(".tsv") else ","
    parse = pa.csv.ParseOptions(newlines_in_values=True, delimiter=delimiter)
    with pa.csv.open_csv(stream(), parse_options=parse) as reader:
        found = reader.schema.names
    wanted = _wanted(config, found)
    convert = pa.csv.ConvertOptions(
        include_columns=wanted,
        column_types=dict.fromkeys(wanted, pa.large_binary()),
        strings_can_be_null=False,
    )
    return pa.csv.read_csv(stream(), parse_options=parse, convert_options=convert)


def _parquet_table(config: FilesSource, content: bytes) -> pa.Table:
    """A field in structs is named with dots."""
    with pq.ParquetFile(io.BytesIO(content)) as file:
        wanted = _wanted(config, _flat(file.schema_arrow.empty_table()).column_names)
        return _flat(file.read(columns=wanted)).select(wanted)


def _flat(table: pa.Table) -> pa.Table:
    while any(pa.types.is_struct(kind) for kind in table.schema.types):
        table = table.flatten()
    return table


def _wanted(config: FilesSource, found: list[str]) -> list[str]:
    """The columns that the recipe names, each once."""
    wanted = list(dict.fromkeys([config.path, *([config.label] if config.label else ()), *config.metadata]))
    for name in wanted:
        if found.count(name) != 1:
            raise RecipeError(
                f"source.list {config.list}: no column {name!r}"
                if name not in found
                else f"source.list {config.list}: {found.count(name)} columns are called {name!r}",
                found=shortened(", ".join(found)),
                wanted=f"a column {name!r} that is there once",
                way_out="name the columns in source.path, source.label and source.metadata",
            )
    return wanted


def _plain(config: FilesSource, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of large_binary, numbers or booleans."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind, is_kind = column.type, pa.types
    if is_kind.is_string(kind) or is_kind.is_large_string(kind) or is_kind.is_binary(kind):
        return column.cast(pa.large_binary())
    is_number = is_kind.is_integer(kind) or is_kind.is_floating(kind) or is_kind.is_boolean(kind)
    if is_kind.is_large_binary(kind) or is_kind.is_null(kind) or (is_number and name != config.path):
        return column
    raise RecipeError(
        f"source.list {config.list}: column {name!r} cannot be used",
        found=str(kind),
        wanted="strings" if name == config.path else "strings, integers, floats or booleans",
        way_out="name another column, or write this one as strings",
    )


def _paths(config: FilesSource, written: pa.Array, source_uri: str) -> pa.Array:
    """Relative to the source, large_string.

    Raises:
        RecipeError: a row names nothing below the source.
    """
    try:
        paths = written.cast(pa.large_string()).fill_null("")
    except pa.ArrowInvalid:
        bad = pa.array([not _is_utf8(path) for path in written.to_pylist()])
        raise _bad_rows(config, written, bad, source_uri) from None
    is_file_uri = pc.match_substring_regex(paths, "(?i)^file:/")
    if pc.any(is_file_uri).as_py():
        plain = (_local_path(uri) for uri in paths.filter(is_file_uri).to_pylist())
        paths = pc.replace_with_mask(paths, is_file_uri, pa.array(plain, pa.large_string()))
    root = f"{source_uri.rstrip('/')}/"
    below = pc.if_else(
        pc.starts_with(paths, root), pc.utf8_slice_codeunits(paths, len(root), 2**31 - 1), paths
    )
    no_path = _NO_PATH if source_uri.startswith("s3://") else f"{_NO_PATH}|//"
    bad = pc.match_substring_regex(below, no_path)
    if pc.any(bad).as_py():
        raise _bad_rows(config, written, bad, source_uri)
    return below


def _bad_rows(config: FilesSource, written: pa.Array, bad: pa.Array, source_uri: str) -> RecipeError:
    first, count = pc.index(bad, True).as_py(), pc.sum(bad).as_py()
    value = written[first].as_py()
    shown = repr(value.decode() if value is not None and _is_utf8(value) else value)
    return RecipeError(
        f"source.list {config.list}: {count:,} of {len(written):,} rows name no file below source.uri",
        found=f"{shortened(shown)} in column {config.path!r} of row {first + 1:,} (the first row of data is 1)",
        wanted=f"paths relative to {source_uri}, or full URIs below it, in UTF-8, without . or .. as a step",
        way_out="correct these rows, or give the source.uri that all of them are below",
    )


def _is_utf8(value: bytes | None) -> bool:
    try:
        return value is None or value.decode() is not None
    except UnicodeDecodeError:
        return False


def _local_path(uri: str) -> str:
    try:
        return uri_in_full(uri)
    except ValueError:
        return uri


def _shown(text: str | None) -> str:
    return repr(text if text is None or len(text) <= 100 else f"{text[:100]} ...")
