"""What is gathered of a night for its page: rejects, doubtful rows, their pictures; and pages beside summaries."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from PIL import Image

from engine import night, night_report
from engine.night_report import (
    INDEX,
    RowsShown,
    doubtful_rows,
    pictures_of,
    rejects_of,
    rows_shown,
    write_page,
)
from engine.parts import PartName, part_name, prediction_name
from engine.pictures import Budget
from engine.recipes import Limits
from engine.schema import SampleId, embeddings_schema, predictions_schema, rejects_schema
from engine.storage import ObjectInfo, StorageConfig, Store, open_store
from engine.storage.local import LocalStore
from engine.tables import (
    EmbeddingPartFacts,
    PredictionPartFacts,
    read_part,
    write_embedding_part,
    write_prediction_part,
)
from tests.embedding_tables import FINGERPRINT, IDENTITY
from tests.flows.archives import crop_jpeg
from tests.report.pages import read_page
from tests.shards.archives import member, tar_bytes
from tests.test_night import WIDTH, folder, tables
from tests.test_pictures import assert_is_crop, made_table, put

__all__ = ["folder"]  # the fixture: an embedding table, a bundle, and predictions of it that are held


def write_rejects(embeddings: Store, shard: str, reasons: list[str]) -> PartName:
    """A part of nothing but rejects."""
    schema = rejects_schema(keep_bytes=False)
    rows = [
        {"key": f"{shard}-{row}", "shard": shard, "index": row, "stage": "decode", "error": reason}
        | {"message": f"not an image: {row}", "size_bytes": 100 + row, "sha256": None}
        for row, reason in enumerate(reasons)
    ]
    facts = EmbeddingPartFacts(
        FINGERPRINT, "/made", shard, IDENTITY, None, None, len(reasons), len(reasons), None, ""
    )
    name = part_name(shard, IDENTITY, 0, True)
    write_embedding_part(
        embeddings,
        name,
        embeddings_schema(WIDTH, "float32").empty_table(),
        pa.Table.from_pylist(rows, schema=schema),
        facts,
    )
    return name


def test_rejects_are_counted_by_reason_and_each_reason_is_named(folder: Path) -> None:
    _, embeddings = tables(folder)
    first = write_rejects(embeddings, "x.tar", ["truncated_image"] * 41)
    second = write_rejects(embeddings, "y.tar", ["no_image", "truncated_image", "no_image"])
    found = rejects_of(embeddings, [first, second])
    assert found["by_reason"] == {"truncated_image": 42, "no_image": 2}
    assert [row["error"] for row in found["named"][:5]] == [
        "truncated_image",
        "no_image",
        "truncated_image",
        "no_image",
        "truncated_image",
    ]
    assert len(found["named"]) == 20
    assert found["named"][1] == {
        "key": "y.tar-0",
        "shard": "y.tar",
        "index": 0,
        "error": "no_image",
        "message": "not an image: 0",
        "size_bytes": 100,
        "sha256": None,
    }
    assert (found["parts"], found["parts_read"]) == (2, 2)
    assert rejects_of(embeddings, []) == {"by_reason": {}, "named": [], "parts": 0, "parts_read": 0}


def test_parts_with_rejects_are_known_from_the_tally(folder: Path) -> None:
    table, embeddings = tables(folder)
    held = night.held_parts(table)
    assert night.tally(table, embeddings, held).parts_with_rejects == ()


def test_of_very_many_parts_with_rejects_the_first_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, embeddings = tables(folder)
    parts = [write_rejects(embeddings, f"{name}.tar", ["no_image"] * 3) for name in "xyz"]
    monkeypatch.setattr(night_report, "REJECTS_READ", 2)
    found = rejects_of(embeddings, parts)
    assert (found["by_reason"], found["parts"], found["parts_read"]) == ({"no_image": 6}, 3, 2)


def test_the_most_doubtful_rows_are_those_between_whose_candidates_there_is_least(folder: Path) -> None:
    table, _ = tables(folder)
    found = doubtful_rows(table, night.held_parts(table))
    rows = ds.dataset(folder / "labels/held/data").to_table().to_pylist()
    margins = sorted(row["top_confidences"][0] - row["top_confidences"][1] for row in rows)
    assert [row["margin"] for row in found["rows"]] == margins[:20]
    assert found["rows_read"] == len(rows) == 77
    by_key = {row["key"]: row for row in rows}
    for row in found["rows"]:
        there = by_key[row["key"]]
        assert (row["shard"], row["index"], row["label"]) == (there["shard"], there["index"], there["label"])
        assert (row["candidate"], row["confidence"]) == (there["top_labels"][0], there["confidence"])
    assert doubtful_rows(table, []) == {"rows": [], "rows_read": 0}


def test_a_page_lies_beside_its_summary_and_links_only_to_pages_that_are_there(folder: Path) -> None:
    table, _ = tables(folder)
    runs = [f"nightly-2026020{day}T010101Z-aaaa" for day in (1, 2, 3)]
    summaries: list[dict[str, Any]] = [{"run_id": run_id, "table": table.uri} for run_id in runs]
    for summary in summaries:
        night.keep_night(table, summary["run_id"], summary)
    table.write("nights/nightly-20260104.json", b"[] not ours")
    for summary in summaries[1:]:
        assert write_page(table, summary) == f"nights/{summary['run_id']}.html"
    page = read_page(table.read(f"nights/{runs[2]}.html").decode())
    assert [row[0] for row in page.by_id("nights").rows()] == ["2026-02-02 01:01 UTC", "2026-02-01 01:01 UTC"]
    assert [one.attributes["href"] for one in page.by_id("nights").all("a")] == [f"{runs[1]}.html"]
    assert table.read(INDEX) == table.read(f"nights/{runs[2]}.html")
    assert (night.last_night(table) or {})["run_id"] == runs[2], "pages are no summaries"


class NeverListed(LocalStore):
    """An embedding table that is too large to be listed."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        raise AssertionError(f"listed: {prefix}")

    def names(self, prefix: str = "") -> Iterator[str]:
        raise AssertionError(f"listed: {prefix}")


def png(side_px: int) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((side_px, side_px), 60).save(buffer, "PNG")
    return buffer.getvalue()


def night_of_photos(folder: Path, keeps_bytes: bool = False) -> RowsShown:
    """Rows of a night over eleven crops, of which the third is cut short, and one image that is too large."""
    images = [crop_jpeg(number)[0] for number in range(11)]
    images[2] = images[2][:300]
    put(
        folder,
        "a.tar",
        tar_bytes([member(f"{n:06d}.jpg", image) for n, image in enumerate([*images, png(110)])]),
    )
    embeddings = made_table(folder, Limits(max_pixels=10_000, keep_reject_bytes=keeps_bytes))
    table = open_store(str(folder / "labels"))
    for name, info in embeddings.parts:
        rows = read_part(embeddings.store, info, ["key", "shard", "index"]).to_pylist()
        told = {"label": None, "top_labels": ["ant", "bee"], "bundle": "b", "confidence": 0.5}
        predictions = [{**row, **told, "top_confidences": [0.5, 0.5 - row["index"] / 100]} for row in rows]
        facts = PredictionPartFacts(
            "b", "f", str(name), info.identity, len(rows), answer_counts={}, abstained=0
        )
        data = pa.Table.from_pylist(predictions, schema=predictions_schema(2))
        write_prediction_part(night.held_store(table), prediction_name(name, info.identity), data, facts)
    unlisted = NeverListed(embeddings.store.uri, StorageConfig())
    with_rejects = [name for name, _ in embeddings.parts]
    return rows_shown(table, unlisted, night.held_parts(table), with_rejects)


def shown_of(document: dict[str, Any]) -> dict[SampleId, np.ndarray]:
    """Pixels by sample."""
    return {
        (one["shard"], one["index"]): np.asarray(Image.open(io.BytesIO(base64.b64decode(one["webp"]))))
        for one in document["pictures"]
    }


def test_doubtful_rows_and_rejects_with_an_image_have_pictures_from_the_archive(tmp_path: Path) -> None:
    rows = night_of_photos(tmp_path)
    assert rows.rejects["by_reason"] == {"too_many_pixels": 1, "truncated_image": 1}
    document = pictures_of(rows, Budget())
    shown = shown_of(document)
    assert list(shown) == [("a.tar", index) for index in (0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11)]
    assert (document["wanted"], document["missing"]) == (11, [])
    for index in (0, 3, 10):
        assert_is_crop(shown["a.tar", index], index)
    assert shown["a.tar", 11].shape == (96, 96, 3)
    assert len(json.dumps([rows.rejects, rows.doubtful])) < 4_000, "what is kept of them has no pictures"


def test_kept_bytes_of_rejects_need_no_archive(tmp_path: Path) -> None:
    rows = night_of_photos(tmp_path, keeps_bytes=True)
    shutil.rmtree(tmp_path / "shards")
    document = pictures_of(rows, Budget())
    assert list(shown_of(document)) == [("a.tar", 11)]
    ((why, samples),) = ((one["why"], one["samples"]) for one in document["missing"])
    assert f"{tmp_path}/shards/a.tar" in why and samples == 10


def test_rows_of_embeddings_that_were_rewritten_since_have_no_picture(tmp_path: Path) -> None:
    rows = night_of_photos(tmp_path)
    (second,) = (tmp_path / "table" / "data").glob("*.00001.last.parquet")
    os.utime(second, ns=(1, 1))
    document = pictures_of(rows, Budget())
    assert [index for _, index in shown_of(document)] == [0, 1, 3, 4, 5, 6, 7]
    ((why, samples),) = ((one["why"], one["samples"]) for one in document["missing"])
    assert why.endswith("00001.last.parquet: was rewritten since it was scored") and samples == 4


def test_pictures_end_with_the_seconds_and_the_bytes_that_they_may_cost(tmp_path: Path) -> None:
    rows = night_of_photos(tmp_path)
    for budget, why in (
        (Budget(seconds=0.0), "the 0 seconds for reading pictures had passed"),
        (Budget(size=0), "the 0 MB for reading pictures were used up"),
    ):
        document = pictures_of(rows, budget)
        assert document["pictures"] == []
        assert document["missing"] == [{"why": why, "samples": 11}]


def test_an_archive_that_never_answers_is_waited_for_no_longer_than_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "nobody")
    rows = night_of_photos(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = StorageConfig(endpoint_url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        contract = {**rows.record["contract"], "source.uri": "s3://archive"}
        slow = dataclasses.replace(
            rows,
            record={**rows.record, "contract": contract},
            embeddings=LocalStore(rows.embeddings.uri, config),
        )
        began = time.monotonic()
        document = pictures_of(slow, Budget(seconds=0.5))
        assert time.monotonic() - began < 2
        reading = [one for one in threading.enumerate() if one.name.startswith("pictures_")]
        assert reading and all(one.daemon for one in reading), "a process that ends waits for none of them"
    why = "the 0.5 seconds for reading pictures had passed"
    assert (document["pictures"], document["missing"]) == ([], [{"why": why, "samples": 11}])


def test_pictures_are_in_the_page_and_the_index_and_not_in_the_summary(tmp_path: Path) -> None:
    rows, table = night_of_photos(tmp_path), open_store(str(tmp_path / "labels"))
    run_id = "nightly-20260201T010101Z-aaaa"
    kept = {"run_id": run_id, "table": table.uri, "rejects_found": rows.rejects, "doubtful": rows.doubtful}
    night.keep_night(table, run_id, kept)
    path = write_page(table, kept, pictures_of(rows, Budget()))
    page = read_page(table.read(path).decode())
    assert (len(list(page.by_id("doubtful").all("img"))), len(list(page.by_id("rejects").all("img")))) == (
        10,
        1,
    )
    assert table.read(INDEX) == table.read(path)
    assert len(table.read(f"nights/{run_id}.json")) < 6_000
