"""The recipe blocks of a fit: their defaults, what they refuse, and that reading them needs nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import check_recipe
from engine.errors import RecipeError
from engine.training.kinds import FitOutput, FitSettings

ROOT = Path(__file__).parents[2]


def test_an_empty_recipe_gets_the_documented_defaults() -> None:
    assert FitSettings().model_dump() == {
        "task": "single_label",
        "labels": {
            "uri": None,
            "key": "key",
            "label": "label",
            "otherwise": None,
            "conflicts": "refuse",
            "separator": None,
        },
        "split": {"column": None, "group": None, "train": 0.8, "validation": 0.1, "test": 0.1, "seed": 0},
        "head": {"kind": "linear"},
        "side_features": (),
        "optimizer": {
            "kind": "adam",
            "learning_rate": 0.001,
            "weight_decay": 0.0,
            "schedule": "constant",
            "warmup_epochs": 0.0,
        },
        "training": {
            "epochs": 100,
            "batch_size": 256,
            "patience": 3,
            "class_weights": "none",
            "label_smoothing": 0.0,
            "standardise": False,
            "seed": 0,
            "rows": "auto",
            "checkpoint_seconds": 30.0,
        },
        "grid": {"learning_rate": (), "weight_decay": (), "l2": (), "dropout": (), "head": ()},
        "calibration": {"kind": "adaptive", "precisions": (0.9, 0.95, 0.99)},
        "suspects": {"folds": 5},
        "report": {"pictures": True},
        "strategy": {"kind": "mirrored", "workers": 1, "devices_per_worker": None},
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": {"train": 0.8, "validation": 0.1, "test": 0.2}}, "must be 1, not 1.1"),
        ({"head": {"kind": "liner"}}, "'linear'"),
        ({"strategy": {"kind": "mirored"}}, "'one_device', 'mirrored'"),
        ({"strategy": {"kind": "mirrored", "workers": 2}}, "strategy.mirrored.workers: found 2"),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.adam.learning_rate: found 0"),
        ({"training": {"class_weights": "balance"}}, "'none' or 'balanced'"),
        ({"training": {"epoch": 5}}, "did you mean 'epochs'?"),
        ({"task": "multi_lable"}, "'single_label' or 'multi_label'"),
        ({"suspects": {"folds": 1}}, "at least 2"),
        ({"grid": {"learning_rate": [0.0]}}, "grid.learning_rate"),
        ({"head": {"kind": "mlp", "dropout": 1}}, "dropout"),
        ({"optimizer": {"kind": "adan"}}, "'adam', 'adamw', 'sgd'"),
    ],
)
def test_a_wrong_block_is_refused_with_what_is_allowed(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        check_recipe(FitSettings, wrong)
    assert message in str(error.value)


def test_every_field_says_what_it_means() -> None:
    for model in (FitSettings, FitOutput):
        schema = model.model_json_schema()
        for owner, name, field in _fields(schema):
            assert len(field.get("description", "")) >= 10, f"{owner}.{name} has no description"


def _fields(schema: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for owner in (schema, *schema.get("$defs", {}).values()):
        for name, field in owner["properties"].items():
            yield owner["title"], name, field


def test_recipe_blocks_import_no_heavy_library() -> None:
    script = (
        "import sys, engine.training.kinds, engine.heads.kinds, engine.strategies.kinds\n"
        "print(sorted({'tensorflow', 'keras', 'pyarrow', 'numpy', 'ray', 'PIL', 's3fs'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
