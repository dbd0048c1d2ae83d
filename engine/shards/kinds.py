"""The menu of sources: their recipe blocks, and one function that opens the chosen kind. Imports nothing heavy.

A new kind is a config class here, a line in `open_reader`, one file with its `ShardReader`, and an entry in KINDS of
tests/contracts/test_shard_contract.py; what it must keep to stands in `base.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from engine.config import Config
from engine.shards.base import TABLE_COLUMNS
from engine.shards.member_text import checked_extension, parse_field
from engine.storage import Uri

if TYPE_CHECKING:
    from engine.shards.base import ShardReader

LIST_ENDINGS = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")


def _each_once(names: tuple[str, ...], what: str) -> tuple[str, ...]:
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the {what} {repeated[0]!r} is there twice")
    return names


def _checked_extensions(image: tuple[str, ...]) -> tuple[str, ...]:
    for extension in image:
        checked_extension(extension)
    return _each_once(image, "extension")


Extensions = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_checked_extensions)]


class ShardSource(Config):
    """What every kind's recipe says besides what a record holds."""

    uri: Uri
    """Folder of the shards: s3://bucket/prefix, file:///folder or a plain path."""
    pattern: str = Field("*", min_length=1)
    """Which objects are shards. Without a slash it is for file names at any depth; with one for whole paths below
    `uri`, where `**` stands for any number of folders."""

    def contract(self) -> dict[str, Any]:
        """The fields that change what a part contains."""
        return self.model_dump(mode="json", exclude={"pattern"})


class WebDatasetSource(ShardSource):
    """Tar archives (plain, or compressed: .tar.gz, .tgz, .tar.zst) whose members are grouped by key."""

    kind: Literal["webdataset"] = "webdataset"
    """The kind of source: `webdataset`."""
    pattern: str = Field("*.tar", min_length=1)
    """Which objects are shards. Without a slash it is for file names at any depth; with one for whole paths below
    `uri`, where `**` stands for any number of folders."""
    image: Extensions = ("jpg", "jpeg", "png", "webp")
    """Extensions of image members, lower case, first choice first: a record's image is the first that it has."""
    label: str | None = None
    """Where the label stands: an extension such as `cls` or `txt` (the member's text), or `json:field`,
    `json:field.sub` (a field of the json member); null: no labels. An empty or missing one is a null label."""
    metadata: tuple[str, ...] = ()
    """More texts to carry along, written like `label`; each becomes a string column named after its last step:
    `json:camera.model` becomes `model`."""

    @field_validator("label")
    @classmethod
    def _is_field(cls, label: str | None) -> str | None:
        if label is not None:
            parse_field(label)
        return label

    @field_validator("metadata")
    @classmethod
    def _are_columns(cls, metadata: tuple[str, ...]) -> tuple[str, ...]:
        _check_columns(tuple(parse_field(notation).column for notation in metadata))
        return metadata

    @model_validator(mode="after")
    def _texts_are_no_images(self) -> WebDatasetSource:
        for notation in (*((self.label,) if self.label else ()), *self.metadata):
            if parse_field(notation).extension in self.image:
                raise ValueError(f"{notation!r} is wanted as text, but `image` lists that extension too")
        return self

    def metadata_columns(self) -> tuple[str, ...]:
        """Names of the extra string columns, in the order of `Sample.metadata`; unique, and none of the table's own."""
        return tuple(parse_field(notation).column for notation in self.metadata)


class ColumnsSource(ShardSource):
    """What the kinds whose records are rows of named fields have in common."""

    label: str | None = Field(None, min_length=1)
    """Field that holds the label: text, a number or a boolean; null: no labels. An empty or missing one is a null
    label."""
    key: str | None = Field(None, min_length=1)
    """Field that holds the sample's key (text or a number); null: its position in the shard, as 9 digits."""
    metadata: tuple[str, ...] = ()
    """More fields to carry along; each becomes a string column named after its last step: `camera.model` becomes
    `model`."""

    @field_validator("metadata")
    @classmethod
    def _are_columns(cls, metadata: tuple[str, ...]) -> tuple[str, ...]:
        _check_columns(tuple(_last_step(name) for name in metadata))
        return metadata

    def metadata_columns(self) -> tuple[str, ...]:
        """Names of the extra string columns, in the order of `Sample.metadata`; unique, and none of the table's own."""
        return tuple(_last_step(name) for name in self.metadata)


class ParquetSource(ColumnsSource):
    """Parquet files with a column of encoded images, read row group by row group."""

    kind: Literal["parquet"] = "parquet"
    """The kind of source: `parquet`."""
    pattern: str = Field("*.parquet", min_length=1)
    """Which objects are shards. Without a slash it is for file names at any depth; with one for whole paths below
    `uri`, where `**` stands for any number of folders."""
    image: str = Field("image", min_length=1)
    """Column of encoded images (binary). A step into a struct is written with a dot: `image.bytes`; a struct that
    has a field `bytes` may be named alone. So may `label`, `key` and `metadata` step into structs."""


class TFRecordSource(ColumnsSource):
    """TFRecord files of tf.train.Example (plain or .gz), or a prepared folder of TensorFlow Datasets (with `split`)."""

    kind: Literal["tfrecord"] = "tfrecord"
    """The kind of source: `tfrecord`."""
    pattern: str = Field("*.tfrecord*", min_length=1)
    """Which objects are shards. Without a slash it is for file names at any depth; with one for whole paths below
    `uri`, where `**` stands for any number of folders."""
    image: str | None = Field(None, min_length=1)
    """Feature that holds the encoded image; null: `image/encoded`, or the image of a prepared dataset."""
    split: str | None = Field(None, min_length=1)
    """Of a prepared dataset, whose folder (the one with dataset_info.json) `uri` then names: a split or a slice of
    one: `train`, `train[:80%]`, `train[1000:]`, `test[25%:75%]`. Its class names become the labels."""


class FilesSource(ShardSource):
    """Loose image files: all of a folder, or those that a list names. Neighbours in a folder are grouped, and a group
    is a shard; the table follows the folder (or the list): a file that goes takes its row with it."""

    kind: Literal["files"] = "files"
    """The kind of source: `files`."""
    pattern: str = Field("*", min_length=1)
    """Which files are samples, those of a list too. Without a slash it is for file names at any depth; with one for
    whole paths below `uri`, where `**` stands for any number of folders."""
    image: Extensions = ("jpg", "jpeg", "png", "webp")
    """Extensions of image files, lower case; in the names any case will do. Not asked of files that a list names."""
    list: Uri | None = None
    """A .csv, .tsv (either may be .gz) or .parquet file with one row for each file; only these files are samples then.
    null: all files of the folder."""
    path: str = Field("path", min_length=1)
    """Column of the list that holds the files: paths relative to `uri`, or full URIs below it."""
    label: str | None = Field(None, min_length=1)
    """Without a list: `folder`, the name of the folder that a file is in. With a list: the column that holds the label
    (text, a number or a boolean; `folder` is then a column of that name). An empty one is a null label. null: no
    labels."""
    metadata: tuple[str, ...] = ()
    """More columns of the list to carry along; each becomes a string column named after its last step: `camera.model`
    becomes `model`."""

    @field_validator("list")
    @classmethod
    def _is_a_table(cls, uri: str | None) -> str | None:
        if uri is not None and not uri.lower().endswith(LIST_ENDINGS):
            raise ValueError(f"a list is a file whose name ends in {', '.join(LIST_ENDINGS)}")
        return uri

    @field_validator("path", "label", "metadata")
    @classmethod
    def _has_a_list(cls, value: Any, checked: ValidationInfo) -> Any:
        if "list" not in checked.data or checked.data["list"] is not None:
            return value
        if checked.field_name == "label" and value not in (None, "folder"):
            raise ValueError("without a `list` the label is `folder` or null")
        if (checked.field_name == "path" and value != "path") or (checked.field_name == "metadata" and value):
            raise ValueError(f"`{checked.field_name}` names columns of a `list`, and there is none")
        return value

    @field_validator("metadata")
    @classmethod
    def _are_columns(cls, metadata: tuple[str, ...]) -> tuple[str, ...]:
        _check_columns(tuple(_last_step(name) for name in metadata))
        return metadata

    def contract(self) -> dict[str, Any]:
        """The fields that change what a part contains; which files there are changes their groups' identities."""
        of_a_list: set[str] = set() if self.list is not None else {"list", "path", "metadata"}
        return self.model_dump(mode="json", exclude={"pattern", "image", *of_a_list})

    def metadata_columns(self) -> tuple[str, ...]:
        """Names of the extra string columns, in the order of `Sample.metadata`; unique, and none of the table's own."""
        return tuple(_last_step(name) for name in self.metadata)


SourceConfig = Annotated[
    WebDatasetSource | ParquetSource | TFRecordSource | FilesSource, Field(discriminator="kind")
]
_SOURCE: TypeAdapter[SourceConfig] = TypeAdapter(SourceConfig)


def open_reader(config: SourceConfig, max_sample_bytes: int) -> ShardReader:
    """The reader that a recipe names.

    Args:
        config: of the source.
        max_sample_bytes: a larger image is not read; its record is a `sample_too_large` reject.
    """
    if isinstance(config, ParquetSource):
        from engine.shards.parquet import ParquetReader

        return ParquetReader(config, max_sample_bytes)
    if isinstance(config, TFRecordSource):
        from engine.shards.tfrecord import TFRecordReader

        return TFRecordReader(config, max_sample_bytes)
    if isinstance(config, FilesSource):
        from engine.shards.files import FilesReader

        return FilesReader(config, max_sample_bytes)
    from engine.shards.webdataset import WebDatasetReader

    return WebDatasetReader(config, max_sample_bytes)


def source_of_contract(contract: Mapping[str, Any]) -> SourceConfig | None:
    """The source that the contract of an embedding table names, without its pattern, which no table keeps; None where
    this engine does not know it."""
    prefix = "source."
    fields = {name.removeprefix(prefix): value for name, value in contract.items() if name.startswith(prefix)}
    try:
        return _SOURCE.validate_python(fields)
    except ValidationError:
        return None


def _check_columns(columns: tuple[str, ...]) -> None:
    lowered = tuple(column.lower() for column in columns)  # DuckDB ignores case
    if taken := sorted(TABLE_COLUMNS.intersection(lowered)):
        raise ValueError(f"the table has a column {taken[0]!r} of its own")
    _each_once(lowered, "column")


def _last_step(name: str) -> str:
    step = name.rpartition(".")[2].rpartition("/")[
        2
    ]  # structs step with a dot, features of Examples with a slash
    if not step:
        raise ValueError(f"{name!r} is not the name of a field")
    return step
