"""SQL over real tables: what each view shows, how little is read for it, and what is refused."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.errors import AccessDenied, ObjectChanged, ObjectNotFound, RecipeError
from engine.parts import part_name
from engine.schema import embeddings_schema, rejects_schema
from engine.sql import TableViews, open_views
from engine.storage import StorageConfig, Store, open_store
from engine.tables import EmbeddingPartFacts, claim_table, open_table, read_part, write_embedding_part
from jobs.cli import main
from tests.embedding_tables import (
    FINGERPRINT,
    IDENTITY,
    claim_embeddings,
    store_in_half_precision,
    write_table,
)
from tests.prediction_tables import write_predictions

KEYS = [f"a/one.tar-{index:08d}" for index in range(7)] + [f"b.tar-{index:08d}" for index in range(5)]
LABELS: dict[str, str | None] = {key: "cat" if key.startswith("a") else "dog" for key in KEYS} | {
    KEYS[2]: None
}


def numbers(rows: int, width: int = 3, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


@pytest.fixture
def embeddings(tmp_path: Path) -> Store:
    return write_table(tmp_path / "embeddings", {"a/one.tar": numbers(7), "b.tar": numbers(5, seed=1)}, 4)


@pytest.fixture
def predictions(tmp_path: Path, embeddings: Store) -> Store:
    return write_predictions(tmp_path / "predictions", embeddings, LABELS)


def rows_of(views: TableViews, sql: str) -> list[tuple[Any, ...]]:
    found = views.select(sql).read_all()
    return list(zip(*(column.to_pylist() for column in found.columns), strict=True))


def test_predictions_bring_their_embeddings_and_both_join(predictions: Store, embeddings: Store) -> None:
    with open_views([predictions.uri]) as views:
        assert {name: (view.uri, view.parts) for name, view in views.views.items()} == {
            "predictions": (predictions.uri, 4),
            "embeddings": (embeddings.uri, 4),
            "rejects": (embeddings.uri, 0),
        }
        found = rows_of(
            views,
            "SELECT p.label, count(*), sum(e.embedding[1]) FROM predictions p JOIN embeddings e USING (shard, index) "
            "GROUP BY ALL ORDER BY 1 NULLS FIRST",
        )
    sums = [numbers(7)[2, 0], np.delete(numbers(7), 2, axis=0)[:, 0].sum(), numbers(5, seed=1)[:, 0].sum()]
    assert [(label, count) for label, count, _ in found] == [(None, 1), ("cat", 6), ("dog", 5)]
    np.testing.assert_allclose([total for _, _, total in found], sums, rtol=1e-6)


def test_embeddings_have_their_length_so_that_cosines_need_no_cast(embeddings: Store) -> None:
    with open_views([embeddings.uri]) as views:
        cosines = rows_of(
            views,
            "SELECT e.index, array_cosine_similarity(e.embedding, q.embedding) FROM embeddings e, embeddings q "
            "WHERE q.key = 'b.tar-00000003' AND e.shard = 'b.tar' ORDER BY 2 DESC LIMIT 1",
        )
    assert cosines == [(3, pytest.approx(1.0))]


def test_of_a_replaced_shard_one_version_is_counted(embeddings: Store, tmp_path: Path) -> None:
    """The new version stands beside the old one, and is not done to its end."""
    rows = read_part(embeddings, open_table(embeddings).parts[0][1])
    facts = EmbeddingPartFacts(FINGERPRINT, "/made", "a/one.tar", "etag:1:2", None, None, 4, 0, None, "")
    name = part_name("a/one.tar", "etag:1:2", 0, False)
    write_embedding_part(embeddings, name, rows, rejects_schema(keep_bytes=False).empty_table(), facts)
    assert duckdb.sql(f"SELECT count(*) FROM '{embeddings.uri}/data/*.parquet'").fetchall() == [(16,)]
    with open_views([embeddings.uri]) as views:
        assert rows_of(views, "SELECT count(*), count(DISTINCT key) FROM embeddings") == [(12, 12)]


def test_rejects_are_those_of_parts_that_count(embeddings: Store) -> None:
    (name, info), *_ = open_table(embeddings).parts
    row = {"key": "k", "shard": "a/one.tar", "index": 9, "stage": "decode", "error": "corrupt_image"}
    rejects = pa.Table.from_pylist([{**row, "message": "m", "size_bytes": 3}], schema=rejects_schema(False))
    facts = EmbeddingPartFacts(FINGERPRINT, "/made", "a/one.tar", IDENTITY, None, None, 5, 1, None, "")
    write_embedding_part(embeddings, name, read_part(embeddings, info), rejects, facts)
    orphan = part_name("c.tar", IDENTITY, 0, True)  # a run that was killed before its data part
    embeddings.write(f"rejects/{orphan}", embeddings.read(f"rejects/{name}"))
    with open_views([embeddings.uri]) as views:
        assert rows_of(views, "SELECT error, count(*) FROM rejects GROUP BY ALL") == [("corrupt_image", 1)]


def test_a_table_without_parts_has_its_columns_and_no_rows(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "embeddings"))
    claim_embeddings(store, 5, 4)
    with open_views([store.uri]) as views:
        assert list(views.views["embeddings"].columns) == embeddings_schema(5, "float32").names
        assert rows_of(views, "SELECT count(*) FROM embeddings") == [(0,)]
        found = views.select("SELECT embedding, sha256, index FROM embeddings").schema
        assert found.types == [pa.list_(pa.float32(), 5), pa.binary(), pa.int64()]


def test_counting_and_filtering_leave_the_embeddings_where_they_are(tmp_path: Path) -> None:
    """1,000 x 1,024 float32 are 4 MB in four parts; their footers and keys are far less."""
    shards = {f"{number}.tar": numbers(250, 1024, number) for number in range(4)}
    store = write_table(tmp_path / "wide", shards, 250)
    size = sum(info.size for _, info in open_table(store).parts)
    with open_views([store.uri]) as views:

        def read_for(sql: str) -> int:
            before = views.bytes_read
            views.select(sql).read_all()
            return views.bytes_read - before

        # The end of each part, and of one of them twice: DuckDB asks it for the columns first.
        assert read_for("SELECT count(*) FROM embeddings") == 5 * 65_536
        assert read_for("SELECT key FROM embeddings WHERE shard = '2.tar' AND index = 17") < size / 10
        # Only one part can have that shard, and of it the embeddings are read, once.
        assert read_for("SELECT embedding FROM embeddings WHERE shard = '2.tar'") < 5 * 65_536 + size / 4
        assert read_for("SELECT sum(embedding[7]) FROM embeddings") > 4_000_000
        plan = "".join(
            row[1] for row in rows_of(views, "EXPLAIN SELECT key FROM embeddings WHERE index = 17")
        )
        assert "Projections: key" in plan.replace("  ", " ") and "Filters" in plan


def test_two_tables_of_a_kind_need_names(predictions: Store, embeddings: Store, tmp_path: Path) -> None:
    other = write_predictions(tmp_path / "other", embeddings, dict.fromkeys(KEYS, "cat"))
    with pytest.raises(RecipeError, match="two tables would be the view predictions") as refused:
        open_views([predictions.uri, other.uri])
    assert predictions.uri in str(refused.value) and other.uri in str(refused.value)
    with open_views([f"old={predictions.uri}", f"new={other.uri}"]) as views:
        assert set(views.views) == {"old", "new", "embeddings", "rejects"}
        differing = "SELECT count(*) FROM old JOIN new USING (shard, index) WHERE old.label <> new.label"
        assert rows_of(views, differing) == [(5,)]


def test_predictions_without_their_embeddings_are_shown_and_a_note_says_so(
    predictions: Store, embeddings: Store
) -> None:
    embeddings.delete("_table.json")
    with open_views([predictions.uri]) as views:
        assert set(views.views) == {"predictions"}
        (note,) = views.notes
        assert embeddings.uri in note and "without `embeddings`" in note


@pytest.mark.parametrize(
    ("sql", "found"),
    [
        ("COPY (SELECT 1) TO '{path}'", "COPY"),
        ("EXPLAIN ANALYZE COPY (SELECT 1) TO '{path}'", "COPY"),
        ("--explain\nEXPLAIN ANALYZE CREATE TABLE made AS\nSELECT 1", "CREATE|EXPLAIN"),
        ("SELECT 1; COPY (SELECT 1) TO '{path}'", "SELECT, COPY"),
        (
            "COPY (PIVOT (SELECT 1 a, 2 b) ON a USING sum(b)) TO '{path}'",
            "MULTI|CREATE, COPY",
        ),  # the second in DuckDB 1.5
        ("ATTACH '{path}' AS other", "ATTACH"),
        ("CREATE TABLE made AS SELECT 1", "CREATE"),
        ("SET temp_directory = '{path}'", "SET"),
        ("INSTALL httpfs", "LOAD"),
        ("-- nothing", "no statement"),
    ],
)
def test_statements_that_write_are_refused_by_their_kind(
    embeddings: Store, tmp_path: Path, sql: str, found: str
) -> None:
    path = tmp_path / "written.csv"
    with open_views([embeddings.uri]) as views, pytest.raises(RecipeError) as refused:
        views.select(sql.format(path=path))
    assert re.fullmatch(found, str(refused.value.found))
    assert not path.exists()


def test_writing_with_the_views_own_files_is_refused_even_by_duckdb(embeddings: Store) -> None:
    with open_views([embeddings.uri]) as views, pytest.raises(duckdb.Error):
        views.connection.execute("COPY (SELECT 1 a) TO 'engine://embeddings/new.parquet' (FORMAT parquet)")


def test_a_wrong_column_is_told_with_the_columns_that_there_are(embeddings: Store) -> None:
    with open_views([embeddings.uri]) as views, pytest.raises(RecipeError) as refused:
        views.select("SELECT lable FROM embeddings")
    assert "lable" in str(refused.value) and "image_width" in str(refused.value.wanted)
    assert refused.value.exit_code == 2


def test_a_part_that_was_rewritten_meanwhile_is_our_own_error(embeddings: Store) -> None:
    (_, info), *_ = open_table(embeddings).parts
    with open_views([embeddings.uri]) as views:
        path = Path(embeddings.uri, info.path)
        path.write_bytes(path.read_bytes())
        with pytest.raises(ObjectChanged, match="was changed since it was listed"):
            views.select("SELECT max(key) FROM embeddings").read_all()


def test_embeddings_in_half_precision_are_read_as_numbers(embeddings: Store) -> None:
    store_in_half_precision(embeddings)
    with open_views([embeddings.uri]) as views:
        found = rows_of(views, "SELECT embedding FROM embeddings WHERE shard = 'b.tar' ORDER BY index")
    halves_ND = numbers(5, seed=1).astype(np.float16)
    np.testing.assert_array_equal(np.array([row[0] for row in found]), halves_ND)


def test_predictions_straight_from_images_have_rejects_of_their_own(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "labels"))
    contract = {"source.uri": "/made", "source.kind": "webdataset", "top_k": 3}
    claim_table(
        store, {"kind": "predictions", "schema_version": 1, "contract": contract, "source_uri": "/made"}
    )
    with open_views([store.uri]) as views:
        assert {name: view.uri for name, view in views.views.items()} == {
            "predictions": store.uri,
            "rejects": store.uri,
        }
        assert rows_of(views, "SELECT top_labels, error FROM predictions JOIN rejects USING (key)") == []
    with open_views([f"night={store.uri}"]) as views:
        assert set(views.views) == {"night", "night_rejects"}


def test_no_table_is_told_like_everywhere(tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFound, match="no .* table here"):
        open_views([str(tmp_path)])


def test_without_duckdb_the_message_says_what_to_install(
    embeddings: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(RecipeError, match=r"image-feature-engine\[analytics\]"):
        open_views([embeddings.uri])


def test_tables_in_a_bucket_are_read_with_our_keys_and_endpoint(
    tmp_path: Path, s3_uri: str, s3_config: StorageConfig, embeddings: Store
) -> None:
    """And few requests: the end of each part for a count."""
    bucket = open_store(f"{s3_uri}/embeddings", s3_config)
    for info in embeddings.list():
        bucket.write(info.path, embeddings.read(info.path))
    labels = write_predictions(f"{s3_uri}/labels", bucket, LABELS)
    with open_views([labels.uri], s3_config) as views:
        found = "SELECT e.key, p.label FROM embeddings e JOIN predictions p USING (shard, index)"
        assert dict(rows_of(views, found)) == LABELS
    with pytest.raises(AccessDenied):
        open_views([labels.uri], s3_config.model_copy(update={"anonymous": True}))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_command_prints_a_table_for_people_and_json_for_programs(
    predictions: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    query = (
        "SELECT label, count(*) AS images, sum(confidence) AS total FROM predictions GROUP BY 1 ORDER BY 1"
    )
    code, out, err = run(capsys, "sql", query, "--table", predictions.uri)
    assert code == 0
    assert "label" in out and "cat" in out and "dog" in out
    assert "4 parts" in err
    code, out, _ = run(capsys, "sql", query, "--table", predictions.uri, "--json")
    (line,) = out.splitlines()
    answer = json.loads(line)
    assert answer["rows"] == [
        {"label": "cat", "images": 6, "total": 4.5},
        {"label": "dog", "images": 5, "total": 3.75},
        {"label": None, "images": 1, "total": 0.75},
    ]
    assert answer["columns"][1] == {"name": "images", "type": "int64"}


def test_the_command_writes_all_rows_to_a_new_file(
    predictions: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query = "SELECT key, embedding, sha256 FROM embeddings ORDER BY key"
    for form in ("csv", "parquet"):
        path = tmp_path / f"rows.{form}"
        code, out, err = run(capsys, "sql", query, "--table", predictions.uri, f"--{form}", path)
        assert (code, out) == (0, ""), err
        assert "12 rows" in err
        code, _, err = run(capsys, "sql", query, "--table", predictions.uri, f"--{form}", path)
        assert code == 1 and "there is something already" in err
    rows = pq.read_table(tmp_path / "rows.parquet")
    assert rows["key"].to_pylist() == KEYS
    np.testing.assert_array_equal(rows["embedding"].to_pylist()[:7], numbers(7))
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        texts = list(csv.DictReader(file))
    assert [text["key"] for text in texts] == KEYS
    assert [text["sha256"] for text in texts] == [value.hex() for value in rows["sha256"].to_pylist()]
    np.testing.assert_array_equal(
        np.array([json.loads(text["embedding"]) for text in texts], np.float32), rows["embedding"].to_pylist()
    )


def test_a_query_that_fails_half_way_leaves_no_file(
    embeddings: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query = "SELECT CASE WHEN index = 3 THEN error('row 3') ELSE key END FROM embeddings"
    out = tmp_path / "out"
    out.mkdir()
    code, _, err = run(capsys, "sql", query, "--table", embeddings.uri, "--csv", out / "rows.csv")
    assert code == 2 and "row 3" in err and "Traceback" not in err
    assert list(out.iterdir()) == []


def test_a_type_that_parquet_lacks_is_said_and_leaves_no_file(
    embeddings: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query, out = "SELECT key, INTERVAL 1 DAY AS age FROM embeddings", tmp_path / "out"
    out.mkdir()
    code, _, err = run(capsys, "sql", query, "--table", embeddings.uri, "--parquet", out / "rows.parquet")
    assert code == 2 and "month_day_nano_interval" in err and "CAST(x AS VARCHAR)" in err
    assert list(out.iterdir()) == []


def test_another_file_can_be_joined_by_its_path(embeddings: Store, tmp_path: Path) -> None:
    (tmp_path / "answers.csv").write_text("key,answer\nb.tar-00000002,fox\n")
    with open_views([embeddings.uri]) as views:
        joined = f"SELECT key, answer FROM embeddings JOIN '{tmp_path}/answers.csv' USING (key)"
        assert rows_of(views, joined) == [("b.tar-00000002", "fox")]


def test_what_a_terminal_would_obey_is_spelled_out(
    embeddings: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "sql", "SELECT chr(27) || '[2J' AS label", "--table", embeddings.uri)
    assert code == 0 and "\x1b[2J" not in out and "\\x1b[2J" in out


@pytest.mark.parametrize("form", [(), ("--json",), ("--parquet", "rows.parquet"), ("--csv", "rows.csv")])
def test_two_columns_of_one_name_are_refused_and_none_is_lost(
    form: tuple[str, ...],
    embeddings: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    query = "SELECT a.key, b.key FROM embeddings a JOIN embeddings b ON a.index = b.index + 1"
    code, out, err = run(capsys, "sql", query, "--table", embeddings.uri, *form)
    assert (code, out) == (2, "") and "two columns of the answer have one name" in err
    assert "found:   key\n" in err
    assert not (tmp_path / form[-1]).is_file() if form[1:] else True


def test_views_may_be_closed_under_an_answer_that_nobody_reads_to_its_end(embeddings: Store) -> None:
    for _ in range(20):  # it ended the process, most of the times
        views = open_views([embeddings.uri], StorageConfig())
        answer = views.select("SELECT a.key AS x, b.key AS y FROM embeddings a JOIN embeddings b ON true")
        views.close()
        with pytest.raises((pa.ArrowException, RecipeError)):
            answer.read_all()
