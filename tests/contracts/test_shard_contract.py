"""What every kind of source must do, whatever its format: one suite, parametrised over the kinds."""

from __future__ import annotations

import gzip
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.errors import ObjectChanged, ObjectNotFound
from engine.schema import RejectReason, embeddings_schema
from engine.shards.base import TABLE_COLUMNS, Resume, Sample, ShardReader
from engine.shards.kinds import ParquetSource, SourceConfig, TFRecordSource, WebDatasetSource, open_reader
from engine.storage import ObjectInfo, Store, open_store
from tests.shards.archives import member, tar_bytes
from tests.shards.reading import read_until_damage
from tests.shards.tfrecords import Value, example, tfrecord_bytes

MAX_SAMPLE_BYTES = 3000


@dataclass(frozen=True)
class Record:
    """A record to be written; `image` None: it has none."""

    key: str
    image: bytes | None
    label: str | None = None
    camera: str | None = None


@dataclass(frozen=True)
class Kind:
    """How the suite writes shards of one kind, and what the kind can do."""

    extension: str
    encode: Callable[[Sequence[Record]], bytes]
    source: Callable[[str], SourceConfig]
    has_offsets: bool
    marks_its_end: bool = True
    """False: a shard that was cut between two records cannot be told from a whole one."""


def _tar(records: Sequence[Record]) -> bytes:
    members = []
    for record in records:
        members += [member(f"{record.key}.jpg", record.image)] if record.image is not None else []
        members += [member(f"{record.key}.cls", record.label.encode())] if record.label is not None else []
        members += [member(f"{record.key}.txt", record.camera.encode())] if record.camera is not None else []
    return tar_bytes(members)


def _web_dataset(pattern: str) -> Callable[[str], SourceConfig]:
    return lambda uri: WebDatasetSource(uri=uri, pattern=pattern, label="cls", metadata=("txt",))


def _zstd(data: bytes) -> bytes:
    """Frames of 1,000 bytes: a zstd file may have several, as `cat` or `pzstd` make them."""
    pieces = [data[start : start + 1000] for start in range(0, len(data), 1000)]
    return b"".join(pa.Codec("zstd").compress(piece, asbytes=True) for piece in pieces)


def _tfrecord(compression: str = "") -> Callable[[Sequence[Record]], bytes]:
    def encode(records: Sequence[Record]) -> bytes:
        examples = []
        for record in records:
            features: dict[str, Value] = {"id": record.key.encode()}
            features |= {"image/encoded": record.image} if record.image is not None else {}
            features |= {"cls": record.label.encode()} if record.label is not None else {}
            features |= {"txt": record.camera.encode()} if record.camera is not None else {}
            examples.append(example(features))
        return tfrecord_bytes(examples, compression)

    return encode


def _tfrecord_source(uri: str) -> SourceConfig:
    return TFRecordSource(uri=uri, label="cls", key="id", metadata=("txt",))


def _parquet(records: Sequence[Record]) -> bytes:
    """Row groups of three rows."""
    columns = {
        "key": pa.array([record.key for record in records], pa.string()),
        "image": pa.array([record.image for record in records], pa.binary()),
        "cls": pa.array([record.label for record in records], pa.string()),
        "txt": pa.array([record.camera for record in records], pa.string()),
    }
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, row_group_size=3)
    return file.getvalue()


def _parquet_source(uri: str) -> ParquetSource:
    return ParquetSource(uri=uri, label="cls", key="key", metadata=("txt",))


KINDS = {
    "parquet": Kind(".parquet", _parquet, _parquet_source, has_offsets=False),
    "tar": Kind(".tar", _tar, _web_dataset("*.tar"), has_offsets=True),
    "tar.gz": Kind(
        ".tar.gz", lambda r: gzip.compress(_tar(r), mtime=0), _web_dataset("*.tar.gz"), has_offsets=False
    ),
    "tar.zst": Kind(".tar.zst", lambda r: _zstd(_tar(r)), _web_dataset("*.tar.zst"), has_offsets=False),
    "tfrecord": Kind(".tfrecord", _tfrecord(), _tfrecord_source, has_offsets=True, marks_its_end=False),
    "tfrecord.gz": Kind(".tfrecord.gz", _tfrecord("GZIP"), _tfrecord_source, has_offsets=False),
}

RECORDS = (
    Record("b/0", b"\xff" * 1021, "cat", "Leica"),
    Record("b/1", None, "dog", "Nikon"),
    Record("b/2", b"", "dog"),
    Record("b/3", b"\xfe" * 2999, None, "Leica"),
    Record("b/4", b"\xfd" * 3001, "cow"),
    Record("a/5", b"\xfc" * 512, "žába\n"),
    Record("a/6", b"\xfb", "7", "Canon"),
)


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "source"))


@pytest.fixture
def reader(kind: Kind, store: Store) -> ShardReader:
    return open_reader(kind.source(store.uri), MAX_SAMPLE_BYTES)


@pytest.fixture
def shard(kind: Kind, store: Store) -> ObjectInfo:
    return store.write(f"x{kind.extension}", kind.encode(RECORDS))


def read_all(reader: ShardReader, store: Store, shard: ObjectInfo, resume: Resume = Resume()) -> list[Sample]:
    return list(reader.read(store, shard, resume))


def test_every_record_comes_once_in_order_with_its_image_label_and_metadata(
    reader: ShardReader, store: Store, shard: ObjectInfo
) -> None:
    found = [
        (s.key, s.index, len(s.image) if s.image is not None else None, s.label, s.metadata, s.size_bytes)
        for s in read_all(reader, store, shard)
    ]
    assert found == [
        ("b/0", 0, 1021, "cat", ("Leica",), 1021),
        ("b/1", 1, None, "dog", ("Nikon",), 0),
        ("b/2", 2, None, "dog", (None,), 0),
        ("b/3", 3, 2999, None, ("Leica",), 2999),
        ("b/4", 4, None, "cow", (None,), 3001),
        ("a/5", 5, 512, "žába", (None,), 512),
        ("a/6", 6, 1, "7", ("Canon",), 1),
    ]
    assert read_all(reader, store, shard)[5].image == b"\xfc" * 512


def test_records_that_cannot_be_used_are_counted_and_say_why(
    reader: ShardReader, store: Store, shard: ObjectInfo
) -> None:
    reasons = {s.index: s.problem[0] for s in read_all(reader, store, shard) if s.problem}
    assert reasons == {
        1: RejectReason.NO_IMAGE,
        2: RejectReason.EMPTY_SAMPLE,
        4: RejectReason.SAMPLE_TOO_LARGE,
    }


def test_a_limit_equal_to_the_size_lets_the_image_through(
    kind: Kind, store: Store, shard: ObjectInfo
) -> None:
    samples = read_all(open_reader(kind.source(store.uri), 3001), store, shard)
    assert samples[4].image == b"\xfd" * 3001 and samples[4].problem is None


def test_reading_from_any_sample_on_gives_exactly_the_rest(
    reader: ShardReader, store: Store, shard: ObjectInfo
) -> None:
    whole = read_all(reader, store, shard)
    for sample in whole:
        assert read_all(reader, store, shard, Resume(sample.index)) == whole[sample.index :]
        at_byte = Resume(sample.index, sample.begin_offset)
        assert read_all(reader, store, shard, at_byte) == whole[sample.index :]
    assert read_all(reader, store, shard, Resume(7, whole[-1].end_offset)) == []


def test_offsets_are_given_where_the_object_can_be_entered_and_leave_no_gap(
    kind: Kind, reader: ShardReader, store: Store, shard: ObjectInfo
) -> None:
    samples = read_all(reader, store, shard)
    if not kind.has_offsets:
        assert {(s.begin_offset, s.end_offset) for s in samples} == {(None, None)}
        with pytest.raises(ValueError, match="512"):
            read_all(reader, store, shard, Resume(1, 512))
        return
    assert [s.begin_offset for s in samples[1:]] == [s.end_offset for s in samples[:-1]]
    assert samples[0].begin_offset == 0
    assert all(s.end_offset is not None and s.end_offset <= shard.size for s in samples)


def test_resuming_at_a_byte_reads_only_what_follows(
    kind: Kind, reader: ShardReader, store: Store, shard: ObjectInfo
) -> None:
    last = read_all(reader, store, shard)[-1]
    told: list[int] = []
    list(reader.read(store, shard, Resume(6, last.begin_offset), told.append))
    assert sum(told) == shard.size - (last.begin_offset or 0)


def test_bytes_are_told_as_they_come_and_add_up_to_the_object(
    reader: ShardReader, store: Store, shard: ObjectInfo
) -> None:
    told: list[int] = []
    assert len(list(reader.read(store, shard, Resume(), told.append))) == 7
    assert sum(told) == shard.size
    assert min(told) >= 0


def test_a_read_that_is_given_up_tells_its_bytes_too(
    reader: ShardReader, store: Store, shard: ObjectInfo
) -> None:
    told: list[int] = []
    reading = reader.read(store, shard, Resume(), told.append)
    next(reading)
    reading.close()  # type: ignore[attr-defined]  # every reader is a generator
    assert 0 < sum(told) <= shard.size


def test_a_shard_cut_at_any_byte_gives_good_samples_and_then_damage(
    kind: Kind, reader: ShardReader, store: Store, shard: ObjectInfo
) -> None:
    whole, data = read_all(reader, store, shard), store.read(shard.path)
    lengths = sorted({*range(0, len(data), max(1, len(data) // 53)), *range(len(data) - 40, len(data))})
    borders = set() if kind.marks_its_end else {sample.begin_offset for sample in whole}
    counts = []
    for length in lengths:
        cut = store.write(f"cut{kind.extension}", data[:length])
        samples, damage = read_until_damage(reader, store, cut)
        cut_at = f"cut at byte {length} of {len(data)}"
        assert (damage is None) == (length in borders), f"{cut_at}: {damage or 'was taken for the end'}"
        assert samples == whole[: len(samples)]
        counts.append(len(samples))
    assert counts == sorted(counts)
    assert counts[0] == 0


def test_damage_names_the_shard_and_survives_pickling(kind: Kind, reader: ShardReader, store: Store) -> None:
    shard = store.write(f"some/cut{kind.extension}", kind.encode(RECORDS)[:-700])
    _, damage = read_until_damage(reader, store, shard)
    assert f"{store.uri}/some/cut{kind.extension}" in str(damage)
    assert str(pickle.loads(pickle.dumps(damage))) == str(damage)


def test_a_shard_without_records_is_no_damage(kind: Kind, reader: ShardReader, store: Store) -> None:
    assert read_all(reader, store, store.write(f"empty{kind.extension}", kind.encode([]))) == []


def test_an_object_of_zero_bytes_is_damage_unless_nothing_marks_an_end(
    kind: Kind, reader: ShardReader, store: Store
) -> None:
    samples, damage = read_until_damage(reader, store, store.write(f"nothing{kind.extension}", b""))
    assert samples == [] and (damage is not None) == kind.marks_its_end


def test_keys_may_repeat(kind: Kind, reader: ShardReader, store: Store) -> None:
    records = [Record("k", b"1", "x"), Record("k", b"2", "y"), Record("j", b"3"), Record("k", b"4")]
    samples = read_all(reader, store, store.write(f"twice{kind.extension}", kind.encode(records)))
    assert [(s.key, s.index, s.image) for s in samples] == [
        ("k", 0, b"1"),
        ("k", 1, b"2"),
        ("j", 2, b"3"),
        ("k", 3, b"4"),
    ]


def test_a_shard_replaced_since_it_was_listed_is_refused(
    kind: Kind, reader: ShardReader, store: Store, shard: ObjectInfo
) -> None:
    store.write(shard.path, kind.encode(RECORDS[:3]))
    with pytest.raises(ObjectChanged):
        read_all(reader, store, shard)


def test_a_shard_replaced_while_it_is_read_is_noticed_before_the_end(
    kind: Kind, reader: ShardReader, store: Store
) -> None:
    big = [replace(record, image=bytes([n]) * 2500, key=str(n)) for n in range(250) for record in RECORDS[:1]]
    shard = store.write(f"big{kind.extension}", kind.encode(big))
    reading = reader.read(store, shard, Resume())
    next(reading)
    store.write(shard.path, kind.encode(RECORDS))
    with pytest.raises(ObjectChanged):
        list(reading)


def test_a_shard_that_is_gone_is_not_found(reader: ShardReader, store: Store, shard: ObjectInfo) -> None:
    store.delete(shard.path)
    with pytest.raises(ObjectNotFound):
        read_all(reader, store, shard)


def test_a_pickled_reader_reads_the_same(reader: ShardReader, store: Store, shard: ObjectInfo) -> None:
    there = pickle.loads(pickle.dumps(reader))
    assert read_all(there, pickle.loads(pickle.dumps(store)), shard) == read_all(reader, store, shard)


def test_shards_are_listed_by_the_pattern_at_any_depth(kind: Kind, reader: ShardReader, store: Store) -> None:
    for path in ("b", "2026/09/a", "2026/c"):
        store.write(f"{path}{kind.extension}", kind.encode([]))
    store.write("b.txt", b"not a shard")
    found = [info.path for info in reader.list_shards(store)]
    assert found == [f"2026/09/a{kind.extension}", f"2026/c{kind.extension}", f"b{kind.extension}"]


def test_the_contract_holds_what_changes_a_part_and_not_the_pattern(kind: Kind) -> None:
    config = kind.source("/archive/2026/")
    contract = config.contract()
    assert contract["kind"] == config.kind and contract["uri"] == "/archive/2026"
    assert "pattern" not in contract
    other = config.model_copy(update={"pattern": "*"})
    assert other.contract() == contract
    assert config.model_copy(update={"label": None}).contract() != contract


def test_no_metadata_column_hides_a_column_of_the_table(kind: Kind) -> None:
    own = set(embeddings_schema(2, "float32").names)
    assert own <= TABLE_COLUMNS
    assert kind.source("/x").metadata_columns() == ("txt",)
    assert not own & set(kind.source("/x").metadata_columns())


def test_checking_a_recipe_imports_nothing_heavy() -> None:
    heavy = ("numpy", "pyarrow", "PIL", "tensorflow", "keras", "ray", "s3fs")
    code = f"import engine.shards.kinds, sys; print([m for m in {heavy!r} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
