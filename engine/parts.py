"""Names of parts, and what a listing of them says is done: the whole of "pending = inputs - outputs".

Pure functions of paths and identities; nothing here touches storage. A part's name is

    <slug>.<path16>.<source8>.<part:05d>[.last].parquet                      an embedding or rejects part
    <slug>.<path16>.<source8>.<embedding8>.<part:05d>[.last].parquet         a prediction part

path16 alone says which shard, source8 which version of it, embedding8 which version of the embedding part.
The slug is for people. These names are a file format: golden values stand in tests/test_parts.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace

SLUG_MAX_CHARS = 80
_PART_NAME = re.compile(
    r"(?P<slug>[A-Za-z0-9][A-Za-z0-9-]{0,79})\.(?P<path16>[0-9a-f]{16})\.(?P<source8>[0-9a-f]{8})"
    r"(?:\.(?P<embedding8>[0-9a-f]{8}))?\.(?P<number>[0-9]{5,})(?P<last>\.last)?\.parquet"
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
    return PartName(
        match["slug"],
        match["path16"],
        match["source8"],
        int(match["number"]),
        bool(match["last"]),
        match["embedding8"],
    )


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

    def without(self, numbers: Container[int]) -> Progress:
        """This as if some parts did not exist."""
        return Progress(tuple(number for number in self.numbers if number not in numbers), self.last)

    def with_part(self, number: int, last: bool) -> Progress:
        """This and one more part."""
        if number in self.numbers and not last:
            return self
        numbers = self.numbers if number in self.numbers else tuple(sorted((*self.numbers, number)))
        return Progress(numbers, number if last else self.last)


Version = str  # source8
TableProgress = dict[str, dict[Version, Progress]]  # path16 -> version -> progress


def progress_of(names: Iterable[PartName]) -> TableProgress:
    """What exists, by shard and version; one pass over a listing.

    The parts of one version stand together in a sorted listing, so each group is built once.
    """
    table: TableProgress = {}
    for path16, version, numbers, last in _grouped(names):
        found = table.setdefault(path16, {})
        if version in found:  # an unsorted listing
            merged = sorted({*found[version].numbers, *numbers})
            found[version] = Progress(tuple(merged), last if last is not None else found[version].last)
        else:
            found[version] = Progress(tuple(sorted(set(numbers))), last)
    return table


def progress_without(progress: TableProgress, names: Iterable[PartName]) -> TableProgress:
    """What would exist without some parts."""
    missing: dict[tuple[str, Version], set[int]] = {}
    for name in names:
        missing.setdefault((name.path16, name.source8), set()).add(name.number)
    return {
        path16: {
            version: found.without(missing.get((path16, version), ())) for version, found in versions.items()
        }
        for path16, versions in progress.items()
    }


def _grouped(names: Iterable[PartName]) -> Iterator[tuple[str, Version, list[int], int | None]]:
    path16 = version = ""
    numbers: list[int] = []
    last: int | None = None
    for name in names:
        if (name.path16, name.source8) != (path16, version):
            if numbers:
                yield path16, version, numbers, last
            path16, version, numbers, last = name.path16, name.source8, [], None
        numbers.append(name.number)
        last = name.number if name.last else last
    if numbers:
        yield path16, version, numbers, last
