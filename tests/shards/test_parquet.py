"""Parquet shards, written by pyarrow: columns of all types, row groups, few reads, and files that are not whole."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.errors import AccessDenied, ObjectChanged, ShardDamaged
from engine.schema import RejectReason
from engine.shards.base import Resume, Sample
from engine.shards.kinds import ParquetSource, open_reader
from engine.storage import ObjectInfo, Store, open_store
from tests.shards.reading import read_until_damage

MAX_SAMPLE_BYTES = 4_000_000
IMAGES = [b"\xff" * 101, b"\xfe" * 211, b"\xfd" * 307]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def put(store: Store, columns: dict[str, Any] | pa.Table, **options: Any) -> ObjectInfo:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    return store.write("a.parquet", parquet_bytes(table, **options))


def read(store: Store, shard: ObjectInfo, resume: Resume = Resume(), **fields: Any) -> list[Sample]:
    reader = open_reader(ParquetSource(uri=store.uri, **fields), MAX_SAMPLE_BYTES)
    return list(reader.read(store, shard, resume))


def labels_of(store: Store, values: Any) -> list[Any]:
    """For each value its label, or the reason why it is none."""
    shard = put(store, {"image": [b"1"] * len(values), "label": values})
    return [s.problem[0] if s.problem else s.label for s in read(store, shard, label="label")]


def metadata_of(store: Store, values: Any) -> list[str | None]:
    shard = put(store, {"image": [b"1"] * len(values), "camera": values})
    return [s.metadata[0] for s in read(store, shard, metadata=("camera",))]


class WatchedStore:
    """A store that counts its reads, and fails with `error` from the read number `fails_at` on."""

    def __init__(self, store: Store, fails_at: int | None = None, error: Exception | None = None) -> None:
        self.uri, self._store, self._fails_at, self._error = store.uri, store, fails_at, error
        self.ranges: list[tuple[int, int]] = []

    def info(self, path: str) -> ObjectInfo:
        return self._store.info(path)

    def read(self, path: str, offset: int, length: int, expected: ObjectInfo) -> bytes:
        self.ranges.append((offset, length))
        if self._error is not None and len(self.ranges) > (self._fails_at or 0):
            raise self._error
        return self._store.read(path, offset, length, expected)


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(101)], ids=str)
def test_images_come_from_every_binary_type(store: Store, kind: pa.DataType) -> None:
    images = [b"\xff" * 101, None, b"\xfd" * 101]
    found = read(store, put(store, {"image": pa.array(images, kind)}))
    assert [s.image for s in found] == images
    assert [(s.key, s.index, s.size_bytes) for s in found] == [
        ("000000000", 0, 101),
        ("000000001", 1, 0),
        ("000000002", 2, 101),
    ]


@pytest.mark.parametrize("name", ["image", "image.bytes"])
def test_an_image_may_stand_in_a_struct_as_hugging_face_writes_it(store: Store, name: str) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": b"one", "path": "a"}, None, {"bytes": None, "path": "b"}, {"bytes": b"", "path": None}]
    found = read(store, put(store, {"image": pa.array(rows, kind)}), image=name)
    assert [s.image for s in found] == [b"one", None, None, None]
    assert [s.problem and s.problem[0] for s in found] == [
        None,
        RejectReason.NO_IMAGE,
        RejectReason.NO_IMAGE,
        RejectReason.EMPTY_SAMPLE,
    ]


def test_dots_step_into_structs_and_a_column_of_that_very_name_comes_first(store: Store) -> None:
    nested = pa.array([{"b": {"bytes": b"nested", "c": "in"}}] * 2)
    shard = put(store, {"a": nested, "a.b.c": ["outer"] * 2, "x": pa.array([{"y.z": 7}] * 2)})
    found = read(store, shard, image="a.b", label="a.b.c", metadata=("a.b.bytes", "x.y.z"))
    assert {(s.image, s.label, s.metadata) for s in found} == {(b"nested", "outer", ("nested", "7"))}


def test_an_image_that_is_too_large_keeps_its_size(store: Store) -> None:
    shard = put(store, {"image": [b"1" * (MAX_SAMPLE_BYTES + 1), b"2" * MAX_SAMPLE_BYTES]})
    large, fits = read(store, shard)
    assert (large.image, large.size_bytes) == (None, MAX_SAMPLE_BYTES + 1)
    assert large.problem and large.problem[0] == RejectReason.SAMPLE_TOO_LARGE
    assert fits.problem is None and fits.size_bytes == MAX_SAMPLE_BYTES


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())], ids=str
)
def test_labels_come_from_every_text_type_without_outer_spaces(store: Store, kind: pa.DataType) -> None:
    found = labels_of(store, pa.array([" cat\n", None, "", " \t", "žába"], pa.string()).cast(kind))
    assert found == ["cat", None, None, None, "žába"]


def test_numbers_and_booleans_are_spelled_as_json_does(store: Store) -> None:
    assert labels_of(store, pa.array([-7, None, 2**63 - 1])) == ["-7", None, "9223372036854775807"]
    assert labels_of(store, pa.array([2**64 - 1], pa.uint64())) == ["18446744073709551615"]
    assert labels_of(store, [True, False, None]) == ["true", "false", None]
    assert labels_of(store, [0.1, 3.0, 1e300]) == ["0.1", "3.0", "1e+300"]
    assert labels_of(store, pa.array([0.5], pa.float32())) == ["0.5"]
    assert labels_of(store, pa.array([np.float16(1.5)], pa.float16())) == ["1.5"]
    assert labels_of(store, pa.nulls(2)) == [None, None]
    bad = RejectReason.BAD_LABEL
    assert labels_of(store, [float("nan"), float("inf"), float("-inf")]) == [bad] * 3
    assert metadata_of(store, [float("nan"), -float("inf"), 1.5, None]) == ["NaN", "-Infinity", "1.5", None]


def test_labels_that_are_no_text_or_too_long_are_rejects_and_metadata_stays(store: Store) -> None:
    values = pa.array([b"ok", b"\xff", b"x" * 4096, b"x" * 4097, b"x" * (2**20 + 1), None], pa.binary())
    bad = RejectReason.BAD_LABEL
    assert labels_of(store, values) == ["ok", bad, "x" * 4096, bad, bad, None]
    assert metadata_of(store, values) == ["ok", "\\xff", "x" * 4096, "x" * 4097, None, None]


def test_a_string_column_that_is_not_utf8_is_a_bad_label_too(store: Store) -> None:
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"caf\xe9", b"tea"]).buffers())
    assert labels_of(store, broken) == [RejectReason.BAD_LABEL, "tea"]
    assert metadata_of(store, broken) == ["caf\\xe9", "tea"]


def test_where_image_and_label_are_bad_the_image_is_the_reason(store: Store) -> None:
    shard = put(store, {"image": pa.array([None, b"1"], pa.binary()), "label": [b"\xff"] * 2})
    reasons = [s.problem[0] for s in read(store, shard, label="label") if s.problem]
    assert reasons == [RejectReason.NO_IMAGE, RejectReason.BAD_LABEL]


def test_hugging_face_class_labels_become_names(store: Store) -> None:
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "id": {"_type": "Value"}}
    table = pa.table({"image": [b"1"] * 5, "label": [1, 0, -1, 2, None], "id": range(5)})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    found = read(store, put(store, table), label="label", key="id")
    assert [s.label for s in found] == ["dog", "cat", None, None, None]
    assert [s.index for s in found if s.problem] == [3]
    assert [s.key for s in found] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("said", [b"", b"{", b"[]", b'{"info": {"features": {"label": 3}}}', b"[" * 100_000])
def test_broken_hugging_face_metadata_is_ignored(store: Store, said: bytes) -> None:
    table = pa.table({"image": [b"1"], "label": [1]}).replace_schema_metadata({"huggingface": said})
    assert [s.label for s in read(store, put(store, table), label="label")] == ["1"]


def test_keys_are_texts_or_numbers_and_the_position_where_there_is_none(store: Store) -> None:
    shard = put(store, {"image": IMAGES, "name": ["a/b.jpg", None, ""], "id": [7, None, 9]})
    assert [s.key for s in read(store, shard, key="name")] == ["a/b.jpg", "000000001", "000000002"]
    assert [s.key for s in read(store, shard, key="id")] == ["7", "000000001", "9"]


def test_one_column_may_serve_twice(store: Store) -> None:
    shard = put(store, {"image": IMAGES, "name": ["a", "b", "c"]})
    found = read(store, shard, key="name", label="name", metadata=("name",))
    assert [(s.key, s.label, s.metadata) for s in found] == [(n, n, (n,)) for n in "abc"]


@pytest.mark.parametrize(
    ("fields", "thing", "found"),
    [
        ({"image": "picture"}, "no column 'picture'", "image, tags, text, when"),
        ({"label": "text.en"}, "no column 'text.en'", "image, tags, text, when"),
        ({"label": "twice"}, "no column 'twice'", "twice, twice"),
        ({"image": "text"}, "column 'text'", "string"),
        ({"image": "tags"}, "column 'tags'", "list<"),
        ({"label": "tags"}, "column 'tags'", "list<"),
        ({"label": "meta"}, "column 'meta'", "struct<"),
        ({"key": "when"}, "column 'when'", "timestamp"),
        ({"metadata": ("tags.list",)}, "no column 'tags.list'", "image, tags"),
    ],
)
def test_missing_and_unfit_columns_are_damage_that_names_them(
    store: Store, fields: dict[str, Any], thing: str, found: str
) -> None:
    columns = {
        "image": pa.array([b"1"]),
        "tags": pa.array([["a"]]),
        "text": pa.array(["x"]),
        "when": pa.array([1], pa.timestamp("ms")),
        "meta": pa.array([{"a": 1}]),
        "twice": pa.array(["x"]),
    }
    table = pa.Table.from_arrays([*columns.values(), columns["twice"]], names=[*columns, "twice"])
    with pytest.raises(ShardDamaged) as damage:
        read(store, put(store, table), **fields)
    assert thing in damage.value.thing
    assert damage.value.found and found in damage.value.found
    assert damage.value.wanted


class Trap(pa.ExtensionType):  # type: ignore[misc]  # pyarrow has no types
    """A registered type that remembers every attempt to rebuild it from the bytes of a file."""

    rebuilt: list[bytes] = []  # noqa: RUF012  # of the class on purpose

    def __init__(self) -> None:
        super().__init__(pa.binary(), "tests.trap")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"from the file"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Trap:
        cls.rebuilt.append(serialized)
        return cls()


@pytest.fixture
def trap() -> Iterator[type[Trap]]:
    pa.register_extension_type(Trap())
    Trap.rebuilt.clear()
    yield Trap
    pa.unregister_extension_type("tests.trap")


def test_a_registered_extension_type_runs_no_code_and_gives_its_storage(
    store: Store, trap: type[Trap]
) -> None:
    encoded = parquet_bytes(pa.table({"image": pa.ExtensionArray.from_storage(trap(), pa.array(IMAGES))}))
    trap.rebuilt.clear()
    assert pq.read_schema(io.BytesIO(encoded)).field("image").type == trap()
    assert trap.rebuilt, "the trap does not work"
    trap.rebuilt.clear()
    assert [s.image for s in read(store, store.write("a.parquet", encoded))] == IMAGES
    assert trap.rebuilt == []


def test_types_that_arrow_would_wrap_are_read_plain(store: Store) -> None:
    shard = put(store, {"image": IMAGES, "j": pa.array(['{"a": 1}'] * 3, pa.json_())})
    assert [s.metadata for s in read(store, shard, metadata=("j",))] == [('{"a": 1}',)] * 3


# ---------------------------------------------------------------- row groups and reads


def large_table(num_rows: int, image_bytes: int) -> pa.Table:
    noise = random.Random(7).randbytes(image_bytes + num_rows)
    return pa.table(
        {
            "key": [f"k{row}" for row in range(num_rows)],
            "image": pa.array([noise[row : row + image_bytes] for row in range(num_rows)], pa.binary()),
            "unwanted": pa.array([noise[row : row + image_bytes // 2] for row in range(num_rows)]),
            "label": [str(row % 13) for row in range(num_rows)],
        }
    )


@pytest.mark.parametrize("row_group_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("compression", ["NONE", "snappy", "zstd", "gzip"])
def test_row_groups_of_any_size_give_the_same_samples(
    store: Store, row_group_size: int, compression: str
) -> None:
    table = large_table(131, 2_003)
    shard = put(store, table, row_group_size=row_group_size, compression=compression, data_page_size=4096)
    found = read(store, shard, key="key", label="label")
    assert [s.image for s in found] == table["image"].to_pylist()
    assert [(s.key, s.label, s.index) for s in found] == [(f"k{n}", str(n % 13), n) for n in range(131)]
    for first in (1, 63, 64, 65, 130, 131, 500):
        assert read(store, shard, Resume(first), key="key", label="label") == found[first:]


def test_resuming_reads_no_byte_of_the_row_groups_before(store: Store) -> None:
    shard = put(store, large_table(300, 60_000), row_group_size=50, use_dictionary=False, compression="NONE")
    begin = pq.read_metadata(f"{store.uri}/a.parquet").row_group(4).column(0).data_page_offset
    told: list[int] = []
    watched = WatchedStore(store)
    reader = open_reader(ParquetSource(uri=store.uri, key="key", label="label"), MAX_SAMPLE_BYTES)
    found = list(reader.read(watched, shard, Resume(213), told.append))  # type: ignore[arg-type]
    assert [s.index for s in found] == list(range(213, 300))
    assert min(offset for offset, _ in watched.ranges) == begin
    assert sum(told) == sum(length for _, length in watched.ranges)
    assert sum(told) < shard.size / 3


def test_reads_are_few_and_large_and_leave_out_other_columns(store: Store) -> None:
    shard = put(store, large_table(700, 60_000), row_group_size=300, use_dictionary=False, compression="NONE")
    watched = WatchedStore(store)
    reader = open_reader(ParquetSource(uri=store.uri, key="key", label="label"), MAX_SAMPLE_BYTES)
    assert len(list(reader.read(watched, shard, Resume()))) == 700  # type: ignore[arg-type]
    fetched = sum(length for _, length in watched.ranges)
    assert 700 * 60_000 < fetched < 1.01 * 700 * 60_000
    assert len(watched.ranges) <= 12  # 42 MB in blocks of 8 MiB, three row groups, and the footer
    assert max(length for _, length in watched.ranges) == 8 * 2**20


def test_a_row_group_is_not_held_in_memory(store: Store) -> None:
    table = large_table(1000, 60_000)
    shard = put(store, table, row_group_size=1000, write_batch_size=16, use_dictionary=False)
    before, most = pa.total_allocated_bytes(), 0
    reader = open_reader(ParquetSource(uri=store.uri), MAX_SAMPLE_BYTES)
    for _ in reader.read(store, shard, Resume()):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 24 * 2**20 < shard.size // 3


def test_a_footer_longer_than_the_first_read_is_fetched_whole(store: Store) -> None:
    table = large_table(3, 500_000).replace_schema_metadata({"note": "x" * 200_000})
    found = read(store, put(store, table, compression="NONE"), label="label")
    assert [s.image for s in found] == table["image"].to_pylist()


# ---------------------------------------------------------------- files that are not whole, stores that fail


@pytest.mark.parametrize("fails_at", [0, 1, 2])
@pytest.mark.parametrize("error", [AccessDenied("no"), ObjectChanged("new"), ShardDamaged("cut")], ids=repr)
def test_what_the_store_says_comes_out_as_it_was(store: Store, fails_at: int, error: Exception) -> None:
    shard = put(store, large_table(400, 60_000), row_group_size=200, compression="NONE")
    watched = WatchedStore(store, fails_at, error)
    reader = open_reader(ParquetSource(uri=store.uri), MAX_SAMPLE_BYTES)
    with pytest.raises(type(error)) as raised:
        list(reader.read(watched, shard, Resume()))  # type: ignore[arg-type]
    assert raised.value is error


def test_a_flipped_bit_in_a_page_with_a_checksum_is_damage_and_earlier_rows_stay(store: Store) -> None:
    table = large_table(90, 3_001)
    encoded = bytearray(
        parquet_bytes(table, row_group_size=30, write_page_checksum=True, use_dictionary=False)
    )
    chunk = pq.read_metadata(io.BytesIO(encoded)).row_group(1).column(1)
    encoded[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 4
    samples, damage = outcome(store, bytes(encoded))
    assert damage is not None and "checksum" in str(damage).lower()
    assert [s.image for s in samples] == table["image"].to_pylist()[:30]


@pytest.mark.parametrize(
    "encoded",
    [b"", b"PAR1", b"PAR1PAR1", b"PAR1" * 3, b"not a Parquet file, but long enough", b"\x89PNG" * 5000]
    + [b"PAR1" + b"\0" * 100 + struct.pack("<I", n) + b"PAR1" for n in (0, 1, 100, 101, 2**31, 2**32 - 1)]
    + [b"PAR1" + b"\0" * 100 + struct.pack("<I", 100) + b"PARE"],
)
def test_what_is_not_parquet_is_damage(store: Store, encoded: bytes) -> None:
    samples, damage = outcome(store, encoded)
    assert samples == []
    assert damage is not None and f"{store.uri}/a.parquet" in str(damage)


def test_a_file_cut_in_the_middle_with_its_footer_still_there_is_damage(store: Store) -> None:
    encoded = parquet_bytes(large_table(90, 3_001), row_group_size=30)
    footer_bytes = 8 + int.from_bytes(encoded[-8:-4], "little")
    data, footer = encoded[:-footer_bytes], encoded[-footer_bytes:]
    for at in range(4, len(data), len(data) // 23):
        _, damage = outcome(store, data[:at] + footer, key="key", label="label", metadata=("unwanted",))
        assert damage is not None, at


def with_number(encoded: bytes, old: int, new: int, places: Collection[int]) -> bytes:
    """The file with a number in its footer replaced where it stands for the nth time."""
    footer_begin = len(encoded) - 8 - int.from_bytes(encoded[-8:-4], "little")
    first, *rest = encoded[footer_begin:-8].split(compact(old))
    numbers = [compact(new if place in places else old) for place in range(len(rest))]
    footer = first + b"".join(number + piece for number, piece in zip(numbers, rest, strict=True))
    return encoded[:footer_begin] + footer + struct.pack("<I", len(footer)) + b"PAR1"


def compact(number: int) -> bytes:
    """An i32 or i64 as Thrift's compact protocol writes it."""
    zigzag, out = number << 1 if number >= 0 else (-number << 1) - 1, bytearray()
    while zigzag >= 128:
        out.append(zigzag & 127 | 128)
        zigzag >>= 7
    return bytes([*out, zigzag])


@pytest.mark.parametrize("declared", [0, 1, 8_999, 9_001, 2**31, 2**40, 2**62, -1, -(2**62)])
def test_wrong_numbers_of_rows_are_damage(store: Store, declared: int) -> None:
    schema = pa.schema(
        [pa.field("image", pa.binary(), nullable=False)]
    )  # no histogram of nulls in the footer
    encoded = parquet_bytes(pa.table({"image": [b"xyz"] * 9_000}, schema=schema), write_statistics=False)
    footer_begin = len(encoded) - 8 - int.from_bytes(encoded[-8:-4], "little")
    places = encoded[footer_begin:].count(compact(9_000))
    assert places == 3, "of the file, of its row group, and of the values in its column"
    for place in range(places):
        samples, damage = outcome(store, with_number(encoded, 9_000, declared, [place]))
        assert damage is not None, place
        assert samples == []
    samples, damage = outcome(store, with_number(encoded, 9_000, declared, range(places)))
    assert len(samples) <= 9_000
    assert (damage is None) == (0 <= declared <= 9_000), (
        "fewer rows, said everywhere, are a file of fewer rows"
    )


def test_a_file_of_nothing_but_declared_rows_is_refused_at_once(store: Store) -> None:
    table = pa.table({"image": pa.nulls(3_000_000, pa.binary())})
    samples, damage = outcome(store, parquet_bytes(table, row_group_size=3_000_000))
    assert samples == []
    assert damage is not None and "3,000,000" in str(damage)


@pytest.mark.parametrize("compression", ["zstd", "gzip"])
def test_a_column_that_expands_absurdly_is_refused_before_it_is_read(store: Store, compression: str) -> None:
    bomb = parquet_bytes(
        pa.table({"image": [b"\0" * 100_000_000]}), compression=compression, use_dictionary=False
    )
    chunk = pq.read_metadata(io.BytesIO(bomb)).row_group(0).column(0)
    if chunk.total_uncompressed_size <= 1000 * chunk.total_compressed_size:
        pytest.skip("deflate did not reach the limit")
    before = pa.default_memory_pool().max_memory()
    samples, damage = outcome(store, bomb)
    assert samples == []
    assert damage is not None and "expanding to 100,0" in str(damage)
    assert pa.default_memory_pool().max_memory() == before


def test_a_footer_that_pyarrow_cannot_survive_is_read_or_damage(store: Store) -> None:
    """Level histograms of a wrong length end the process where pyarrow's own view of a column chunk is asked for."""
    encoded = parquet_bytes(pa.table({"image": pa.array([b"x", None] * 50)}))
    footer_begin = len(encoded) - 8 - int.from_bytes(encoded[-8:-4], "little")
    for at in range(footer_begin, len(encoded) - 8):
        outcome(store, encoded[:at] + bytes([encoded[at] ^ 0x10]) + encoded[at + 1 :])


def mixed_table(num_rows: int) -> pa.Table:
    rng = random.Random(11)
    return pa.table(
        {
            "image": pa.array([{"bytes": rng.randbytes(rng.randrange(300)), "path": "p"} for _ in range(num_rows)]),
            "label": pa.array([rng.choice(["cat", "dog", None]) for _ in range(num_rows)]).dictionary_encode(),
            "id": pa.array([rng.randrange(10**6) for _ in range(num_rows)]),
            "score": pa.array([rng.random() for _ in range(num_rows)], pa.float32()),
            "good": pa.array([rng.random() < 0.5 for _ in range(num_rows)]),
        }
    )  # fmt: skip


def outcome(store: Store, encoded: bytes, **fields: Any) -> tuple[list[Sample], ShardDamaged | None]:
    """What a file gives; any other exception than ShardDamaged fails the test."""
    shard = store.write("a.parquet", encoded)
    reader = open_reader(ParquetSource(uri=store.uri, **fields), MAX_SAMPLE_BYTES)
    return read_until_damage(reader, store, shard)


WRITERS: tuple[dict[str, Any], ...] = (
    {"compression": "NONE", "use_dictionary": False},
    {"compression": "snappy"},
    {"compression": "zstd", "data_page_version": "2.0"},
    {"compression": "gzip", "write_page_index": True, "write_page_checksum": True},
)


@pytest.mark.parametrize("writer", range(4))
@pytest.mark.parametrize("where", ["anywhere", "footer"])
def test_mutated_files_end_in_samples_or_damage(store: Store, writer: int, where: str) -> None:
    encoded = parquet_bytes(mixed_table(60), row_group_size=25, data_page_size=1000, **WRITERS[writer])
    begin = len(encoded) - int.from_bytes(encoded[-8:-4], "little") - 8 if where == "footer" else 0
    rng = random.Random(f"{writer} {where}")
    damaged = 0
    for _ in range(30):
        mutated = bytearray(encoded)
        for _ in range(rng.choice([1, 2, 5])):
            mutated[rng.randrange(begin, len(mutated))] = rng.choice(
                [0, 1, 127, 128, 255, rng.randrange(256)]
            )
        fields = {"label": "label", "key": "id", "metadata": ("score", "good")}
        samples, damage = outcome(store, bytes(mutated), **fields)
        damaged += damage is not None
        assert [s.index for s in samples] == list(range(len(samples)))
    assert damaged > 0
