"""Recipes: YAML, overrides, and messages that name the field, what was found and what is allowed."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from engine.config import Config, canonical_json, check_recipe, load_recipe, stable_hash
from engine.errors import RecipeError


class Apple(Config):
    kind: Literal["apple"] = "apple"
    seeds: int = Field(5, ge=0)


class Pear(Config):
    kind: Literal["pear"] = "pear"
    length_mm: float = 90.0


class Basket(Config):
    name: str
    """What it is called."""
    fruit: Annotated[Apple | Pear, Field(discriminator="kind")] = Apple()
    spare: Apple | None = None
    tags: tuple[str, ...] = ()
    rows: tuple[Apple, ...] = ()


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(Basket, write(folder, text), overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_overrides_reach_nested_fields_lists_and_absent_blocks(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nrows: [{seeds: 1}, {seeds: 2}]\n")
    basket = load_recipe(
        Basket, path, ["fruit.kind=pear", "fruit.length_mm=1e-3", "rows.1.seeds=7", "spare.seeds=3"]
    )
    assert basket.fruit == Pear(length_mm=0.001)
    assert [apple.seeds for apple in basket.rows] == [1, 7]
    assert basket.spare == Apple(seeds=3)


def test_an_override_wins_over_the_file_and_null_unsets(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nspare: {seeds: 2}\n")
    assert load_recipe(Basket, path, ["spare=null", "name=b=c"]) == Basket(name="b=c")


def test_a_typo_names_the_field_and_the_nearest_word(tmp_path: Path) -> None:
    message = message_of(tmp_path, "name: a\nfruit: {kind: apple, seds: 3}\n")
    assert "fruit.apple.seds: unknown field; did you mean 'seeds'? allowed here: kind, seeds" in message
    assert "nme: unknown field; did you mean 'name'?" in message_of(tmp_path, "nme: a\n")
    assert "spare.seed: unknown field; did you mean 'seeds'?" in message_of(
        tmp_path, "name: a\nspare: {seed: 3}\n"
    )


def test_a_wrong_kind_comes_with_the_list_of_right_ones(tmp_path: Path) -> None:
    message = message_of(tmp_path, "name: a\nfruit: {kind: plum}\n")
    assert "fruit" in message and "'plum'" in message and "'apple', 'pear'" in message


def test_an_impossible_value_names_found_and_allowed(tmp_path: Path) -> None:
    message = message_of(tmp_path, "name: a\nfruit: {kind: apple, seeds: -1}\n")
    assert "fruit.apple.seeds: found -1; input should be greater than or equal to 0" in message


def test_every_wrong_field_is_listed_at_once(tmp_path: Path) -> None:
    message = message_of(tmp_path, "fruit: {kind: apple, seeds: many}\ntags: 3\n")
    assert "3 wrong fields" in message
    assert "name: is missing" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\nname: b\n", "written twice"),
        ("name: [a\n", "not valid YAML"),
        ("", "an empty file"),
        ("- a\n", "a list"),
        ("name: .nan\nfruit: {kind: pear, length_mm: .nan}\n", "length_mm"),
        ("name: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_recipe_are_told_apart(tmp_path: Path, text: str, said: str) -> None:
    assert said in message_of(tmp_path, text)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(Basket, tmp_path / "absent.yaml")


@pytest.mark.parametrize("override", ["name", "=3", ".a=3", "rows.9.seeds=1", "name.inner=3", "name=[1"])
def test_a_malformed_override_is_named(tmp_path: Path, override: str) -> None:
    assert f"--set {override}" in message_of(tmp_path, "name: a\nrows: [{seeds: 1}]\n", override)


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Basket(name="a").name = "b"  # type: ignore[misc]


def test_stable_hash_is_the_same_for_every_order_of_keys_and_pinned() -> None:
    assert canonical_json({"b": 1, "a": [1.5, None, "é"]}) == '{"a":[1.5,null,"é"],"b":1}'
    assert stable_hash({"b": 1, "a": 2}) == stable_hash({"a": 2, "b": 1})
    assert stable_hash({"a": 2}) == "7e8059f495589fcd981232cc11d00b00da3802c01d688fa1cf1f6bed6e5bb33c"


def test_field_docstrings_become_the_schema() -> None:
    assert Basket.model_json_schema()["properties"]["name"]["description"] == "What it is called."


def test_check_recipe_accepts_what_a_dump_says() -> None:
    basket = Basket(name="a", fruit=Pear())
    assert check_recipe(Basket, basket.model_dump(mode="json")) == basket
