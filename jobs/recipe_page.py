"""engine/docs/recipes.md: what every verb's recipe may say. `python -m jobs.recipe_page` writes it (`make docs`)."""

from __future__ import annotations

import importlib
from pathlib import Path

from engine.recipe_page import recipe_page
from jobs.cli import RECIPE_CLASSES

PAGE = Path(__file__).resolve().parent.parent / "engine" / "docs" / "recipes.md"
_INTRODUCTION = """\
# Recipes

Every field of every verb's recipe. This page is made from the code by `make docs`; `engine schema VERB` prints the same
as JSON Schema, and `engine schema VERB --markdown` a page like this one for one verb.

A recipe is YAML. A field that is not on this page is refused, with the nearest name; a kind that is not, with the list
of those that are. `--set path.to.key=value` changes one field of any recipe (`--set bundles.0.output.top_k=3`).
Short ones: `extract`, `fit` and `score` in the [README](../../README.md#use),
[finetune](training.md#what-fine-tuning-does), [nightly](operations.md#what-a-night-does). Some that run are in
[jobs/recipes](../../jobs/recipes/README.md).

"""


def whole_page() -> str:
    """The text of the page."""
    recipes = {
        verb: getattr(importlib.import_module(f"jobs.{verb}"), name) for verb, name in RECIPE_CLASSES.items()
    }
    return _INTRODUCTION + recipe_page(recipes)


if __name__ == "__main__":
    PAGE.write_text(whole_page(), encoding="utf-8")
    print(f"wrote {PAGE}")
