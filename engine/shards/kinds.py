"""The menu of sources: their recipe blocks, and one function that opens the chosen kind. Imports nothing heavy.

A new kind is a config class here, a line in `open_reader`, one file with its `ShardReader`, and an entry in KINDS of
tests/contracts/test_shard_contract.py; what it must keep to stands in `base.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from engine.config import Config
from engine.shards.base import TABLE_COLUMNS
from engine.shards.member_text import checked_extension, parse_field
from engine.storage import Uri

if TYPE_CHECKING:
    from engine.shards.base import ShardReader


class WebDatasetSource(Config):
    """Tar archives (plain, or gzipped with a name ending in .tar.gz or .tgz) whose members are grouped by key."""

    kind: Literal["webdataset"] = "webdataset"
    """The kind of source: `webdataset`."""
    uri: Uri
    """Folder of the shards: s3://bucket/prefix, file:///folder or a plain path."""
    pattern: str = Field("*.tar", min_length=1)
    """Which objects are shards. Without a slash it is for file names at any depth; with one for whole paths below
    `uri`, where `**` stands for any number of folders."""
    image: tuple[str, ...] = Field(("jpg", "jpeg", "png", "webp"), min_length=1)
    """Extensions of image members, lower case, first choice first: a record's image is the first that it has."""
    label: str | None = None
    """Where the label stands: an extension such as `cls` or `txt` (the member's text), or `json:field`,
    `json:field.sub` (a field of the json member); null: no labels. An empty or missing one is a null label."""
    metadata: tuple[str, ...] = ()
    """More texts to carry along, written like `label`; each becomes a string column named after its last step:
    `json:camera.model` becomes `model`."""

    @field_validator("image")
    @classmethod
    def _are_extensions(cls, image: tuple[str, ...]) -> tuple[str, ...]:
        for extension in image:
            checked_extension(extension)
        return _each_once(image, "extension")

    @field_validator("label")
    @classmethod
    def _is_field(cls, label: str | None) -> str | None:
        if label is not None:
            parse_field(label)
        return label

    @field_validator("metadata")
    @classmethod
    def _are_columns(cls, metadata: tuple[str, ...]) -> tuple[str, ...]:
        columns = tuple(parse_field(notation).column.lower() for notation in metadata)  # DuckDB ignores case
        if taken := sorted(TABLE_COLUMNS.intersection(columns)):
            raise ValueError(f"the table has a column {taken[0]!r} of its own")
        _each_once(columns, "column")
        return metadata

    @model_validator(mode="after")
    def _texts_are_no_images(self) -> WebDatasetSource:
        for notation in (*((self.label,) if self.label else ()), *self.metadata):
            if parse_field(notation).extension in self.image:
                raise ValueError(f"{notation!r} is wanted as text, but `image` lists that extension too")
        return self

    def contract(self) -> dict[str, Any]:
        """The fields that change what a part contains."""
        return self.model_dump(mode="json", exclude={"pattern"})


# A second kind makes this a union with Field(discriminator="kind"); pydantic wants no discriminator for one.
SourceConfig = WebDatasetSource


def metadata_columns(config: SourceConfig) -> tuple[str, ...]:
    """The names of the extra string columns, in the order of `Sample.metadata`; unique, and none of the table's own."""
    return tuple(parse_field(notation).column for notation in config.metadata)


def open_reader(config: SourceConfig, max_sample_bytes: int) -> ShardReader:
    """The reader that a recipe names.

    Args:
        config: of the source.
        max_sample_bytes: a larger image is not read; its record is a `sample_too_large` reject.
    """
    from engine.shards.webdataset import WebDatasetReader

    return WebDatasetReader(config, max_sample_bytes)


def _each_once(names: tuple[str, ...], what: str) -> tuple[str, ...]:
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the {what} {repeated[0]!r} is there twice")
    return names
