"""What a recipe says of a bundle's classes becomes a least confidence and a name for each, or a clear refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.config import check_recipe
from engine.decisions import Decisions, PredictionOutput, decisions_of
from engine.errors import ObjectNotFound, RecipeError
from engine.storage import StorageConfig

CLASSES = ("ant", "bee", "cat")
IDS = {"ant": "1", "bee": "02", "cat": "c,3"}


def decided(**output: Any) -> Decisions:
    checked = check_recipe(PredictionOutput, {"uri": "/labels", **output})
    return decisions_of(checked, CLASSES, StorageConfig(), "/bundle")


def test_without_choices_classes_keep_their_names_and_the_contract_has_two_fields() -> None:
    found = decided()
    assert (found.top_k, found.labels, found.min_confidences) == (5, CLASSES, (0.0, 0.0, 0.0))
    assert found.contract == {"top_k": 5, "min_confidence": 0.0}


def test_a_least_confidence_is_of_all_classes_or_of_some_and_the_rest() -> None:
    assert decided(min_confidence=0.25).min_confidences == (0.25, 0.25, 0.25)
    found = decided(min_confidence={"default": 0.25, "classes": {"bee": 1, "ant": 0.25}})
    assert found.min_confidences == (0.25, 1.0, 0.25)
    assert found.contract == {"top_k": 5, "min_confidence": 0.25, "min_confidence.bee": 1.0}


@pytest.mark.parametrize("value", [1.5, -0.1, True, "high", None, {"default": 2}, {"classes": {"cat": 1.1}}])
def test_a_least_confidence_outside_of_0_to_1_is_refused(value: Any) -> None:
    with pytest.raises(RecipeError, match="min_confidence"):
        decided(min_confidence=value)


def test_a_class_written_without_classes_is_refused_with_the_right_spelling() -> None:
    with pytest.raises(RecipeError, match="allowed here: default, classes"):
        decided(min_confidence={"cat": 0.9})


def test_an_unknown_class_is_refused_and_one_near_it_named() -> None:
    for output in ({"min_confidence": {"classes": {"catt": 0.9}}}, {"label_map": {**IDS, "catt": "4"}}):
        with pytest.raises(RecipeError, match="no class 'catt'") as raised:
            decided(**output)
        assert raised.value.wanted == "perhaps 'cat'"


def test_a_map_names_every_class_or_the_recipe_says_that_others_keep_their_names() -> None:
    found = decided(label_map=IDS)
    assert found.labels == ("1", "02", "c,3")
    assert found.contract["label_map.bee"] == "02"
    with pytest.raises(RecipeError, match="1 of 3 classes") as raised:
        decided(label_map={"ant": 7, "cat": "x"})
    assert raised.value.found == "'bee'" and "unmapped: keep" in str(raised.value.way_out)
    assert decided(label_map={"ant": 7, "cat": "x"}, unmapped="keep").labels == ("7", "bee", "x")


@pytest.mark.parametrize("given", [{}, {"ant": None}, {"ant": 1.5}, {"ant": True}, {"ant": ""}, "ids.txt", 7])
def test_a_map_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(RecipeError, match="label_map"):
        decided(label_map=given)


@pytest.mark.parametrize("name", ["ids.csv", "ids.tsv", "ids.parquet"])
def test_a_map_may_be_a_file_with_two_columns_and_more_classes(tmp_path: Path, name: str) -> None:
    path, more = tmp_path / name, {**IDS, "yak": "NA"}
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"class": list(more), "id": list(more.values())}), path)
    else:
        between = "," if name.endswith(".csv") else "\t"
        path.write_text(f"class{between}id\n" + "".join(f'{c}{between}"{i}"\n' for c, i in more.items()))
    assert decided(label_map=str(path)).labels == ("1", "02", "c,3")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ant,1\nbee,2\ncat,3\n", "1 of 3 classes"),  # no line of column names
        ("class,id,more\nant,1,x\n", "3 columns"),
        ("class,id\nant,1\nant,2\nbee,2\ncat,3\n", "several ids"),
        ("class,id\nant,\nbee,2\ncat,3\n", "lack a class or an id"),
        ('class,id\nant,"1\n', "cannot be read|lack a class|classes"),
        ("", "cannot be read"),
    ],
)
def test_a_file_that_is_no_map_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "ids.csv"
    path.write_text(text)
    with pytest.raises(RecipeError, match=said):
        decided(label_map=str(path))


def test_a_file_of_fractions_is_refused_and_one_that_is_not_there_named(tmp_path: Path) -> None:
    path = tmp_path / "ids.parquet"
    pq.write_table(pa.table({"class": CLASSES, "id": [1.0, 2.0, 3.0]}), path)
    with pytest.raises(RecipeError, match="cannot be read") as raised:
        decided(label_map=str(path))
    assert "a column of double" in str(raised.value.found)
    with pytest.raises(ObjectNotFound, match="absent.csv"):
        decided(label_map=str(tmp_path / "absent.csv"))


def test_copies_are_named_once_each_and_their_order_does_not_matter() -> None:
    assert decided(also=["jsonl", "csv"]).contract["also"] == ["csv", "jsonl"]
    for also in (["csv", "csv"], ["xml"]):
        with pytest.raises(RecipeError, match="also"):
            decided(also=also)
