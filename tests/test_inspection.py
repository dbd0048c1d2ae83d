"""What lies at a URI is told in a screenful, and damage of a bundle is named."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from engine.errors import BundleError, ObjectNotFound, TableDamaged
from engine.heads.bundle import TrainedHead, publish_bundle
from engine.heads.confidence import Calibration
from engine.heads.kinds import LinearHeadConfig, build_head
from engine.inspection import inspect_uri
from engine.parts import part_name
from engine.run_record import keep_run
from engine.shards.kinds import SourceConfig
from engine.storage import Store, open_store
from engine.tables import claim_table
from jobs.cli import main
from tests.embedding_tables import write_table
from tests.flows.archives import crop_jpeg
from tests.prediction_tables import write_predictions
from tests.shards.archives import member, tar_bytes
from tests.shards.tfrecords import example, tfrecord_bytes


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


def look(folder: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    """What is told of a folder with these files; the block that is suggested loads as a recipe's."""
    store = open_store(str(folder))
    for name, content in files.items():
        store.write(name, content)
    facts = inspect_uri(store)
    if "source" in facts:
        block = TypeAdapter(SourceConfig).validate_python(facts["source"])
        assert facts["source"].pop("uri") == block.uri == str(folder)
    return facts


PHOTO, NAME = crop_jpeg(3)
SEEN = {"width_px": 24, "height_px": 24, "bytes": len(PHOTO)}


def test_shards_are_told_with_their_first_record_and_a_block_that_reads_it(tmp_path: Path) -> None:
    texts = {"cls": b" cat\n", "json": b'{"split": "train", "key": 7, "camera": {"model": "x"}, "iso": 100}'}
    record = [member("a/1.jpg", PHOTO), *(member(f"a/1.{name}", data) for name, data in texts.items())]
    facts = look(
        tmp_path, {"b.tar": tar_bytes(record), "a.tar": tar_bytes([*record, member("a/2.jpg", PHOTO)])}
    )
    assert (facts["kind"], facts["source_kind"], facts["shards"]) == ("files", "webdataset", 2)
    assert facts["bytes_of_one"]["smallest"] < facts["bytes_of_one"]["largest"]
    assert facts["first_record"] == {
        "jpg": f"{len(PHOTO):,} bytes",
        "cls": "cat",
        "json": '{"split": "train", "key": 7, "camera": {...',
    }
    assert facts["source"] == {"kind": "webdataset", "label": "cls", "metadata": ["json:split", "json:iso"]}
    assert facts["first_sample"] == {"key": "a/1", "label": "cat", "split": "train", "iso": "100", **SEEN}


def test_other_names_of_shards_images_and_labels_stand_in_the_block(tmp_path: Path) -> None:
    record = [member("1.left.png", PHOTO), member("1.json", b'{"label": "\\u001b[31m"}')]
    facts = look(tmp_path, {"a.tgz": gzip.compress(tar_bytes(record))})
    assert facts["source"] == {
        "kind": "webdataset", "pattern": "*.tgz", "image": ["left.png"], "label": "json:label",
    }  # fmt: skip
    assert facts["first_sample"]["bytes"] == len(PHOTO)
    assert "\x1b" not in facts["first_record"]["json"]


def test_columns_of_parquet_and_features_of_tfrecords_are_told(tmp_path: Path) -> None:
    rows = pa.table({"id": [1], "photo": [{"bytes": PHOTO, "path": "x"}], "label": ["cat"]})
    with pa.BufferOutputStream() as sink:
        pq.write_table(rows, sink)
        facts = look(tmp_path / "rows", {"0.parquet": sink.getvalue().to_pybytes()})
    assert facts["source"] == {"kind": "parquet", "image": "photo", "label": "label"}
    assert list(facts["first_record"]) == ["id", "photo", "label"]
    assert facts["first_sample"] == {"key": "000000000", "label": "cat", **SEEN}
    data = example({"image/encoded": PHOTO, "image/class/label": 3, "box": [0.5, 0.25]})
    facts = look(tmp_path / "records", {"x.tfrecord-00000-of-00001": tfrecord_bytes([data])})
    assert facts["source"] == {"kind": "tfrecord", "label": "image/class/label"}
    assert facts["first_record"] == {
        "box": "2 float values",
        "image/class/label": "int64 3",
        "image/encoded": f"{len(PHOTO):,} bytes",
    }
    assert facts["first_sample"]["label"] == "3"


def test_a_prepared_dataset_is_told_with_its_splits(tmp_path: Path) -> None:
    info = {"name": "pets", "splits": [{"name": "test", "shardLengths": ["1"]}]}
    leaf = "tensorflow_datasets.core.features."
    features = {
        "image": {"pythonClassName": f"{leaf}image_feature.Image", "image": {"encodingFormat": "jpeg"}},
        "species": {
            "pythonClassName": f"{leaf}class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "2"},
        },
    }
    tree = {"pythonClassName": f"{leaf}features_dict.FeaturesDict", "featuresDict": {"features": features}}
    facts = look(
        tmp_path,
        {
            "dataset_info.json": json.dumps(info).encode(),
            "features.json": json.dumps(tree).encode(),
            "species.labels.txt": b"cat\ndog\n",
            "pets-test.tfrecord-00000-of-00001": tfrecord_bytes([example({"image": PHOTO, "species": 1})]),
        },
    )
    assert facts["source"] == {"kind": "tfrecord", "label": "species", "split": "test"}
    assert facts["first_record"]["split test"] == "1 records"
    assert facts["first_sample"]["label"] == "dog"


def test_loose_images_are_labelled_by_their_folders_where_all_are_in_some(tmp_path: Path) -> None:
    files = {"cats/1.jpg": PHOTO, "dogs/2.TIF": PHOTO, "list.csv": b"path,label"}
    facts = look(tmp_path, files)
    assert (facts["source_kind"], facts["images"], facts["files"]) == ("files", 2, 3)
    assert facts["source"] == {"kind": "files", "image": ["jpg", "tif"], "label": "folder"}
    assert facts["first_sample"] == {"key": "cats/1.jpg", "label": "cats", **SEEN}
    assert look(tmp_path, {"3.jpg": PHOTO})["source"] == {"kind": "files", "image": ["jpg", "tif"]}


def test_what_is_in_the_way_of_a_source_is_said_and_does_not_end_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is damaged at byte 0" in look(tmp_path / "a", {"a.tar": b"x" * 1024})["no_source"]
    half = tar_bytes([member("1.jpg", PHOTO[:300])])
    assert look(tmp_path / "b", {"a.tar": half})["first_sample"].startswith("truncated_image: ")
    told = look(tmp_path / "c", {"a.tar": tar_bytes([member("1.npy", PHOTO), member("1.cls", b"cat")])})
    assert told["no_source"] == "no image among the members of the first record of a.tar: npy, cls"
    with pa.BufferOutputStream() as sink:
        pq.write_table(pa.table({"digest": pa.array([b"12"], pa.binary(2))}), sink)
        told = look(tmp_path / "d", {"0.parquet": sink.getvalue().to_pybytes()})
    assert told["no_source"] == "no column of encoded images"
    assert not {"source", "no_source"} & set(look(tmp_path / "e", {"notes.txt": b"no images"}))
    assert main(["inspect", str(tmp_path / "b")]) == 0
    assert f'{{"kind": "webdataset", "uri": "{tmp_path}/b"' in capsys.readouterr().out


def test_rows_and_columns_of_a_table_are_told_while_they_can_be_read(tmp_path: Path) -> None:
    embeddings_ND = np.ones((7, 3), np.float32)
    store = write_table(tmp_path, {"a.tar": embeddings_ND, "b.tar": embeddings_ND[:2]}, rows_per_part=5)
    facts = inspect_uri(store)
    assert (facts["rows"], facts["parts"]) == (9, 3)
    assert facts["columns"][:5] == ["key", "shard", "index", "embedding", "label"]
    (first, *_) = store.names("data/")
    store.write(first, b"no part at all")
    assert inspect_uri(store)["rows"] == f"DAMAGED: {tmp_path}/{first}: not a part of a table"


def test_names_of_files_are_told_so_that_no_terminal_obeys_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "\x1b]0;mine\x07.bin").write_bytes(b"1")
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\x1b]0;mine\\x07.bin" in out


def test_predictions_of_a_rewritten_embedding_part_are_counted_once(tmp_path: Path) -> None:
    for seed in range(2):  # the second time the same part has other bytes
        rows_ND = np.random.default_rng(seed).normal(size=(3, 4)).astype(np.float32)
        embeddings = write_table(tmp_path / "embeddings", {"a.tar": rows_ND}, 3)
        labels: dict[str, str | None] = {f"a.tar-{index:08d}": "cat" for index in range(3)}
        predictions = write_predictions(tmp_path / "predictions", embeddings, labels)
    facts = inspect_uri(predictions)
    assert (facts["parts"], facts["rows"]) == (2, 3)
