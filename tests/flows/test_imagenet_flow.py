"""Labels without training: EfficientNet-Lite0 with its own classifier on photos, through the command."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from engine.imagenet import imagenet_classes
from tests.commands import Engine
from tests.flows.archives import write_recipe

# What the network may call each photo of scikit-image: as the tests of the network itself have it.
PHOTOS = {
    "chelsea.png": {"tabby", "tiger_cat", "Persian_cat", "Siamese_cat", "Egyptian_cat"},
    "coffee.png": {"coffee_mug", "espresso", "cup"},
    "rocket.jpg": {"missile", "projectile", "space_shuttle"},
}


def test_photos_are_labelled_by_a_network_that_nobody_trained_here(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in PHOTOS:
        shutil.copy(str(files("skimage") / "data" / name), tmp_path / "photos" / name)
    made = engine("imagenet", "efficientnet_lite0", tmp_path / "bundle", "--resize", "center_crop", "--json")
    assert made.code == 0, made.stderr
    assert (made.summary["classes"], made.summary["width"]) == (1000, 1280)
    inspected = json.loads(engine("inspect", tmp_path / "bundle", "--json").stdout)
    assert inspected["class_ids"].startswith("n") and inspected["damaged"] == []
    document = {
        "source": {"kind": "files", "uri": str(tmp_path / "photos")},
        "bundles": [
            {"uri": str(tmp_path / "bundle"), "output": {"uri": str(tmp_path / "names"), "top_k": 3}},
            {
                "uri": str(tmp_path / "bundle"),
                "output": {"uri": str(tmp_path / "ids"), "label_map": "class_ids"},
            },
        ],
        "output": {"uri": str(tmp_path / "embeddings")},
    }
    ended = engine("score", write_recipe(tmp_path, "score.yaml", json.dumps(document)), "--json")
    assert ended.code == 0, ended.stderr
    rows = {row["key"]: row for row in ds.dataset(tmp_path / "names" / "data").to_table().to_pylist()}
    assert len(rows) == len(PHOTOS)
    for key, row in rows.items():
        (name,) = (name for name in PHOTOS if key in name or name in key)
        assert row["label"] in PHOTOS[name], row
        assert row["confidence"] > 0.2
    predicted = engine("predict", tmp_path / "bundle", tmp_path / "photos", "--json").summary["predictions"]
    assert len(predicted) == len(PHOTOS)
    for one in predicted:
        row = rows[Path(one["image"]).name]
        assert (one["label"], one["confidence"]) == (row["label"], pytest.approx(row["confidence"], abs=1e-5))
    id_of = {one.label: one.wordnet_id for one in imagenet_classes()}
    ids = {row["key"]: row["label"] for row in ds.dataset(tmp_path / "ids" / "data").to_table().to_pylist()}
    assert ids == {key: id_of[row["label"]] for key, row in rows.items()}
    for table in ("embeddings", "names", "ids"):
        assert engine("verify", tmp_path / table).code == 0


def test_a_network_that_there_is_not_and_a_classifier_of_another_kind_are_refused(
    engine: Engine, tmp_path: Path
) -> None:
    ended = engine("imagenet", "MobileNetV9", tmp_path / "bundle")
    assert (ended.code, "did you mean MobileNetV2" in ended.stderr) == (2, True)
    ended = engine("imagenet", "MobileNetV3Small", tmp_path / "bundle")
    assert (ended.code, "the classifier of MobileNetV3Small is not" in ended.stderr) == (2, True)
    recipe = "jobs/recipes/demo_extract.yaml"
    assert engine("imagenet", recipe, tmp_path / "bundle", "--input-size", "96").code == 2
    assert not (tmp_path / "bundle").exists()
