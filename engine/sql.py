"""Tables as views of an in-memory DuckDB, and one SELECT over them. The door to DuckDB, which is an extra of its own.

DuckDB reads the very parts that `engine.tables` chose, one version of each shard, through our own stores, so that keys,
endpoints and retries are those of every other command. Filters and columns are pushed down into the Parquet files. Not
for: writing; statements that change anything are refused.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, final

import pyarrow as pa

from engine.errors import EngineError, RecipeError
from engine.schema import embeddings_schema, predictions_schema, rejects_schema
from engine.shards.kinds import source_of_contract
from engine.storage import ObjectInfo, StorageConfig, open_store
from engine.storage.file_system import ObjectFileSystem
from engine.tables import REJECTS_FOLDER, Record, Table, is_of_images, list_parts, open_any_table, open_table

if TYPE_CHECKING:
    import duckdb

THREADS = (
    16  # at least: they wait for stores most of their time; 8 read twice as fast from one as 2 on two cores
)
BATCH_ROWS = 8_192  # 42 MB of embeddings at width 1,280
_NAMED = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.+)", re.DOTALL)
_EXPLAIN = re.compile(r"\s*explain\s+(?:analyze\s+)?", re.IGNORECASE)
_STORAGE = StorageConfig()
_SETTINGS = {
    "autoinstall_known_extensions": False,  # nothing is downloaded on the way
    "autoload_known_extensions": False,
    "python_enable_replacements": False,  # a name that is no view is an error, not a variable of ours
}


def open_views(tables: Sequence[str], storage: StorageConfig = _STORAGE) -> TableViews:
    """Open tables as views of one in-memory DuckDB.

    An embedding table is the view `embeddings`, a prediction table `predictions`; `rejects` has those of an embedding
    table, or of predictions that were made straight from images. Predictions bring the embeddings that they were made
    of, where these can be opened.

    Args:
        tables: URIs; NAME=URI names the views NAME and NAME_rejects instead, for several tables of one kind.
        storage: how they are reached.

    Raises:
        RecipeError: DuckDB is not installed, no table is given, or two would be one view.
        ObjectNotFound, TableDamaged, ContractMismatch: a table cannot be opened.
    """
    if not tables:
        raise RecipeError("no table to look at", way_out="name one: --table URI")
    named = [_name_and_uri(table) for table in tables]
    views = TableViews()
    try:
        opened = [(name, open_any_table(open_store(uri, storage))) for name, uri in named]
        for name, table in opened:
            views.add(table, name)
        for _, table in opened:
            views.add_embeddings_of(table)
    except BaseException:
        views.close()
        raise
    return views


@dataclass(frozen=True)
class View:
    """What a view shows.

    Attributes:
        uri: of the table.
        parts: that are read.
        columns: their names.
    """

    uri: str
    parts: int
    columns: tuple[str, ...]


@final
class TableViews:
    """An in-memory DuckDB with tables as views; close it, or use it in a `with`.

    Attributes:
        connection: DuckDB's own, for notebooks; `select` says in our words what goes wrong.
        views: by name.
        notes: sentences for people: what could not be shown, and what is not whole.
    """

    def __init__(self) -> None:
        try:
            import duckdb
        except ModuleNotFoundError:
            raise RecipeError(
                "SQL needs DuckDB, which is not installed",
                way_out="pip install 'image-feature-engine[analytics]'",
            ) from None
        self._files = ObjectFileSystem()
        self._spill = tempfile.mkdtemp(prefix="engine-sql-")  # else DuckDB makes one in the present folder
        self.connection: duckdb.DuckDBPyConnection = duckdb.connect(
            config={**_SETTINGS, "threads": max(THREADS, os.cpu_count() or 1), "temp_directory": self._spill}
        )
        self.connection.register_filesystem(self._files)
        self.views: dict[str, View] = {}
        self.notes: list[str] = []
        self._answers: weakref.WeakSet[pa.RecordBatchReader] = weakref.WeakSet()

    def __enter__(self) -> TableViews:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def bytes_read(self) -> int:
        """From stores until now."""
        return self._files.bytes_read

    def add(self, table: Table, name: str | None = None) -> None:
        """Show a table, and its rejects where its parts were made from shards.

        Args:
            name: of the view; None: the table's kind.

        Raises:
            RecipeError: there is such a view.
        """
        kind = table.record["kind"]
        infos = [info for _, info in table.parts]
        self._add_view(name or kind, table, infos, _schema_of(table.record))
        if kind == "embeddings" or is_of_images(table.record):
            read = {part for part, _ in table.parts}
            rejects = [info for part, info in list_parts(table.store, REJECTS_FOLDER) if part in read]
            keeps_bytes = bool(table.record["contract"].get("limits.keep_reject_bytes"))
            view = f"{name}_rejects" if name else "rejects"
            if view in self.views:
                self.notes.append(f"`rejects` are those of {self.views[view].uri}, without {table.store.uri}")
            else:
                self._add_view(view, table, rejects, rejects_schema(keeps_bytes))
        if table.incomplete_shards:
            self.notes.append(
                f"{table.store.uri}: {table.incomplete_shards:,} shards are not done to their end"
            )

    def add_embeddings_of(self, table: Table) -> None:
        """Show the embeddings that predictions were made of, unless there is such a view; a note where that fails."""
        if table.record["kind"] != "predictions" or is_of_images(table.record) or "embeddings" in self.views:
            return
        try:
            self.add(open_table(open_store(table.record["source_uri"], table.store.config)))
        except (EngineError, KeyError) as error:
            said = error.thing if isinstance(error, EngineError) else f"the record has no {error}"
            self.notes.append(f"without `embeddings` of {table.store.uri}: {said}")

    def select(self, sql: str) -> pa.RecordBatchReader:
        """Run one SELECT (or DESCRIBE, SUMMARIZE, EXPLAIN of one); its rows come as they are read.

        Raises:
            RecipeError: it is another statement, or several; two columns have one name; or DuckDB cannot run it.
            StorageError: a part cannot be read, also while rows are taken.
        """
        import duckdb

        self._files.failure = None
        try:
            _require_select(sql)
            relation = self.connection.sql(sql)
            _require_names(relation.columns)
            found = relation.to_arrow_reader(BATCH_ROWS)
            self._answers.add(found)
            return pa.RecordBatchReader.from_batches(found.schema, self._batches(found))
        except duckdb.Error as error:
            raise self._explained(error) from None

    def close(self) -> None:
        """Let go of DuckDB and its temporary files; an answer that is not read to its end ends here."""
        for answer in list(self._answers):
            answer.close()  # DuckDB 2.0 ends the process if its connection is closed under an answer
        if self.connection.filesystem_is_registered(self._files.protocol):
            self.connection.unregister_filesystem(self._files.protocol)
        self.connection.close()
        shutil.rmtree(self._spill, ignore_errors=True)

    def _add_view(self, name: str, table: Table, infos: Sequence[ObjectInfo], schema: pa.Schema) -> None:
        taken = {there.lower(): view.uri for there, view in self.views.items()}  # as DuckDB compares names
        if name.lower() in taken:
            raise RecipeError(
                f"two tables would be the view {name}",
                found=f"{taken[name.lower()]} and {table.store.uri}",
                way_out="name them: --table old=URI --table new=URI",
            )
        quoted = f'"{name}"'
        if infos:
            self._files.add_folder(name, table.store, infos)
            columns = _array_columns(table.record) if infos[0].path.startswith("data/") else ""
            source = f"read_parquet('{self._files.protocol}://{name}/*.parquet', hive_partitioning = false)"
            self._run(f"CREATE VIEW {quoted} AS SELECT *{columns} FROM {source}")
        else:
            self.connection.register(name, schema.empty_table())
        described = self._run(f"DESCRIBE {quoted}")
        self.views[name] = View(table.store.uri, len(infos), tuple(row[0] for row in described))

    def _run(self, sql: str) -> list[Any]:
        import duckdb

        try:
            return self.connection.execute(sql).fetchall()
        except duckdb.Error as error:
            raise self._explained(error) from None

    def _batches(self, found: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
        try:
            yield from found
        except (pa.ArrowException, OSError) as error:  # how an Arrow stream hands on what DuckDB met
            raise self._explained(error) from None

    def _explained(self, error: BaseException) -> EngineError:
        """Our own error where a store's was the cause; else what DuckDB says."""
        if self._files.failure is not None:
            return self._files.failure
        there = ", ".join(f"{name} ({', '.join(view.columns)})" for name, view in self.views.items())
        return RecipeError(
            "DuckDB cannot run that", found=str(error).strip(), wanted=f"a SELECT over {there}"
        )


def _name_and_uri(table: str) -> tuple[str | None, str]:
    named = _NAMED.fullmatch(table)
    return (named[1], named[2]) if named else (None, table)


def _require_select(sql: str) -> None:
    """Refuse statements that could change anything, on a disk or in a store.

    Raises:
        RecipeError: it is not one SELECT.
        duckdb.Error: it is no SQL.
    """
    import duckdb

    statements = duckdb.extract_statements(sql)
    kinds = [statement.type for statement in statements]
    if kinds == [duckdb.StatementType.EXPLAIN]:  # EXPLAIN ANALYZE runs what it explains
        text = statements[0].query
        explain = _EXPLAIN.match(text)
        kinds = [one.type for one in duckdb.extract_statements(text[explain.end() :])] if explain else kinds
    if kinds != [duckdb.StatementType.SELECT]:
        raise RecipeError(
            "tables are only read here",
            found=", ".join(kind.name for kind in kinds) or "no statement",
            wanted="one SELECT, DESCRIBE or SUMMARIZE, or EXPLAIN of one; a PIVOT with its values named: ON x IN (...)",
        )


def _require_names(names: Sequence[str]) -> None:
    """Two columns of one name are one in JSON, and a Parquet file that cannot be read by name."""
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise RecipeError(
            "two columns of the answer have one name",
            found=", ".join(twice),
            way_out="name them: SELECT p.label AS predicted, e.label AS given",
        )


def _array_columns(record: Record) -> str:
    """Lists of Parquet have no length; with it DuckDB has array_cosine_similarity and its like."""
    if record["kind"] != "embeddings":
        return ""
    return f" REPLACE (embedding::FLOAT[{int(record['width'])}] AS embedding)"


def _schema_of(record: Record) -> pa.Schema:
    """The columns of a table that has no parts yet, as far as its record tells: predictions of several labels look
    like those of one."""
    contract = record["contract"]
    if record["kind"] == "predictions":
        return predictions_schema(int(contract.get("top_k", 1)))
    source = source_of_contract(contract)
    metadata = source.metadata_columns() if source else ()
    return embeddings_schema(int(record["width"]), contract.get("output.dtype", "float32"), metadata)
