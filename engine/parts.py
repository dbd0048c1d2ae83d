"""Names of parts, and what a listing of them says is done: the whole of "pending = inputs - outputs".

Pure functions of paths and identities; nothing here touches storage. A part's name is

    <slug>.<path16>.<source8>.<part:05d>[.last].parquet                      an embedding or rejects part
    <slug>.<path16>.<source8>.<embedding8>.<part:05d>[.last].parquet         a prediction part made of an embedding part
    <slug>.<path16>.<source8>.<part:05d>[.last].parquet                      one made straight from the shard

    also/<a prediction part's name without .parquet>.jsonl or .csv                  its copy for people

path16 alone says which shard, source8 which version of it, embedding8 which version of the embedding part.
The slug is for people. These names are a file format: golden values stand in tests/test_parts.py.
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

SLUG_MAX_CHARS = 80
COPIES_FOLDER = "also/"
_EXTENSION = ".parquet"
_COPY_PATH = re.compile(r"also/(?P<stem>[^/]+)\.(?P<form>csv|jsonl)")
_PART_NAME = re.compile(
    r"(?P<slug>[A-Za-z0-9][A-Za-z0-9-]{0,79})\.(?P<path16>[0-9a-f]{16})\.(?P<source8>[0-9a-f]{8})"
    r"(?:\.(?P<embedding8>[0-9a-f]{8}))?\.(?P<number>[0-9]{5,18})(?P<last>\.last)?\.parquet"
)


@dataclass(frozen=True, slots=True)
class PartName:
    """One part's name, taken apart. `number` counts from 0 within the shard; `last` marks the shard's end."""

    slug: str
    path16: str
    source8: str
    number: int
    last: bool
    embedding8: str | None = None

    def __str__(self) -> str:
        version = self.source8 if self.embedding8 is None else f"{self.source8}.{self.embedding8}"
        return f"{self.slug}.{self.path16}.{version}.{self.number:05d}{'.last' if self.last else ''}.parquet"


def part_name(shard_path: str, identity: str, number: int, last: bool) -> PartName:
    """Name of part `number` of the shard at `shard_path` (relative to its source), which has `identity` now."""
    return PartName(slug_of(shard_path), path16_of(shard_path), hash8_of(identity), number, last)


def prediction_name(embedding_part: PartName, identity: str) -> PartName:
    """Name of the prediction part made from an embedding part whose object has `identity` now."""
    return replace(embedding_part, embedding8=hash8_of(identity))


def parse_part_name(path: str) -> PartName | None:
    """Take a name apart (folders before it are dropped); None for a file that is not a part."""
    match = _PART_NAME.fullmatch(path.rsplit("/", 1)[-1])
    if match is None:
        return None
    slug, path16, source8, embedding8, number, last = match.groups()
    return PartName(slug, path16, source8, int(number), last is not None, embedding8)


def copy_path(name: PartName, form: str) -> str:
    """Path below the table of a prediction part's copy for people, of the form "jsonl" or "csv"."""
    return f"{COPIES_FOLDER}{str(name).removesuffix(_EXTENSION)}.{form}"


def parse_copy_path(path: str) -> tuple[PartName, str] | None:
    """The part that a copy belongs to, and its form; None for a file that is no copy."""
    match = _COPY_PATH.fullmatch(path)
    name = parse_part_name(f"{match['stem']}{_EXTENSION}") if match else None
    return None if match is None or name is None else (name, match["form"])


def path16_of(shard_path: str) -> str:
    """First 16 hex digits of sha-256 of the relative path (UTF-8)."""
    return _sha256_hex(shard_path)[:16]


def hash8_of(identity: str) -> str:
    """First 8 hex digits of sha-256 of an object's identity, as storage states it."""
    return _sha256_hex(identity)[:8]


def slug_of(shard_path: str) -> str:
    """End of the path for people: `[A-Za-z0-9-]`, 1 to 80 characters, beginning with a letter or digit.

    Readers (Spark, DuckDB globs, pyarrow) skip files that begin with `_` or `.` in silence.
    """
    text = re.sub(r"[^A-Za-z0-9]", "-", shard_path)[-SLUG_MAX_CHARS:].lstrip("-")
    return text or "shard"


def _sha256_hex(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True, slots=True)
class Progress:
    """Which parts of one version of one shard exist.

    Attributes:
        numbers: part numbers that exist, ascending.
        last: number of the part marked `.last`, or None while the shard's end is not known.
    """

    numbers: tuple[int, ...] = ()
    last: int | None = None

    def has(self, name: PartName) -> bool:
        """Whether this very part exists, as the last one or as another."""
        at = bisect.bisect_left(self.numbers, name.number)
        exists = at < len(self.numbers) and self.numbers[at] == name.number
        return exists and name.last == (name.number == self.last)

    @property
    def is_complete(self) -> bool:
        """Parts 0..n exist and n is `.last`."""
        return self.last is not None and sum(number <= self.last for number in self.numbers) == self.last + 1

    @property
    def first_missing(self) -> int:
        """Smallest part number that does not exist."""
        if self.numbers == tuple(range(len(self.numbers))):  # the usual case, without a search
            return len(self.numbers)
        existing = set(self.numbers)
        return next(number for number in range(len(self.numbers) + 1) if number not in existing)

    @staticmethod
    def in_all(tables: Sequence[Progress]) -> Progress:
        """What exists in each of several tables of the same parts; where the shard ends, any of them can tell."""
        first, *others = (set(one.numbers) for one in tables)
        numbers = first.intersection(*others)
        last = next((one.last for one in tables if one.last is not None), None)
        return Progress(tuple(sorted(numbers)), last)

    def with_part(self, number: int, last: bool) -> Progress:
        """This and one more part."""
        if number in self.numbers and not last:
            return self
        numbers = self.numbers if number in self.numbers else tuple(sorted((*self.numbers, number)))
        return Progress(numbers, number if last else self.last)


NOTHING = Progress()
"""No part exists; one object for all shards that are new."""

Version = str  # source8


class TableProgress(Mapping[str, dict[Version, Progress]]):
    """What exists in a table: path16 -> version -> progress. Holds 22 bytes a part, so that millions fit a driver.

    Args:
        names: parts that exist, in any order, perhaps repeated.
    """

    def __init__(self, names: Iterable[PartName] = ()) -> None:
        self._sort((int(name.path16, 16), int(name.source8, 16), name.number, name.last) for name in names)

    @staticmethod
    def of_paths(paths: Iterable[str], folder: str) -> TableProgress:
        """Of the files in a folder, in any order, those that are parts; without a PartName for each of a million.

        Args:
            folder: what each path begins with, up to its slash.
        """
        progress, begin = TableProgress(), len(folder)
        matches = (_PART_NAME.fullmatch(path, begin) for path in paths)
        progress._sort(
            (int(match[2], 16), int(match[3], 16), int(match[5]), match[6] is not None)
            for match in matches
            if match is not None
        )
        return progress

    def _sort(self, parts: Iterable[tuple[int, int, int, bool]]) -> None:
        paths, versions, numbers, lasts = array("Q"), array("I"), array("Q"), array("B")
        for path, version, number, last in parts:
            paths.append(path)
            versions.append(version)
            numbers.append(number)
            lasts.append(last)
        columns = [np.array(column, column.typecode) for column in (paths, versions, numbers, lasts)]
        order = np.lexsort(columns[2::-1])
        self._path_of_row, self._versions, self._numbers, self._lasts = (column[order] for column in columns)
        self._absent = np.zeros(len(order), bool)
        self._paths, begins = np.unique(self._path_of_row, return_index=True)
        self._borders = np.append(begins, len(order))  # rows of shard n: from border n to border n + 1
        # Whoever asks comes back for the next part.
        self._asked: tuple[int, dict[Version, Progress]] = (-1, {})

    def position(self, path16: str) -> int | None:
        """Ordinal of a shard in the iteration, or None; for noting something about each in an array."""
        key = np.uint64(int(path16, 16))
        at = int(self._paths.searchsorted(key))
        return at if at < len(self._paths) and self._paths[at] == key else None

    def __getitem__(self, path16: str) -> dict[Version, Progress]:
        at = self.position(path16)
        if at is None:
            raise KeyError(path16)
        return self.at(at)

    def __iter__(self) -> Iterator[str]:
        return (f"{int(path):016x}" for path in self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def in_several_versions(self) -> list[str]:
        """path16 of the shards that have parts of more than one version."""
        other = (self._path_of_row[1:] == self._path_of_row[:-1]) & (
            self._versions[1:] != self._versions[:-1]
        )
        return [f"{int(path):016x}" for path in np.unique(self._path_of_row[1:][other])]

    def without(self, names: Iterable[PartName]) -> TableProgress:
        """What would exist without some parts; that a shard ends where it ends stays known."""
        rest = copy.copy(self)
        rest._absent, rest._asked = self._absent.copy(), (-1, {})
        for name in names:
            at = self.position(name.path16)
            if at is not None:
                rows = self._rows_of(at)
                same = (self._versions[rows] == int(name.source8, 16)) & (self._numbers[rows] == name.number)
                rest._absent[rows] |= same
        return rest

    def _rows_of(self, at: int) -> slice:
        return slice(int(self._borders[at]), int(self._borders[at + 1]))

    def at(self, position: int) -> dict[Version, Progress]:
        """What exists of the shard at a position."""
        if self._asked[0] != position:
            self._asked = (position, self._progress_at(position))
        return self._asked[1]

    def _progress_at(self, position: int) -> dict[Version, Progress]:
        rows = self._rows_of(position)
        numbers: dict[int, list[int]] = {}
        last: dict[int, int] = {}
        columns = (self._versions, self._numbers, self._lasts, self._absent)
        for version, number, is_last, is_absent in zip(
            *(column[rows].tolist() for column in columns), strict=True
        ):
            found = numbers.setdefault(version, [])
            if is_last:
                last[version] = number
            if not is_absent and (not found or found[-1] != number):  # once with and once without `.last`
                found.append(number)
        return {
            f"{version:08x}": Progress(tuple(found), last.get(version)) for version, found in numbers.items()
        }
