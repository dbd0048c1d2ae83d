"""What a prediction table says: how many candidates, from which confidence on a label, and under which names.

From a recipe's block and a bundle's classes to numbers and names for each class. Not for: computing confidences.
"""

from __future__ import annotations

import difflib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from engine.config import Config
from engine.errors import RecipeError
from engine.storage import StorageConfig, Uri, open_store, uri_in_full

CLASS_IDS = "class_ids"  # a label map that the bundle has itself
_MAP_FILES = (".csv", ".tsv", ".parquet")
_NAMES_SHOWN = 10  # of classes, in a message
Share = Annotated[float, Field(ge=0, le=1)]


class MinConfidence(Config):
    """Confidence below which a row is not given a label."""

    default: Share = 0.0
    """Of every class that is not named in `classes`."""
    classes: dict[str, Share] = Field(default={})
    """By name of the class, as the bundle has it."""


def _as_min_confidence(given: Any) -> Any:
    if isinstance(given, int | float) and not isinstance(given, bool):
        return {"default": given}
    if not isinstance(given, (dict, MinConfidence)):
        raise ValueError("a number from 0 to 1, or {default: 0.5, classes: {cat: 0.9}}")
    return given


def _as_label_map(given: Any) -> Any:
    """Ids may be written as whole numbers; a file's URI is spelled in full."""
    if given is None:
        return None
    if given == CLASS_IDS:
        return given
    if isinstance(given, str) and given.lower().endswith(_MAP_FILES):
        return uri_in_full(given)
    if not isinstance(given, dict) or not given:
        raise ValueError(
            "a mapping as in {cat: id-7, dog: id-9}, the URI of a .csv, .tsv or .parquet file, or class_ids"
        )
    for name, label in given.items():
        is_id = isinstance(label, str | int) and not isinstance(label, bool)
        if not isinstance(name, str) or not is_id or label == "":
            raise ValueError(
                f"{name!r}: {label!r} is not a class's name and an id; quote what YAML takes for else"
            )
    return {name: str(label) for name, label in given.items()}


class PredictionForm(Config):
    """What predictions say."""

    top_k: int = Field(5, ge=1, le=1000)
    """Candidates kept for each row; never more than there are classes."""
    min_confidence: Annotated[
        MinConfidence, BeforeValidator(_as_min_confidence, json_schema_input_type=float | MinConfidence)
    ] = MinConfidence()
    """Confidence below which `label` is null (or a label not among `labels`); the candidates stay. A number for all
    classes, or `{default: 0.5, classes: {cat: 0.9}}`."""
    label_map: Annotated[
        dict[str, str] | str | None,
        BeforeValidator(_as_label_map, json_schema_input_type=dict[str, str | int] | str | None),
    ] = None
    """Your ids for the classes, which then stand in `label`, `labels` and `top_labels`: `{cat: id-7}`, or the URI of a
    .csv, .tsv or .parquet file with two columns, class and id (a .csv begins with a line of column names), or the word
    `class_ids`: those that the bundle has itself (WordNet's, of ImageNet). A file may name more classes than the bundle
    has. Classes with the same id stay candidates of their own."""
    unmapped: Literal["refuse", "keep"] = "refuse"
    """Classes that `label_map` does not name: `refuse` the run, or `keep` their own names."""


class PredictionOutput(PredictionForm):
    """Where predictions are written, and what they say."""

    uri: Uri
    """Folder of the prediction table."""
    also: tuple[Literal["jsonl", "csv"], ...] = ()
    """Copies of each part for people, beside the Parquet ones: `<table>/also/<part>.jsonl` or `.csv`."""

    @field_validator("also")
    @classmethod
    def _once(cls, also: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(also)) != len(also):
            raise ValueError("each format once")
        return tuple(sorted(also))


@dataclass(frozen=True)
class Decisions:
    """What a recipe says of a bundle's classes.

    Attributes:
        top_k: candidates wanted; there may be fewer classes.
        min_confidences: of each class, in the bundle's order.
        labels: what each class is called in the table.
        also: formats of the copies for people.
        contract: the fields of the table's contract that say all this; of what is left out there are none, so that
            tables from before there was a choice stay valid.
    """

    top_k: int
    min_confidences: tuple[float, ...]
    labels: tuple[str, ...]
    also: tuple[str, ...]
    contract: Mapping[str, Any]


def decisions_of(
    output: PredictionForm,
    classes: Sequence[str],
    storage: StorageConfig,
    bundle_uri: str,
    class_ids: Sequence[str] = (),
) -> Decisions:
    """Work a recipe's block out for the classes of a bundle.

    Args:
        class_ids: of each class, where the bundle has them.

    Raises:
        RecipeError: it names a class that the bundle has not got, leaves one without an id, or asks for ids that there
            are none of.
        StorageError: the file of a label map cannot be read.
    """
    wanted = output.min_confidence
    _require_known(wanted.classes, classes, "min_confidence.classes", bundle_uri)
    contract: dict[str, Any] = {"top_k": output.top_k, "min_confidence": wanted.default}
    apart = {name: value for name, value in wanted.classes.items() if value != wanted.default}
    contract |= {f"min_confidence.{name}": apart[name] for name in sorted(apart)}
    labels = tuple(classes)
    if output.label_map is not None:
        labels = _mapped(output, classes, storage, bundle_uri, class_ids)
        contract |= {f"label_map.{name}": label for name, label in zip(classes, labels, strict=True)}
    also = output.also if isinstance(output, PredictionOutput) else ()
    if also:
        contract["also"] = list(also)
    min_confidences = tuple(apart.get(name, wanted.default) for name in classes)
    return Decisions(output.top_k, min_confidences, labels, also, contract)


def _mapped(
    output: PredictionForm,
    classes: Sequence[str],
    storage: StorageConfig,
    bundle_uri: str,
    class_ids: Sequence[str],
) -> tuple[str, ...]:
    if output.label_map == CLASS_IDS:
        if not class_ids:
            raise RecipeError(
                f"label_map: bundle {bundle_uri} has no class_ids",
                wanted="a bundle whose classes are from a catalogue, as `engine imagenet` makes them",
                way_out="give a mapping, or leave label_map out",
            )
        return tuple(class_ids)
    if isinstance(output.label_map, str):
        ids = _read_map(output.label_map, storage)
    else:
        assert output.label_map is not None
        ids = output.label_map
        _require_known(ids, classes, "label_map", bundle_uri)
    without = [name for name in classes if name not in ids]
    if without and output.unmapped == "refuse":
        near = difflib.get_close_matches(without[0], ids, n=1)
        raise RecipeError(
            f"label_map: {len(without):,} of {len(classes):,} classes of bundle {bundle_uri} have no id",
            found=_shown(without) + (f"; near it there is {near[0]!r}" if near else ""),
            wanted="an id for every class (a .csv or .tsv file begins with a line of column names)",
            way_out="name them too, or set unmapped: keep",
        )
    return tuple(ids.get(name, name) for name in classes)


def _require_known(names: Mapping[str, Any], classes: Sequence[str], field: str, bundle_uri: str) -> None:
    known = set(classes)
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    near = difflib.get_close_matches(unknown[0], classes, n=3)
    raise RecipeError(
        f"{field}: bundle {bundle_uri} has no class {_shown(unknown)}",
        found=f"{len(classes):,} classes: {_shown(classes)}",
        wanted=f"perhaps {_shown(near)}" if near else "names as the bundle has them",
        way_out="correct the names; `engine inspect` of the bundle lists them",
    )


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN:,} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(map(repr, names[:_NAMES_SHOWN])) + more


def _read_map(uri: str, storage: StorageConfig) -> dict[str, str]:
    """Class to id, of a file with two columns.

    Raises:
        RecipeError: it cannot be parsed, has other than two columns or an empty value, or gives a class two ids.
    """
    import pyarrow as pa

    folder, _, name = uri.rpartition("/")
    content = open_store(folder or "/", storage).read(name)
    try:
        table = _parsed(uri, content)
        columns = [_texts(column) for column in table.columns]
    except (pa.ArrowException, OSError) as error:
        raise RecipeError(
            f"label_map {uri}: cannot be read",
            found=" ".join(str(error).split())[:300],
            wanted="a .csv, .tsv or .parquet file with two columns of texts, class and id",
        ) from None
    if len(columns) != 2:
        raise RecipeError(
            f"label_map {uri}: {len(columns)} columns",
            found=", ".join(table.column_names)[:300],
            wanted="two: the class, then its id",
        )
    pairs = set(zip(*columns, strict=True))
    if empty := sum(not class_name or not label for class_name, label in pairs):
        raise RecipeError(
            f"label_map {uri}: {empty:,} rows lack a class or an id", wanted="both in every row"
        )
    repeated = [class_name for class_name, count in Counter(one for one, _ in pairs).items() if count > 1]
    if repeated:
        raise RecipeError(f"label_map {uri}: classes with several ids", found=_shown(sorted(repeated)))
    return dict(pairs)


def _texts(column: Any) -> list[str | None]:
    """Strings, or whole numbers written out.

    Raises:
        pyarrow.ArrowInvalid: a column of anything else.
    """
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
        raise pa.ArrowInvalid(f"a column of {kind}, not of strings or whole numbers")
    texts: list[str | None] = column.cast(pa.string()).to_pylist()
    return texts


def _parsed(uri: str, content: bytes) -> Any:
    """CSV values as they are written: the id 007 stays 007."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    if uri.lower().endswith(".parquet"):
        return pa.parquet.read_table(io.BytesIO(content))
    delimiter = "\t" if uri.lower().endswith(".tsv") else ","
    parse = pa.csv.ParseOptions(newlines_in_values=True, delimiter=delimiter)
    with pa.csv.open_csv(io.BytesIO(content), parse_options=parse) as reader:
        names = reader.schema.names
    convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
    return pa.csv.read_csv(io.BytesIO(content), parse_options=parse, convert_options=convert)
