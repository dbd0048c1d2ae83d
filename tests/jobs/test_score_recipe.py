"""What a recipe of `score` may not ask for, said before anything is read or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import check_recipe
from engine.errors import RecipeError
from jobs.nightly import NightlyRecipe
from jobs.score import ScoreRecipe


def recipe(folder: Path, output: dict[str, Any], *tables: str) -> ScoreRecipe:
    bundles = [{"uri": str(folder / "bundle"), "output": {"uri": table}} for table in tables]
    source = {"kind": "webdataset", "uri": str(folder / "shards")}
    return check_recipe(ScoreRecipe, {"source": source, "bundles": bundles, "output": output}, "here")


def test_embeddings_are_not_kept_where_predictions_go(tmp_path: Path) -> None:
    kept, labels = tmp_path / "embeddings", str(tmp_path / "labels")
    with pytest.raises(RecipeError, match=f"{kept} is the place of embeddings, and cannot"):
        recipe(tmp_path, {"uri": f"file://{kept}"}, labels, f"{kept}/")
    assert recipe(tmp_path, {"uri": f"{kept}"}, labels).output.uri == str(kept)


def test_each_bundle_has_a_table_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="given twice: "):
        recipe(tmp_path, {}, *2 * [str(tmp_path / "labels")])


def test_predictions_do_not_go_where_the_embeddings_are(tmp_path: Path) -> None:
    table = str(tmp_path / "table")
    bundles = [{"uri": str(tmp_path / "bundle"), "output": {"uri": f"{table}/"}}]
    scored = {"embeddings": {"uri": table}, "bundles": bundles}
    with pytest.raises(RecipeError, match=f"{table} is the place of embeddings, and cannot"):
        check_recipe(ScoreRecipe, scored, "here")
    source = {"kind": "webdataset", "uri": str(tmp_path / "shards")}
    backbone = {"kind": "keras_application", "name": "MobileNetV2", "input_size": 96}
    night = {"source": source, "backbone": backbone, "output": {"uri": table}, "bundles": bundles}
    with pytest.raises(RecipeError, match=f"{table} is the place of embeddings, and cannot"):
        check_recipe(NightlyRecipe, night, "here")
