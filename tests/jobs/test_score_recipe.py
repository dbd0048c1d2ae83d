"""What a recipe of `score` may not ask for, said before anything is read or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import check_recipe
from engine.errors import RecipeError
from jobs.score import ScoreRecipe


def recipe(folder: Path, output: dict[str, Any], *tables: str) -> ScoreRecipe:
    bundles = [{"uri": str(folder / "bundle"), "output": {"uri": table}} for table in tables]
    source = {"kind": "webdataset", "uri": str(folder / "shards")}
    return check_recipe(ScoreRecipe, {"source": source, "bundles": bundles, "output": output}, "here")


def test_embeddings_are_not_kept_where_predictions_go(tmp_path: Path) -> None:
    kept, labels = tmp_path / "embeddings", str(tmp_path / "labels")
    with pytest.raises(RecipeError, match=f"cannot be a bundle's output.uri: {kept}"):
        recipe(tmp_path, {"uri": f"file://{kept}"}, labels, f"{kept}/")
    assert recipe(tmp_path, {"uri": f"{kept}"}, labels).output.uri == str(kept)


def test_each_bundle_has_a_table_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="given twice: "):
        recipe(tmp_path, {}, *2 * [str(tmp_path / "labels")])
