"""What lies at a URI is told in a screenful, and damage of a bundle is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import BundleError, ObjectNotFound, TableDamaged
from engine.heads.bundle import TrainedHead, publish_bundle
from engine.heads.confidence import Calibration
from engine.heads.kinds import LinearHeadConfig, build_head
from engine.inspection import inspect_uri
from engine.parts import part_name
from engine.run_record import keep_run
from engine.storage import Store, open_store
from engine.tables import claim_table
from jobs.cli import main


def publish(folder: Path, num_classes: int = 3) -> Store:
    store = open_store(str(folder))
    head = TrainedHead(
        LinearHeadConfig(),
        build_head(LinearHeadConfig(), 7, num_classes, 0),
        tuple(f"class{number:02d}" for number in range(num_classes)),
        "single_label",
        Calibration(temperature=1.5),
    )
    metrics = {
        "validation": None,
        "test": {"rows": 9, "accuracy": 0.75, "per_class": [], "roc_auc": 0.5},
        "grid": [{}, {}],
    }
    record = {"fingerprint": "f" * 64, "width": 7}
    publish_bundle(
        store,
        head,
        table_record=record,
        metrics=metrics,
        recipe={},
        suspects=[{"key": "a"}],
        report=lambda documents: f"{documents['id']}, {documents['manifest']['created']}",
    )
    return store


def test_a_bundle_is_told_with_its_worth_and_its_files(tmp_path: Path) -> None:
    facts = inspect_uri(publish(tmp_path, num_classes=30))
    assert (facts["kind"], facts["width"]) == ("bundle", 7)
    assert facts["calibration"] == {"temperature": 1.5, "entropy_exponent": 0.0}
    assert facts["classes"].startswith("class00, class01") and facts["classes"].endswith("and 18 more")
    assert facts["test"] == {"rows": 9, "accuracy": 0.75, "roc_auc": 0.5}
    assert (facts["validation"], facts["heads_tried"], facts["suspect_labels"]) == (None, 2, 1)
    assert set(facts["files"]) == {"head", "matrix", "metrics", "embeddings_table", "recipe", "suspects"}
    assert facts["damaged"] == []
    assert facts["report"] == f"{tmp_path}/report.html"


@pytest.mark.parametrize("role", ["metrics", "suspects", "head"])
def test_a_damaged_file_of_a_bundle_is_named_and_ends_the_command_with_1(
    tmp_path: Path, role: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = publish(tmp_path)
    (path,) = (info.path for info in store.list(role))
    store.write(path, b"{}")
    assert inspect_uri(store)["damaged"] == [role]
    assert main(["inspect", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert f"DAMAGED {path}: 2 bytes" in told.out
    assert "the bundle is damaged" in told.err


def test_a_table_is_told_from_its_record_and_its_listing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    record = {
        "kind": "embeddings",
        "schema_version": 1,
        "contract": {},
        "fingerprint": "f" * 64,
        "width": 1280,
    }
    claim_table(store, {**record, "backbone": {"kind": "efficientnet_lite0"}, "source_uri": "s3://archive/"})
    for shard, number, last in (("a.tar", 0, False), ("a.tar", 1, True), ("b.tar", 0, False)):
        store.write(f"data/{part_name(shard, 'etag', number, last)}", b"123")
    facts = inspect_uri(store)
    assert (facts["kind"], facts["width"]) == ("table of embeddings", 1280)
    assert facts["backbone"] == {"kind": "efficientnet_lite0"}
    assert [facts[name] for name in ("shards", "shards_complete", "parts", "bytes")] == [2, 1, 3, 9]
    assert "last_run" not in facts
    run_id = "extract-20260101T000000Z-0a1b"
    error = {"kind": "ShardsFailed", "thing": "2 shards could not be read", "found": None}
    keep_run(store, run_id, {"run_id": run_id, "ended": "then", "outcome": "failed", "error": error})
    told = {"run_id": run_id, "ended": "then", "outcome": "failed", "error": "2 shards could not be read"}
    assert inspect_uri(store)["last_run"] == told
    store.write("_table.json", b"[]")
    with pytest.raises(TableDamaged, match="not a table record"):
        inspect_uri(store)


def test_anything_else_is_files_and_nothing_is_said_to_be_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path))
    with pytest.raises(ObjectNotFound, match="nothing here"):
        inspect_uri(store)
    for name in ("a.tar", "b.tar", "c.tar.gz", "LICENSE", "photos/x.y/d.JPG"):
        store.write(name, b"12")
    facts = inspect_uri(store)
    assert (facts["kind"], facts["files"], facts["bytes"]) == ("files", 5, 10)
    assert facts["endings"] == {".tar": 2, ".tar.gz": 1, "none": 1, ".jpg": 1}
    assert main(["inspect", str(tmp_path)]) == 0
    assert ".tar 2" in capsys.readouterr().out


def test_a_bundle_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("bundle.json", b"{}")
    with pytest.raises(BundleError, match="is not a bundle's"):
        inspect_uri(store)
