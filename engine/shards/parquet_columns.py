"""The wanted columns of a Parquet file: which leaves they are, and how their values become labels and texts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.errors import ShardDamaged
from engine.shards.kinds import ParquetSource
from engine.shards.member_text import MAX_LABEL_CHARACTERS, MAX_TEXT_BYTES, BadText
from engine.shards.parquet_file import ParquetObject, shortened

Value = bytes | int | float | None  # bool is an int


@final
class Columns:
    """Where the recipe's fields stand in one file.

    Raises:
        ShardDamaged: a column is missing, or of a type that cannot be used.
    """

    def __init__(self, config: ParquetSource, file: pq.ParquetFile, source: ParquetObject) -> None:
        self._schema, self._source = file.schema_arrow, source
        self._features = _hugging_face_features(file.metadata.metadata or {})
        self.image = self._image_column(config.image)
        self.label = self._text_column(config.label) if config.label else None
        self.key = self._text_column(config.key) if config.key else None
        self.metadata = tuple(self._text_column(name) for name in config.metadata)
        texts = [column for column in (self.label, self.key, *self.metadata) if column]
        wanted = {column.path for column in (self.image, *texts)}
        leaves = [file.schema.column(leaf).path for leaf in range(len(file.schema))]
        self.leaves = [leaf for leaf, path in enumerate(leaves) if path in wanted]
        # In the order of the file, which is the order pyarrow then reads in: small columns are done with before the
        # images beside them move the block on. In another order a quarter of a file was fetched twice.
        self.paths = list(dict.fromkeys(leaves[leaf] for leaf in self.leaves))
        self.image_leaf = leaves.index(self.image.path)

    def _image_column(self, name: str) -> _Column:
        fields = self._find(name)
        if pa.types.is_struct(fields[-1].type) and fields[-1].type.get_field_index("bytes") >= 0:
            fields = (*fields, fields[-1].type.field("bytes"))
        if not _is_binary(fields[-1].type):
            raise self._wrong_type(name, fields[-1], "binary, or a struct with a binary field `bytes`")
        return _Column(name, tuple(field.name for field in fields))

    def _text_column(self, name: str) -> TextColumn:
        fields = self._find(name)
        if not _is_text(fields[-1].type):
            raise self._wrong_type(name, fields[-1], "strings, bytes in UTF-8, integers, floats or booleans")
        steps = tuple(field.name for field in fields)
        is_integer = pa.types.is_integer(fields[-1].type)
        return TextColumn(name, steps, _class_names(self._features, steps) if is_integer else None)

    def _find(self, name: str) -> tuple[pa.Field, ...]:
        fields = _fields_to(name, list(self._schema))
        if not fields:
            raise ShardDamaged(
                f"{self._source.name} has no column {name!r}",
                found=shortened(", ".join(self._schema.names)),
                wanted=f"a column {name!r} that is there once, or a way to it through structs",
                way_out="name a column that every shard has, or leave this shard out by `pattern`",
            )
        return fields

    def _wrong_type(self, name: str, field: pa.Field, wanted: str) -> ShardDamaged:
        return ShardDamaged(
            f"{self._source.name}: column {name!r} cannot be used",
            found=shortened(str(field.type)),
            wanted=wanted,
            way_out="name another column, or leave this shard out by `pattern`",
        )


@dataclass(frozen=True)
class _Column:
    """A column, or a field in nested structs."""

    name: str
    """As the recipe has it."""
    steps: tuple[str, ...]
    """Names of the column and of the fields to step into."""

    @property
    def path(self) -> str:
        """As Parquet has it."""
        return ".".join(self.steps)

    def array(self, batch: pa.RecordBatch) -> pa.Array:
        """Its values, shape (rows of the batch,); null where a struct on the way is null."""
        array = batch.column(self.steps[0])
        return pc.struct_field(array, list(self.steps[1:])) if self.steps[1:] else array


@final
@dataclass(frozen=True)
class TextColumn(_Column):
    """A column for labels, keys or metadata."""

    class_names: tuple[str, ...] | None
    """What its integers stand for; None: themselves."""

    def values(self, batch: pa.RecordBatch) -> list[Value]:
        """One for each row; strings as bytes, because nobody has checked yet that they are UTF-8."""
        array = self.array(batch)
        is_string = pa.types.is_string(array.type) or pa.types.is_large_string(array.type)
        values: list[Value] = (array.cast(pa.large_binary()) if is_string else array).to_pylist()
        return values

    def label(self, value: Value) -> str | None:
        """The label that a value is.

        Raises:
            BadText: it is none.
        """
        if isinstance(value, bytes):
            return _label_text(value) or None
        if isinstance(value, float) and not math.isfinite(value):
            raise BadText(f"{value} is not a JSON number")
        if self.class_names is not None and value is not None and not -1 <= value < len(self.class_names):
            raise BadText(f"{value} is none of {len(self.class_names):,} classes")
        return self.text(value)

    def text(self, value: Value) -> str | None:
        """The value as metadata or key, whatever its state; None: null, or too long."""
        if isinstance(value, bytes):
            return None if len(value) > MAX_TEXT_BYTES else value.decode("utf-8", "backslashreplace")
        if isinstance(value, int) and self.class_names is not None and -1 <= value < len(self.class_names):
            return self.class_names[value] if value >= 0 else None
        return None if value is None else json.dumps(value)


def _label_text(encoded: bytes) -> str:
    if len(encoded) > MAX_TEXT_BYTES:
        raise BadText(f"it has {len(encoded):,} bytes; at most {MAX_TEXT_BYTES:,} are read")
    try:
        label = encoded.decode().strip()
    except UnicodeDecodeError as error:
        raise BadText(f"not UTF-8: {error.reason} at byte {error.start}") from None
    if len(label) > MAX_LABEL_CHARACTERS:
        raise BadText(f"{len(label):,} characters; at most {MAX_LABEL_CHARACTERS:,} are a label")
    return label


def _fields_to(name: str, fields: Sequence[pa.Field]) -> tuple[pa.Field, ...]:
    """The field of that name, or the fields to step through; () where there is none or more than one."""
    cuts = [len(name), *(at for at in range(len(name) - 1, 0, -1) if name[at] == ".")]
    for cut in cuts:
        found = [field for field in fields if field.name == name[:cut]]
        if len(found) != 1:
            continue
        if cut == len(name):
            return (found[0],)
        inner = _fields_to(name[cut + 1 :], list(found[0].type)) if pa.types.is_struct(found[0].type) else ()
        if inner:
            return (found[0], *inner)
    return ()


def _is_binary(kind: pa.DataType) -> bool:
    is_kind = pa.types
    return bool(
        is_kind.is_binary(kind)
        or is_kind.is_large_binary(kind)
        or is_kind.is_fixed_size_binary(kind)
        or is_kind.is_null(kind)  # what writers make of a column without a single value
    )


def _is_text(kind: pa.DataType) -> bool:
    is_kind = pa.types
    return (
        _is_binary(kind)
        or is_kind.is_string(kind)
        or is_kind.is_large_string(kind)
        or is_kind.is_integer(kind)
        or is_kind.is_floating(kind)
        or is_kind.is_boolean(kind)
    )


def _hugging_face_features(metadata: dict[bytes, bytes]) -> Any:
    """What the library `datasets` says about the columns, as JSON; None where it says nothing."""
    try:
        return json.loads(metadata[b"huggingface"])["info"]["features"]
    except (LookupError, TypeError, ValueError, RecursionError):
        return None


def _class_names(features: Any, steps: tuple[str, ...]) -> tuple[str, ...] | None:
    for step in steps:
        features = features.get(step) if isinstance(features, dict) else None
    if not isinstance(features, dict) or features.get("_type") != "ClassLabel":
        return None
    names = features.get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)
