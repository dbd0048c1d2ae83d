"""The rows that a person is asked about: which, in which order, why, and none of them twice."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from engine.errors import AlreadyExists, ContractMismatch, RecipeError
from engine.heads.bundle import TrainedHead, publish_bundle
from engine.heads.kinds import LinearHeadConfig, build_head
from engine.heads.reference import Reference
from engine.parts import prediction_name
from engine.review import (
    CANDIDATES_PER_ROW,
    require_review_uri,
    review_queue,
    review_schema,
    write_review,
)
from engine.schema import predictions_schema
from engine.storage import StorageConfig, Store, open_store
from engine.tables import PredictionPartFacts, claim_table, open_table, read_part, write_prediction_part
from tests.embedding_tables import FINGERPRINT, write_part, write_table

NAMES = np.array(["ant", "bee", "cat"])
STORAGE = StorageConfig()


def write_predictions(
    folder: Path,
    embeddings: Store,
    confidences_NK: NDArray[Any],
    *,
    bundle: str = "made",
    min_confidence: float = 0.0,
    top_k: int = 2,
) -> Store:
    """A prediction table of these confidences for the rows of an embedding table, in its order."""
    store, first = open_store(str(folder)), 0
    schema = predictions_schema(top_k)
    record = {"kind": "predictions", "schema_version": 1, "contract": {}, "fingerprint": FINGERPRINT}
    claim_table(
        store,
        {
            **record,
            "bundle": bundle,
            "bundle_uri": str(folder.parent / "bundle"),
            "source_uri": embeddings.uri,
        },
    )
    for name, info in open_table(embeddings).parts:
        rows = read_part(embeddings, info, ["key", "shard", "index"])
        own_BK = np.asarray(confidences_NK[first : first + rows.num_rows], np.float32)
        order_Bk = np.argsort(-own_BK, axis=1, kind="stable")[:, :top_k]
        tops_Bk = np.take_along_axis(own_BK, order_Bk, axis=1)
        columns = {
            **{column: rows[column] for column in ("key", "shard", "index")},
            "label": pa.array(NAMES[order_Bk[:, 0]], mask=tops_Bk[:, 0] < min_confidence),
            "confidence": tops_Bk[:, 0],
            "top_labels": list(NAMES[order_Bk]),
            "top_confidences": list(tops_Bk),
            "bundle": [bundle] * rows.num_rows,
        }
        facts = PredictionPartFacts(bundle, FINGERPRINT, str(name), info.identity, rows.num_rows)
        data = pa.table(
            {
                name: pa.array(column, schema.field(name).type)
                if not isinstance(column, pa.ChunkedArray)
                else column
                for name, column in columns.items()
            },
            schema=schema,
        )
        write_prediction_part(store, prediction_name(name, info.identity), data, facts)
        first += rows.num_rows
    assert first == len(confidences_NK)
    return store


def publish_with_reference(folder: Path, centroids_CD: NDArray[np.float32]) -> str:
    """A bundle that was fitted on rows in these directions; its id."""
    classes = np.arange(len(centroids_CD))
    given_MK = np.eye(len(classes), dtype=np.bool_)
    head = TrainedHead(
        LinearHeadConfig(),
        build_head(LinearHeadConfig(), centroids_CD.shape[1], len(classes), 0),
        tuple(NAMES[: len(classes)]),
        "single_label",
    )
    bundle = publish_bundle(
        open_store(str(folder)),
        head,
        table_record={"fingerprint": FINGERPRINT, "width": centroids_CD.shape[1]},
        metrics={},
        recipe={},
        reference=Reference.of(centroids_CD, classes, classes, np.array([], np.int64), given_MK),
    )
    return bundle.id


def orthogonal(count: int) -> NDArray[np.float32]:
    return np.eye(count, dtype=np.float32) * np.float32(3)


def asked(rows: pa.Table, *columns: str) -> list[tuple[Any, ...]]:
    return list(zip(*(rows[name].to_pylist() for name in columns), strict=True))


SEVEN = np.array(
    [
        [0.5, 0.3, 0.2],  # margin 0.2
        [0.05, 0.9, 0.05],  # sure, and not like any row of the fit
        [0.46, 0.45, 0.09],  # margin 0.01
        [0.4, 0.3, 0.3],  # the least confident
        [0.1, 0.1, 0.8],
        [0.0, 0.0, 1.0],
        [0.48, 0.44, 0.08],  # margin 0.04
    ]
)


def test_margin_confidence_and_farness_take_turns_and_each_row_says_why_it_is_asked(tmp_path: Path) -> None:
    embeddings_ND = orthogonal(8)[:7]
    embeddings_ND[1] -= embeddings_ND[0]
    store = write_table(tmp_path / "embeddings", {"b/one.tar": embeddings_ND}, 4)
    fitted_CD = (orthogonal(8) + 0.1)[[0, 2, 4]]
    bundle = publish_with_reference(tmp_path / "bundle", fitted_CD)
    table = write_predictions(tmp_path / "labels", store, SEVEN, bundle=bundle, min_confidence=0.42)
    found = review_queue(table, 5)
    assert (found.rows_read, found.notes) == (7, ())
    assert found.rows.schema.equals(review_schema(2))
    assert asked(found.rows, "index", "reason", "label") == [
        (2, "margin", "ant"),
        (3, "abstained", None),
        (1, "far", "bee"),
        (6, "margin", "ant"),
        (0, "confidence", "ant"),
    ]
    np.testing.assert_allclose(found.rows["margin"].to_numpy(), [0.01, 0.1, 0.85, 0.04, 0.2], atol=1e-6)
    (row,) = found.rows.slice(2, 1).to_pylist()
    assert (row["key"], row["shard"], row["source_uri"]) == (
        "b/one.tar-00000001",
        "b/one.tar",
        "/made/b/one.tar",
    )
    assert (row["top_labels"], row["answer"]) == (["bee", "ant"], None)
    units_CD = fitted_CD / np.linalg.norm(fitted_CD, axis=1, keepdims=True)
    unit_D = embeddings_ND[1] / np.linalg.norm(embeddings_ND[1])
    assert row["nearness"] == pytest.approx((units_CD @ unit_D).max(), abs=1e-6)
    assert review_queue(table, 5).rows.equals(found.rows), "the same tables give the same queue"


def test_of_near_duplicates_and_equal_images_one_is_asked_about(tmp_path: Path) -> None:
    a, b = np.array([1, 0, 0, 0], np.float32), np.array([0, 1, 0, 0], np.float32)
    embeddings_ND = np.stack(
        [a, 9 * a + 0.1 * b, b, a + 0.3 * b, np.array([0, 0, 1, 0]), np.array([0, 0, 0, 2])]
    )
    store = write_table(tmp_path / "embeddings", {"a.tar": embeddings_ND.astype(np.float32)}, 6)
    ((_, info),) = open_table(store).parts
    part = read_part(store, info)
    hashes = part["sha256"].to_pylist()
    hashes[5] = hashes[4]  # the same file twice, if with other numbers
    place = part.schema.get_field_index("sha256")
    changed = part.set_column(place, part.schema.field(place), pa.array(hashes, pa.binary(32)))
    path = tmp_path / "embeddings" / info.path
    metadata = pq.read_metadata(path).metadata
    pq.write_table(changed.replace_schema_metadata({b"engine.part": metadata[b"engine.part"]}), path)
    firsts = np.linspace(0.9, 0.5, 6)
    table = write_predictions(tmp_path / "labels", store, np.stack([firsts, 1 - firsts, 0 * firsts], axis=1))
    found = review_queue(table, 6).rows
    # cos(a, 9a + b/10) = 0.99994; cos(a, a + 0.3 b) = 0.958. Of each pair the less certain one is asked about.
    assert sorted(found["index"].to_pylist()) == [1, 2, 3, 5]


def test_the_least_certain_rows_of_a_large_table_are_found_with_few_of_them_in_memory(tmp_path: Path) -> None:
    random = np.random.default_rng(7)
    shards = {f"{number}.tar": random.normal(size=(997, 5)).astype(np.float32) for number in range(6)}
    store = write_table(tmp_path / "embeddings", shards, 100)
    confidences_NK = random.dirichlet([1, 1, 1], size=6 * 997).astype(np.float32)
    table = write_predictions(tmp_path / "labels", store, confidences_NK)
    (tmp_path / "embeddings" / "_table.json").unlink()
    found = review_queue(table, 8)
    assert found.rows_read == 6 * 997
    assert found.notes == (
        "without embeddings, so rows by margin and confidence only, duplicates too: "
        f"{tmp_path}/embeddings: no embeddings table here",
    )
    ordered_NK = -np.sort(-confidences_NK, axis=1)
    margins, confidences = np.sort(ordered_NK[:, 0] - ordered_NK[:, 1]), np.sort(ordered_NK[:, 0])
    assert found.rows["reason"].to_pylist() == ["margin", "confidence"] * 4
    np.testing.assert_array_equal(found.rows["margin"].to_numpy()[::2], margins[:4])
    np.testing.assert_array_equal(found.rows["confidence"].to_numpy()[1::2], confidences[:4])
    assert found.rows["source_uri"].null_count == found.rows["nearness"].null_count == 8


def test_rows_on_which_another_bundle_differs_come_first_the_least_certain_first(tmp_path: Path) -> None:
    store = write_table(tmp_path / "embeddings", {"a.tar": orthogonal(7)}, 4)
    table = write_predictions(tmp_path / "labels", store, SEVEN)
    differing = SEVEN.copy()
    for row in (0, 5, 6):
        differing[row] = [0.1, 0.6, 0.3]
    finer = write_table(tmp_path / "finer", {"a.tar": orthogonal(7)}, 3)  # the same shard, cut otherwise
    other = write_predictions(tmp_path / "other", finer, differing, bundle="other")
    found = review_queue(table, 5, other).rows
    assert asked(found, "index", "reason", "other_label")[:3] == [
        (6, "disagreement", "bee"),
        (0, "disagreement", "bee"),
        (5, "disagreement", "bee"),
    ]
    assert asked(found, "index", "reason", "other_label")[3:] == [
        (2, "margin", "ant"),
        (3, "confidence", "ant"),
    ]
    (gone,) = (info for name, info in open_table(other, "predictions").parts if name.number == 1)
    other.delete(gone.path)
    partly = review_queue(table, 5, other)
    assert partly.rows["index"].to_pylist()[:2] == [6, 0]
    assert "2 parts have rows that the other table does not label" in partly.notes


def test_what_was_rewritten_or_republished_since_is_left_out_and_said(tmp_path: Path) -> None:
    store = write_table(tmp_path / "embeddings", {"a.tar": orthogonal(7)}, 4)
    bundle = publish_with_reference(tmp_path / "bundle", orthogonal(7)[:2])
    table = write_predictions(tmp_path / "labels", store, SEVEN, bundle=bundle)
    write_part(store, "a.tar", 1, True, 4, orthogonal(7)[:3])
    publish_with_reference(tmp_path / "bundle", orthogonal(7)[:3])
    found = review_queue(table, 7)
    assert sorted(found.rows["index"].to_pylist()) == [0, 1, 2, 3]
    rewritten, republished = found.notes
    assert rewritten == "1 parts are left out: their embeddings are gone or were rewritten since"
    assert "another bundle was published meanwhile" in republished
    assert found.rows["nearness"].null_count == 4


def test_one_candidate_for_each_row_has_no_margin(tmp_path: Path) -> None:
    store = write_table(tmp_path / "embeddings", {"a.tar": orthogonal(7)}, 4)
    found = review_queue(write_predictions(tmp_path / "labels", store, SEVEN, top_k=1), 2).rows
    assert asked(found, "index", "reason", "margin") == [(3, "confidence", None), (2, "confidence", None)]


def test_a_table_of_several_labels_is_refused(tmp_path: Path) -> None:
    store = write_table(tmp_path / "embeddings", {"a.tar": orthogonal(7)}, 7)
    table = write_predictions(tmp_path / "labels", store, SEVEN)
    ((_, info),) = open_table(table, "predictions").parts
    part = pq.read_table(tmp_path / "labels" / info.path).rename_columns({"label": "labels"})
    pq.write_table(part, tmp_path / "labels" / info.path)
    with pytest.raises(ContractMismatch, match="several labels for a row"):
        review_queue(table, 2)


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
def test_a_file_with_answers_is_never_replaced(tmp_path: Path, ending: str) -> None:
    store = write_table(tmp_path / "embeddings", {"a.tar": orthogonal(7)}, 4)
    rows = review_queue(write_predictions(tmp_path / "labels", store, SEVEN), 3).rows
    uri = f"{tmp_path}/new/queue{ending}"
    require_review_uri(uri, STORAGE)
    write_review(rows, uri, STORAGE)
    content = Path(uri).read_bytes()
    if ending == ".parquet":
        assert pq.read_table(io.BytesIO(content)).equals(rows)
    else:
        read = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
        assert [row["key"] for row in read] == rows["key"].to_pylist()
        assert {(row["answer"], row["nearness"]) for row in read} == {("", "")}
    with pytest.raises(AlreadyExists, match="a person's answers"):
        require_review_uri(uri, STORAGE)
    with pytest.raises(AlreadyExists, match="a person's answers"):
        write_review(rows.slice(0, 1), uri, STORAGE)
    assert Path(uri).read_bytes() == content
    with pytest.raises(RecipeError, match="ending in .parquet or .csv"):
        require_review_uri(f"{tmp_path}/queue.xlsx", STORAGE)


def test_candidates_are_bounded_by_the_rows_that_are_wanted() -> None:
    from engine.review import _Pool

    random, pool = np.random.default_rng(3), _Pool(CANDIDATES_PER_ROW * 2, compares=True)
    names = [prediction_name_of(number) for number in range(30)]
    for name in names:
        top_Nk = -np.sort(-random.random((101, 2)).astype(np.float32), axis=1)
        part = pa.table(
            {
                "key": ["k"] * 101,
                "shard": ["s"] * 101,
                "index": range(101),
                "label": ["ant"] * 101,
                "confidence": top_Nk[:, 0],
                "top_labels": pa.array([["ant", "bee"]] * 101, pa.list_(pa.string(), 2)),
                "top_confidences": pa.array(list(top_Nk), pa.list_(pa.float32(), 2)),
            }
        )
        pool.offer(name, part, None, None)
        assert len(pool.candidates()) <= 40
    assert pool.rows_read == 30 * 101


def prediction_name_of(number: int) -> Any:
    from engine.parts import part_name

    return prediction_name(part_name("a.tar", "etag:1:1", number, False), "etag:2:2")
