"""engine/docs/recipes.md says what the models say: every verb, every block, every field, and no others."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import pytest
from pydantic import Field, TypeAdapter

from engine.config import Config, parse_yaml
from engine.recipe_page import recipe_page
from jobs.cli import RECIPE_CLASSES, main
from jobs.recipe_page import PAGE, whole_page


class Tar(Config):
    """Archives | of two kinds."""

    kind: Literal["tar"] = "tar"
    depth: int = Field(3, ge=1, le=7)
    """How deep, in folders;
    `null` is not allowed."""


class Zip(Config):
    """Others."""

    kind: Literal["zip"]
    level: float | None = Field(None, gt=0)
    """How tight."""


class Output(Config):
    """Where it goes."""

    uri: str
    """A place."""
    rate: float = 0.00001
    """Of learning."""


class Recipe(Config):
    """Recipe of `pack`."""

    sources: tuple[Annotated[Tar | Zip, Field(discriminator="kind")], ...] = Field(min_length=1)
    """What is packed."""
    output: Output
    also: dict[str, Output] = Field({})
    """Further places."""
    form: Literal["*", "b"] = "*"
    """Of names."""
    first: Output = Output(uri="/x")
    """One that is given."""


def test_a_page_has_each_field_with_type_default_and_sentence() -> None:
    page = recipe_page({"pack": Recipe})
    assert [line for line in page.splitlines() if line.startswith("| `")] == [
        "| `sources` | list of kind [`tar`](#tar), [`zip`](#zip), not empty | required | What is packed. |",
        "| `output` | [block](#output) | required | Where it goes. |",
        "| `also` | map of text to [block](#output) | `{}` | Further places. |",
        '| `form` | `"*"`, `b` | `"*"` | Of names. |',
        "| `first` | [block](#output) | `{uri: /x}` | One that is given. |",
        "| `kind` | `tar` | `tar` | Which kind of block this is. |",
        "| `depth` | whole number, at least 1, at most 7 | `3` "
        "| How deep, in folders; `null` is not allowed. |",
        "| `kind` | `zip` | required | Which kind of block this is. |",
        "| `level` | number, above 0 or `null` | `null` | How tight. |",
        "| `uri` | text | required | A place. |",
        "| `rate` | number | `0.00001` | Of learning. |",
    ]
    assert "### `sources[]`, kind `zip`" in page
    assert page.count('<a id="output"></a>') == 1


def test_the_page_is_what_the_models_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == whole_page(), "run `make docs`"


def test_every_verb_and_every_place_of_a_block_is_on_the_page() -> None:
    page = whole_page()
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == [*RECIPE_CLASSES, "Blocks"]
    anchors = set(re.findall(r'<a id="([a-z0-9_]+)"></a>', page))
    assert set(re.findall(r"\]\(#([a-z0-9_]+)\)", page)) == anchors
    for row in re.findall(r"^\| `.*$", page, re.MULTILINE):
        assert len(re.findall(r"(?<!\\)\|", row)) == 5, row
        assert not row.endswith("|  |"), f"no sentence: {row}"


def test_defaults_on_the_page_are_yaml_that_gives_them_back() -> None:
    """As a person would copy them: 1e-05 would be read as a text."""
    rows = re.findall(r"^\| `(\w+)` \|.*\| `([^`]+)` \| [^|]+ \|$", whole_page(), re.MULTILINE)
    assert len(rows) > 150
    values = {(name, text): parse_yaml(text) for name, text in rows}
    assert values[
        "optimizer", "{learning_rate: 0.00001, schedule: cosine, warmup_epochs: 1.0, kind: adam}"
    ] == {
        "learning_rate": 0.00001,
        "schedule": "cosine",
        "warmup_epochs": 1.0,
        "kind": "adam",
    }
    assert values["pattern", '"*.tar"'] == "*.tar"
    for (name, text), value in values.items():
        is_number = re.fullmatch(r"[-0-9.e]+", text)
        assert not is_number or TypeAdapter(int | float).validate_python(value, strict=True) == value, (
            name,
            text,
        )


@pytest.mark.parametrize("verb", sorted(RECIPE_CLASSES))
def test_a_verb_prints_its_own_page(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", verb, "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^## (\w+)$", printed, re.MULTILINE) == [verb, "Blocks"]
    assert set(re.findall(r"^\| `.*$", printed, re.MULTILINE)) <= set(
        re.findall(r"^\| `.*$", whole_page(), re.MULTILINE)
    )
