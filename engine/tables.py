"""Tables on storage: the record that names a table's contract, its parts, and the sweep of replaced ones.

A table is a folder: `_table.json`, `data/<part>`, where shards were read `rejects/<part>`, and for predictions perhaps
`also/<part>.jsonl` and `.csv`, copies for people. The PUT of a data part is
the commit; everything a part says about itself stands in its Parquet footer. Names are `engine.parts`' business,
what is computed in between is not known here.

Predictions are made of embedding parts, or straight from shards; then their table accounts for every sample of a shard
as an embedding table does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.copies import written_as
from engine.errors import ContractMismatch, ObjectChanged, ObjectNotFound, RecipeError, TableDamaged
from engine.parts import (
    COPIES_FOLDER,
    NOTHING,
    PartName,
    Progress,
    TableProgress,
    copy_path,
    parse_copy_path,
    parse_part_name,
    path16_of,
)
from engine.plain_pages import read_plain_lists
from engine.schema import SCHEMA_VERSION
from engine.storage import ObjectInfo, Store
from engine.storage.object_file import object_file

RECORD_NAME = "_table.json"
PROBE_NAME = "_probe"
DATA_FOLDER = "data/"
REJECTS_FOLDER = "rejects/"
READ_THREADS = 8  # parts are small (about 5 MB): reading is bound by the store's latency
FOOTER_KEY = b"engine.part"
DIFFERING_SHOWN = 20  # fields of contracts, in a message
_READ_AT_ONCE_BYTES = 1 << 20  # of an object: a request or two more would take longer

Record = Mapping[str, Any]
ItemT = TypeVar("ItemT")


# ---------------------------------------------------------------- the record of a table


def read_record(store: Store, kind: str) -> Record | None:
    """`_table.json` of the table at `store`, or None where there is no table yet.

    Args:
        kind: "embeddings" or "predictions".

    Raises:
        TableDamaged: the record cannot be read, or was written by another schema version.
        ContractMismatch: it is a table of another kind.
    """
    try:
        text = store.read(RECORD_NAME)
    except ObjectNotFound:
        return None
    where = f"{store.uri}/{RECORD_NAME}"
    try:
        record = json.loads(text)
        found_kind, found_version = record["kind"], record["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise TableDamaged(
            f"{where}: not a table record", found=repr(error), way_out="give another output.uri"
        ) from None
    if found_kind != kind:
        raise ContractMismatch(f"{where}: another kind of table", found=found_kind, wanted=kind)
    if found_version != SCHEMA_VERSION:
        raise TableDamaged(
            f"{where}: written by another version of the engine",
            found=f"schema version {found_version}",
            wanted=f"schema version {SCHEMA_VERSION}",
            way_out="read it with the engine that wrote it, or write a new table",
        )
    if not isinstance(record.get("contract"), dict):
        raise TableDamaged(
            f"{where}: not a table record", found="no contract in it", way_out="give another output.uri"
        )
    result: Record = record
    return result


def is_of_images(record: Record) -> bool:
    """Whether it is of a prediction table that was made straight from images, and not of an embedding table."""
    return record.get("kind") == "predictions" and "source.uri" in record.get("contract", ())


def require_record(store: Store, kind: str) -> Record:
    """As `read_record`, where the table must exist."""
    record = read_record(store, kind)
    if record is None:
        raise ObjectNotFound(
            f"{store.uri}: no {kind} table here",
            wanted=f"a folder with {RECORD_NAME}",
            way_out="check the uri, or run the job that writes the table first",
        )
    return record


def require_writable(store: Store) -> None:
    """Write and delete a small object where a table will be, before anything dear is started.

    Raises:
        AccessDenied, StorageError: that is refused.
    """
    store.write(PROBE_NAME, b"")
    store.delete(PROBE_NAME)


def claim_table(store: Store, record: Record) -> Record:
    """Create the table with `record`, or join the one that is there if its contract is the same.

    Returns:
        The record that is on storage now: ours, or that of the run which was first.

    Raises:
        ContractMismatch: the table there has another contract.
    """
    if store.create(RECORD_NAME, json.dumps(record, indent=1, sort_keys=True).encode()):
        return record
    existing = require_record(store, record["kind"])
    check_contract(existing, record["contract"], store.uri)
    return existing


def check_contract(record: Record, contract: Mapping[str, Any], table_uri: str) -> None:
    """Refuse to mix: compare field by field, naming both values.

    Args:
        record: what the table says of itself.
        contract: fields that this run would write with; a subset may be given to check early.

    Raises:
        ContractMismatch: at least one field differs.
    """
    recorded, missing = record["contract"], object()
    present = json.loads(json.dumps(contract))  # as the record spells it: tuples are lists there
    differing = [name for name, wanted in present.items() if recorded.get(name, missing) != wanted]
    if not differing:
        return
    shown = [
        f"{name}: the table has {json.dumps(recorded[name]) if name in recorded else 'no such field'}, "
        f"this run {json.dumps(present[name])}"
        for name in differing[:DIFFERING_SHOWN]
    ]
    if len(differing) > DIFFERING_SHOWN:
        shown.append(f"and {len(differing) - DIFFERING_SHOWN:,} more")
    raise ContractMismatch(
        f"{table_uri}: the table was made with another contract\n    " + "\n    ".join(shown),
        way_out="change the recipe back, or write to a new output.uri",
    )


# ---------------------------------------------------------------- parts


@dataclass(frozen=True, slots=True)
class ShardPartFacts:
    """What the footer of every part says that was made from a shard.

    Attributes:
        fingerprint: of the network that made it, or the embeddings it was predicted from.
        source_uri: root that `shard` is relative to.
        shard: relative path of the shard.
        identity: of the shard's object when it was read.
        begin_offset: byte in the shard where the part's first sample begins; None where the shard is compressed.
        end_offset: byte where its last sample ends, and the next part begins; None where compressed.
        samples: rows + rejects.
        rejects: samples that have no row.
        rejects_sha256: hex digest of the rejects file, or None where there are no rejects.
    """

    fingerprint: str
    source_uri: str
    shard: str
    identity: str
    begin_offset: int | None
    end_offset: int | None
    samples: int
    rejects: int
    rejects_sha256: str | None


@dataclass(frozen=True, slots=True)
class EmbeddingPartFacts(ShardPartFacts):
    """Footer of an embedding part.

    Attributes:
        embeddings_sha256: hex digest of the embedding numbers, row by row, little-endian.
        schema_version: of the columns.
    """

    embeddings_sha256: str
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True)
class ShardPredictionFacts(ShardPartFacts):
    """Footer of a prediction part that was made straight from a shard: which bundle labelled it.

    Attributes:
        bundle: its id.
        recipe_sha256: of what decides the predictions: the table's contract, as `stable_hash` spells it.
        engine_version: that scored it.
        schema_version: of the columns.
    """

    bundle: str
    recipe_sha256: str
    engine_version: str
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True)
class PredictionPartFacts:
    """Footer of a prediction part made of an embedding part: which bundle scored which version of which.

    Attributes:
        answer_counts: rows by their first candidate, whatever its confidence, or each of their several labels; None
            where nothing was counted.
        abstained: rows without a label; None where nothing was counted.
        cosine_counts: rows by their nearness to what the bundle was fitted on, in the bins of its reference; None where
            nothing was counted, or the bundle has none.
        reference_sha256: of that reference.
        recipe_sha256: of what decides the predictions: the table's contract, as `stable_hash` spells it; equal parts of
            different runs have the same. None in parts from before there was one.
        engine_version: that scored it; None likewise.
    """

    bundle: str
    fingerprint: str
    embedding_part: str
    embedding_identity: str
    rows: int
    schema_version: int = SCHEMA_VERSION
    answer_counts: dict[str, int] | None = None
    abstained: int | None = None
    cosine_counts: tuple[int, ...] | None = None
    reference_sha256: str | None = None
    recipe_sha256: str | None = None
    engine_version: str | None = None


PartFacts = EmbeddingPartFacts | PredictionPartFacts | ShardPredictionFacts


def write_embedding_part(
    store: Store, name: PartName, data: pa.Table, rejects: pa.Table, facts: EmbeddingPartFacts
) -> ObjectInfo:
    """Write rejects, then data; the data PUT commits both.

    Args:
        data: N rows of `embeddings_schema`; may have no rows.
        rejects: rows of `rejects_schema`; where empty, a leftover rejects file of that name is deleted instead.
        facts: `rejects_sha256` and `embeddings_sha256` are filled in here.

    Returns:
        The data part, with the identity that it has now.
    """
    facts = dataclasses.replace(
        facts,
        rejects_sha256=_write_rejects(store, name, rejects),
        embeddings_sha256=embeddings_digest(data["embedding"]),
    )
    return store.write(f"{DATA_FOLDER}{name}", _parquet_bytes(data, facts))


def write_shard_predictions(
    store: Store,
    name: PartName,
    data: pa.Table,
    rejects: pa.Table,
    facts: ShardPredictionFacts,
    also: Iterable[str] = (),
) -> None:
    """Write rejects and copies for people, then data; the data PUT commits them all.

    Args:
        data: rows of `predictions_schema`; may have no rows.
        rejects: as of `write_embedding_part`.
        facts: `rejects_sha256` is filled in here.
        also: forms of the copies, as in `engine.copies.FORMS`.
    """
    facts = dataclasses.replace(facts, rejects_sha256=_write_rejects(store, name, rejects))
    for form in also:
        store.write(copy_path(name, form), written_as(data, form))
    store.write(f"{DATA_FOLDER}{name}", _parquet_bytes(data, facts))


def _write_rejects(store: Store, name: PartName, rejects: pa.Table) -> str | None:
    """Their digest; None where there are none, and no file."""
    if not rejects.num_rows:
        store.delete(f"{REJECTS_FOLDER}{name}")
        return None
    encoded = _parquet_bytes(rejects, None)
    store.write(f"{REJECTS_FOLDER}{name}", encoded)
    return hashlib.sha256(encoded).hexdigest()


def write_prediction_part(
    store: Store, name: PartName, data: pa.Table, facts: PredictionPartFacts, also: Iterable[str] = ()
) -> int:
    """Write copies for people, then data; the data PUT commits them all.

    Args:
        also: forms of the copies, as in `engine.copies.FORMS`.

    Returns:
        Bytes written.
    """
    size = 0
    for form in also:
        copy = written_as(data, form)
        store.write(copy_path(name, form), copy)
        size += len(copy)
    data_bytes = _parquet_bytes(data, facts)
    store.write(f"{DATA_FOLDER}{name}", data_bytes)
    return size + len(data_bytes)


def read_embedding_facts(store: Store, name: PartName) -> EmbeddingPartFacts:
    """Footer of one embedding part, by ranged reads of its end only.

    Raises:
        ObjectNotFound: no such part.
        TableDamaged: the file is not a part.
    """
    return EmbeddingPartFacts(**_footer(store, store.info(f"{DATA_FOLDER}{name}"), EmbeddingPartFacts))


def read_shard_prediction_facts(store: Store, name: PartName) -> ShardPredictionFacts:
    """Footer of one prediction part that was made straight from a shard; errors as `read_embedding_facts`."""
    return ShardPredictionFacts(**_footer(store, store.info(f"{DATA_FOLDER}{name}"), ShardPredictionFacts))


def read_shard_facts(store: Store, name: PartName) -> ShardPartFacts:
    """What the footer of one part says of its shard, in a table of either kind; errors as `read_embedding_facts`."""
    info = store.info(f"{DATA_FOLDER}{name}")
    wanted = [field.name for field in dataclasses.fields(ShardPartFacts)]
    found = _footer(store, info, EmbeddingPartFacts, ShardPredictionFacts)
    return ShardPartFacts(**{field: found[field] for field in wanted})


def read_prediction_facts(store: Store, info: ObjectInfo) -> PredictionPartFacts:
    """Footer of one prediction part, by ranged reads of its end only.

    Raises:
        ObjectNotFound, ObjectChanged: the part is gone, or was rewritten since it was listed.
        TableDamaged: the file is not a part.
    """
    return PredictionPartFacts(**_footer(store, info, PredictionPartFacts))


def _footer(store: Store, info: ObjectInfo, *kinds: type[PartFacts]) -> dict[str, Any]:
    """The fields of a footer of one of these kinds."""
    try:
        metadata = pq.read_metadata(object_file(store, info)).metadata or {}
        found: dict[str, Any] = json.loads(metadata[FOOTER_KEY])
        if not any(_required(kind) <= set(found) <= _known(kind) for kind in kinds):
            raise ValueError(f"a footer with the fields {', '.join(sorted(found))}")
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise TableDamaged(
            f"{store.uri}/{info.path}: not a part of such a table",
            found=repr(error),
            wanted=f"a footer with the fields {', '.join(sorted(_required(kinds[0])))}",
            way_out="delete the file and run the job that wrote it again",
        ) from None
    return found


def _known(kind: type[PartFacts]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _required(kind: type[PartFacts]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}


def embeddings_digest(embedding: pa.ChunkedArray) -> str:
    """sha-256 (hex) over the numbers of a fixed-size-list column, row by row, little-endian."""
    return hashlib.sha256(np.ascontiguousarray(embeddings_matrix(embedding)).data).hexdigest()


def embeddings_matrix(embedding: pa.ChunkedArray) -> np.ndarray:
    """The embedding column as an array (N, D) of its own dtype; no copy where the column is one chunk."""
    column = embedding.chunk(0) if embedding.num_chunks == 1 else embedding.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # a column without chunks stays chunked
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], type=column.type)
    matrix: np.ndarray = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
    return matrix


def list_parts(store: Store, folder: str = DATA_FOLDER) -> Iterator[tuple[PartName, ObjectInfo]]:
    """Parts in a folder of the table, sorted by name; files that are not parts are passed over."""
    for info in store.list(folder):
        name = parse_part_name(info.path)
        if name is not None and "/" not in info.path.removeprefix(folder):
            yield name, info


def part_names(store: Store, folder: str = DATA_FOLDER) -> Iterator[PartName]:
    """As `list_parts`, names only and in any order: for tables of millions of parts."""
    for path in store.names(folder):
        name = parse_part_name(path)
        if name is not None and "/" not in path.removeprefix(folder):
            yield name


def table_progress(store: Store) -> TableProgress:
    """What exists, from one listing of `data/`."""
    return TableProgress.of_paths(store.names(DATA_FOLDER), DATA_FOLDER)


# ---------------------------------------------------------------- reading a table


@dataclass(frozen=True)
class Table:
    """An embedding or prediction table, open for reading: one version per shard.

    Attributes:
        store: rooted at the table.
        record: `_table.json`.
        parts: name and object of each part that counts, sorted by name.
        incomplete_shards: shards whose end has not been written yet.
    """

    store: Store
    record: Record
    parts: tuple[tuple[PartName, ObjectInfo], ...]
    incomplete_shards: int

    def column_names(self) -> list[str]:
        """Columns of the table, from the footer of one part.

        Raises:
            TableDamaged: the table has no parts yet.
        """
        if not self.parts:
            raise self._empty()
        return list(pq.read_schema(object_file(self.store, self.parts[0][1])).names)

    def read(self, columns: Sequence[str]) -> pa.Table:
        """All rows of the named columns, in the order of the parts; held in memory at once."""
        tables = list(self.read_by_part(columns))
        if not tables:
            raise self._empty()
        return pa.concat_tables(tables)

    def read_by_part(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The same, part by part; twice as many as there are threads are in memory at most."""
        return self.map_parts(lambda part: part, columns)

    def map_parts(self, function: Callable[[pa.Table], ItemT], columns: Sequence[str]) -> Iterator[ItemT]:
        """What a function makes of the named columns of each part, in the order of the parts.

        Parts are read, and the function is called, in several threads at once; what it gives of twice as many parts as
        there are threads is in memory at most.
        """
        waiting: deque[Future[ItemT]] = deque()
        with ThreadPoolExecutor(READ_THREADS) as pool:
            try:
                for _, info in self.parts:
                    if len(waiting) == 2 * READ_THREADS:
                        yield waiting.popleft().result()
                    waiting.append(
                        pool.submit(lambda one: function(read_part(self.store, one, columns)), info)
                    )
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for left in waiting:
                    left.cancel()

    def _empty(self) -> TableDamaged:
        return TableDamaged(
            f"{self.store.uri}: the table has no parts yet", way_out="run extract on it to its end first"
        )


def rows_and_columns(store: Store, parts: Sequence[ObjectInfo]) -> tuple[int, list[str]]:
    """Rows of some parts in all, and the columns of the first, by ranged reads of their ends.

    Raises:
        ObjectNotFound, ObjectChanged: a part is gone, or was rewritten since it was listed.
        TableDamaged: a file is not Parquet.
    """

    def footer(info: ObjectInfo) -> pq.FileMetaData:
        try:
            return pq.read_metadata(object_file(store, info))
        except pa.ArrowInvalid as error:
            raise TableDamaged(f"{store.uri}/{info.path}: not a part of a table", found=str(error)) from None

    with ThreadPoolExecutor(READ_THREADS) as pool:
        footers = list(pool.map(footer, parts))
    names = list(footers[0].schema.to_arrow_schema().names) if footers else []
    return sum(one.num_rows for one in footers), names


def open_table(store: Store, kind: str = "embeddings") -> Table:
    """Open a table; where a shard stands in several versions, its complete one is read.

    Predictions of an embedding part that was rewritten stand beside those of the new one for a while: the ones that
    came last are read.

    Raises:
        ObjectNotFound: there is no table.
    """
    record = require_record(store, kind)
    listed = list(list_parts(store))
    progress = TableProgress(name for name, _ in listed)
    parts = parts_to_read(listed, progress)
    incomplete = sum(not versions[version_to_read(versions)].is_complete for versions in progress.values())
    return Table(store, record, parts, incomplete)


def require_apart(table: Table, place: str) -> None:
    """Who opens a table's folder takes every file there for a part of it.

    Args:
        place: URI or path of what is to be written.

    Raises:
        RecipeError: it lies in the table.
    """
    uri = table.store.uri
    if "://" in uri or "://" in place:
        lies_in = f"{place}/".startswith(f"{uri}/")
    else:  # through links, too
        lies_in = Path(place).resolve().is_relative_to(Path(uri).resolve())
    if lies_in:
        raise RecipeError(f"{place}: lies in the table that is to be read", way_out="name a place outside it")


def parts_to_read(
    listed: Iterable[tuple[PartName, ObjectInfo]], progress: TableProgress
) -> tuple[tuple[PartName, ObjectInfo], ...]:
    """Those of a listing that readers of the table get, sorted by name: one of each number of each shard."""
    chosen = {path16: version_to_read(versions) for path16, versions in progress.items()}
    latest: dict[tuple[str, int], tuple[PartName, ObjectInfo]] = {}
    for name, info in listed:
        place = name.path16, name.number
        if name.source8 == chosen[name.path16] and (
            place not in latest or _age_of(latest[place]) < _age_of((name, info))
        ):
            latest[place] = name, info
    return tuple(sorted(latest.values(), key=lambda part: part[1].path))


def open_any_table(store: Store) -> Table:
    """A table of either kind; its record says which.

    Raises:
        ObjectNotFound, TableDamaged, ContractMismatch: there is none that can be read.
    """
    try:
        return open_table(store)
    except ContractMismatch:
        return open_table(store, "predictions")


def _age_of(part: tuple[PartName, ObjectInfo]) -> tuple[bool, float, str]:
    """Of two parts with the same number the one to read has the greater one."""
    name, info = part
    return name.last, info.modified or 0.0, str(name)


def read_part(store: Store, info: ObjectInfo, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of one part: read as one object, or without the embeddings by their ranges, which are a twentieth of it.

    Raises:
        ObjectChanged: the part was rewritten since it was listed.
        TableDamaged: it is not Parquet, or lacks a column.
    """
    is_whole = columns is None or "embedding" in columns or info.size <= _READ_AT_ONCE_BYTES
    content = store.read(info.path, expected=info) if is_whole else None
    try:
        source = object_file(store, info) if content is None else pa.BufferReader(content)
        file = pq.ParquetFile(source, pre_buffer=False)  # as `_read_here` says; there is nothing to wait for
        absent = sorted(set(columns or ()) - set(file.schema_arrow.names))
        if absent:
            raise TableDamaged(
                f"{store.uri}/{info.path}: has no column {', '.join(absent)}",
                found=", ".join(file.schema_arrow.names),
                way_out="check the names of columns in the recipe",
            )
        if content is not None and (columns is None or "embedding" in columns):
            return _with_embeddings(content, file, columns)
        return _read_here(file, columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise TableDamaged(
            f"{store.uri}/{info.path}: cannot be read as a part",
            found=str(error),
            way_out="delete the file and run the job that wrote it again",
        ) from None


def _with_embeddings(content: bytes, file: pq.ParquetFile, columns: Sequence[str] | None) -> pa.Table:
    """What `file.read` gives, in a third of its time: the embeddings are copied from their pages."""
    wanted = [name for name in file.schema_arrow.names if columns is None or name in columns]
    place = file.schema_arrow.names.index("embedding") if "embedding" in wanted else -1
    lists = read_plain_lists(content, file.schema_arrow, place) if place >= 0 else None
    if lists is None:
        return _read_here(file, columns)
    # The rest takes 0.16 ms, less than handing it to a pool of threads that others wait for.
    rest = file.read(columns=[name for name in wanted if name != "embedding"], use_threads=False)
    return rest.add_column(wanted.index("embedding"), file.schema_arrow.field(place), lists)


def _read_here(file: pq.ParquetFile, columns: Sequence[str] | None) -> pa.Table:
    """Columns of a part, in this thread.

    Arrow's own threads may let go of the file, a Python object, after they have answered. Where the process has come to
    its end by then, it is aborted ("terminate called without an active exception", one in forty searches with pyarrow
    26 and Python 3.11): they wait for an interpreter that is gone. Parts are read by several threads as it is.
    """
    return file.read(columns=list(columns) if columns is not None else None, use_threads=False)


def version_to_read(versions: Mapping[str, Progress]) -> str:
    """A complete version before a half-done one, then the one with more parts, then by name.

    Two complete versions stand side by side only until a run's sweep; each of them is whole.
    """
    return max(
        versions, key=lambda version: (versions[version].is_complete, len(versions[version].numbers), version)
    )


# ---------------------------------------------------------------- rejects


def count_rejects(store: Store, progress: TableProgress) -> tuple[Counter[str], Counter[PartName]]:
    """Rejects of the whole table, of one version per shard: by reason, and by part.

    Reads rejects files only, and of these only such that have their data part.

    Args:
        progress: of the table, from `table_progress`.
    """
    reasons: Counter[str] = Counter()
    by_part: Counter[PartName] = Counter()
    names = [name for name in part_names(store, REJECTS_FOLDER) if is_read(progress, name)]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for name, errors in zip(names, pool.map(lambda name: _errors_of(store, name), names), strict=True):
            reasons.update(errors)
            by_part[name] = len(errors)
    return reasons, by_part


def is_read(progress: TableProgress, name: PartName) -> bool:
    """Whether a part exists, and is of the version of its shard that readers of the table get."""
    versions = progress.get(name.path16, {})
    if name.source8 not in versions or version_to_read(versions) != name.source8:
        return False
    return versions[name.source8].has(name)


def _errors_of(store: Store, name: PartName) -> list[str]:
    return [reject["error"] for reject in read_rejects(store, name, ("error",))]


def read_rejects(store: Store, name: PartName, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Columns of a part's rejects; none where it has no rejects, or another run has just swept them away.

    Raises:
        TableDamaged: it is not Parquet, or lacks a column.
    """
    try:
        encoded = store.read(f"{REJECTS_FOLDER}{name}")
    except ObjectNotFound:
        return []
    try:
        rejects = pq.read_table(io.BytesIO(encoded), columns=list(columns))
        found: list[dict[str, Any]] = rejects.select(list(columns)).to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise TableDamaged(
            f"{store.uri}/{REJECTS_FOLDER}{name}: not a rejects file",
            found=" ".join(str(error).split())[:200],
            way_out="delete it and its namesake in data/, and run extract again",
        ) from None
    return found


def parts_with_rejects(store: Store) -> list[PartName]:
    """Parts, by name, beside which a rejects file stands; perhaps one that was never committed."""
    return list(part_names(store, REJECTS_FOLDER))


# ---------------------------------------------------------------- the sweep


def sweep(store: Store, identity8_now: Callable[[str], str | None], may_have_copies: bool = True) -> int:
    """Delete parts of superseded versions: only where the version the shard has *now* is complete.

    Args:
        store: rooted at the table.
        identity8_now: asks the source for a shard's version (source8) by its path; None where the shard is gone.
        may_have_copies: predictions have; an embedding table is spared that listing.

    Returns:
        Number of data parts deleted.
    """
    progress = table_progress(store)
    # Listed before the source is asked: what another run commits after that is not judged.
    candidates = _parts_of_shards(store, frozenset(progress.in_several_versions()))
    superseded: set[tuple[str, str]] = set()
    for path16, path in _paths_of(store, candidates).items():
        versions, current = progress[path16], identity8_now(path)
        if current in versions and versions[current].is_complete:
            superseded.update((path16, version) for version in versions if version != current)
    doomed = [name for name in candidates if (name.path16, name.source8) in superseded]
    _delete_parts(store, doomed)
    _sweep_orphaned_rejects(store, identity8_now)
    if may_have_copies:
        _sweep_orphaned_copies(store, identity8_now)
    return len(doomed)


def _delete_parts(store: Store, doomed: Sequence[PartName]) -> None:
    """Delete parts with all that belongs to them; data first: rejects and copies without it do not count."""
    copies: dict[PartName, list[str]] = {}
    for path, name in _copies(store) if doomed else ():
        copies.setdefault(name, []).append(path)
    for name in doomed:
        store.delete(f"{DATA_FOLDER}{name}")
        store.delete(f"{REJECTS_FOLDER}{name}")
        for path in copies.get(name, ()):
            store.delete(path)


def _sweep_orphaned_rejects(store: Store, identity8_now: Callable[[str], str | None]) -> None:
    """Delete rejects files of old versions whose data part a killed sweep has deleted, or a killed run never wrote."""
    rejects = list(part_names(store, REJECTS_FOLDER))
    if not rejects:
        return
    progress = table_progress(store)
    for name in rejects:
        done = progress.get(name.path16, {}).get(name.source8)
        if done is None or not done.has(name):
            path = _path_in_rejects(store, name)
            current = identity8_now(path) if path is not None else None
            if current is not None and current != name.source8:
                store.delete(f"{REJECTS_FOLDER}{name}")


def _sweep_orphaned_copies(store: Store, identity8_now: Callable[[str], str | None]) -> None:
    """Delete copies of old versions without their data part, likewise; other versions say which shard it is."""
    copies = list(_copies(store))
    if not copies:
        return
    progress = table_progress(store)
    orphaned = [
        (path, name)
        for path, name in copies
        if not progress.get(name.path16, {}).get(name.source8, NOTHING).has(name)
    ]
    paths = shard_paths(store, frozenset(name.path16 for _, name in orphaned))
    for path, name in orphaned:
        current = identity8_now(paths[name.path16]) if name.path16 in paths else None
        if current is not None and current != name.source8:
            store.delete(path)


def _path_in_rejects(store: Store, name: PartName) -> str | None:
    """The shard that a rejects file belongs to; None where the file is gone, or nobody's."""
    try:
        encoded = store.read(f"{REJECTS_FOLDER}{name}")
        paths = pq.read_table(io.BytesIO(encoded), columns=["shard"])["shard"]
    except (ObjectNotFound, pa.ArrowException, OSError, KeyError):  # verify names it
        return None
    path: str | None = paths[0].as_py() if len(paths) else None
    return path if path is not None and path16_of(path) == name.path16 else None


def shard_paths(store: Store, wanted: Collection[str]) -> dict[str, str]:
    """Relative paths of shards that are known by path16, from the footer of one part of each."""
    return _paths_of(store, _parts_of_shards(store, wanted))


def _parts_of_shards(store: Store, wanted: Collection[str]) -> list[PartName]:
    return [name for name in part_names(store) if name.path16 in wanted] if wanted else []


def _paths_of(store: Store, parts: Iterable[PartName]) -> dict[str, str]:
    """path16 -> path, of the shards that have a part whose footer says it."""
    by_shard: dict[str, list[PartName]] = {}
    for name in parts:
        by_shard.setdefault(name.path16, []).append(name)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        paths = pool.map(lambda names: _path_in_footers(store, names), by_shard.values())
        return {path16: path for path16, path in zip(by_shard, paths, strict=True) if path is not None}


def _path_in_footers(store: Store, names: Iterable[PartName]) -> str | None:
    """From the first part that is there and whole: another run may sweep them away, and `verify` names damage."""
    for name in names:
        with contextlib.suppress(ObjectNotFound, ObjectChanged, TableDamaged):
            return read_shard_facts(store, name).shard
    return None


def prune(store: Store, removed: Collection[str], is_gone: Callable[[str], bool]) -> tuple[int, list[str]]:
    """Delete the parts of shards that the source no longer has; each is asked for once more.

    Args:
        store: rooted at the table.
        removed: path16 of shards that a listing of the source did not have.
        is_gone: asks the source now whether a path is gone; another run may have seen it come.

    Returns:
        Number of data parts deleted, and the paths of shards that are still there and so were kept.
    """
    parts = _parts_of_shards(store, removed)
    paths = _paths_of(store, parts)
    gone = {path16 for path16, path in paths.items() if is_gone(path)}
    doomed = [name for name in parts if name.path16 in gone]
    _delete_parts(store, doomed)
    return len(doomed), [path for path16, path in paths.items() if path16 not in gone]


def prune_predictions(
    store: Store, wanted_now: Callable[[], set[PartName]], allowed: Callable[[int], int]
) -> tuple[int, int]:
    """Delete the prediction parts of shards of which the embedding table has no part any more.

    Args:
        wanted_now: as of `sweep_predictions`.
        allowed: of a table of so many shards, how many may go; beyond that nothing does.

    Returns:
        Number of data parts deleted, and of shards that should have gone but were too many.
    """
    listed = [name for name, _ in list_parts(store)]  # before asking: what comes after this is not judged
    embedded = {name.path16 for name in wanted_now()}
    shards = {name.path16 for name in listed}
    gone = shards - embedded
    if len(gone) > allowed(len(shards)):
        return 0, len(gone)
    doomed = [name for name in listed if name.path16 in gone]
    for name in doomed:
        store.delete(f"{DATA_FOLDER}{name}")  # data first: copies without their data part do not count
    for path, name in list(_copies(store)):
        if name.path16 in gone:
            store.delete(path)
    return len(doomed), 0


def sweep_predictions(store: Store, wanted_now: Callable[[], set[PartName]]) -> int:
    """Delete prediction parts whose embedding part was rewritten, once its successor stands beside them.

    Args:
        wanted_now: lists the embedding table again and names the prediction parts it calls for now: a run that began
            before another must not delete what the other has made since.
    """
    listed = [name for name, _ in list_parts(store)]  # before asking: what comes after this is not judged
    copies = list(_copies(store))
    wanted = wanted_now()
    present = set(listed)
    scored_now = {(name.path16, name.number) for name in wanted if name in present}
    shards_whole = {name.path16 for name in wanted} - {name.path16 for name in wanted if name not in present}
    doomed = [
        name
        for name in listed
        if name not in wanted and ((name.path16, name.number) in scored_now or name.path16 in shards_whole)
    ]
    for name in doomed:
        store.delete(f"{DATA_FOLDER}{name}")  # data first: copies without their data part do not count
    kept = (
        present.difference(doomed) | wanted
    )  # a run that is going on has copies whose data is still to come
    for path, name in copies:
        if name not in kept:
            store.delete(path)
    return len(doomed)


def _copies(store: Store) -> Iterator[tuple[str, PartName]]:
    """Paths of the copies for people, and the parts they belong to."""
    for path in store.names(COPIES_FOLDER):
        parsed = parse_copy_path(path)
        if parsed is not None:
            yield path, parsed[0]


# ---------------------------------------------------------------- Parquet


def _parquet_bytes(table: pa.Table, facts: PartFacts | None) -> bytes:
    """One row group; embeddings are left uncompressed (zstd saves 8 % of float32 noise and costs every reader)."""
    if facts is not None:
        footer = json.dumps(dataclasses.asdict(facts), sort_keys=True).encode()
        table = table.replace_schema_metadata({FOOTER_KEY: footer})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=max(1, table.num_rows), **parquet_options(table.column_names))
    return sink.getvalue()


def parquet_options(column_names: Sequence[str]) -> dict[str, Any]:
    """How our columns are written, for pyarrow's writers: compression, dictionaries, statistics."""
    plain = [name for name in column_names if name != "embedding"]
    nested = {"embedding": "embedding.list.element", "top_labels": "top_labels.list.element"}
    nested["top_confidences"] = "top_confidences.list.element"
    leaves = {name: nested.get(name, name) for name in column_names}
    return {
        "compression": {leaves[name]: "ZSTD" if name in plain else "NONE" for name in column_names},
        "use_dictionary": [
            leaves[name] for name in plain if name not in ("sha256", "bytes", "top_confidences")
        ],
        "write_statistics": [leaves[name] for name in plain if name in ("key", "shard", "index", "label")],
    }
