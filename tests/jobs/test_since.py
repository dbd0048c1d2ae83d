"""What `--since` takes for a time, and what it is refused for."""

from __future__ import annotations

import datetime
import time
from pathlib import Path

import pytest
import typer

from engine.config import check_recipe
from engine.errors import RecipeError
from jobs import extract
from jobs.cli import _moment


@pytest.mark.parametrize(
    ("age", "seconds"), [("90m", 5400), ("36h", 129_600), ("7d", 604_800), ("1.5h", 5400)]
)
def test_an_age_is_counted_back_from_now(age: str, seconds: float) -> None:
    assert _moment(age) == pytest.approx(time.time() - seconds, abs=5)


def test_a_date_is_of_this_machines_clock_unless_it_says_another() -> None:
    assert _moment("2026-11-20") == datetime.datetime(2026, 11, 20).timestamp()
    assert _moment("2026-11-20T22:00+00:00") == 1_795_212_000.0
    assert _moment("2026-11-20T23:00+01:00") == 1_795_212_000.0
    with pytest.raises(typer.BadParameter, match="'36 hours' is no time"):
        _moment("36 hours")


def test_single_files_are_refused(tmp_path: Path) -> None:
    """A new file may split a group in two: the older half would be swept as replaced, and never be done again."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"x")
    fields = {
        "source": {"kind": "files", "uri": str(tmp_path / "images")},
        "backbone": {
            "kind": "keras_application",
            "name": "MobileNetV2",
            "weights": "random",
            "input_size": 32,
        },
        "output": {"uri": str(tmp_path / "table")},
    }
    recipe = check_recipe(extract.ExtractRecipe, fields)
    assert extract.plan(recipe)["shards_pending"] == 1
    with pytest.raises(RecipeError, match="--since: not for single files"):
        extract.plan(recipe, since=time.time())
