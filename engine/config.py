"""Recipes as frozen values: the pydantic base, YAML loading, `--set` overrides, readable errors, stable hashes.

Not for: what the fields mean (that stands beside the code which uses them) or reading the environment.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from engine.errors import RecipeError

RecipeT = TypeVar("RecipeT", bound="Config")
_NO_SCHEMA: Mapping[str, Any] = {}


class Config(BaseModel):
    """Base of every config: frozen, unknown keys fail, field docstrings become the JSON schema's descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


def load_recipe(model: type[RecipeT], path: str | Path, overrides: Sequence[str] = ()) -> RecipeT:
    """Read a YAML recipe, apply `a.b=value` overrides and check it.

    Args:
        model: the recipe class of the verb.
        path: a YAML file on local disk.
        overrides: texts like `compute.actors=4`; the value is read as YAML.

    Raises:
        RecipeError: the file is missing or not YAML, an override is malformed, or a field is wrong.
    """
    return check_recipe(model, read_document(path, overrides), origin=str(path))


def read_document(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe as it is written, with its `a.b=value` overrides, and not yet checked: for sending it elsewhere.

    Raises:
        RecipeError: the file is missing or not YAML, or an override is malformed.
    """
    return with_overrides(_read_yaml(Path(path)), overrides)


def with_overrides(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy in which each `a.b=value` is applied; RecipeError for a malformed one."""
    for override in overrides:
        document = _with_override(document, override)
    return document


def resolved_text(path: str | Path, overrides: Sequence[str] = ()) -> str:
    """A recipe's file as it is, comments and all; with overrides, what it says once they are applied.

    Raises:
        RecipeError: as of `load_recipe`, but for what the fields say.
    """
    document = read_document(path, overrides)
    return to_yaml(document) if overrides else Path(path).read_text(encoding="utf-8")


def check_recipe(model: type[RecipeT], document: Mapping[str, Any], origin: str = "recipe") -> RecipeT:
    """Validate a plain mapping; RecipeError lists every wrong field with what was found and what is allowed."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise RecipeError(_explain(error, model, origin)) from None


def read_value(name: str, text: str) -> Any:
    """One value of a recipe as it is written on a command line.

    Raises:
        RecipeError: it is not YAML.
    """
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} {text}: not YAML", found=" ".join(str(error).split())) from None


def parse_yaml(text: str) -> Any:
    """What a YAML text of our own says."""
    return yaml.load(text, Loader=_UniqueKeyLoader)


def to_yaml(*documents: Any) -> str:
    """Plain values as YAML for people, in the order of their keys; several documents one after another."""
    return str(yaml.dump_all(documents, Dumper=_PlainDumper, sort_keys=False, width=1000, allow_unicode=True))


def canonical_json(value: Any) -> str:
    """One spelling per value: sorted keys, no spaces, UTF-8; configs are dumped first."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def stable_hash(value: Any) -> str:
    """sha-256 (hex) of `canonical_json(value)`; the same on every machine and Python."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice instead of keeping the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key: Any = self.construct_object(key_node, deep=True)  # pyright: ignore[reportUnknownMemberType]
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _PlainDumper(yaml.SafeDumper):
    """SafeDumper without anchors, and with texts of several lines as such."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _as_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)  # pyright: ignore[reportUnknownMemberType]


_PlainDumper.add_representer(str, _as_text)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"recipe {path}: no such file", way_out="give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: cannot be read", found=str(error)) from None
    try:
        document: Any = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path}: not valid YAML", found=" ".join(str(error).split())) from None
    if not isinstance(document, dict):
        raise RecipeError(
            f"recipe {path}: not a recipe",
            found="an empty file" if document is None else f"a {type(document).__name__}",
            wanted="`field: value` lines; see `engine schema VERB`",
        )
    return cast("dict[str, Any]", document)


def _with_override(document: Any, override: str) -> Any:
    path, equals, text = override.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise RecipeError(
            f"--set {override}: not an override",
            wanted="path.to.key=value",
            way_out="for example --set compute.actors=4",
        )
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"--set {override}: the value is not YAML", found=" ".join(str(error).split())
        ) from None
    return _replaced(document, names, value, override)


def _replaced(node: Any, names: Sequence[str], value: Any, override: str) -> Any:
    """A copy of `node` in which the entry at `names` is `value`; numbers index lists."""
    if not names:
        return value
    name, rest = names[0], names[1:]
    if isinstance(node, list):
        items = cast("Sequence[Any]", node)
        if not name.isdecimal() or int(name) >= len(items):
            raise RecipeError(
                f"--set {override}: no entry {name!r}",
                found=f"a list of {len(items)}",
                wanted="its index from 0",
            )
        return [
            _replaced(item, rest, value, override) if i == int(name) else item for i, item in enumerate(items)
        ]
    if not isinstance(node, dict | None):
        raise RecipeError(f"--set {override}: cannot look for {name!r} inside a value", found=repr(node))
    fields = cast("dict[str, Any]", node or {})
    return {**fields, name: _replaced(fields.get(name), rest, value, override)}


def _explain(error: ValidationError, model: type[BaseModel], origin: str) -> str:
    problems = error.errors(include_url=False)
    lines = [f"{origin}: {len(problems)} wrong field{'s' if len(problems) > 1 else ''}"]
    for problem in problems:
        field = ".".join(str(step) for step in problem["loc"]) or "(whole recipe)"
        lines.append(f"  {field}: {_describe(problem, model)}")
    return "\n".join(lines)


def _describe(problem: Mapping[str, Any], model: type[BaseModel]) -> str:
    kind, found, loc = problem["type"], problem["input"], problem["loc"]
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        allowed = _siblings(model, loc)
        close = difflib.get_close_matches(str(loc[-1]), allowed, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        return f"unknown field{hint} allowed here: {', '.join(allowed)}" if allowed else "unknown field"
    message = problem["msg"].removeprefix("Value error, ")
    return f"found {_shown(found)}; {message[:1].lower()}{message[1:]}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _siblings(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """Field names allowed beside `loc`, walking the schema (through lists and tagged unions)."""
    schema = model.model_json_schema()
    node: Mapping[str, Any] = schema
    for step in loc[:-1]:
        node = _resolved(node, schema)
        if "oneOf" in node and isinstance(step, str):  # a step into a tagged union is the tag
            options = (_resolved(option, schema) for option in node["oneOf"])
            node = next((option for option in options if _has_tag(option, step)), _NO_SCHEMA)
        elif isinstance(step, int):
            node = node.get("items", {})
        else:
            node = node.get("properties", {}).get(step, {})
    node = _resolved(node, schema)
    return list(node.get("properties", {}))


def _resolved(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    for option in node.get("anyOf", []):  # Optional[...]: take the side that has fields
        if "$ref" in option:
            node = option
    if "allOf" in node:
        node = node["allOf"][0]
    if "$ref" in node:
        resolved: Mapping[str, Any] = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        return resolved
    return node


def _has_tag(option: Mapping[str, Any], tag: str) -> bool:
    return bool(option.get("properties", {}).get("kind", {}).get("const") == tag)
