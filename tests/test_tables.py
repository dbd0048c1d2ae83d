"""Tables on a real disk: records, parts with their footers, reading, rejects and the sweep."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.errors import ContractMismatch, ObjectChanged, ObjectNotFound, TableDamaged
from engine.parts import PartName, copy_path, hash8_of, part_name, path16_of, prediction_name
from engine.schema import SCHEMA_VERSION, embeddings_schema, predictions_schema, rejects_schema
from engine.storage import Store, open_store
from engine.tables import (
    READ_THREADS,
    EmbeddingPartFacts,
    PredictionPartFacts,
    claim_table,
    count_rejects,
    list_parts,
    open_table,
    prune,
    read_embedding_facts,
    read_part,
    read_record,
    sweep,
    sweep_predictions,
    table_progress,
    write_embedding_part,
    write_prediction_part,
)
from tests.embedding_tables import write_table

WIDTH = 7
IDENTITY = "etag:v1:100"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "table"))


def record(**contract: object) -> dict[str, object]:
    return {
        "kind": "embeddings",
        "schema_version": SCHEMA_VERSION,
        "contract": contract,
        "fingerprint": "f",
        "width": WIDTH,
    }


def embeddings(shard: str, first: int, rows: int, dtype: str = "float32") -> pa.Table:
    schema = embeddings_schema(WIDTH, dtype, ["camera"])  # type: ignore[arg-type]
    numbers = np.arange(first * WIDTH, (first + rows) * WIDTH, dtype=dtype) + 1
    index = list(range(first, first + rows))
    return pa.table(
        {
            "key": [f"{shard}-{i}" for i in index],
            "shard": [shard] * rows,
            "index": index,
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(numbers), type=schema.field("embedding").type
            ),
            "label": ["a" if i % 2 else None for i in index],
            "image_width": [31] * rows,
            "image_height": [37] * rows,
            "sha256": [bytes(32)] * rows,
            "camera": ["x"] * rows,
        },
        schema=schema,
    )


def rejects(shard: str, *reasons: str) -> pa.Table:
    rows = [
        {
            "key": "k",
            "shard": shard,
            "index": i,
            "stage": "decode",
            "error": reason,
            "message": "",
            "size_bytes": 3,
        }
        for i, reason in enumerate(reasons)
    ]
    return pa.Table.from_pylist(rows, schema=rejects_schema(keep_bytes=False))


def facts(shard: str, samples: int, num_rejects: int = 0, end: int | None = 512) -> EmbeddingPartFacts:
    return EmbeddingPartFacts("f", "s3://source", shard, IDENTITY, 0, end, samples, num_rejects, None, "")


def write(
    store: Store,
    shard: str,
    number: int,
    last: bool,
    rows: int = 3,
    reasons: tuple[str, ...] = (),
    identity: str = IDENTITY,
) -> PartName:
    name = part_name(shard, identity, number, last)
    samples = rows + len(reasons)
    write_embedding_part(
        store,
        name,
        embeddings(shard, number * 10, rows),
        rejects(shard, *reasons),
        facts(shard, samples, len(reasons)),
    )
    return name


def test_the_first_run_claims_a_table_and_an_equal_one_joins_it(store: Store) -> None:
    assert read_record(store, "embeddings") is None
    first = claim_table(store, record(dtype="float32", image=("jpg", "png")) | {"created": "1"})
    second = claim_table(store, record(dtype="float32", image=("jpg", "png")) | {"created": "2"})
    assert first["created"] == second["created"] == "1"


def test_of_predictions_of_a_rewritten_embedding_part_the_latest_are_read(store: Store) -> None:
    claim_table(store, record() | {"kind": "predictions"})
    shard = part_name("a.tar", IDENTITY, 0, True)
    for identity, label in (("etag:2:9", "newer"), ("etag:1:9", "older")):
        data = pa.table(
            {
                "key": ["k"],
                "shard": ["a.tar"],
                "index": [0],
                "label": [label],
                "confidence": pa.array([1], pa.float32()),
                "top_labels": [[label]],
                "top_confidences": [[1.0]],
                "bundle": ["b"],
            },
            schema=predictions_schema(1),
        )
        made_of = PredictionPartFacts("b", "f", str(shard), identity, 1)
        write_prediction_part(store, prediction_name(shard, identity), data, made_of)
        path = Path(store.uri, "data", str(prediction_name(shard, identity)))
        os.utime(path, (2_000_000_000, 2_000_000_000 + (label == "newer")))
    table = open_table(store, "predictions")
    assert (len(table.parts), table.read(["label"])["label"].to_pylist()) == (1, ["newer"])


def test_another_contract_is_refused_with_both_values_of_every_field(store: Store) -> None:
    claim_table(store, record(dtype="float32", rows_per_part=64))
    with pytest.raises(ContractMismatch) as caught:
        claim_table(store, record(dtype="float16", rows_per_part=64, extra=None))
    message = str(caught.value)
    assert 'dtype: the table has "float32", this run "float16"' in message
    assert "extra: the table has no such field, this run null" in message
    assert "rows_per_part" not in message


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("{", TableDamaged, "not a table record"),
        ("[]", TableDamaged, "not a table record"),
        (
            json.dumps({"kind": "predictions", "schema_version": SCHEMA_VERSION}),
            ContractMismatch,
            "another kind",
        ),
        (json.dumps({"kind": "embeddings", "schema_version": 99}), TableDamaged, "schema version 99"),
        (json.dumps({"kind": "embeddings", "schema_version": SCHEMA_VERSION}), TableDamaged, "no contract"),
    ],
)
def test_a_record_that_is_not_ours_is_refused(
    store: Store, text: str, error: type[Exception], said: str
) -> None:
    store.write("_table.json", text.encode())
    with pytest.raises(error, match=said):
        read_record(store, "embeddings")


def test_a_part_reads_back_exactly_and_its_footer_says_what_it_holds(store: Store) -> None:
    name = write(store, "a.tar", 0, last=False, rows=5, reasons=("no_image", "truncated_image"))
    ((listed, info),) = list_parts(store)
    assert listed == name
    assert read_part(store, info).equals(embeddings("a.tar", 0, 5))
    found = read_embedding_facts(store, name)
    assert (found.samples, found.rejects, found.end_offset, found.identity) == (7, 2, 512, IDENTITY)
    numbers = np.arange(5 * WIDTH, dtype="<f4") + 1
    assert found.embeddings_sha256 == hashlib.sha256(numbers.tobytes()).hexdigest()
    assert found.rejects_sha256 == hashlib.sha256(store.read(f"rejects/{name}")).hexdigest()


def test_parts_open_in_plain_parquet_readers_without_our_types(store: Store, tmp_path: Path) -> None:
    write(store, "a.tar", 0, last=True)
    table = pq.read_table(tmp_path / "table" / "data")
    assert table.schema.field("embedding").type == pa.list_(
        pa.field("element", pa.float32(), nullable=False), WIDTH
    )
    assert table.num_rows == 3


def test_a_part_of_rejects_only_has_no_rows_and_still_commits(store: Store) -> None:
    write(store, "a.tar", 0, last=True, rows=0, reasons=("empty_sample",))
    claim_table(store, record())
    assert open_table(store).read(["key"]).num_rows == 0
    assert count_rejects(store, table_progress(store))[0] == {"empty_sample": 1}


def test_a_writer_without_rejects_removes_a_leftover(store: Store) -> None:
    name = write(store, "a.tar", 0, last=True, reasons=("no_image",))
    assert [str(found) for found, _ in list_parts(store, "rejects/")] == [str(name)]
    write(store, "a.tar", 0, last=True)
    assert list(store.list("rejects/")) == []


def test_rejects_whose_data_part_was_never_committed_do_not_count(store: Store) -> None:
    name = write(store, "a.tar", 0, last=True, reasons=("no_image",))
    write(store, "b.tar", 0, last=True, reasons=("no_image", "corrupt_image"))
    store.delete(f"data/{name}")
    reasons, by_part = count_rejects(store, table_progress(store))
    assert reasons == {"no_image": 1, "corrupt_image": 1}
    assert by_part.total() == 2


def test_open_table_reads_one_version_per_shard_the_complete_one(store: Store) -> None:
    claim_table(store, record())
    write(store, "a.tar", 0, last=False, identity="new")  # half-way through the replacement
    write(store, "a.tar", 0, last=False, identity="old", rows=5)
    write(store, "a.tar", 1, last=True, identity="old", rows=2)
    write(store, "b.tar", 0, last=False)
    table = open_table(store)
    assert table.read(["key", "index"]).num_rows == 5 + 2 + 3
    assert table.incomplete_shards == 1


def test_parts_are_worked_on_in_their_order_and_not_far_ahead_of_who_asks(tmp_path: Path) -> None:
    store = write_table(tmp_path, {"a.tar": np.arange(60, dtype=np.float32)[:, None]}, 1)
    table, begun = open_table(store), []

    def first_number(part: pa.Table) -> float:
        begun.append(part.num_rows)
        return part["embedding"][0].as_py()[0]

    assert list(table.map_parts(first_number, ["embedding"])) == list(range(60))
    begun.clear()
    some = table.map_parts(first_number, ["embedding"])
    assert [next(some), next(some)] == [0, 1]
    some.close()
    assert len(begun) <= 2 * READ_THREADS + 1


def test_an_empty_or_absent_table_says_so(store: Store) -> None:
    with pytest.raises(ObjectNotFound, match="no embeddings table here"):
        open_table(store)
    claim_table(store, record())
    with pytest.raises(TableDamaged, match="no parts yet"):
        open_table(store).read(["key"])


def test_a_part_rewritten_after_listing_is_not_read_in_its_place(store: Store) -> None:
    write(store, "a.tar", 0, last=True)
    ((_, info),) = list_parts(store)
    write(store, "a.tar", 0, last=True, rows=4)
    with pytest.raises(ObjectChanged):
        read_part(store, info)


def test_a_file_that_is_no_part_is_named(store: Store) -> None:
    name = part_name("a.tar", IDENTITY, 0, True)
    store.write(f"data/{name}", b"not parquet at all")
    with pytest.raises(TableDamaged, match=str(name)):
        read_embedding_facts(store, name)
    with pytest.raises(TableDamaged, match=str(name)):
        read_part(store, next(list_parts(store))[1])


def test_the_footer_is_found_behind_a_large_part(store: Store) -> None:
    name = part_name("big.tar", IDENTITY, 0, True)
    write_embedding_part(
        store, name, embeddings("big.tar", 0, 9000), rejects("big.tar"), facts("big.tar", 9000)
    )
    ((_, info),) = list_parts(store)
    assert info.size > 200_000
    assert read_embedding_facts(store, name).samples == 9000


def test_the_sweep_removes_old_versions_only_once_the_present_one_is_complete(store: Store) -> None:
    write(store, "a.tar", 0, last=True, identity="old", reasons=("no_image",))
    write(store, "a.tar", 0, last=False, identity="new")
    assert sweep(store, lambda _: hash8_of("new")) == 0
    write(store, "a.tar", 1, last=True, identity="new")
    assert sweep(store, lambda _: hash8_of("newer")) == 0  # replaced again since: nothing is superseded yet
    assert sweep(store, lambda _: None) == 0  # gone from the source
    assert sweep(store, lambda _: hash8_of("new")) == 1
    assert set(table_progress(store)[path16_of("a.tar")]) == {hash8_of("new")}
    assert list(store.list("rejects/")) == []


def test_the_sweep_takes_copies_with_it_and_leaves_those_of_parts_that_are_still_to_come(
    store: Store,
) -> None:
    old, new = (write(store, "a.tar", 0, True, identity=version) for version in ("v1", "v2"))
    coming, lost = part_name("a.tar", "v2", 1, True), part_name("a.tar", "v0", 0, False)
    unknown = part_name("b.tar", "v0", 0, True)  # no part says which shard it is of
    for name in (old, new, coming, lost, unknown):
        store.write(copy_path(name, "csv"), b"key\n")
    assert sweep(store, lambda path: {"a.tar": hash8_of("v2")}[path]) == 1
    assert set(store.names("also/")) == {copy_path(name, "csv") for name in (new, coming, unknown)}


@pytest.mark.parametrize("damage", [b"", b"PAR1 not parquet PAR1"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_part_of_an_old_version_does_not_end_the_sweep(
    store: Store, number: int, damage: bytes
) -> None:
    for identity in ("old", "new"):
        write(store, "a.tar", 0, last=False, identity=identity)
        write(store, "a.tar", 1, last=True, identity=identity)
    store.write(f"data/{part_name('a.tar', 'old', number, number == 1)}", damage)
    assert sweep(store, lambda _: hash8_of("new")) == 2
    assert set(table_progress(store)[path16_of("a.tar")]) == {hash8_of("new")}


def test_rejects_that_cannot_be_read_are_left_to_verify_by_the_sweep_and_named_by_the_budget(
    store: Store,
) -> None:
    write(store, "a.tar", 0, last=True, reasons=("no_image",))
    orphan = part_name("b.tar", "old", 0, last=True)
    store.write(f"rejects/{orphan}", b"rotten")
    assert sweep(store, lambda _: hash8_of("new")) == 0
    ((name, _),) = list_parts(store)
    store.write(f"rejects/{name}", b"rotten")
    with pytest.raises(TableDamaged, match=str(name)):
        count_rejects(store, table_progress(store))


def test_rejects_of_another_end_of_the_shard_do_not_count(store: Store) -> None:
    write(store, "a.tar", 0, last=True, reasons=("no_image",))
    ((name, _),) = list_parts(store)
    encoded = store.read(f"rejects/{name}")
    store.delete(f"rejects/{name}")
    store.write(f"rejects/{part_name('a.tar', IDENTITY, 0, last=False)}", encoded)
    assert count_rejects(store, table_progress(store))[0] == {}


def test_pruning_asks_once_more_and_keeps_what_is_still_there(store: Store) -> None:
    for shard in ("gone.tar", "here.tar", "listed.tar"):
        write(store, shard, 0, last=True)
    removed = {path16_of("gone.tar"), path16_of("here.tar")}
    assert prune(store, removed, lambda path: path == "gone.tar") == (1, ["here.tar"])
    assert {name.path16 for name, _ in list_parts(store)} == {path16_of("here.tar"), path16_of("listed.tar")}


def test_predictions_of_a_rewritten_part_go_once_it_is_scored_again(store: Store) -> None:
    part = part_name("a.tar", IDENTITY, 0, True)
    old, new = prediction_name(part, "old"), prediction_name(part, "new")
    table = predictions_schema(2).empty_table()
    for name in (old,):
        store.write(f"data/{name}", table.schema.serialize().to_pybytes())
    assert sweep_predictions(store, lambda: {new}) == 0
    store.write(f"data/{new}", b"")
    assert sweep_predictions(store, lambda: {new}) == 1
    assert [name for name, _ in list_parts(store)] == [new]


def test_small_columns_of_a_large_part_are_read_without_its_embeddings(tmp_path: Path) -> None:
    class Counting(type(open_store(str(tmp_path)))):  # type: ignore[misc]
        reads: ClassVar[list[int]] = []

        def read(self, path: str, *arguments: Any, **named: Any) -> bytes:
            content: bytes = super().read(path, *arguments, **named)
            self.reads.append(len(content))
            return content

    width, rows = 512, 1024
    random = np.random.default_rng(0)
    data = pa.table(
        {
            "key": [f"{row:04d}" for row in range(rows)],
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(random.normal(size=rows * width).astype(np.float32)), width
            ),
            "label": ["a", "b"] * (rows // 2),
        }
    )
    pq.write_table(data, tmp_path / "part.parquet", row_group_size=rows, use_dictionary=False)
    store = Counting(str(tmp_path), open_store(str(tmp_path)).config)
    info = store.info("part.parquet")
    small = read_part(store, info, ["key", "label"])
    assert small == data.select(["key", "label"])
    assert sum(store.reads) < info.size / 10 and len(store.reads) <= 4, store.reads
    store.reads.clear()
    assert read_part(store, info, ["embedding"]) == data.select(["embedding"])
    assert store.reads == [info.size]
