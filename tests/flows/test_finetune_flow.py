"""Fine-tuning through Ray: shards in, a new backbone out that the other verbs treat like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from engine.storage import open_store
from tests.commands import Engine
from tests.flows.archives import crop_jpeg, write_recipe, write_shards

IMAGES = 60
RECIPE = """
source:   {{kind: webdataset, uri: "{folder}/shards", label: cls}}
backbone: {{kind: efficientnet_lite0, input_size: 64}}
unfreeze: {{top_layers: 12}}
split:    {{train: 0.6, validation: 0.2, test: 0.2}}
optimizer: {{learning_rate: 0.001}}
training: {{epochs: 2, batch_size: 16}}
strategy: {{kind: one_device}}
publish:  {publish}
output:   {{uri: "{folder}/finetuned"}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(open_store(str(tmp_path / "shards")), shards=4, images=IMAGES // 4)
    return tmp_path


def test_a_new_backbone_is_extracted_with_and_its_bundle_scores(engine: Engine, folder: Path) -> None:
    recipe = write_recipe(folder, "finetune.yaml", RECIPE.format(folder=folder, publish="always"))
    ended = engine("finetune", recipe, "--json")
    assert ended.code == 0, ended.stderr
    summary = ended.summary
    assert (summary["verb"], summary["rows"], summary["rejects"], summary["classes"]) == (
        "finetune",
        IMAGES,
        0,
        2,
    )
    assert summary["bundle"].endswith("/finetuned")
    assert summary["report"] == f"{summary['bundle']}/report.html"
    assert "Before and after" in (folder / "finetuned" / "report.html").read_text(encoding="utf-8")
    assert engine("inspect", summary["bundle"], "--json").summary["report"] == summary["report"]
    assert summary["trainable"] > 0 and summary["epochs"] == 2
    assert 0 <= summary["waiting_for_images"] <= 1
    assert summary["images"] == {"placement": "everywhere", "rows_per_worker": [IMAGES]}
    assert "points" in ended.stderr
    extract = {
        "source": {"kind": "webdataset", "uri": str(folder / "shards"), "label": "cls"},
        "backbone": summary["backbone"],
        "output": {"uri": str(folder / "embeddings")},
    }
    ended = engine("extract", write_recipe(folder, "extract.yaml", json.dumps(extract)), "--json")
    assert ended.code == 0, ended.stderr
    assert ended.summary["fingerprint"] == summary["fingerprint"]
    score = {
        "embeddings": {"uri": str(folder / "embeddings")},
        "bundles": [{"uri": summary["bundle"], "output": {"uri": str(folder / "predictions")}}],
    }
    ended = engine("score", write_recipe(folder, "score.yaml", json.dumps(score)), "--json")
    assert ended.code == 0, ended.stderr
    assert ended.summary["rows"] == IMAGES
    (folder / "photo.jpg").write_bytes(crop_jpeg(7)[0])
    (predicted,) = engine("predict", summary["bundle"], folder / "photo.jpg", "--json").summary["predictions"]
    rows = ds.dataset(folder / "predictions" / "data").to_table().to_pylist()
    (row,) = (row for row in rows if row["key"] == "000007")
    assert predicted["label"] == row["label"]
    assert predicted["confidence"] == pytest.approx(row["confidence"], abs=1e-5)


def test_what_did_not_help_leaves_with_3_and_the_old_bundle(engine: Engine, folder: Path) -> None:
    recipe = write_recipe(folder, "finetune.yaml", RECIPE.format(folder=folder, publish="always"))
    ended = engine("finetune", recipe, "--json", "--set", "training.epochs=1")
    assert ended.code == 0, ended.stderr
    before = published(folder)
    assert "bundle.json" in before
    ended = engine(
        "finetune", recipe, "--json", "--set", "publish=if_better", "--set", "optimizer.learning_rate=1e-30"
    )
    assert ended.code == 3, ended.stderr
    assert "it did not help" in ended.stderr
    assert ended.summary["bundle"] is ended.summary["report"] is None
    assert published(folder) == before


def published(folder: Path) -> dict[str, bytes]:
    """The bundle; beside it stands a record of every run."""
    return {path.name: path.read_bytes() for path in (folder / "finetuned").iterdir() if path.is_file()}


def test_the_plan_counts_what_learns_and_touches_nothing(engine: Engine, folder: Path) -> None:
    recipe = write_recipe(folder, "finetune.yaml", RECIPE.format(folder=folder, publish="always"))
    ended = engine("finetune", recipe, "--plan", "--json")
    assert ended.code == 0, ended.stderr
    plan = ended.summary
    assert plan["shards"] == 4
    assert plan["trainable"] + plan["frozen"] == 3_413_024
    assert 0 < plan["trainable"] < plan["frozen"]
    assert (plan["images"], plan["most_bytes_for_a_worker"]) == ("everywhere", plan["bytes"])
    two = ("--set", "strategy={kind: multi_worker, workers: 2}")
    ended = engine("finetune", recipe, "--plan", "--json", *two)
    assert ended.summary["most_bytes_for_a_worker"] == plan["bytes"]
    ended = engine("finetune", recipe, "--plan", "--json", *two, "--set", "training.images=split")
    assert ended.summary["images"] == "split"
    assert plan["bytes"] / 2 <= ended.summary["most_bytes_for_a_worker"] < plan["bytes"] * 0.6
    assert not (folder / "finetuned").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("source.label=null", "labels.label: the images have no 'label'"),
        ("split.column=fold", "split.column: the images have no 'fold'"),
        ("unfreeze={top_layers: 1}", "nothing of efficientnet_lite0 would learn"),
        ("backbone.layer=block5_add", "a network that is cut cannot be fine-tuned"),
        ("source.pattern=nothing.tar", "no shards"),
        ("bundle.uri=/nowhere", "not published"),
        ("head={kind: knn}", "does not learn by gradients"),
    ],
)
def test_what_cannot_work_is_said_before_anything_starts(
    engine: Engine, folder: Path, change: str, told: str
) -> None:
    recipe = write_recipe(folder, "finetune.yaml", RECIPE.format(folder=folder, publish="always"))
    ended = engine("finetune", recipe, "--set", change)
    assert ended.code != 0
    assert not (folder / "finetuned").exists()
    assert told in ended.stderr


def test_layers_are_listed_with_what_a_recipe_needs_to_know_of_them(engine: Engine) -> None:
    ended = engine("backbones", "efficientnet_lite0", "--layers", "--json")
    assert ended.code == 0, ended.stderr
    rows = ended.summary["layer_table"]
    assert rows[0] == {"index": 0, "name": "pixels", "kind": "InputLayer", "parameters": 0}
    assert [row["name"] for row in rows[-3:]] == ["head_conv", "head_bn", "head_relu"]
    assert sum(row["parameters"] for row in rows) == ended.summary["parameters"]
    assert "head_conv" in engine("backbones", "efficientnet_lite0", "--layers").stdout
