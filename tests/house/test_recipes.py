"""Every recipe that reads a local folder plans its run there, on an archive and tables like those it is written for."""

from __future__ import annotations

import json
import os
import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import TypeAdapter

from engine.backbones.kinds import BackboneConfig
from engine.config import read_document
from engine.parts import part_name
from engine.schema import SCHEMA_VERSION, embeddings_schema, rejects_schema
from engine.storage import open_store
from engine.tables import EmbeddingPartFacts, claim_table, write_embedding_part
from jobs.cli import main
from jobs.demo_images import write_demo_shards
from tests.embedding_tables import FINGERPRINT, publish_linear

RECIPES = sorted((Path(__file__).resolve().parents[2] / "jobs" / "recipes").glob("*.yaml"))
LOCAL = [path for path in RECIPES if "s3://" not in path.read_text(encoding="utf-8")]
WIDTH, CLASSES = 3, ("chelsea", "coffee")
# What the networks of recipes that score images straight away are; other recipes say it themselves.
IMAGENET = {"kind": "efficientnet_lite0", "weights": "package", "input_size": 224, "resize": "center_crop"}


def test_there_are_recipes_of_either_sort() -> None:
    assert {path.name for path in RECIPES} > {path.name for path in LOCAL} >= {"demo_extract.yaml"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "shards"
    write_demo_shards(folder)
    return folder


@pytest.mark.parametrize("recipe", LOCAL, ids=lambda path: path.stem)
def test_a_recipe_plans_its_run(
    recipe: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    found = re.search(r"^# Command: +engine ([a-z]+)", recipe.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    document = read_document(recipe)
    _make_inputs(found[1], document, shards)
    before = sorted(tmp_path.rglob("*"))
    assert main([found[1], str(recipe), "--plan", "--json"]) == 0, capsys.readouterr().err
    plan = json.loads(capsys.readouterr().out)
    assert plan["verb"] == found[1]
    assert sorted(tmp_path.rglob("*")) == before
    work = [plan[name] for name in ("shards_pending", "shards", "parts", "parts_pending") if name in plan]
    assert work and work[0] > 0, plan


def _make_inputs(verb: str, document: dict[str, Any], shards: Path) -> None:
    """What the steps before this one leave behind, as far as a plan looks at it."""
    if "source" in document:
        _make_source(document["source"], shards)
    bundles = [document["bundle"]] if document.get("bundle") else document.get("bundles", [])
    table = document.get("embeddings", document["output"] if verb == "nightly" else None)
    record = _record(document.get("backbone", IMAGENET))
    for bundle in bundles:
        publish_linear(Path(bundle["uri"]), np.ones((WIDTH, 2)), np.zeros(2), CLASSES, record)
    if table is not None and verb != "nightly":
        _write_embeddings(Path(table["uri"]), record)


def _make_source(source: dict[str, Any], shards: Path) -> None:
    folder = Path(source["uri"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    if source["kind"] == "webdataset":
        os.symlink(shards, folder)
        return
    folder.mkdir()
    shutil.copy(str(files("skimage") / "data" / "coffee.png"), folder)


def _record(backbone: dict[str, Any]) -> dict[str, Any]:
    """`_table.json` of embeddings of this network; no network has been loaded for it."""
    config = TypeAdapter(BackboneConfig).validate_python(backbone)
    contract = {"fingerprint": FINGERPRINT, "source.uri": "/made", "source.kind": "webdataset"}
    return {
        "kind": "embeddings",
        "schema_version": SCHEMA_VERSION,
        "contract": contract | {"runtime.precision": "float32"},
        "fingerprint": FINGERPRINT,
        "source_uri": "/made",
        "width": WIDTH,
        "rows_per_part": 64,
        "backbone": config.model_dump(mode="json"),
        "runtime": {"kind": "tensorflow", "precision": "float32", "batch_size": None},
    }


def _write_embeddings(folder: Path, record: dict[str, Any]) -> None:
    """A table of two rows with the column `split`, as the demo's shards give it."""
    store = open_store(str(folder))
    claim_table(store, record)
    schema = embeddings_schema(WIDTH, "float32", ("split",))
    rows = [
        {
            "key": name,
            "shard": "train-00000.tar",
            "index": index,
            "embedding": [1.0, 2.0, 3.0],
            "label": name,
            "image_width": 64,
            "image_height": 64,
            "sha256": bytes(32),
            "split": "train",
        }
        for index, name in enumerate(CLASSES)
    ]
    facts = EmbeddingPartFacts(
        FINGERPRINT, "/made", "train-00000.tar", "etag:0:1", None, None, 2, 0, None, ""
    )
    rejects = rejects_schema(keep_bytes=False).empty_table()
    name = part_name("train-00000.tar", "etag:0:1", 0, True)
    write_embedding_part(store, name, pa.Table.from_pylist(rows, schema=schema), rejects, facts)
