"""From the bytes of a CSV or Parquet list to the paths and texts in it; not for what they are joined with."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from engine.errors import RecipeError
from engine.shards.kinds import FilesSource
from engine.shards.parquet_file import shortened, with_plain_types
from engine.storage import uri_in_full

_NO_PATH = r"^$|^/|/$|(^|/)\.\.?(/|$)|\x00|^[A-Za-z][A-Za-z0-9+.-]*:/"  # `checked_path`, and foreign URIs


def parsed_list(config: FilesSource, content: bytes, source_uri: str) -> tuple[pa.Array, pa.Table]:
    """Paths relative to the source, shape (rows,), large_string; and the texts, shape (rows, columns): `label` (if the
    recipe names one), `metadata0`, `metadata1` ...

    Raises:
        RecipeError: it cannot be parsed, lacks a column, or has a row that names nothing below the source.
    """
    table = _parsed(config, content)
    columns = {f"metadata{place}": table[name] for place, name in enumerate(config.metadata)}
    columns |= {"label": table[config.label]} if config.label is not None else {}
    return _paths(config, table[config.path].combine_chunks(), source_uri), pa.table(columns)


def _parsed(config: FilesSource, content: bytes) -> pa.Table:
    """The wanted columns; text as large_binary, because nobody has checked yet that it is UTF-8."""
    assert config.list is not None
    try:
        if config.list.lower().endswith(".parquet"):
            table = _parquet_table(config, content)
        else:
            table = _csv_table(config, content)
        return pa.table({name: _plain(config, name, table[name]) for name in table.column_names})
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"source.list {config.list}: cannot be read",
            found=shortened(" ".join(str(error).split())),
            wanted="a table whose name says what it is: .csv, .csv.gz, .tsv, .tsv.gz or .parquet",
            way_out="write the list anew, or name another in source.list",
        ) from None


def _csv_table(config: FilesSource, content: bytes) -> pa.Table:
    """Values as they are written: the class "01" stays "01", and "NA" stays a word."""
    assert config.list is not None
    name = config.list.lower()

    def stream() -> Any:
        return pa.input_stream(io.BytesIO(content), compression="gzip" if name.endswith(".gz") else None)

    delimiter = "\t" if name.removesuffix(".gz").endswith(".tsv") else ","
    parse = pa.csv.ParseOptions(newlines_in_values=True, delimiter=delimiter)
    with pa.csv.open_csv(stream(), parse_options=parse) as reader:
        found = reader.schema.names
    wanted = _wanted(config, found)
    convert = pa.csv.ConvertOptions(
        include_columns=wanted,
        column_types=dict.fromkeys(wanted, pa.large_binary()),
        strings_can_be_null=False,
    )
    return pa.csv.read_csv(stream(), parse_options=parse, convert_options=convert)


def _parquet_table(config: FilesSource, content: bytes) -> pa.Table:
    """A field in structs is named with dots."""
    with pq.ParquetFile(io.BytesIO(with_plain_types(content))) as file:
        wanted = _wanted(config, _flat(file.schema_arrow.empty_table()).column_names)
        return _flat(file.read(columns=wanted)).select(wanted)


def _flat(table: pa.Table) -> pa.Table:
    while any(pa.types.is_struct(kind) for kind in table.schema.types):
        table = table.flatten()
    return table


def _wanted(config: FilesSource, found: list[str]) -> list[str]:
    """The columns that the recipe names, each once."""
    wanted = list(dict.fromkeys([config.path, *([config.label] if config.label else ()), *config.metadata]))
    for name in wanted:
        if found.count(name) != 1:
            raise RecipeError(
                f"source.list {config.list}: no column {name!r}"
                if name not in found
                else f"source.list {config.list}: {found.count(name)} columns are called {name!r}",
                found=shortened(", ".join(found)),
                wanted=f"a column {name!r} that is there once",
                way_out="name the columns in source.path, source.label and source.metadata",
            )
    return wanted


def _plain(config: FilesSource, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of large_binary, numbers or booleans."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind, is_kind = column.type, pa.types
    if is_kind.is_string(kind) or is_kind.is_large_string(kind) or is_kind.is_binary(kind):
        return column.cast(pa.large_binary())
    is_number = is_kind.is_integer(kind) or is_kind.is_floating(kind) or is_kind.is_boolean(kind)
    if is_kind.is_large_binary(kind) or is_kind.is_null(kind) or (is_number and name != config.path):
        return column
    raise RecipeError(
        f"source.list {config.list}: column {name!r} cannot be used",
        found=str(kind),
        wanted="strings" if name == config.path else "strings, integers, floats or booleans",
        way_out="name another column, or write this one as strings",
    )


def _paths(config: FilesSource, written: pa.Array, source_uri: str) -> pa.Array:
    """Relative to the source, large_string.

    Raises:
        RecipeError: a row names nothing below the source.
    """
    try:
        paths = written.cast(pa.large_string()).fill_null("")
    except pa.ArrowInvalid:
        bad = pa.array([not _is_utf8(path) for path in written.to_pylist()])
        raise _bad_rows(config, written, bad, source_uri) from None
    is_file_uri = pc.match_substring_regex(paths, "(?i)^file:/")
    if pc.any(is_file_uri).as_py():
        plain = (_local_path(uri) for uri in paths.filter(is_file_uri).to_pylist())
        paths = pc.replace_with_mask(paths, is_file_uri, pa.array(plain, pa.large_string()))
    root = f"{source_uri.rstrip('/')}/"
    below = pc.if_else(
        pc.starts_with(paths, root), pc.utf8_slice_codeunits(paths, len(root), 2**31 - 1), paths
    )
    no_path = _NO_PATH if source_uri.startswith("s3://") else f"{_NO_PATH}|//"
    bad = pc.match_substring_regex(below, no_path)
    if pc.any(bad).as_py():
        raise _bad_rows(config, written, bad, source_uri)
    return below


def _bad_rows(config: FilesSource, written: pa.Array, bad: pa.Array, source_uri: str) -> RecipeError:
    first, count = pc.index(bad, True).as_py(), pc.sum(bad).as_py()
    value = written[first].as_py()
    shown = repr(value.decode() if value is not None and _is_utf8(value) else value)
    return RecipeError(
        f"source.list {config.list}: {count:,} of {len(written):,} rows name no file below source.uri",
        found=f"{shortened(shown)} in column {config.path!r} of row {first + 1:,} (the first row of data is 1)",
        wanted=f"paths relative to {source_uri}, or full URIs below it, in UTF-8, without . or .. as a step",
        way_out="correct these rows, or give the source.uri that all of them are below",
    )


def _is_utf8(value: bytes | None) -> bool:
    try:
        return value is None or value.decode() is not None
    except UnicodeDecodeError:
        return False


def _local_path(uri: str) -> str:
    try:
        return uri_in_full(uri)
    except ValueError:
        return uri
