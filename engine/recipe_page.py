"""Recipes as a Markdown page for people: every block, field, type, default and sentence, from the models themselves.

Not for: what a field means. That is its docstring, which stands in the code beside what uses it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, cast

from pydantic.json_schema import models_json_schema

from engine.config import Config

Schema = Mapping[str, Any]
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}
_WORDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true` or `false`"}


@dataclass
class _Block:
    """A model that recipes hold, and where they do."""

    path: str
    kind: str | None
    verbs: list[str] = field(default_factory=list)


def recipe_page(recipes: Mapping[str, type[Config]]) -> str:
    """What recipes may say, as Markdown with one table for each recipe and each block.

    Args:
        recipes: verb -> the class of its recipe.
    """
    _, schema = models_json_schema([(model, "validation") for model in recipes.values()])
    models: Schema = schema["$defs"]
    names = {verb: model.__name__ for verb, model in recipes.items()}
    blocks: dict[str, _Block] = {}
    for verb, name in names.items():
        _collect(name, verb, "", models, blocks)
    lines: list[str] = []
    for verb, name in names.items():
        lines += [f"## {verb}", "", *_described(models[name]), *_table(models[name], models)]
    if blocks:
        lines += ["## Blocks", ""]
    for name, block in blocks.items():
        lines += [f'<a id="{_anchor(name)}"></a>', "", f"### {_heading(block)}", ""]
        lines += [f"Of {', '.join(block.verbs)}.", ""] if len(names) > 1 else []
        lines += [*_described(models[name]), *_table(models[name], models)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _collect(name: str, verb: str, path: str, models: Schema, blocks: dict[str, _Block]) -> None:
    """Note the blocks below a model, in the order in which a reader meets them."""
    below: list[tuple[str, str]] = []
    for label, property_ in models[name].get("properties", {}).items():
        for steps, inner in _references(property_):
            below.append((inner, f"{path}.{label}{steps}".lstrip(".")))
    for inner, place in below:
        kind = models[inner].get("properties", {}).get("kind", {}).get("const")
        block = blocks.setdefault(inner, _Block(place, kind))
        if verb not in block.verbs:
            block.verbs.append(verb)
    for inner, place in below:
        _collect(inner, verb, place, models, blocks)


def _references(node: Schema) -> Iterator[tuple[str, str]]:
    """Each model that a field may hold, with `[]` for every list and map around it."""
    if "$ref" in node:
        yield "", _name(node)
    for option in (*node.get("oneOf", ()), *node.get("anyOf", ())):
        yield from _references(option)
    for around in ("items", "additionalProperties"):
        if isinstance(node.get(around), dict):
            yield from ((f"[]{steps}", inner) for steps, inner in _references(node[around]))


def _heading(block: _Block) -> str:
    return f"`{block.path}`" + (f", kind `{block.kind}`" if block.kind else "")


def _described(model: Schema) -> list[str]:
    return [model["description"], ""] if "description" in model else []


def _table(model: Schema, models: Schema) -> list[str]:
    required = model.get("required", ())
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, property_ in sorted(model.get("properties", {}).items(), key=lambda item: item[0] != "kind"):
        default = "required" if name in required else _default(property_, models)
        meaning = _meaning(property_, models)
        cells = (f"`{name}`", _type(property_, models), default, meaning)
        rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return [*rows, ""]


def _meaning(property_: Schema, models: Schema) -> str:
    """The field's own sentence, else that of the block it holds."""
    if "description" in property_:
        return str(property_["description"])
    if "$ref" in property_:
        return str(models[_name(property_)].get("description", ""))
    return "Which kind of block this is." if "const" in property_ else ""


def _type(node: Schema, models: Schema) -> str:
    if "$ref" in node:
        return f"[block](#{_anchor(_name(node))})"
    if "const" in node:
        return f"`{_json(node['const'])}`"
    if "enum" in node:
        return ", ".join(f"`{_json(value)}`" for value in node["enum"])
    if "oneOf" in node:
        return "kind " + ", ".join(_kind(option, models) for option in node["oneOf"])
    if "anyOf" in node:
        return " or ".join(_type(option, models) for option in node["anyOf"])
    return _plain_type(node, models)


def _plain_type(node: Schema, models: Schema) -> str:
    if node.get("type") == "array":
        return _list_type(node, models)
    if node.get("type") == "object":
        values = node.get("additionalProperties")
        return "map" + (
            f" of text to {_type(cast('Schema', values), models)}" if isinstance(values, dict) else ""
        )
    if node.get("type") == "null":
        return "`null`"
    bounds = [words.format(_json(node[bound])) for bound, words in _BOUNDS.items() if bound in node]
    return ", ".join([_WORDS.get(node.get("type", ""), "any value"), *bounds])


def _list_type(node: Schema, models: Schema) -> str:
    if "prefixItems" in node:
        return "list of " + ", ".join(_type(item, models) for item in node["prefixItems"])
    return f"list of {_type(node.get('items', {}), models)}" + (", not empty" if node.get("minItems") else "")


def _kind(option: Schema, models: Schema) -> str:
    kind = models[_name(option)]["properties"]["kind"]["const"]
    return f"[`{kind}`](#{_anchor(_name(option))})"


def _default(property_: Schema, models: Schema) -> str:
    """A value as recipes spell it; of a block what differs from its own defaults."""
    value = property_["default"]
    held = [_name(option) for option in (property_, *property_.get("oneOf", ())) if "$ref" in option]
    if not isinstance(value, dict) or not held:
        return f"`{_json(value)}`"
    given = cast("dict[str, Any]", value)
    (name,) = [name for name in held if len(held) == 1 or _kind_of(models[name]) == given.get("kind")]
    own = {label: inner.get("default") for label, inner in models[name]["properties"].items()}
    other = {label: one for label, one in given.items() if label == "kind" or one != own[label]}
    return f"`{_json(other)}`" if other else "its defaults"


def _kind_of(model: Schema) -> Any:
    return model["properties"].get("kind", {}).get("const")


def _json(value: Any) -> str:
    """As YAML's one-line form would have it, where it is short."""
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return "{" + ", ".join(f"{name}: {_json(inner)}" for name, inner in fields.items()) + "}"
    if isinstance(value, list | tuple):
        items = cast("Sequence[Any]", value)
        return "[" + ", ".join(_json(inner) for inner in items) + "]"
    if isinstance(value, str):
        return value if value and value[0] not in "*&!%@[{" else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return f"{Decimal(repr(value)):f}"  # 1e-05 is a text to YAML
    return json.dumps(value)


def _name(reference: Schema) -> str:
    return str(reference["$ref"]).rsplit("/", 1)[1]


def _anchor(name: str) -> str:
    return name.lower()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
