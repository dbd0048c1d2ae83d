"""The rows nearest to a vector or to another row: all of them, in order, whatever the parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from engine.errors import RecipeError
from engine.schema import SCHEMA_VERSION
from engine.similar import FEW_QUERIES, ROWS_NAMED, SIMILAR_SCHEMA, similar, similar_to_row
from engine.storage import Store, open_store
from engine.tables import Table, claim_table, open_table
from tests.embedding_tables import FINGERPRINT, claim_embeddings, write_part, write_table

WIDTH = 7


def rows_of_any_length(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Lengths between a tenth and ten, so that products and cosines put them in another order."""
    random = np.random.default_rng(seed)
    rows_ND = random.normal(size=(count, WIDTH)) * 10 ** random.uniform(-1, 1, size=(count, 1))
    return rows_ND.astype(np.float32)


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Two shards in parts of 11 rows, the last of each with fewer."""
    shards = {"a.tar": rows_of_any_length(101), "b/c.tar": rows_of_any_length(29, seed=1)}
    return open_table(write_table(tmp_path, shards, 11))


def by_numpy(table: Table, queries_BD: NDArray[Any], k: int) -> tuple[NDArray[Any], list[list[str]]]:
    """Cosines and keys, in float64 and all at once."""
    rows = table.read(["key", "embedding"])
    rows_ND = np.array(rows["embedding"].to_pylist(), np.float64)
    products_BN = queries_BD.astype(np.float64) @ rows_ND.T
    cosines_BN = products_BN / np.linalg.norm(rows_ND, axis=1) / np.linalg.norm(queries_BD, axis=1)[:, None]
    order = np.argsort(-cosines_BN, axis=1, kind="stable")[:, :k]
    keys = np.array(rows["key"].to_pylist())
    return np.take_along_axis(cosines_BN, order, axis=1), keys[order].tolist()


@pytest.mark.parametrize(("queries", "k"), [(1, 1), (5, 20), (5, 130), (FEW_QUERIES + 1, 20)])
def test_the_nearest_rows_are_those_of_numpy_in_the_same_order(table: Table, queries: int, k: int) -> None:
    queries_BD = rows_of_any_length(queries, seed=2)
    found = similar(table, queries_BD, k)
    assert found.schema == SIMILAR_SCHEMA
    cosines_Bk, keys = by_numpy(table, queries_BD, k)
    assert np.array(found["key"].to_pylist()).reshape(queries, k).tolist() == keys
    np.testing.assert_allclose(found["cosine"].to_numpy().reshape(queries, k), cosines_Bk, atol=1e-6)
    assert found["query"].to_pylist() == np.repeat(np.arange(queries), k).tolist()
    assert found["rank"].to_pylist() == [*range(1, k + 1)] * queries
    assert found["shard"][0].as_py() == found["key"][0].as_py().rpartition("-")[0]


def test_a_table_with_fewer_rows_than_are_wanted_gives_them_all(table: Table) -> None:
    assert similar(table, rows_of_any_length(1), 1000).num_rows == 130


def test_of_equal_rows_those_that_come_first_are_taken(tmp_path: Path) -> None:
    rows_ND = np.repeat(rows_of_any_length(3), 40, axis=0)
    table = open_table(write_table(tmp_path, {"a.tar": rows_ND}, 11))
    assert similar(table, rows_ND[40:41], 25)["index"].to_pylist() == list(range(40, 65))


def test_a_table_of_float16_is_compared_in_float32(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    contract = {"fingerprint": FINGERPRINT, "output.dtype": "float16"}
    record = {"kind": "embeddings", "schema_version": SCHEMA_VERSION, "contract": contract, "width": WIDTH}
    claim_table(store, record)
    rows_ND = rows_of_any_length(60).astype(np.float16)
    write_part(store, "a.tar", 0, True, 0, rows_ND)
    table, queries_BD = open_table(store), rows_of_any_length(2, seed=3)
    found = similar(table, queries_BD, 20)
    cosines_Bk, keys = by_numpy(table, queries_BD, 20)
    assert np.array(found["key"].to_pylist()).reshape(2, 20).tolist() == keys
    np.testing.assert_allclose(found["cosine"].to_numpy().reshape(2, 20), cosines_Bk, atol=1e-6)


def test_progress_counts_every_part(table: Table) -> None:
    told: list[tuple[int, int]] = []
    similar(table, rows_of_any_length(1), report=lambda done, total: told.append((done, total)))
    assert told == [(done, 13) for done in range(1, 14)]


@pytest.mark.parametrize(
    "queries_BD",
    [np.ones(WIDTH), np.ones((2, WIDTH + 1)), np.zeros((1, WIDTH)), np.full((1, WIDTH), np.nan)],
)
def test_queries_that_have_no_direction_in_the_table_are_refused(
    table: Table, queries_BD: NDArray[Any]
) -> None:
    with pytest.raises(ValueError, match="quer"):
        similar(table, queries_BD)


def test_a_row_is_asked_about_by_its_key_and_is_not_its_own_neighbour(table: Table) -> None:
    row, near = similar_to_row(table, key="b/c.tar-00000013", k=5)
    assert row == {"key": "b/c.tar-00000013", "shard": "b/c.tar", "index": 13, "label": None}
    vector_1D = rows_of_any_length(29, seed=1)[13:14]
    _, keys = by_numpy(table, vector_1D, 6)
    assert keys[0][0] == "b/c.tar-00000013"
    assert near["key"].to_pylist() == keys[0][1:]
    assert near["rank"].to_pylist() == [1, 2, 3, 4, 5]
    _, same = similar_to_row(table, shard="b/c.tar", index=13, k=5)
    assert same.equals(near)


def test_a_row_among_more_equal_ones_than_are_wanted_is_left_out_all_the_same(tmp_path: Path) -> None:
    store = write_table(tmp_path, {"a.tar": np.ones((9, WIDTH), np.float32)}, 4)
    for index, others in ((1, [0, 2, 3]), (8, [0, 1, 2])):
        assert (
            similar_to_row(open_table(store), shard="a.tar", index=index, k=3)[1]["index"].to_pylist()
            == others
        )


def with_one_key_three_times(folder: Path) -> Store:
    shards = {f"{name}.tar": rows_of_any_length(4, seed) for seed, name in enumerate("xyz")}
    store = write_table(folder, shards, 4)
    for name, _ in open_table(store).parts:
        store.delete(f"data/{name}")
    for shard, rows_ND in shards.items():
        write_part(store, shard, 0, True, 0, rows_ND, key=["one", "cat", "two", "three"])
    return store


def test_a_key_of_several_rows_is_refused_with_their_names_and_taken_with_one_of_them(tmp_path: Path) -> None:
    table = open_table(with_one_key_three_times(tmp_path))
    with pytest.raises(RecipeError, match="3 rows have key 'cat'") as refused:
        similar_to_row(table, key="cat")
    assert set(str(refused.value.found).split("; ")) == {f"--shard {name}.tar --index 1" for name in "xyz"}
    row, near = similar_to_row(table, key="cat", shard="y.tar")
    assert (row["shard"], row["index"]) == ("y.tar", 1)
    assert {"shard": "x.tar", "key": "cat"} in near.select(["shard", "key"]).to_pylist()


def test_of_many_rows_with_one_key_twenty_are_named_and_all_are_counted(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    claim_embeddings(store, WIDTH, 25)
    for number in range(2):
        rows_ND = rows_of_any_length(25)
        write_part(store, "a.tar", number, number == 1, 25 * number, rows_ND, key=["cat"] * 25)
    with pytest.raises(RecipeError, match="50 rows have key 'cat'") as refused:
        similar_to_row(open_table(store), key="cat")
    named = str(refused.value.found).split("; ")
    assert len(named) == ROWS_NAMED + 1 and named[-1] == "and 30 more"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"key": "absent"}, "no row has key 'absent'"),
        ({"key": "a.tar-00000003", "shard": "b/c.tar"}, "no row has key 'a.tar-00000003', shard 'b/c.tar'"),
        ({"key": "caf\udce9"}, "no row has key 'caf\\udce9'"),
        ({"shard": "a.tar", "index": 10**20}, "no row has shard 'a.tar', index 100000000000000000000"),
        ({"shard": "a.tar", "index": 101}, "no row has shard 'a.tar', index 101"),
        ({"shard": "a.tar"}, "by its key, or by its shard and index"),
        ({}, "none of them"),
    ],
)
def test_a_row_that_is_not_there_is_named(table: Table, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match="row") as refused:
        similar_to_row(table, **asked)
    assert said in str(refused.value)


def test_labels_and_columns_are_those_of_the_rows(tmp_path: Path) -> None:
    store = write_table(tmp_path, {"a.tar": rows_of_any_length(3)}, 3)
    ((name, _),) = open_table(store).parts
    store.delete(f"data/{name}")
    labels = pa.array(["ant", None, "[bee]"])
    write_part(store, "a.tar", 0, True, 0, rows_of_any_length(3), label=labels)
    near = similar(open_table(store), rows_of_any_length(3)[2:], 1)
    assert near["label"].to_pylist() == ["[bee]"] and near["index"].to_pylist() == [2]
