"""WebDataset shards: tar archives whose consecutive members with one key are one sample; nothing is unpacked to disk.

The rules:

- The key is the member's path up to the first dot of its file name, folders kept; the rest of the file name, in lower
  case, is the extension: "a/b.seg.PNG" is key "a/b", extension "seg.png". File names that start with a dot or have
  none have no key; they, folders, and names with a step like `__meta__` are passed over.
- A record is a run of members with one key. An extension that the run already has begins a new record, so keys may
  repeat, and members of interleaved keys become records of their own.
- The image is the member with the first extension of the recipe's `image` list that the record has. A record without
  one counts, as a `no_image` reject.
- Links, devices, pipes and sparse files have no bytes: as an image they are `no_image`, as a label `bad_label`.
- A label or metadata member above 1 MiB is not read: `bad_label`, or null metadata. Members that the recipe does not
  name are never read. Where the image and the label are both bad, the image is the reason.
- A record's offsets run from its first header block to that of the next record, or to the end-of-archive marker.

Compressed archives (.tar.gz, .tgz, .tar.zst) are read from the start each time; gzip's checksum stands at the very end,
so samples before a damage that only it shows were already given. zstd windows above 128 MiB are refused.
Source: the grouping rule of github.com/webdataset/webdataset, wds.tariterators.group_by_keys.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, BinaryIO, cast, final

import pyarrow as pa

from engine.schema import RejectReason
from engine.shards.base import Resume, Sample, ShardReader, objects_matching
from engine.shards.image_bytes import Problem, size_problem
from engine.shards.kinds import WebDatasetSource
from engine.shards.member_text import (
    MAX_TEXT_BYTES,
    BadText,
    MemberText,
    TextField,
    label_of,
    metadata_of,
    parse_field,
)
from engine.shards.tar_search import Stretch, find_record
from engine.shards.tar_stream import FOLDER, TarMember, TarStream
from engine.storage import ObjectInfo, Store

_KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_META_STEP = re.compile(r"(?:.*/)?__[^/]*__(?:/.*)?", re.DOTALL)


@final
class WebDatasetReader(ShardReader):
    """Reads the shards of one WebDataset source.

    Args:
        config: of the source.
        max_sample_bytes: a larger image is skipped, not read.
    """

    def __init__(self, config: WebDatasetSource, max_sample_bytes: int) -> None:
        self._pattern = config.pattern
        self._wanted = _Wanted(config, max_sample_bytes)

    def list_shards(self, store: Store) -> Iterator[ObjectInfo]:
        return objects_matching(store, self._pattern)

    def read(
        self, store: Store, shard: ObjectInfo, resume: Resume, on_bytes: Callable[[int], None] | None = None
    ) -> Iterator[Sample]:
        opened = next((open_ for end, open_ in _COMPRESSED.items() if shard.path.lower().endswith(end)), None)
        is_compressed = opened is not None
        if is_compressed and resume.offset is not None:
            raise ValueError(f"{shard.path} is compressed and cannot be entered at byte {resume.offset}")
        reported = 0
        with contextlib.closing(store.open_input(shard, resume.offset or 0)) as source:
            stream = opened(source) if opened else cast(BinaryIO, source)
            tar = TarStream(stream, resume.offset or 0, f"{store.uri}/{shard.path}")
            try:
                for sample in self._samples(tar, resume, has_offsets=not is_compressed):
                    yield sample
                    if on_bytes:
                        on_bytes(source.bytes_read - reported)
                        reported = source.bytes_read
            finally:
                if on_bytes:
                    on_bytes(source.bytes_read - reported)

    def find(
        self,
        store: Store,
        shard: ObjectInfo,
        key: str,
        stretch: Stretch,
        on_bytes: Callable[[int], None] | None = None,
    ) -> Sample | None:
        """One sample of a plain tar without what is before it; None where it is not found so. Its index is -1.

        Args:
            stretch: records that it is among.
            store, shard, on_bytes: as of `read`.

        Raises:
            ObjectChanged, ObjectNotFound: the shard was replaced or removed.
        """

        def read(offset: int, length: int) -> bytes:
            data = store.read(shard.path, offset, length, expected=shard)
            if on_bytes:
                on_bytes(len(data))
            return data

        def parse(data: bytes, offset: int) -> Iterator[Sample]:
            tar = TarStream(io.BytesIO(data), offset, f"{store.uri}/{shard.path}")
            return self._samples(tar, Resume(0, offset), has_offsets=True)

        found = find_record(key, stretch, read, parse)
        return found and replace(found, index=-1)

    def _samples(self, tar: TarStream, resume: Resume, has_offsets: bool) -> Iterator[Sample]:
        """A record becomes a sample when the next one begins, or the archive has ended as it should."""
        index = 0 if resume.offset is None else resume.index
        record: _Record | None = None
        for member in tar.members():
            name = _key_and_extension(member)
            if name is None:
                continue
            key, extension = name
            if record is None or key != record.key or extension in record.extensions:
                if record is not None:
                    if index >= resume.index:
                        yield record.to_sample(index, member.offset, has_offsets)
                    index += 1
                record = _Record(self._wanted, key, member.offset)
            record.add(extension, member, tar)
        if record is not None and index >= resume.index:
            yield record.to_sample(index, tar.end_offset, has_offsets)


def first_record(store: Store, shard: ObjectInfo) -> dict[str, tuple[int, bytes | None]]:
    """The members of a shard's first record by their extension: bytes of each, and its data where it is short enough
    for a text; nothing where there is no record.

    Raises:
        ShardDamaged: the archive breaks its format before the record ends.
    """
    members: dict[str, tuple[int, bytes | None]] = {}
    first: str | None = None
    with contextlib.closing(store.open_input(shard)) as source:
        opened = next((open_ for end, open_ in _COMPRESSED.items() if shard.path.lower().endswith(end)), None)
        tar = TarStream(opened(source) if opened else cast(BinaryIO, source), 0, f"{store.uri}/{shard.path}")
        for member in tar.members():
            name = _key_and_extension(member)
            if name is None:
                continue
            first = first or name[0]
            if name[0] != first or name[1] in members:
                break
            is_text = member.special is None and member.size <= MAX_TEXT_BYTES
            members[name[1]] = member.size, tar.read() if is_text else None
    return members


@final
class _Wanted:
    """What the recipe wants of each record."""

    def __init__(self, config: WebDatasetSource, max_sample_bytes: int) -> None:
        self.image_ranks = {extension: rank for rank, extension in enumerate(config.image)}
        self.image_names = ", ".join(config.image)
        self.label: TextField | None = parse_field(config.label) if config.label is not None else None
        self.metadata = tuple(parse_field(notation) for notation in config.metadata)
        fields = (*((self.label,) if self.label else ()), *self.metadata)
        self.text_extensions = frozenset(field.extension for field in fields)
        self.max_sample_bytes = max_sample_bytes


@final
class _Record:
    """The members of one key, as they come."""

    def __init__(self, wanted: _Wanted, key: str, begin_offset: int) -> None:
        self._wanted, self.key, self._begin_offset = wanted, key, begin_offset
        self.extensions: set[str] = set()
        self._rank = len(wanted.image_ranks)
        self._image: bytes | None = None
        self._size_bytes = 0
        self._problem: Problem | None = (RejectReason.NO_IMAGE, f"no member named .{wanted.image_names}")
        self._texts: dict[str, MemberText] = {}

    def add(self, extension: str, member: TarMember, tar: TarStream) -> None:
        """Take the member that `tar` stands at."""
        self.extensions.add(extension)
        rank = self._wanted.image_ranks.get(extension, self._rank)
        if rank < self._rank:
            self._rank, self._image, self._size_bytes = rank, None, member.size
            self._problem = _image_problem(member, self._wanted.max_sample_bytes)
            if self._problem is None:
                self._image = tar.read()
        elif extension in self._wanted.text_extensions:
            self._texts[extension] = _member_text(extension, member, tar)

    def to_sample(self, index: int, end_offset: int, has_offsets: bool) -> Sample:
        label, label_problem = self._label()
        return Sample(
            key=self.key,
            index=index,
            image=self._image,
            label=label,
            metadata=tuple(metadata_of(f, self._texts.get(f.extension)) for f in self._wanted.metadata),
            begin_offset=self._begin_offset if has_offsets else None,
            end_offset=end_offset if has_offsets else None,
            problem=self._problem or label_problem,
            size_bytes=self._size_bytes,
        )

    def _label(self) -> tuple[str | None, Problem | None]:
        field = self._wanted.label
        if field is None:
            return None, None
        try:
            return label_of(field, self._texts.get(field.extension)), None
        except BadText as error:
            return None, (RejectReason.BAD_LABEL, f"label member .{field.extension}: {error}")


class _Zstd:
    """The `read` of a zstd file, with errors as gzip has them."""

    def __init__(self, source: BinaryIO) -> None:
        self._stream = pa.CompressedInputStream(pa.PythonFile(source, "r"), "zstd")

    def read(self, size: int) -> bytes:
        try:
            data: bytes = self._stream.read(size)
        except OSError as error:  # of Arrow; a store's errors are not OSErrors, and pass
            raise EOFError(str(error)) from None
        return data


_COMPRESSED: dict[str, Callable[[Any], BinaryIO]] = {
    ".tar.gz": lambda source: cast(BinaryIO, gzip.GzipFile(fileobj=source)),
    ".tgz": lambda source: cast(BinaryIO, gzip.GzipFile(fileobj=source)),
    ".tar.zst": lambda source: cast(BinaryIO, _Zstd(source)),
}


def _key_and_extension(member: TarMember) -> tuple[str, str] | None:
    """None for members that belong to no record."""
    match = _KEY_AND_EXTENSION.fullmatch(member.name)
    if match is None or member.special == FOLDER or _META_STEP.fullmatch(member.name):
        return None
    return match[1], match[2].lower()


def _image_problem(member: TarMember, max_sample_bytes: int) -> Problem | None:
    if member.special is not None:
        return RejectReason.NO_IMAGE, f"the image member is {member.special}, which is not followed"
    return size_problem("the image member", member.size, max_sample_bytes)


def _member_text(extension: str, member: TarMember, tar: TarStream) -> MemberText:
    if member.special is not None:
        return MemberText(b"", f"it is {member.special}, which is not followed")
    if member.size > MAX_TEXT_BYTES:
        return MemberText(b"", f"it has {member.size:,} bytes; at most {MAX_TEXT_BYTES:,} are read")
    return MemberText(tar.read())
