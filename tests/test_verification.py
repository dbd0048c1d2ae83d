"""A clean table has no findings; every kind of damage, planted alone, is found alone and by name."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.parts import PartName, copy_path, part_name, prediction_name
from engine.schema import SCHEMA_VERSION, embeddings_schema, predictions_schema, rejects_schema
from engine.storage import ObjectInfo, Store, open_store
from engine.tables import (
    FOOTER_KEY,
    EmbeddingPartFacts,
    PredictionPartFacts,
    claim_table,
    list_parts,
    write_embedding_part,
    write_prediction_part,
)
from engine.verification import (
    Damage,
    Finding,
    Leftover,
    Unfinished,
    Verification,
    source_shards,
    verify_table,
)
from jobs.cli import main

WIDTH, ROWS_PER_PART, TOP_K = 7, 4, 3
IDENTITY, SOURCE_URI, FINGERPRINT, BUNDLE = "etag:v1:100", "/somewhere/shards", "f" * 64, "b" * 16

A0 = part_name("a.tar", IDENTITY, 0, False)  # 3 rows and the reject 2
A1 = part_name("a.tar", IDENTITY, 1, False)  # 4 rows
A2 = part_name("a.tar", IDENTITY, 2, True)  # 2 rows
B0 = part_name("b.tar", IDENTITY, 0, True)  # rejects only: 0 and 1
A_PARTS = f"data/{A0.slug}.{A0.path16}.{A0.source8}.*"


def record(source_uri: str = SOURCE_URI) -> dict[str, Any]:
    contract = {
        "source.kind": "webdataset",
        "source.uri": source_uri,
        "source.metadata": ["json:camera"],
        "limits.keep_reject_bytes": False,
        "output.dtype": "float32",
        "output.rows_per_part": ROWS_PER_PART,
        "fingerprint": FINGERPRINT,
    }
    return {
        "kind": "embeddings",
        "schema_version": SCHEMA_VERSION,
        "contract": contract,
        "fingerprint": FINGERPRINT,
        "width": WIDTH,
        "rows_per_part": ROWS_PER_PART,
        "source_uri": source_uri,
    }


def data_of(shard: str, index: list[int]) -> pa.Table:
    schema = embeddings_schema(WIDTH, "float32", ["camera"])
    numbers = pa.array(np.array([i * WIDTH + d + 1 for i in index for d in range(WIDTH)], np.float32))
    columns = {
        "key": [f"{shard}-{i}" for i in index],
        "shard": [shard] * len(index),
        "index": index,
        "embedding": pa.FixedSizeListArray.from_arrays(numbers, type=schema.field("embedding").type),
        "label": ["a" if i % 2 else None for i in index],
        "image_width": [31] * len(index),
        "image_height": [37] * len(index),
        "sha256": [bytes(32)] * len(index),
        "camera": ["x"] * len(index),
    }
    return pa.table(columns, schema=schema)


def rejects_of(shard: str, index: list[int]) -> pa.Table:
    told = {"stage": "decode", "error": "corrupt_image", "message": "", "size_bytes": 3}
    rows = [{"key": f"k{i}", "shard": shard, "index": i, **told} for i in index]
    return pa.Table.from_pylist(rows, schema=rejects_schema(keep_bytes=False))


def put(
    store: Store,
    name: PartName,
    index: list[int],
    reject_index: list[int] | None = None,
    shard: str = "a.tar",
    **facts: Any,
) -> None:
    """Write a part of an embedding table as the engine does; `facts` replace those that would be right."""
    rejects = reject_index or []
    right: dict[str, Any] = {
        "fingerprint": FINGERPRINT,
        "source_uri": SOURCE_URI,
        "shard": shard,
        "identity": IDENTITY,
        "begin_offset": name.number * 512,
        "end_offset": (name.number + 1) * 512,
        "samples": len(index) + len(rejects),
        "rejects": len(rejects),
        "rejects_sha256": None,
        "embeddings_sha256": "",
    }
    written = EmbeddingPartFacts(**{**right, **facts})
    write_embedding_part(store, name, data_of(shard, index), rejects_of(shard, rejects), written)


def edit(
    store: Store,
    path: str,
    table: Callable[[pa.Table], pa.Table] = lambda table: table,
    footer: Callable[[dict[str, Any]], object] = lambda facts: facts,
) -> None:
    """Write a part again with other columns or another footer."""
    found = pq.read_table(io.BytesIO(store.read(path)))
    facts = footer(json.loads(found.schema.metadata[FOOTER_KEY]))
    sink = io.BytesIO()
    pq.write_table(table(found).replace_schema_metadata({FOOTER_KEY: json.dumps(facts)}), sink)
    store.write(path, sink.getvalue())


def with_column(name: str, values: pa.Array | list[Any], **field: Any) -> Callable[[pa.Table], pa.Table]:
    """Replaces one column; its type and nullability as given, else as they were."""

    def changed(table: pa.Table) -> pa.Table:
        place, was = table.schema.get_field_index(name), table.schema.field(name)
        new = pa.field(name, field.get("type", was.type), field.get("nullable", was.nullable))
        column = values if isinstance(values, pa.Array) else pa.array(values, new.type)
        return table.set_column(place, new, column)

    return changed


def with_numbers(change: Callable[[np.ndarray], None]) -> Callable[[Store], None]:
    """Writes part A2 with other embeddings and a checksum that fits them."""

    def planted(store: Store) -> None:
        data = data_of("a.tar", [8, 9])
        numbers = np.array(data["embedding"].to_pylist(), np.float32)
        change(numbers)
        column = pa.FixedSizeListArray.from_arrays(
            pa.array(numbers.ravel()), type=data.schema.field("embedding").type
        )
        facts = EmbeddingPartFacts(FINGERPRINT, SOURCE_URI, "a.tar", IDENTITY, 1024, 1536, 2, 0, None, "")
        write_embedding_part(
            store, A2, with_column("embedding", column)(data), rejects_of("a.tar", []), facts
        )

    return planted


def flip_bit_of_an_embedding(store: Store) -> None:
    path = f"data/{A1}"
    encoded = bytearray(store.read(path))
    place = encoded.find(np.array([4 * WIDTH + 1, 4 * WIDTH + 2], np.float32).tobytes())  # stored as they are
    assert place > 0
    encoded[place] ^= 1
    store.write(path, bytes(encoded))


def change_record(**fields: Any) -> Callable[[Store], None]:
    return lambda store: put_record(store, {**record(), **fields})


def put_record(store: Store, value: object) -> None:
    store.write("_table.json", json.dumps(value).encode())


def copy(store: Store, path: str, other: str) -> None:
    store.write(other, store.read(path))


def facts_of(path: PartName, **changed: Any) -> Callable[[Store], None]:
    return lambda store: edit(store, f"data/{path}", footer=lambda facts: {**facts, **changed})


def columns_of(path: PartName, table: Callable[[pa.Table], pa.Table]) -> Callable[[Store], None]:
    return lambda store: edit(store, f"data/{path}", table)


def rewritten(name: PartName, *arguments: Any, **facts: Any) -> Callable[[Store], None]:
    return lambda store: put(store, name, *arguments, **facts)


def second_version(store: Store) -> None:
    """A half-done replacement of a.tar, as a killed run leaves it."""
    put(store, part_name("a.tar", "etag:v2:7", 0, False), [0, 1, 2, 3], identity="etag:v2:7")


def put_rejects(store: Store, encoded: bytes) -> None:
    """Another rejects file of A0, with the digest that its part names."""
    store.write(f"rejects/{A0}", encoded)
    facts_of(A0, rejects_sha256=hashlib.sha256(encoded).hexdigest())(store)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A clean embedding table of two shards."""
    store = open_store(str(tmp_path / "table"))
    claim_table(store, record())
    put(store, A0, [0, 1, 3], [2])
    put(store, A1, [4, 5, 6, 7])
    put(store, A2, [8, 9])
    put(store, B0, [], [0, 1], shard="b.tar")
    return store


def all_findings(result: Verification) -> list[Finding]:
    return [*result.damage, *result.leftovers, *result.unfinished]


def test_a_clean_table_has_no_findings_and_is_counted(store: Store) -> None:
    told: list[tuple[int, int, int]] = []
    result = verify_table(store, report=lambda *counts: told.append(counts))
    assert all_findings(result) == []
    assert (result.kind, result.shards, result.parts, result.rows, result.rejects) == (
        "embeddings",
        2,
        4,
        9,
        3,
    )
    sizes = sum(info.size for folder in ("data/", "rejects/") for info in store.list(folder))
    assert result.bytes_read == sizes
    assert told[0] == (0, 4, 0)
    assert told[-1] == (4, 4, sizes)


def test_tables_of_float16_compressed_shards_and_an_empty_shard_are_clean(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "table"))
    put_record(store, {**record(), "contract": {**record()["contract"], "output.dtype": "float16"}})
    schema = embeddings_schema(WIDTH, "float16", ["camera"])
    for shard, index in (("c.tar.gz", [0, 1, 2]), ("empty.tar", [])):
        data = data_of(shard, index)
        half = pa.FixedSizeListArray.from_arrays(
            pa.array(np.array(data["embedding"].to_pylist(), np.float16).ravel()),
            type=schema.field("embedding").type,
        )
        facts = EmbeddingPartFacts(
            FINGERPRINT, SOURCE_URI, shard, IDENTITY, None, None, len(index), 0, None, ""
        )
        table = pa.table([half if f.name == "embedding" else data[f.name] for f in schema], schema=schema)
        write_embedding_part(store, part_name(shard, IDENTITY, 0, True), table, rejects_of(shard, []), facts)
    assert all_findings(verify_table(store)) == []


PLANTED: dict[str, tuple[Callable[[Store], None], Damage | Leftover | Unfinished, str]] = {
    # the record
    "record missing": (lambda s: s.delete("_table.json"), Damage.RECORD_MISSING, "_table.json"),
    "record cut": (lambda s: s.write("_table.json", b'{"kind": "em'), Damage.RECORD_DAMAGED, "_table.json"),
    "record not UTF-8": (
        lambda s: s.write("_table.json", b"\xff\xfe{"),
        Damage.RECORD_DAMAGED,
        "_table.json",
    ),
    "record a list": (lambda s: put_record(s, []), Damage.RECORD_DAMAGED, "_table.json"),
    "record of text": (change_record(width="7"), Damage.RECORD_DAMAGED, "_table.json"),
    "record of another kind": (change_record(kind="bundle"), Damage.RECORD_DAMAGED, "_table.json"),
    "record without its contract": (change_record(contract={}), Damage.RECORD_DAMAGED, "_table.json"),
    "record unlike its contract": (change_record(fingerprint="e" * 64), Damage.RECORD_DAMAGED, "_table.json"),
    "record of another version": (change_record(schema_version=99), Damage.SCHEMA_VERSION, "_table.json"),
    # files
    "foreign file": (lambda s: s.write("data/notes.txt", b"hello"), Leftover.FOREIGN_FILE, "data/notes.txt"),
    "foreign file in rejects": (
        lambda s: s.write("rejects/x.parquet.tmp", b""),
        Leftover.FOREIGN_FILE,
        "rejects/x.parquet.tmp",
    ),
    "part in a folder": (
        lambda s: copy(s, f"data/{A0}", f"data/old/{A0}"),
        Damage.MISPLACED_PART,
        f"data/old/{A0}",
    ),
    "prediction part": (
        lambda s: copy(s, f"data/{A0}", f"data/{prediction_name(A0, 'x')}"),
        Damage.MISPLACED_PART,
        f"data/{prediction_name(A0, 'x')}",
    ),
    "part not Parquet": (
        lambda s: s.write(f"data/{A2}", b"not Parquet at all"),
        Damage.UNREADABLE_PART,
        f"data/{A2}",
    ),
    "part empty": (lambda s: s.write(f"data/{A2}", b""), Damage.UNREADABLE_PART, f"data/{A2}"),
    "part cut": (
        lambda s: s.write(f"data/{A2}", s.read(f"data/{A2}")[:-100]),
        Damage.UNREADABLE_PART,
        f"data/{A2}",
    ),
    # footers
    "no footer": (
        lambda s: s.write(f"data/{A2}", parquet_bytes(data_of("a.tar", [8, 9]))),
        Damage.FOOTER,
        f"data/{A2}",
    ),
    "footer a list": (
        lambda s: edit(s, f"data/{A2}", footer=lambda _: [1]),
        Damage.FOOTER,
        f"data/{A2}",
    ),
    "footer lacks a field": (
        lambda s: edit(s, f"data/{A2}", footer=lambda facts: {"schema_version": facts["schema_version"]}),
        Damage.FOOTER,
        f"data/{A2}",
    ),
    "footer of a wrong type": (facts_of(A2, samples="2"), Damage.FOOTER, f"data/{A2}"),
    "part of another version": (facts_of(A2, schema_version=99), Damage.SCHEMA_VERSION, f"data/{A2}"),
    "other fingerprint": (facts_of(A1, fingerprint="e" * 64), Damage.FINGERPRINT, f"data/{A1}"),
    "other source": (facts_of(A1, source_uri="s3://elsewhere"), Damage.SOURCE_URI, f"data/{A1}"),
    "footer of another shard": (facts_of(A1, shard="other.tar"), Damage.PART_NAME, f"data/{A1}"),
    "footer of another identity": (facts_of(A1, identity="etag:v0:1"), Damage.PART_NAME, f"data/{A1}"),
    # columns
    "other width": (
        columns_of(
            A2,
            with_column(
                "embedding", [[1.0] * 5] * 2, type=embeddings_schema(5, "float32").field("embedding").type
            ),
        ),
        Damage.COLUMNS,
        f"data/{A2}",
    ),
    "other dtype": (
        columns_of(
            A2,
            lambda t: with_column(
                "embedding",
                t["embedding"].to_pylist(),
                type=embeddings_schema(WIDTH, "float16").field("embedding").type,
            )(t),
        ),
        Damage.COLUMNS,
        f"data/{A2}",
    ),
    "column missing": (columns_of(A2, lambda t: t.drop_columns(["camera"])), Damage.COLUMNS, f"data/{A2}"),
    "column too many": (
        columns_of(A2, lambda t: t.append_column("more", pa.array([1, 2]))),
        Damage.COLUMNS,
        f"data/{A2}",
    ),
    "columns in another order": (
        columns_of(A2, lambda t: t.select(list(reversed(t.column_names)))),
        Damage.COLUMNS,
        f"data/{A2}",
    ),
    "sha256 too short": (
        columns_of(A2, with_column("sha256", [bytes(31)] * 2, type=pa.binary(31))),
        Damage.COLUMNS,
        f"data/{A2}",
    ),
    "key declared nullable": (
        columns_of(A2, with_column("key", ["x", "y"], nullable=True)),
        Damage.COLUMNS,
        f"data/{A2}",
    ),
    "key null": (
        columns_of(A2, with_column("key", ["x", None], nullable=True)),
        Damage.NULL_VALUES,
        f"data/{A2}",
    ),
    "sha256 null": (
        columns_of(A2, with_column("sha256", [bytes(32), None], nullable=True)),
        Damage.NULL_VALUES,
        f"data/{A2}",
    ),
    # numbers
    "flipped bit": (flip_bit_of_an_embedding, Damage.EMBEDDINGS_CHECKSUM, f"data/{A1}"),
    "zero embedding": (
        with_numbers(lambda numbers: numbers[1].fill(0)),
        Damage.ZERO_EMBEDDING,
        f"data/{A2}",
    ),
    "NaN": (
        with_numbers(lambda numbers: numbers[0, 3:4].fill(np.nan)),
        Damage.NON_FINITE_EMBEDDING,
        f"data/{A2}",
    ),
    "infinity": (
        with_numbers(lambda numbers: numbers[1, :1].fill(-np.inf)),
        Damage.NON_FINITE_EMBEDDING,
        f"data/{A2}",
    ),
    # samples and their places
    "a row lost": (rewritten(A2, [8], samples=2), Damage.SAMPLE_COUNT, f"data/{A2}"),
    "part not full": (rewritten(A1, [4, 5, 6]), Damage.PART_SIZE, f"data/{A1}"),
    "last part too large": (rewritten(A2, [8, 9, 10, 11, 12]), Damage.PART_SIZE, f"data/{A2}"),
    "last part empty": (rewritten(A2, []), Damage.PART_SIZE, f"data/{A2}"),
    "index twice": (rewritten(A1, [4, 5, 5, 7]), Damage.DUPLICATE_INDEX, f"data/{A1}"),
    "index of a row and a reject": (rewritten(A0, [0, 1, 2], [2]), Damage.DUPLICATE_INDEX, f"data/{A0}"),
    "index of another part": (rewritten(A1, [3, 5, 6, 7]), Damage.INDEX_RANGE, f"data/{A1}"),
    "index behind a hole": (rewritten(A2, [8, 10]), Damage.INDEX_RANGE, f"data/{A2}"),
    "reject of another part": (rewritten(A0, [0, 1, 3], [7]), Damage.INDEX_RANGE, f"data/{A0}"),
    "rows of another shard": (
        columns_of(A2, with_column("shard", ["a.tar", "b.tar"])),
        Damage.SHARD_COLUMN,
        f"data/{A2}",
    ),
    "bytes between parts": (rewritten(A1, [4, 5, 6, 7], begin_offset=516), Damage.BYTE_OFFSETS, f"data/{A1}"),
    "bytes backwards": (rewritten(A2, [8, 9], end_offset=1000), Damage.BYTE_OFFSETS, f"data/{A2}"),
    # rejects
    "rejects missing": (lambda s: s.delete(f"rejects/{A0}"), Damage.REJECTS_MISSING, f"rejects/{A0}"),
    "rejects changed": (
        lambda s: s.write(f"rejects/{A0}", s.read(f"rejects/{A0}").replace(b"k2", b"k3")),
        Damage.REJECTS_CHECKSUM,
        f"rejects/{A0}",
    ),
    "rejects of another part": (
        lambda s: copy(s, f"rejects/{B0}", f"rejects/{A0}"),
        Damage.REJECTS_CHECKSUM,
        f"rejects/{A0}",
    ),
    "another count of rejects": (
        rewritten(A0, [0, 1, 3], [2], rejects=2),
        Damage.REJECTS_COUNT,
        f"rejects/{A0}",
    ),
    "rejects counted without a file": (
        rewritten(A2, [8], samples=2, rejects=1),
        Damage.REJECTS_COUNT,
        f"data/{A2}",
    ),
    "rejects not Parquet": (
        lambda s: put_rejects(s, b"not Parquet at all"),
        Damage.UNREADABLE_REJECTS,
        f"rejects/{A0}",
    ),
    "rejects with another column": (
        lambda s: put_rejects(s, parquet_bytes(rejects_of("a.tar", [2]).drop_columns(["error"]))),
        Damage.COLUMNS,
        f"rejects/{A0}",
    ),
    "rejects without a part": (
        lambda s: copy(s, f"rejects/{A0}", f"rejects/{part_name('gone.tar', IDENTITY, 0, True)}"),
        Leftover.ORPHANED_REJECTS,
        f"rejects/{part_name('gone.tar', IDENTITY, 0, True)}",
    ),
    "rejects that the part does not name": (
        lambda s: copy(s, f"rejects/{A0}", f"rejects/{A1}"),
        Leftover.ORPHANED_REJECTS,
        f"rejects/{A1}",
    ),
    # parts of a shard
    "part missing": (lambda s: s.delete(f"data/{A1}"), Damage.MISSING_PARTS, A_PARTS),
    "part behind the last": (
        rewritten(part_name("a.tar", IDENTITY, 3, False), [12, 13, 14, 15]),
        Damage.PART_BEHIND_LAST,
        A_PARTS,
    ),
    "two last parts": (
        rewritten(part_name("a.tar", IDENTITY, 3, True), [12, 13]),
        Damage.TWO_LAST_PARTS,
        A_PARTS,
    ),
    "one part under two names": (
        rewritten(part_name("a.tar", IDENTITY, 2, False), [8, 9, 10, 11], begin_offset=None),
        Damage.REPEATED_PART,
        A_PARTS,
    ),
    "a part number of fourteen digits": (
        rewritten(part_name("b.tar", IDENTITY, 10**13, False), [], shard="b.tar", samples=4, rejects=4),
        Damage.PART_BEHIND_LAST,
        f"data/{B0.slug}.{B0.path16}.{B0.source8}.*",
    ),
    "no last part": (lambda s: s.delete(f"data/{A2}"), Unfinished.INCOMPLETE_SHARD, A_PARTS),
    "second version": (
        second_version,
        Leftover.STALE_VERSION,
        f"data/{A0.slug}.{A0.path16}.{part_name('a.tar', 'etag:v2:7', 0, False).source8}.*",
    ),
}
AND_ALSO = {  # what such a thing brings with it
    "a part number of fourteen digits": {Damage.REJECTS_COUNT, Damage.MISSING_PARTS},
}


def parquet_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_in_an_embedding_table_it_is_found_alone_and_by_name(store: Store, planted: str) -> None:
    plant, kind, object_path = PLANTED[planted]
    plant(store)
    found = all_findings(verify_table(store))
    also = AND_ALSO.get(planted, set())
    assert [(f.kind, f.object) for f in found if f.kind not in also] == [(kind, object_path)], found
    assert all(finding.message for finding in found)


def test_a_damaged_part_does_not_hide_the_others(store: Store) -> None:
    for planted in ("part not Parquet", "flipped bit", "rejects missing", "no last part", "foreign file"):
        PLANTED[planted][0](store)
    result = verify_table(store)
    assert {f.kind for f in result.damage} == {Damage.EMBEDDINGS_CHECKSUM, Damage.REJECTS_MISSING}
    assert [f.kind for f in result.unfinished] == [Unfinished.INCOMPLETE_SHARD]
    assert [f.kind for f in result.leftovers] == [Leftover.FOREIGN_FILE]


def test_cut_anywhere_or_with_any_byte_flipped_a_part_is_a_finding_or_a_table_never_an_error(
    store: Store,
) -> None:
    path = f"data/{A1}"
    whole = store.read(path)
    random = np.random.default_rng(0)
    for place in random.integers(0, len(whole), 40):
        store.write(path, whole[:place])
        assert [f.kind for f in verify_table(store).damage] == [Damage.UNREADABLE_PART]
    for place in random.integers(0, len(whole), 150):
        flipped = bytearray(whole)
        flipped[place] ^= int(random.integers(1, 256))
        store.write(path, bytes(flipped))
        assert {f.object for f in all_findings(verify_table(store))} <= {path, f"data/{A2}"}


def test_a_part_that_is_swept_away_meanwhile_is_not_damage(store: Store, tmp_path: Path) -> None:
    def sweep_first(done: int, total: int, bytes_read: int) -> None:
        if done == 0:
            store.delete(f"data/{A1}")

    result = verify_table(store, report=sweep_first)
    assert [(f.kind, f.object) for f in all_findings(result)] == [
        (Unfinished.CHANGED_MEANWHILE, f"data/{A1}")
    ]


def test_the_source_tells_new_replaced_and_removed_shards(store: Store, tmp_path: Path) -> None:
    listed = [ObjectInfo("a.tar", 9, "etag:v3:9"), ObjectInfo("c.tar", 5, "etag:v1:5")]
    result = verify_table(store, listed)
    assert result.damage == []
    assert [(f.kind, f.object) for f in result.unfinished] == [
        (Unfinished.REPLACED_SHARD, "a.tar"),
        (Unfinished.NEW_SHARD, "c.tar"),
    ]
    assert [(f.kind, f.object) for f in result.leftovers] == [
        (Leftover.REMOVED_SHARD, f"data/{B0.slug}.{B0.path16}.*")
    ]
    unchanged = [ObjectInfo(path, 100, IDENTITY) for path in ("a.tar", "b.tar")]
    assert all_findings(verify_table(store, unchanged)) == []


def test_the_source_of_a_table_is_listed_by_its_record(tmp_path: Path) -> None:
    source, store = open_store(str(tmp_path / "shards")), open_store(str(tmp_path / "table"))
    for path in ("x/a.tar", "b.tar", "b.txt"):
        source.write(path, b"")
    put_record(store, record(source.uri))
    assert [shard.path for shard in source_shards(store)] == ["b.tar", "x/a.tar"]
    assert [shard.path for shard in source_shards(store, "*.txt")] == ["b.txt"]


# ---------------------------------------------------------------- predictions


def predictions_record(embeddings_uri: str) -> dict[str, Any]:
    both = {"fingerprint": FINGERPRINT, "bundle": BUNDLE}
    contract = {**both, "embeddings.uri": embeddings_uri, "top_k": TOP_K, "min_confidence": 0.3}
    return {
        "kind": "predictions",
        "schema_version": SCHEMA_VERSION,
        "contract": contract,
        "source_uri": embeddings_uri,
        **both,
    }


def predictions_of(shard: str, index: list[int], k: int = TOP_K) -> pa.Table:
    labels, confidences = ["x", "y", "z"][:k], [0.5, 0.25, 0.125][:k]
    columns = {
        "key": [f"{shard}-{i}" for i in index],
        "shard": [shard] * len(index),
        "index": index,
        "label": [None if i % 2 else "x" for i in index],
        "confidence": [0.5] * len(index),
        "top_labels": [labels] * len(index),
        "top_confidences": [confidences] * len(index),
        "bundle": [BUNDLE] * len(index),
    }
    return pa.table(columns, schema=predictions_schema(k))


def score(store: Store, part: PartName, identity: str, data: pa.Table) -> PartName:
    name = prediction_name(part, identity)
    facts = PredictionPartFacts(BUNDLE, FINGERPRINT, str(part), identity, data.num_rows)
    write_prediction_part(store, name, data, facts)
    return name


class Scored:
    """A clean prediction table beside the embedding table, and the name of one of its parts."""

    def __init__(self, embeddings: Store, folder: Path) -> None:
        self.embeddings, self.store = embeddings, open_store(str(folder / "predictions"))
        claim_table(self.store, predictions_record(embeddings.uri))
        rows = {A0: [0, 1, 3], A1: [4, 5, 6, 7], A2: [8, 9], B0: []}
        names = {}
        for part, info in list_parts(embeddings):
            shard = "b.tar" if part == B0 else "a.tar"
            names[part] = score(self.store, part, info.identity, predictions_of(shard, rows[part]))
        self.name = names[A2]
        self.path = f"data/{names[A2]}"

    def columns(self, name: str, values: list[Any], **field: Any) -> None:
        edit(self.store, self.path, with_column(name, values, **field))

    def facts(self, **changed: Any) -> None:
        edit(self.store, self.path, footer=lambda facts: {**facts, **changed})


@pytest.fixture
def scored(store: Store, tmp_path: Path) -> Scored:
    return Scored(store, tmp_path)


def test_a_clean_prediction_table_has_no_findings(scored: Scored) -> None:
    result = verify_table(scored.store)
    assert all_findings(result) == []
    assert (result.kind, result.shards, result.parts, result.rows) == ("predictions", 2, 4, 9)


def lose_one_copy(scored: Scored) -> None:
    """A table with copies for people, of which one part has none."""
    record = json.loads(scored.store.read("_table.json"))
    record["contract"]["also"] = ["csv"]
    scored.store.write("_table.json", json.dumps(record).encode())
    for name, _ in list_parts(scored.store):
        if name != scored.name:
            scored.store.write(copy_path(name, "csv"), b"key\r\n")


PLANTED_IN_PREDICTIONS: dict[str, tuple[Callable[[Scored], None], Damage]] = {
    "not Parquet": (lambda t: t.store.write(t.path, b"PAR1 PAR1"), Damage.UNREADABLE_PART),
    "no footer": (
        lambda t: t.store.write(t.path, parquet_bytes(predictions_of("a.tar", [8, 9]))),
        Damage.FOOTER,
    ),
    "footer lacks a field": (
        lambda t: edit(t.store, t.path, footer=lambda f: {"schema_version": f["schema_version"]}),
        Damage.FOOTER,
    ),
    "other schema version": (lambda t: t.facts(schema_version=0), Damage.SCHEMA_VERSION),
    "other fingerprint": (lambda t: t.facts(fingerprint="e"), Damage.FINGERPRINT),
    "other recipe": (lambda t: t.facts(recipe_sha256="e" * 64), Damage.RECIPE),
    "other row count": (lambda t: t.facts(rows=3), Damage.ROW_COUNT),
    "other embedding part": (lambda t: t.facts(embedding_part=str(A1)), Damage.PART_NAME),
    "no embedding part": (lambda t: t.facts(embedding_part="?"), Damage.PART_NAME),
    "other embedding version": (lambda t: t.facts(embedding_identity="etag:0:0"), Damage.PART_NAME),
    "bundle of the rows": (lambda t: t.columns("bundle", [BUNDLE, "other"]), Damage.BUNDLE),
    "column missing": (
        lambda t: edit(t.store, t.path, lambda table: table.drop_columns(["confidence"])),
        Damage.COLUMNS,
    ),
    "labels and confidences of other lengths": (
        lambda t: t.columns(
            "top_confidences", [[0.5, 0.25]] * 2, type=predictions_schema(2).field("top_confidences").type
        ),
        Damage.COLUMNS,
    ),
    "fewer top entries than the others": (
        lambda t: edit(t.store, t.path, lambda _: predictions_of("a.tar", [8, 9], k=2)),
        Damage.COLUMNS,
    ),
    "null confidence": (lambda t: t.columns("confidence", [0.5, None], nullable=True), Damage.NULL_VALUES),
    "confidence below 0": (
        lambda t: t.columns("top_confidences", [[0.5, 0.25, 0.125], [0.5, 0.25, -0.125]]),
        Damage.CONFIDENCE_RANGE,
    ),
    "NaN": (lambda t: t.columns("confidence", [0.5, float("nan")]), Damage.CONFIDENCE_RANGE),
    "rising confidences": (
        lambda t: t.columns("top_confidences", [[0.5, 0.125, 0.25], [0.5, 0.25, 0.125]]),
        Damage.CONFIDENCE_ORDER,
    ),
    "label of another class": (lambda t: t.columns("label", ["y", None]), Damage.TOP_ENTRY),
    "confidence of another class": (lambda t: t.columns("confidence", [0.25, 0.5]), Damage.TOP_ENTRY),
    "rows of another shard": (lambda t: t.columns("shard", ["a.tar", "b.tar"]), Damage.SHARD_COLUMN),
    "index twice": (lambda t: t.columns("index", [8, 8]), Damage.DUPLICATE_INDEX),
    "index of another part": (lambda t: t.columns("index", [7, 8]), Damage.INDEX_RANGE),
    "a copy is missing": (lose_one_copy, Damage.COPY_MISSING),
}


@pytest.mark.parametrize("planted", PLANTED_IN_PREDICTIONS)
def test_planted_in_a_prediction_table_it_is_found_alone_and_by_name(scored: Scored, planted: str) -> None:
    plant, kind = PLANTED_IN_PREDICTIONS[planted]
    plant(scored)
    found = all_findings(verify_table(scored.store))
    assert [(f.kind, f.object) for f in found] == [(kind, scored.path)], found


def test_every_kind_of_damage_is_planted_somewhere() -> None:
    kinds = {kind for _, kind, _ in PLANTED.values()} | {kind for _, kind in PLANTED_IN_PREDICTIONS.values()}
    assert set(Damage) <= kinds


def test_predictions_of_another_bundle_than_the_record_says_are_named(scored: Scored) -> None:
    edit(
        scored.store,
        scored.path,
        with_column("bundle", ["other"] * 2),
        lambda facts: {**facts, "bundle": "other"},
    )
    assert [(f.kind, f.object) for f in all_findings(verify_table(scored.store))] == [
        (Damage.BUNDLE, scored.path)
    ]


def test_predictions_without_a_record_are_still_checked(scored: Scored) -> None:
    scored.store.delete("_table.json")
    scored.columns("index", [8, 8])
    result = verify_table(scored.store)
    assert result.kind == "predictions"
    assert [f.kind for f in all_findings(result)] == [Damage.RECORD_MISSING, Damage.DUPLICATE_INDEX]


def test_a_rewritten_embedding_part_leaves_stale_predictions_and_is_unscored(scored: Scored) -> None:
    put(scored.embeddings, A2, [8, 9, 10])
    result = verify_table(scored.store)
    assert result.damage == []
    assert [(f.kind, f.object) for f in result.leftovers] == [(Leftover.STALE_PREDICTIONS, scored.path)]
    assert [(f.kind, f.object) for f in result.unfinished] == [
        (Unfinished.UNSCORED_PART, f"{scored.embeddings.uri}/data/{A2}")
    ]


@pytest.mark.parametrize("record_there", [None, "{", predictions_record("/elsewhere")])
def test_predictions_whose_embeddings_cannot_be_reached_are_checked_alone_and_that_is_said(
    scored: Scored, record_there: object
) -> None:
    if record_there is None:
        scored.embeddings.delete("_table.json")
    else:
        put_record(scored.embeddings, record_there)
    result = verify_table(scored.store)
    assert result.rows == 9
    assert [(f.kind, f.object) for f in all_findings(result)] == [
        (Unfinished.EMBEDDINGS_UNREACHABLE, scored.embeddings.uri)
    ]


# ---------------------------------------------------------------- the command


def test_the_command_answers_0_for_a_clean_table_and_1_for_damage_naming_it(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    PLANTED["no last part"][0](store)
    assert main(["verify", store.uri, "--json"]) == 0
    said = capsys.readouterr()
    summary = json.loads(said.out.splitlines()[-1])
    assert summary["unfinished"] == {"incomplete_shard": 1}
    assert (summary["verb"], summary["damage"], summary["parts"], summary["rows"]) == ("verify", {}, 3, 7)
    assert f"unfinished: incomplete_shard: {A_PARTS}: no last part among 2" in said.err

    PLANTED["flipped bit"][0](store)
    assert main(["verify", store.uri, "--json"]) == 1
    said = capsys.readouterr()
    assert f"damage: embeddings_checksum: data/{A1}: " in said.err
    assert "error: " in said.err
    assert "Traceback" not in said.err
    (named,) = json.loads(said.out)["findings"]["damage"]
    assert (named["kind"], named["object"]) == ("embeddings_checksum", f"data/{A1}")


def test_the_command_shows_twenty_findings_of_a_group_and_counts_the_rest(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(23):
        store.write(f"data/{number:02d}.tmp", b"")
    assert main(["verify", store.uri]) == 0
    said = capsys.readouterr().err
    assert said.count("foreign_file: data/") == 20
    assert "leftovers: ... and 3 more" in said
    assert "foreign_file 23" in said


def test_the_command_compares_with_the_source_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, store = open_store(str(tmp_path / "shards")), open_store(str(tmp_path / "table"))
    source.write("new.tar", b"")
    put_record(store, record(source.uri))
    assert main(["verify", store.uri, "--source"]) == 0
    assert "new_shard: new.tar" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["nowhere"], 1), (["table", "--endpoint-url", "ftp://x"], 2), (["gs://x/y"], 2), ([], 2)],
)
def test_a_table_that_cannot_be_opened_ends_with_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["verify", *arguments]) == code
    assert "Traceback" not in capsys.readouterr().err
