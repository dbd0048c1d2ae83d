"""Every snippet of the page on tables runs, in the order of the page, and prints what stands behind it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.schema import embeddings_schema, predictions_schema, rejects_schema
from engine.sql import open_views
from jobs.cli import main
from tests.embedding_tables import write_table
from tests.prediction_tables import write_predictions

PAGE = "engine/docs/tables.md"
LANGUAGES = ("python", "sql", "sh")


def snippets(page: str) -> list[tuple[str, str]]:
    """Language and text of each block of code."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the page speaks of: the embedding of row n is 4n, 4n + 1, 4n + 2, 4n + 3."""
    numbers_ND = np.arange(48, dtype=np.float32).reshape(12, 4)
    store = write_table(tmp_path / "embeddings", {"a/one.tar": numbers_ND[:7], "b.tar": numbers_ND[7:]}, 4)
    places = [("a/one.tar", index) for index in range(7)] + [("b.tar", index) for index in range(5)]
    predicted: list[str | None] = ["cat"] * 6 + [None] + ["dog"] * 5
    keys = [f"{shard}-{index:08d}" for shard, index in places]
    write_predictions(tmp_path / "predictions", store, dict(zip(keys, predicted, strict=True)))
    truth = ["cat"] * 9 + ["dog"] * 3
    lines = [f"{shard},{index},{label}" for (shard, index), label in zip(places, truth, strict=True)]
    (tmp_path / "labels.csv").write_text("\n".join(["shard,index,label", *lines]) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(text: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, PAGE, "exec"), {"__name__": "__main__"})
    wanted = re.findall(r"^ *print\(.*\)  # (.*)$", text, re.MULTILINE)
    assert printed.getvalue().splitlines() == wanted, text


def run_sql(text: str) -> None:
    wanted = re.findall(r"^-- (.*)$", text, re.MULTILINE)
    with open_views(["predictions"]) as views:
        found = views.select(text).read_all()
    rows = zip(*(column.to_pylist() for column in found.columns), strict=True)
    assert [" ".join(map(_shown, row)) for row in rows] == wanted, text


def _shown(value: Any) -> str:
    return str(round(value, 4)) if isinstance(value, float) else str(value)


def run_commands(text: str) -> None:
    for line in text.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "engine"
        assert main(arguments) == 0, line


def test_every_snippet_runs_and_prints_what_the_page_says(tables: Path, repository: Path) -> None:
    found = snippets((repository / PAGE).read_text(encoding="utf-8"))
    assert {language for language, _ in found} == set(LANGUAGES)
    assert all(re.search(r"print\(.*\)  # ", text) for language, text in found if language == "python")
    assert all(re.search(r"^-- ", text, re.MULTILINE) for language, text in found if language == "sql")
    run = {"python": run_python, "sql": run_sql, "sh": run_commands}
    for language, text in found:
        run[language](text)
    assert sorted(os.listdir(tables)) == [
        "compacted",
        "counts.csv",
        "embeddings",
        "exported",
        "labels.csv",
        "predictions",
        "predictions.csv",
    ]


# As in ParquetSchemaConverter.scala of Spark 4.0: physical type, logical type -> what Spark makes of it.
SPARK_TYPES = {
    ("BYTE_ARRAY", "STRING"): "string",
    ("BYTE_ARRAY", "NONE"): "binary",
    ("FIXED_LEN_BYTE_ARRAY", "NONE"): "binary",  # since Spark 3.4 (SPARK-41096)
    ("INT32", "NONE"): "int",
    ("INT64", "NONE"): "bigint",
    ("FLOAT", "NONE"): "float",
}


def spark_types(schema: pa.Schema) -> dict[str, str | None]:
    """Of each leaf what Spark reads it as; None: Spark refuses it."""
    sink = io.BytesIO()
    pq.write_table(schema.empty_table(), sink)
    parquet = pq.ParquetFile(sink).schema
    leaves = [parquet.column(number) for number in range(len(parquet.names))]
    return {leaf.path: SPARK_TYPES.get((leaf.physical_type, leaf.logical_type.type)) for leaf in leaves}


def test_every_column_has_a_type_that_spark_reads() -> None:
    for schema in (
        predictions_schema(5),
        predictions_schema(5, several=True),
        rejects_schema(keep_bytes=True),
        embeddings_schema(7, "float32", ["camera"]),
    ):
        assert None not in spark_types(schema).values(), schema
    found = spark_types(embeddings_schema(7, "float32"))
    assert found == {
        "key": "string",
        "shard": "string",
        "index": "bigint",
        "embedding.list.element": "float",  # three levels, as Spark wants lists
        "label": "string",
        "image_width": "int",
        "image_height": "int",
        "sha256": "binary",
    }
    assert spark_types(embeddings_schema(7, "float16"))["embedding.list.element"] is None, "the page says so"
