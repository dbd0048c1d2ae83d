"""TFRecord shards: files of tf.train.Example, plain or gzipped, or those of a prepared TensorFlow Datasets folder.

The rules:

- A record is a length (uint64), a checksum of it, the data, and a checksum of that, all little-endian. Both checksums
  are checked, of records that are skipped too. A record above 1 GiB is refused before it is read.
- One record is one sample. Its data must parse as a tf.train.Example (`tf_example.py` says how features become the
  image and the texts); data that does not, though its checksum is right, is damage of the shard.
- Where the image and the label are both bad, the image is the reason.
- A file of zero bytes has no records; gzipped it would have a header, so a .gz of zero bytes is damage.
- Nothing marks the end: a plain file that was cut between two records cannot be told from a whole one, except in a
  prepared dataset, which says how many records each file has.
- With `split`, a file's samples are those that the slice selects, numbered from 0; records before them are passed over,
  those behind them are not read.

Gzipped files (.gz) are read from the start each time.
Source: github.com/tensorflow/tensorflow, tensorflow/core/lib/io/record_writer.h (framing) and
tensorflow/core/lib/hash/crc32c.h (masking).
"""

from __future__ import annotations

import contextlib
import gzip
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast, final

import google_crc32c

from engine.errors import ObjectNotFound, ShardDamaged
from engine.schema import RejectReason
from engine.shards.base import Resume, Sample, ShardReader, objects_matching, path_matches
from engine.shards.kinds import TFRecordSource
from engine.shards.member_text import BadText
from engine.shards.tf_example import (
    Example,
    NotAnExample,
    image_of,
    key_of_feature,
    label_of_feature,
    metadata_of_feature,
)
from engine.shards.tfds import FileSlice, PreparedSplit, open_split
from engine.storage import ObjectInfo, Store

MAX_RECORD_BYTES = 2**30
_HEADER = struct.Struct("<QI")  # length of the data, its masked checksum
_CHECKSUM = struct.Struct("<I")
_GZIP_START = b"\x1f\x8b"
_WHOLE_FILE = FileSlice(num_records=None, begin=0, end=None)


@final
class TFRecordReader(ShardReader):
    """Reads the shards of one TFRecord source.

    Args:
        config: of the source.
        max_sample_bytes: a larger image is not handed out.
    """

    def __init__(self, config: TFRecordSource, max_sample_bytes: int) -> None:
        self._config, self._max_sample_bytes = config, max_sample_bytes
        self._opened_split: PreparedSplit | None = None  # values only, so it may travel with the reader

    def list_shards(self, store: Store) -> Iterator[ObjectInfo]:
        """The shards; see ShardReader.

        Raises:
            RecipeError: `split` names no prepared dataset, no split of it, or one that cannot be read.
            ObjectNotFound: the dataset names a file that is not there.
        """
        split = self._split(store)
        if split is None:
            return objects_matching(store, self._config.pattern)
        return iter(self._files_of(split, store))

    def read(
        self, store: Store, shard: ObjectInfo, resume: Resume, on_bytes: Callable[[int], None] | None = None
    ) -> Iterator[Sample]:
        is_compressed = shard.path.lower().endswith(".gz")
        if is_compressed and resume.offset is not None:
            raise ValueError(f"{shard.path} is compressed and cannot be entered at byte {resume.offset}")
        split, reported = self._split(store), 0
        with contextlib.closing(store.open_input(shard, resume.offset or 0)) as source:
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=source) if is_compressed else source)
            size = None if is_compressed else shard.size
            records = _RecordStream(stream, resume.offset or 0, size, f"{store.uri}/{shard.path}")
            if is_compressed and not shard.size:
                raise records.damage("there is not even the header of a gzipped file")
            try:
                for sample in self._samples(records, _slice_of(split, shard, records), split, resume):
                    yield sample
                    if on_bytes:
                        on_bytes(source.bytes_read - reported)
                        reported = source.bytes_read
                if not records.at_end:  # only there the stream itself notices that the file was changed
                    store.read(shard.path, 0, 1, expected=shard)
            finally:
                if on_bytes:
                    on_bytes(source.bytes_read - reported)

    def _split(self, store: Store) -> PreparedSplit | None:
        """What `split` selects, read from the store once; None without `split`."""
        if self._config.split is not None and self._opened_split is None:
            self._opened_split = open_split(store, self._config, self._config.split)
        return self._opened_split

    def _files_of(self, split: PreparedSplit, store: Store) -> list[ObjectInfo]:
        """The files of the split in the order of the listing; a pattern narrows them only where the recipe has one."""
        pattern = self._config.pattern if "pattern" in self._config.model_fields_set else "**"
        wanted = {path for path in split.files if path_matches(path, pattern)}
        found = [shard for shard in store.list() if shard.path in wanted]
        if missing := sorted(wanted - {shard.path for shard in found}):
            raise ObjectNotFound(
                f"{store.uri} lacks {len(missing):,} of {len(wanted):,} files of split {self._config.split!r}",
                found=f"no {missing[0]}",
                wanted="every file that dataset_info.json names",
                way_out="copy the folder again, or name a slice whose files are all there",
            )
        return found

    def _samples(
        self, records: _RecordStream, wanted: FileSlice, split: PreparedSplit | None, resume: Resume
    ) -> Iterator[Sample]:
        # Only at byte 0 is the number of the record known without the slice: a slice may begin later.
        number = wanted.begin + resume.index if resume.offset else 0
        while wanted.end is None or number < wanted.end or wanted.end == wanted.num_records:
            record = records.next()
            if record is None:
                _check_count(records, number, wanted)
                return
            if number == wanted.num_records:
                raise records.damage(f"a record more than the {number:,} that dataset_info.json says")
            if number >= wanted.begin + resume.index:
                yield self._sample(record, number - wanted.begin, split, records)
            number += 1

    def _sample(
        self, record: _Record, index: int, split: PreparedSplit | None, records: _RecordStream
    ) -> Sample:
        try:
            example = Example(record.data)
        except NotAnExample as error:
            raise records.damage(f"a record that is no tf.train.Example: {error}", record.begin) from None
        config = self._config
        image = image_of(example, split.image if split else config.image, self._max_sample_bytes)
        label, label_problem = self._label(example, split)
        return Sample(
            key=(key_of_feature(example.feature(config.key)) if config.key else None) or f"{index:09d}",
            index=index,
            image=image.data,
            label=label,
            metadata=tuple(metadata_of_feature(example.feature(name)) for name in config.metadata),
            begin_offset=record.begin if records.has_offsets else None,
            end_offset=record.end if records.has_offsets else None,
            problem=image.problem or label_problem,
            size_bytes=image.size_bytes,
        )

    def _label(
        self, example: Example, split: PreparedSplit | None
    ) -> tuple[str | None, tuple[RejectReason, str] | None]:
        name = self._config.label
        if name is None:
            return None, None
        try:
            return label_of_feature(example.feature(name), split.class_names if split else None), None
        except BadText as error:
            return None, (RejectReason.BAD_LABEL, f"label feature {name!r}: {error}")


def first_example(store: Store, shard: ObjectInfo) -> Example:
    """The first record of a file.

    Raises:
        ShardDamaged: there is none, or it is no tf.train.Example.
    """
    with contextlib.closing(store.open_input(shard)) as source:
        is_compressed = shard.path.lower().endswith(".gz")
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=source) if is_compressed else source)
        records = _RecordStream(stream, 0, None if is_compressed else shard.size, f"{store.uri}/{shard.path}")
        record = records.next()
        if record is None:
            raise records.damage("the end, before any record")
        try:
            return Example(record.data)
        except NotAnExample as error:
            raise records.damage(f"a record that is no tf.train.Example: {error}") from None


@final
@dataclass(frozen=True, slots=True)
class _Record:
    """One record whose checksums are right."""

    data: bytes
    begin: int
    end: int


@final
class _RecordStream:
    """The records of one file, one at a time.

    Args:
        source: stands at `position`; unpacked already.
        position: byte that it stands at.
        size: bytes of the whole file; None where unknown (compressed).
        shard_uri: for messages.
    """

    def __init__(self, source: BinaryIO, position: int, size: int | None, shard_uri: str) -> None:
        self._source, self._position, self._size, self._shard_uri = source, position, size, shard_uri
        self.at_end = False

    @property
    def has_offsets(self) -> bool:
        return self._size is not None

    def next(self) -> _Record | None:
        """The next record; None at the end of the file.

        Raises:
            ShardDamaged: it is cut, or a checksum is wrong.
        """
        begin = self._position
        header = self._read(_HEADER.size)
        if not header:
            self.at_end = True
            return None
        if len(header) < _HEADER.size:
            raise self.damage("the file ends inside a record's header", begin)
        length, checksum = _HEADER.unpack(header)
        self._check_length(header, length, checksum, begin)
        data = self._read(length)
        trailer = self._read(_CHECKSUM.size)
        if len(trailer) < _CHECKSUM.size:
            raise self.damage("the file ends inside a record", begin)
        if _masked_crc32c(data) != _CHECKSUM.unpack(trailer)[0]:
            raise self.damage("the checksum of a record is wrong", begin)
        return _Record(data, begin, self._position)

    def damage(self, what: str, position: int | None = None) -> ShardDamaged:
        """The error to raise.

        Args:
            what: was found.
            position: byte where; None: where the stream stands.
        """
        position = self._position if position is None else position
        where = f"byte {position:,}" if self.has_offsets else f"byte {position:,} of the unpacked file"
        return ShardDamaged(
            f"{self._shard_uri} is damaged at {where}",
            found=what,
            wanted="whole TFRecord records of tf.train.Example",
            way_out="copy or write the shard again; the parts before the damage are kept",
        )

    def _check_length(self, header: bytes, length: int, checksum: int, begin: int) -> None:
        if _masked_crc32c(header[:8]) != checksum:
            if begin == 0 and header.startswith(_GZIP_START):
                raise self.damage("a gzipped file whose name does not end in .gz", begin)
            raise self.damage("the checksum of a record's length is wrong", begin)
        if length > MAX_RECORD_BYTES:
            found = f"a record of {length:,} bytes; at most {MAX_RECORD_BYTES:,} are read"
            raise self.damage(found, begin)
        left = None if self._size is None else self._size - self._position
        if left is not None and length + _CHECKSUM.size > left:
            raise self.damage(f"a record of {length:,} bytes, where {left:,} are left in the file", begin)

    def _read(self, count: int) -> bytes:
        try:
            data = self._source.read(count)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:  # cut, broken, and wrong header or checksum
            raise self.damage(f"broken gzip data: {error}") from None
        self._position += len(data)
        return data


def _slice_of(split: PreparedSplit | None, shard: ObjectInfo, records: _RecordStream) -> FileSlice:
    if split is None:
        return _WHOLE_FILE
    if shard.path not in split.files:
        raise records.damage("no file of the split, says dataset_info.json")
    return split.files[shard.path]


def _check_count(records: _RecordStream, number: int, wanted: FileSlice) -> None:
    """Raise ShardDamaged where a file has ended before the record that dataset_info.json says is its last."""
    if wanted.num_records is not None and number < wanted.num_records:
        expected = f"the {wanted.num_records:,} that dataset_info.json says"
        raise records.damage(f"the end of the file after {number:,} records, not {expected}")


def _masked_crc32c(data: bytes) -> int:
    """CRC32C, rotated right by 15 bits plus a constant: so that a checksum of data with checksums still tells."""
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
