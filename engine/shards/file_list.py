"""A CSV or Parquet list of files with their labels, and its join with what a store has; not for reading the files.

A list is parsed once per process and version, into an Arrow table sorted by folder and name: the rows of one folder
are a slice, and become Python objects only while somebody goes through them.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple, final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.errors import ObjectNotFound, RecipeError
from engine.schema import RejectReason
from engine.shards.image_bytes import Problem
from engine.shards.kinds import FilesSource
from engine.shards.list_table import parsed_list
from engine.shards.member_text import BadText
from engine.shards.parquet_columns import TextColumn
from engine.storage import ObjectInfo, Store, open_store

MAX_FOLDERS_ASKED = (
    1000  # as many listings as a million objects take pages; above, the whole source is listed
)
_ROWS_AT_ONCE = 4096
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
    paths, texts = parsed_list(config, content, store.uri)
    _kept[asked] = FileList(paths, texts, config)
    pa.default_memory_pool().release_unused()  # parsing takes six times what is kept
    return _kept[asked]


def _shown(text: str | None) -> str:
    return repr(text if text is None or len(text) <= 100 else f"{text[:100]} ...")
