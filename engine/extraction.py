"""The plain stages of extraction: a shard becomes parts of pixels, pixels become embeddings, a part is written.

No Ray here: `engine.on_ray` strings these callables together, and tests run them in one process. Labels that are made
of embeddings on the way are `engine.labelling`'s business. Between the stages one part travels as one Arrow row, so
that no executor can split or merge it. What a stage yields is fixed by its arguments alone: the set of existing parts
is passed in, the output is never listed here.

Shape letters: N samples of a part that have an image, S input side in pixels, D embedding width.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from engine.backbones.kinds import BackboneConfig
from engine.embedder import Embedder
from engine.errors import EngineError, ObjectChanged, ObjectNotFound, ShardDamaged
from engine.images import ImageRejected, decode_image
from engine.parts import PartName, part_name
from engine.predictor import BundleCounts
from engine.recipes import Limits
from engine.runtimes.base import FrozenGraph
from engine.runtimes.kinds import ResolvedRuntime, RuntimeConfig, import_runtime
from engine.schema import EmbeddingDtype, RejectReason, RejectStage, embeddings_schema, rejects_schema
from engine.shards.base import Resume, Sample, ShardReader
from engine.shards.kinds import SourceConfig, open_reader
from engine.storage import ObjectInfo, StorageConfig, Store, open_store
from engine.tables import EmbeddingPartFacts, ShardPartFacts, read_shard_facts, write_embedding_part
from engine.worklist import ShardWork

PIXEL_BYTES_PER_PART = 64_000_000
ROWS_PER_PART_STEP = 64
ROWS_PER_PART_MAX = 1024
# Of one part that travels undecoded (see `read_parts`); a part with more is decoded where it is read.
MAX_ENCODED_BYTES = 128 << 20
DECODE_NICENESS = 5
ENCODED_AHEAD_BYTES = 64 << 20  # of images that wait for a decoding thread
# Images that a decoding thread is handed at once: each time costs two threads a switch.
DECODE_GROUP = 4
DECODE_GROUP_BYTES = 1 << 20  # a group with more of them is not waited for to be full


def default_rows_per_part(input_size_px: int) -> int:
    """Samples per part so that its pixels take about 64 MB: a multiple of 64, from 64 to 1,024."""
    rows = PIXEL_BYTES_PER_PART // (input_size_px**2 * 3)
    return min(ROWS_PER_PART_MAX, max(ROWS_PER_PART_STEP, rows // ROWS_PER_PART_STEP * ROWS_PER_PART_STEP))


@dataclass(frozen=True)
class ExtractJob:
    """What every stage needs to know; small, picklable, known before the network is loaded.

    Attributes:
        runtime: as the recipe says it; what it means is in the `Setup`.
        table_uri: of the table that is filled; of several, of any.
        rows_per_part: samples in one part, resolved.
        decode_threads: threads in each reader.
        embed_threads: threads of each actor, None for the runtime's default.
        use_gpu: whether actors have a GPU.
    """

    source: SourceConfig
    storage: StorageConfig
    backbone: BackboneConfig
    runtime: RuntimeConfig
    limits: Limits
    table_uri: str
    dtype: EmbeddingDtype
    rows_per_part: int
    decode_threads: int = 1
    embed_threads: int | None = None
    use_gpu: bool = False


@dataclass(frozen=True)
class Setup:
    """What loading the backbone once has settled, as actors need it.

    Attributes:
        graph, runtime: what is run, and how.
        fingerprint, canary: of the table; every actor must compute the same.
    """

    graph: FrozenGraph
    runtime: ResolvedRuntime
    fingerprint: str
    canary: tuple[tuple[float, ...], ...]

    def open_embedder(self, num_threads: int | None, use_gpu: bool) -> Embedder:
        """The network, loaded into this process and checked.

        Raises:
            CanaryMismatch: this process computes other numbers than the table was made with.
        """
        embedder = Embedder(self.graph, self.runtime, num_threads, use_gpu)
        embedder.check(np.asarray(self.canary, np.float32))
        return embedder


class Answer(Protocol):
    """Something that another process is still at; picklable."""

    def get(self) -> Any:
        """Wait for it; raises what that process raised."""


# ---------------------------------------------------------------- what travels between the stages


@dataclass(frozen=True)
class PartHeader:
    """What is known of a part besides its samples.

    Attributes:
        shard, identity: relative path, and the object's identity when it was listed.
        number: of the part within its shard; for a failed shard, of the part that could not be made.
        fingerprint: of the table, once there are embeddings.
        damage: why the shard cannot be read on from here; such a header has no samples.
        samples: rows + rejects.
        lacking: of several tables, the places of those that lack this part; empty: all that are filled.
        bytes_read: from the source, since the part before.
        read_s, decode_s, embed_s, write_s: seconds that each stage was busy with the part. Of a processor: decode, and
            embed without a GPU; of the clock: all others.
    """

    shard: str
    identity: str
    number: int
    last: bool = False
    begin_offset: int | None = None
    end_offset: int | None = None
    samples: int = 0
    lacking: tuple[int, ...] = ()
    fingerprint: str = ""
    damage: str | None = None
    bytes_read: int = 0
    read_s: float = 0.0
    decode_s: float = 0.0
    embed_s: float = 0.0
    write_s: float = 0.0

    @staticmethod
    def of_json(fields: dict[str, Any]) -> PartHeader:
        """From the fields as JSON has them."""
        return PartHeader(**{**fields, "lacking": tuple(fields["lacking"])})


@dataclass(frozen=True)
class Part:
    """A part on its way: after decoding `array` is pixels uint8 (N, S, S, 3), after embedding float (N, D).

    Where reading and decoding are stages of their own there is only `encoded` in between: the samples as read. Where
    it is labelled there are `predictions` of each bundle, None for those whose table has the part; embeddings that are
    not kept do not travel on.
    """

    header: PartHeader
    samples: pa.Table | None = None
    rejects: pa.Table | None = None
    array: np.ndarray | None = None
    encoded: pa.Table | None = None
    predictions: tuple[pa.Table | None, ...] = ()

    def to_row(self) -> pa.Table:
        """One Arrow row, whatever the number of samples; the array's buffer is not copied."""
        shape = list(self.array.shape) if self.array is not None else None
        dtype = str(self.array.dtype) if self.array is not None else None
        header = {**asdict(self.header), "shape": shape, "dtype": dtype, "bundles": len(self.predictions)}
        return pa.table(
            {
                "header": pa.array([json.dumps(header)]),
                "samples": _one_table(self.samples),
                "rejects": _one_table(self.rejects),
                "array": _one_array(self.array),
                "encoded": _one_table(self.encoded),
                **{_of_bundle(place): _one_table(one) for place, one in enumerate(self.predictions)},
            }
        )

    @staticmethod
    def from_row(row: pa.Table) -> Part:
        """Inverse of `to_row`; the array is a read-only view of the row's buffer."""
        fields = json.loads(row["header"][0].as_py())
        shape, dtype, bundles = fields.pop("shape"), fields.pop("dtype"), fields.pop("bundles")
        array = None
        if shape is not None:
            array = np.frombuffer(_bytes_of(row["array"]) or b"", dtype).reshape(shape)
        samples, rejects, encoded = (_from_ipc(row[name]) for name in ("samples", "rejects", "encoded"))
        predictions = tuple(_from_ipc(row[_of_bundle(place)]) for place in range(bundles))
        return Part(PartHeader.of_json(fields), samples, rejects, array, encoded, predictions)


def _of_bundle(place: int) -> str:
    """The column of its predictions."""
    return f"predictions {place}"


def _one_table(table: pa.Table | None) -> pa.Array:
    """A column of one value; undecoded images are so large that each copy counts: one, into a buffer of its size."""
    if table is None:
        return _one_value(None)
    size = pa.MockOutputStream()
    with pa.ipc.new_stream(size, table.schema) as writer:
        writer.write_table(table)
    data = pa.allocate_buffer(size.size())
    with pa.ipc.new_stream(pa.FixedSizeBufferWriter(data), table.schema) as writer:
        writer.write_table(table)
    return _one_value(data)


def _from_ipc(column: pa.ChunkedArray) -> pa.Table | None:
    data = _bytes_of(column)
    return pa.ipc.open_stream(data).read_all() if data is not None else None


def _bytes_of(column: pa.ChunkedArray) -> pa.Buffer | None:
    """The one value of a column, as it lies there: `column[0].as_buffer()` would copy it (pyarrow 26)."""
    (chunk,) = (chunk for chunk in column.chunks if len(chunk))  # Arrow allows empty ones beside it
    if chunk.null_count:
        return None
    _, offsets, data = chunk.buffers()
    begin, end = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + 2]
    return data.slice(begin, end - begin)


def _one_array(array: np.ndarray | None) -> pa.Array:
    if array is None:
        return _one_value(None)
    return _one_value(pa.py_buffer(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))


def _one_value(data: pa.Buffer | None) -> pa.Array:
    if data is None:
        return pa.nulls(1, pa.large_binary())
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, data])


# ---------------------------------------------------------------- stage 1: read and decode


def read_parts(job: ExtractJob, works: Sequence[ShardWork], apart: bool = False) -> Iterator[pa.Table]:
    """Read shards and yield each missing part as a row; a shard that cannot be read on yields a row that says so.

    Args:
        apart: leave the decoding to `decode_part`: where there are fewer shards than cores to decode on, one large
            shard then keeps many of them busy. Encoded images are copied once more for it.

    Raises:
        StorageError: the store itself is at fault (denied, unreachable), so going on makes no sense.
    """
    source = open_store(job.source.uri, job.storage)
    table = open_store(job.table_uri, job.storage)
    reader = open_reader(job.source, job.limits.max_sample_bytes)
    with _decode_pool(job) as pool:
        for work in works:
            for part in _parts_of_shard(job, reader, source, table, work, pool, apart):
                yield part.to_row()


def decode_part(job: ExtractJob, row: pa.Table) -> pa.Table:
    """Decode a part that was read `apart`; any other row is handed on."""
    part = Part.from_row(row)
    if part.encoded is None:
        return row
    header = part.header
    with _decode_pool(job) as pool:
        builder = _PartBuilder(job, header, pool)
        for sample in _samples_of(part.encoded):
            builder.add(sample, wanted=True)
        return builder.finish(header.last, header.bytes_read, header.read_s).to_row()


def _decode_pool(job: ExtractJob) -> ThreadPoolExecutor:
    """Threads that give way to the network where both are on the same cores: it never waits for a core, while they wait
    for it anyway when they are ahead."""

    def give_way() -> None:
        with contextlib.suppress(OSError):  # Linux takes it for this thread alone
            if not job.use_gpu and sys.platform == "linux":
                thread = threading.get_native_id()
                niceness = os.getpriority(os.PRIO_PROCESS, thread) + DECODE_NICENESS
                os.setpriority(os.PRIO_PROCESS, thread, niceness)  # at most 19, says Linux

    return ThreadPoolExecutor(job.decode_threads, thread_name_prefix="decode", initializer=give_way)


def _parts_of_shard(
    job: ExtractJob,
    reader: ShardReader,
    source: Store,
    table: Store,
    work: ShardWork,
    pool: ThreadPoolExecutor,
    apart: bool,
) -> Iterator[Part]:
    shard, existing = work.shard, work.existing
    kind = _EncodedBuilder if apart else _PartBuilder
    number = existing.first_missing
    resume = _resume_point(job, table, work)
    meter = _ReadMeter()
    builder = kind(job, _header_of(work, number), pool)
    try:
        samples = meter.timed(reader.read(source, shard, resume, on_bytes=meter.add_bytes))
        for sample in samples:
            if not work.has(sample.index):
                continue
            if builder.is_full:
                if number not in existing.numbers:
                    yield builder.finish(False, meter.take_bytes(), meter.take_seconds())
                number += 1
                if existing.last is not None and number > existing.last:
                    return
                builder = kind(job, _header_of(work, number), pool)
            builder.add(sample, wanted=number not in existing.numbers)
        if number not in existing.numbers:
            yield builder.finish(True, meter.take_bytes(), meter.take_seconds())
    except (ShardDamaged, ObjectChanged, ObjectNotFound) as error:
        builder.abandon()
        yield Part(
            PartHeader(shard.path, shard.identity, number, damage=str(error), bytes_read=meter.take_bytes())
        )


def _header_of(work: ShardWork, number: int) -> PartHeader:
    return PartHeader(work.shard.path, work.shard.identity, number, lacking=work.lacking(number))


def _resume_point(job: ExtractJob, table: Store, work: ShardWork) -> Resume:
    """Where the first missing part begins: behind the part before it, whose footer knows the byte."""
    number = work.existing.first_missing
    if number == 0:
        return Resume(index=0, offset=None)
    before = part_name(work.shard.path, work.shard.identity, number - 1, last=False)
    try:
        offset = read_shard_facts(table, before).end_offset
    except (
        ObjectNotFound,
        ObjectChanged,
    ):  # another run is at it: read from the start, the parts are the same
        offset = None
    return Resume(index=number * job.rows_per_part, offset=offset)


class _ReadMeter:
    """Bytes and seconds spent on reading, handed out part by part."""

    def __init__(self) -> None:
        self._bytes = 0
        self._seconds = 0.0

    def add_bytes(self, count: int) -> None:
        self._bytes += count

    def timed(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        while True:
            started = time.perf_counter()
            sample = next(samples, None)
            self._seconds += time.perf_counter() - started
            if sample is None:
                return
            yield sample

    def take_bytes(self) -> int:
        taken, self._bytes = self._bytes, 0
        return taken

    def take_seconds(self) -> float:
        taken, self._seconds = self._seconds, 0.0
        return taken


@dataclass(frozen=True, slots=True)
class _Reject:
    key: str
    index: int
    stage: RejectStage
    reason: RejectReason
    message: str
    size_bytes: int
    sha256: bytes | None
    encoded: bytes | None


class _Decoded(NamedTuple):
    sha256: bytes
    width_px: int
    height_px: int
    seconds: float
    rejected: ImageRejected | None


class _PixelMemory:
    """Arrays whose memory is used again once nobody holds one, nor a view or an Arrow buffer of it.

    Fresh memory of this size comes page by page from the system: 0.1 to 0.2 of the 3.2 ms that an image of 160 pixels
    cost a reader (a virtual machine, 2026-11-22).
    """

    def __init__(self, keep: int) -> None:
        # No lock: memory comes back whenever Python frees an array, even while this thread is in `array`.
        self._free = deque[mmap.mmap](maxlen=keep)

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """uint8, of any content."""
        count = math.prod(shape)
        memory = self._taken()
        if memory is None or len(memory) < count:
            memory = mmap.mmap(-1, max(1, count))
        array = np.frombuffer(memory, np.uint8)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array[:count].reshape(shape)

    def _taken(self) -> mmap.mmap | None:
        try:
            return self._free.pop()
        except IndexError:
            return None


_PIXEL_MEMORY = _PixelMemory(keep=2)  # a part that is being filled and one that is being handed on


class _PartBuilder:
    """Collects the samples of one part; images are decoded by the pool while the shard is read on.

    Args:
        header: says which part of which shard it will be.
    """

    def __init__(self, job: ExtractJob, header: PartHeader, pool: ThreadPoolExecutor) -> None:
        self._job, self._header, self._pool = job, header, pool
        self._samples: list[Sample] = []
        self._decoded: list[_Decoded | None] = []  # None: not yet, or there is no image to decode
        self._digests: list[bytes | None] = []  # of images that are rejects already when they are read
        self._group: list[tuple[int, bytes]] = []
        self._group_bytes = 0
        self._in_flight: deque[tuple[Future[None], int]] = deque()
        self._bytes_in_flight = 0
        side = job.backbone.input_size
        self._pixels_NSS3 = _PIXEL_MEMORY.array((job.rows_per_part, side, side, 3))
        self._count = 0

    @property
    def is_full(self) -> bool:
        return self._count == self._job.rows_per_part

    def add(self, sample: Sample, wanted: bool) -> None:
        """Take one sample; `wanted` is False where the part exists and its samples are only passed over."""
        self._count += 1
        if not wanted:
            return
        keeps_bytes = self._job.limits.keep_reject_bytes
        self._samples.append(sample if keeps_bytes else replace(sample, image=None))
        self._decoded.append(None)
        is_image = sample.problem is not None and sample.image is not None  # for example one with a bad label
        self._digests.append(hashlib.sha256(sample.image).digest() if is_image and sample.image else None)
        if sample.problem is None and sample.image is not None:
            self._group.append((len(self._samples) - 1, sample.image))
            self._group_bytes += len(sample.image)
            if len(self._group) == DECODE_GROUP or self._group_bytes > DECODE_GROUP_BYTES:
                self._decode_group()

    def _decode_group(self) -> None:
        """Have the collected images decoded; holds few encoded ones in memory: reading waits for decoding."""
        if not self._group:
            return
        self._in_flight.append((self._pool.submit(self._decode, self._group), self._group_bytes))
        self._bytes_in_flight += self._group_bytes
        self._group, self._group_bytes = [], 0
        at_most = 2 * self._job.decode_threads
        while len(self._in_flight) > at_most or (
            self._bytes_in_flight > ENCODED_AHEAD_BYTES and len(self._in_flight) > 1
        ):
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        future, size = self._in_flight.popleft()
        self._bytes_in_flight -= size
        future.result()

    def abandon(self) -> None:
        """Drop the part: its shard cannot be read to the part's end."""
        for future, _ in self._in_flight:
            future.cancel()

    def finish(self, last: bool, bytes_read: int, read_s: float) -> Part:
        """The part, in the order of its samples."""
        self._decode_group()
        while self._in_flight:
            self._wait_for_oldest()
        results = self._decoded
        rejects: list[_Reject] = []
        kept: list[int] = []
        for slot, (sample, decoded) in enumerate(zip(self._samples, results, strict=True)):
            reject = _reject_of(sample, decoded, self._digests[slot])
            if reject is None:
                kept.append(slot)
            else:
                rejects.append(reject)
        pixels = self._pixels_NSS3[: len(kept)] if len(kept) == len(results) else self._pixels_NSS3[kept]
        header = replace(
            self._header,
            last=last,
            begin_offset=self._samples[0].begin_offset if self._samples else None,
            end_offset=self._samples[-1].end_offset if self._samples else None,
            samples=len(self._samples),
            bytes_read=bytes_read,
            read_s=read_s,
            decode_s=sum(decoded.seconds for decoded in results if decoded),
        )
        return Part(header, self._sample_table(kept, results), self._reject_table(rejects), pixels)

    def _decode(self, group: Sequence[tuple[int, bytes]]) -> None:
        """Runs on a pool thread; each slot is one image's alone."""
        for slot, encoded in group:
            self._decoded[slot] = self._decode_one(slot, encoded)

    def _decode_one(self, slot: int, encoded: bytes) -> _Decoded:
        started = time.thread_time()
        digest = hashlib.sha256(encoded).digest()
        backbone = self._job.backbone
        try:
            image = decode_image(encoded, backbone.input_size, backbone.resize, self._job.limits.max_pixels)
        except ImageRejected as rejected:
            # Without its traceback, which holds the frames and in them the bytes of the image.
            bare = rejected.with_traceback(None)
            return _Decoded(digest, 0, 0, time.thread_time() - started, bare)
        self._pixels_NSS3[slot] = image.pixels_SS3
        return _Decoded(digest, image.width_px, image.height_px, time.thread_time() - started, None)

    def _sample_table(self, kept: Sequence[int], results: Sequence[_Decoded | None]) -> pa.Table:
        """The columns of the data part besides `embedding`."""
        schema = _samples_schema(self._job)
        samples = [self._samples[slot] for slot in kept]
        decoded = [results[slot] for slot in kept]
        columns: list[list[Any]] = [
            [sample.key for sample in samples],
            [self._header.shard] * len(kept),
            [sample.index for sample in samples],
            [sample.label for sample in samples],
            [image.width_px if image else 0 for image in decoded],
            [image.height_px if image else 0 for image in decoded],
            [image.sha256 if image else b"" for image in decoded],
            *(
                [sample.metadata[i] for sample in samples]
                for i in range(len(self._job.source.metadata_columns()))
            ),
        ]
        return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)

    def _reject_table(self, rejects: Sequence[_Reject]) -> pa.Table:
        keeps_bytes = self._job.limits.keep_reject_bytes
        rows = [
            {
                "key": reject.key,
                "shard": self._header.shard,
                "index": reject.index,
                "stage": reject.stage,
                "error": str(reject.reason),
                "message": reject.message,
                "size_bytes": reject.size_bytes,
                "sha256": reject.sha256,
                **({"bytes": reject.encoded} if keeps_bytes else {}),
            }
            for reject in rejects
        ]
        return pa.Table.from_pylist(rows, schema=rejects_schema(keeps_bytes))


class _EncodedBuilder:
    """A builder that collects and leaves the decoding to `decode_part`, unless the part is too large to travel so."""

    def __init__(self, job: ExtractJob, header: PartHeader, pool: ThreadPoolExecutor) -> None:
        self._job, self._header, self._pool = job, header, pool
        self._decoding: _PartBuilder | None = None
        self._samples: list[Sample] = []
        self._count = self._bytes = 0

    @property
    def is_full(self) -> bool:
        return self._count == self._job.rows_per_part

    def add(self, sample: Sample, wanted: bool) -> None:
        self._count += 1
        if not wanted:
            return
        self._bytes += len(sample.image or b"")
        if self._decoding is None and self._bytes > MAX_ENCODED_BYTES:
            self._decoding = _PartBuilder(self._job, self._header, self._pool)
            for earlier in self._samples:
                self._decoding.add(earlier, wanted=True)
            self._samples.clear()
        if self._decoding is not None:
            self._decoding.add(sample, wanted=True)
        else:
            self._samples.append(sample)

    def abandon(self) -> None:
        if self._decoding is not None:
            self._decoding.abandon()

    def finish(self, last: bool, bytes_read: int, read_s: float) -> Part:
        if self._decoding is not None:
            return self._decoding.finish(last, bytes_read, read_s)
        header = replace(self._header, last=last, bytes_read=bytes_read, read_s=read_s)
        part = encoded_part(header, self._samples)
        self._samples.clear()  # the images are in the part now
        return part


def encoded_part(header: PartHeader, samples: Sequence[Sample]) -> Part:
    """A part of samples as they were read, for `decode_part`."""
    return Part(header, encoded=_table_of(samples))


_SAMPLES_AS_READ = pa.schema(
    [
        ("key", pa.large_string()),
        ("index", pa.int64()),
        ("image", pa.large_binary()),
        ("label", pa.large_string()),
        ("metadata", pa.list_(pa.large_string())),
        ("begin_offset", pa.int64()),
        ("end_offset", pa.int64()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("size_bytes", pa.int64()),
    ]
)


def _table_of(samples: Sequence[Sample]) -> pa.Table:
    plain = ("key", "index", "image", "label", "metadata", "begin_offset", "end_offset", "size_bytes")
    columns: dict[str, list[Any]] = {name: [getattr(sample, name) for sample in samples] for name in plain}
    problems = [sample.problem or (None, None) for sample in samples]
    columns["reason"] = [None if reason is None else str(reason) for reason, _ in problems]
    columns["message"] = [message for _, message in problems]
    return pa.table(
        [pa.array(columns[field.name], field.type) for field in _SAMPLES_AS_READ], _SAMPLES_AS_READ
    )


def _samples_of(table: pa.Table) -> Iterator[Sample]:
    """Inverse of `_table_of`, one sample in memory at a time."""
    for batch in table.to_batches(max_chunksize=1):
        (row,) = batch.to_pylist()
        reason, message, metadata = row.pop("reason"), row.pop("message"), row.pop("metadata")
        problem = (RejectReason(reason), message) if reason is not None else None
        yield Sample(problem=problem, metadata=tuple(metadata), **row)


def _reject_of(sample: Sample, decoded: _Decoded | None, digest: bytes | None) -> _Reject | None:
    stage: Literal["read", "decode"]
    if sample.problem is not None:
        (reason, message), stage = sample.problem, "read"
    elif decoded is None or decoded.rejected is None:
        return None
    else:
        reason, message, stage = decoded.rejected.reason, decoded.rejected.message, "decode"
    digest = decoded.sha256 if decoded else digest
    return _Reject(sample.key, sample.index, stage, reason, message, sample.size_bytes, digest, sample.image)


def _samples_schema(job: ExtractJob) -> pa.Schema:
    schema = embeddings_schema(1, job.dtype, job.source.metadata_columns())
    return schema.remove(schema.get_field_index("embedding"))


# ---------------------------------------------------------------- stage 2: embed


class PartEmbedder:
    """Actor body: pixels of a part -> embeddings of a part; rows the network cannot answer become rejects.

    May be called from several threads. A processor computes one part at a time. A GPU is given the next part's batches
    while it is busy with the last of one: a part at a time, ResNet50 in float32 ran at 1,873 images/s on an H100 that
    does 2,885 (parts of 250 images, 2026-11-23).

    Args:
        setup: waited for; whatever can be imported before it comes is.

    Raises:
        EngineError: as the process that makes the setup raised it.
        CanaryMismatch: this process computes other numbers than the table was made with.
    """

    def __init__(self, job: ExtractJob, setup: Answer) -> None:
        import_runtime(job.runtime)
        settled: Setup = setup.get()
        self._job, self._fingerprint = job, settled.fingerprint
        self._embedder = settled.open_embedder(job.embed_threads, job.use_gpu)
        self._at_once = contextlib.nullcontext() if job.use_gpu else threading.Lock()
        self._clock = _BusyClock(time.perf_counter if job.use_gpu else time.process_time)

    def __call__(self, row: pa.Table) -> pa.Table:
        return self.answered(row, self.embedded)

    def answered(self, row: pa.Table, compute: Callable[[Part], Part]) -> pa.Table:
        """What is computed of a part in its turn, timed; a shard's damage is handed on."""
        part = Part.from_row(row)
        if part.header.damage is not None:
            return row
        with self._at_once:
            self._clock.begin()
            try:
                answer = compute(part)
            finally:
                seconds = self._clock.end()
        return replace(answer, header=replace(answer.header, embed_s=seconds)).to_row()

    def embedded(self, part: Part) -> Part:
        """The part with embeddings in place of pixels."""
        assert part.array is not None and part.samples is not None and part.rejects is not None
        embeddings_ND = self._embedder.embed(part.array)
        with np.errstate(over="ignore"):  # beyond float16's range: becomes infinite, and so a reject
            embeddings_ND = embeddings_ND.astype(self._job.dtype, copy=False)
        header = replace(part.header, fingerprint=self._fingerprint)
        return _without_unusable(Part(header, part.samples, part.rejects, embeddings_ND))


class _BusyClock:
    """Seconds in which at least one of several overlapping pieces of work was under way, each counted once.

    Args:
        now: the clock.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self._lock = now, threading.Lock()
        self._under_way, self._since, self._untold = 0, 0.0, 0.0

    def begin(self) -> None:
        """A piece begins."""
        with self._lock:
            self._count()
            self._under_way += 1

    def end(self) -> float:
        """A piece ends: the busy seconds since one ended last, so that all answers add up to the busy time."""
        with self._lock:
            self._count()
            self._under_way -= 1
            seconds, self._untold = self._untold, 0.0
            return seconds

    def _count(self) -> None:
        now = self._now()
        if self._under_way:
            self._untold += now - self._since
        self._since = now


def _without_unusable(part: Part) -> Part:
    """Move rows whose embedding is zero or not finite to the rejects."""
    assert part.array is not None and part.samples is not None and part.rejects is not None
    finite = np.isfinite(part.array).all(axis=1)
    usable = finite & part.array.any(axis=1)
    if usable.all():
        return part
    rejects = part.samples.filter(pa.array(~usable))
    reasons = [
        RejectReason.ZERO_EMBEDDING if row_is_finite else RejectReason.NON_FINITE_EMBEDDING
        for row_is_finite in finite[~usable]
    ]
    added = pa.Table.from_pylist(
        [
            {
                **{name: row[name] for name in ("key", "shard", "index", "sha256")},
                "stage": "embed",
                "error": str(reason),
                "message": f"the network's answer for a {row['image_width']} x {row['image_height']} image",
                "size_bytes": 0,
            }
            for row, reason in zip(rejects.to_pylist(), reasons, strict=True)
        ],
        schema=part.rejects.schema,
    )
    in_order = pa.concat_tables([part.rejects, added]).sort_by("index")
    return Part(part.header, part.samples.filter(pa.array(usable)), in_order, part.array[usable])


# ---------------------------------------------------------------- stage 3: write


@dataclass(frozen=True)
class Receipt:
    """What the driver hears of a part that is committed, or of a shard that failed (`header.damage`).

    Attributes:
        bundles: what was written for each of them that lacked the part, by its place.
    """

    header: PartHeader
    rows: int = 0
    rejects: int = 0
    reject_reasons: dict[str, int] = field(default_factory=dict)
    bundles: dict[int, BundleCounts] = field(default_factory=dict)

    def to_row(self) -> pa.Table:
        return pa.table({"receipt": [json.dumps(asdict(self))]})

    @staticmethod
    def from_json(text: str) -> Receipt:
        fields = json.loads(text)
        bundles = {int(place): BundleCounts(**counts) for place, counts in fields["bundles"].items()}
        return Receipt(**{**fields, "header": PartHeader.of_json(fields["header"]), "bundles": bundles})


def write_part(job: ExtractJob, row: pa.Table) -> pa.Table:
    """Commit one part and answer with its receipt."""
    part = Part.from_row(row)
    if part.header.damage is not None:
        return Receipt(part.header).to_row()
    started = time.perf_counter()
    write_embeddings(job, part)
    return receipt_of(part, started).to_row()


def name_of(header: PartHeader) -> PartName:
    """Of the part's files."""
    return part_name(header.shard, header.identity, header.number, header.last)


def write_embeddings(job: ExtractJob, part: Part) -> ObjectInfo:
    """Commit the embeddings and rejects of a part.

    Raises:
        EngineError: it does not account for every sample.
    """
    facts = EmbeddingPartFacts(**asdict(shard_facts(job, part)), embeddings_sha256="")
    assert part.rejects is not None
    store = open_store(job.table_uri, job.storage)
    return write_embedding_part(store, name_of(part.header), embedding_rows(job, part), part.rejects, facts)


def shard_facts(job: ExtractJob, part: Part) -> ShardPartFacts:
    """What the footer of a part says of its shard, whatever is made of it.

    Raises:
        EngineError: a sample is neither a row nor a reject.
    """
    _require_accounted(part)
    assert part.rejects is not None
    header = part.header
    return ShardPartFacts(
        fingerprint=header.fingerprint,
        source_uri=job.source.uri,
        shard=header.shard,
        identity=header.identity,
        begin_offset=header.begin_offset,
        end_offset=header.end_offset,
        samples=header.samples,
        rejects=part.rejects.num_rows,
        rejects_sha256=None,
    )


def _require_accounted(part: Part) -> None:
    """Every sample is a row or a reject; EngineError where one got lost between the stages."""
    assert part.samples is not None and part.rejects is not None
    header = part.header
    if part.samples.num_rows + part.rejects.num_rows != header.samples:
        raise EngineError(
            f"{header.shard}: part {header.number} does not account for every sample",
            found=f"{part.samples.num_rows} rows + {part.rejects.num_rows} rejects",
            wanted=f"{header.samples} samples",
            way_out="this is a defect of the engine: nothing was written for this part",
        )


def receipt_of(part: Part, started: float) -> Receipt:
    """Of a part that is committed now.

    Args:
        started: when its writing began, as `time.perf_counter` says.
    """
    assert part.samples is not None and part.rejects is not None
    return Receipt(
        replace(part.header, write_s=time.perf_counter() - started),
        rows=part.samples.num_rows,
        rejects=part.rejects.num_rows,
        reject_reasons=dict(Counter(part.rejects["error"].to_pylist())),
    )


def embedding_rows(job: ExtractJob, part: Part) -> pa.Table:
    """Samples and embeddings side by side, columns in the order of the schema."""
    assert part.array is not None and part.samples is not None
    schema = embeddings_schema(part.array.shape[1], job.dtype, job.source.metadata_columns())
    numbers = pa.array(np.ascontiguousarray(part.array).reshape(-1))
    embedding = pa.FixedSizeListArray.from_arrays(numbers, type=schema.field("embedding").type)
    columns = {**{name: part.samples[name] for name in part.samples.column_names}, "embedding": embedding}
    return pa.table([columns[name] for name in schema.names], schema=schema)
