"""One record of a long tar without reading all before it: a guess by its place, a look around, a better guess.

Records of a tar have no directory, but a header can be told from data by its checksum, and who knows the keys of a
stretch of records knows from any of them where it is. Not for: reading a shard, which misses nothing; this may.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from engine.errors import ShardDamaged
from engine.shards.base import Sample
from engine.shards.tar_stream import BLOCK_BYTES

WINDOW_BYTES = 1 << 20  # of a look; more where records are large
RECORDS_OF_WINDOW = 4
MAX_WINDOW_BYTES = 16 << 20
LOOKS = 8  # records of like sizes take one; such as grow four hundred times from first to last, two to five

_Place = tuple[int, int]  # index of a record, and the byte where it begins


@dataclass(frozen=True, slots=True)
class Stretch:
    """Records that follow each other in a tar.

    Attributes:
        begin_index, begin_offset: of the first, and the byte where it begins.
        end_index, end_offset: behind the last.
        indexes: of those whose key is known, and is there once.
    """

    begin_index: int
    begin_offset: int
    end_index: int
    end_offset: int
    indexes: Mapping[str, int]

    @property
    def window_bytes(self) -> int:
        """What one look reads."""
        mean = (self.end_offset - self.begin_offset) // max(1, self.end_index - self.begin_index)
        return min(MAX_WINDOW_BYTES, max(WINDOW_BYTES, RECORDS_OF_WINDOW * mean))


def find_record(
    key: str,
    stretch: Stretch,
    read: Callable[[int, int], bytes],
    parse: Callable[[bytes, int], Iterator[Sample]],
) -> Sample | None:
    """The record of a key, by interpolation between the nearest ones known; None where that does not find it.

    Args:
        key: one of `stretch.indexes`.
        read: bytes of the tar: offset, length.
        parse: the records in bytes that begin at a header at that offset; may end in ShardDamaged.
    """
    index, size = stretch.indexes[key], stretch.window_bytes
    low, high = (stretch.begin_index, stretch.begin_offset), (stretch.end_index, stretch.end_offset)
    guess = _between(low, high, index)
    for _ in range(LOOKS):
        begin = max(low[1], guess - size // 4) // BLOCK_BYTES * BLOCK_BYTES
        seen: list[_Place] = []  # where records begin, and the last one ends
        for sample in _records_in(read(begin, size), begin, begin == low[1], parse):
            if sample.key == key:
                return sample
            found = stretch.indexes.get(sample.key)
            if found is not None and sample.begin_offset is not None and sample.end_offset is not None:
                seen += [(found, sample.begin_offset), (found + 1, sample.end_offset)]
        before = low, high
        low = max([low, *(place for place in seen if place[0] <= index)])
        high = min([high, *(place for place in seen if place[0] > index)])
        if (low, high) == before:  # nothing was learnt, as behind the last known record: it must lie before
            guess = (low[1] + guess) // 2
        else:  # records hereabouts say more than the mean of all that are left
            (first, first_offset), (last, last_offset) = seen[0], seen[-1]
            mean = (last_offset - first_offset) // max(1, last - first)
            nearest = min(seen, key=lambda place: abs(place[0] - index))
            guess = min(max(nearest[1] + (index - nearest[0]) * mean, low[1]), high[1])
    return None


def _between(low: _Place, high: _Place, index: int) -> int:
    """Where a record begins, if all between two places are of one size."""
    return low[1] + (index - low[0]) * (high[1] - low[1]) // max(1, high[0] - low[0])


def _records_in(
    data: bytes, begin: int, is_border: bool, parse: Callable[[bytes, int], Iterator[Sample]]
) -> Iterator[Sample]:
    """Records that are whole in the data; the first one only where it is known to begin there."""
    at = _first_header(data)
    if at is None:
        return
    records = parse(data[at:], begin + at)
    try:
        if at > 0 or not is_border:
            next(records, None)  # it may have begun before
        yield from records
    except ShardDamaged:  # the data ends inside a record
        return


def _first_header(data: bytes) -> int | None:
    """Where the first block is that is a header, by its magic and checksum."""
    for at in range(0, len(data) - BLOCK_BYTES, BLOCK_BYTES):
        if data[at + 257 : at + 262] == b"ustar":
            try:
                tarfile.TarInfo.frombuf(data[at : at + BLOCK_BYTES], "utf-8", "backslashreplace")
            except tarfile.HeaderError:
                continue
            return at
    return None
