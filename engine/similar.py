"""The rows of an embedding table that are nearest to given vectors: exact, every part is read once.

Memory does not grow with the table. Not for: what the vectors are made from (`engine.query_images`), or an index that
answers many questions a second.

Shape letters: B queries, N rows of a part, D embedding width, k nearest.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.errors import RecipeError
from engine.parts import path16_of
from engine.representatives import of_unit_length
from engine.schema import SAMPLE_FIELDS
from engine.tables import Table, embeddings_matrix, read_part

ROWS_NAMED = 20  # of several with one key, in a message
# Threads that read parts multiply too. A BLAS of several threads makes them wait for each other: with one query 16 ms
# of processor time a part of 1,024 x 1280, and 3 ms without it (two cores at a load of 40, NumPy 2.4, 2026-11-23).
FEW_QUERIES = 16
_WITH_LABEL = ("key", "shard", "index", "label")

SIMILAR_SCHEMA = pa.schema(
    [
        pa.field("query", pa.int64(), nullable=False),  # place of the vector among those asked for
        pa.field("rank", pa.int64(), nullable=False),  # 1: the nearest
        pa.field("cosine", pa.float32(), nullable=False),
        *SAMPLE_FIELDS,
        pa.field("label", pa.string()),
    ]
)


def similar(
    table: Table,
    queries_BD: NDArray[np.floating[Any]],
    k: int = 20,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> pa.Table:
    """The k rows with the largest cosine to each query, the largest first; of equal ones those that come first.

    Every row is compared, in float32, whatever the lengths of embeddings and queries; nothing is approximated.

    Args:
        table: of embeddings, as `engine.tables.open_table` gives it.
        queries_BD: vectors of the same network, shape (B, D), of any length but 0.
        k: rows wanted for each; there may be fewer in the table.
        report: told parts searched, parts in all.

    Returns:
        Rows of `SIMILAR_SCHEMA`, query by query.

    Raises:
        ValueError: the queries have another shape, or one has no direction.
        ObjectChanged, TableDamaged: a part was rewritten meanwhile, or cannot be read.
    """
    width = int(table.record["width"])
    if queries_BD.ndim != 2 or queries_BD.shape[1] != width or k < 1:
        raise ValueError(f"queries of shape {queries_BD.shape} and k {k}, wanted (B, {width}) and at least 1")
    if not (np.isfinite(queries_BD).all() and queries_BD.any(axis=1).all()):
        raise ValueError("a query is all zeros or not finite: nothing is near to it")
    units_BD = of_unit_length(queries_BD)
    best = _Nearest(len(queries_BD), k)
    found = table.map_parts(lambda part: _nearest_of_part(part, units_BD, k), ["embedding"])
    for done, (cosines_Bk, rows_Bk) in enumerate(found, 1):
        best.offer(cosines_Bk, done - 1, rows_Bk)
        report(done, len(table.parts))
    return best.rows(table)


def similar_to_row(
    table: Table,
    key: str | None = None,
    shard: str | None = None,
    index: int | None = None,
    k: int = 20,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], pa.Table]:
    """The same for a row of the table, which is left out of the answer.

    Args:
        key: of the row; where several have it, `shard` or `index` says which.
        shard: relative path of its shard, and
        index: position in it: together they name a row even without a key.

    Returns:
        The row's key, shard, index and label, and rows of `SIMILAR_SCHEMA`.

    Raises:
        RecipeError: there is no such row, or there are several, which are named.
    """
    number, row = _the_row(table, key, shard, index)
    info = table.parts[number][1]
    asked = read_part(table.store, info, [*_WITH_LABEL, "embedding"]).slice(row, 1)
    (facts,) = asked.select(_WITH_LABEL).to_pylist()
    near = similar(table, embeddings_matrix(asked["embedding"]), k + 1, report)
    itself = pc.and_(pc.equal(near["shard"], facts["shard"]), pc.equal(near["index"], facts["index"]))
    others = near.filter(pc.invert(itself)).slice(0, k)
    place = others.schema.get_field_index("rank")
    ranks = pa.array(np.arange(1, len(others) + 1))
    return facts, others.set_column(place, others.schema.field(place), ranks)


# ---------------------------------------------------------------- the search


def _nearest_of_part(
    part: pa.Table, units_BD: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Cosines (B, <= k) and numbers of the nearest rows of one part, nearest first."""
    rows_ND = embeddings_matrix(part["embedding"]).astype(np.float32, copy=False)
    lengths_N = np.sqrt(np.einsum("nd,nd->n", rows_ND, rows_ND))
    lengths_N[lengths_N == 0] = 1
    if len(units_BD) <= FEW_QUERIES:
        products_BN = np.stack([np.einsum("nd,d->n", rows_ND, unit_D) for unit_D in units_BD])
    else:
        products_BN = units_BD @ rows_ND.T
    cosines_BN = products_BN / lengths_N
    rows_Bk = np.argsort(-cosines_BN, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosines_BN, rows_Bk, axis=1), rows_Bk


class _Nearest:
    """The k nearest rows to each query among the parts until now."""

    def __init__(self, num_queries: int, k: int) -> None:
        self._k = k
        self._cosines_Bk = np.empty((num_queries, 0), np.float32)
        self._parts_Bk = np.empty((num_queries, 0), np.int64)
        self._rows_Bk = np.empty((num_queries, 0), np.int64)

    def offer(self, cosines_Bk: NDArray[np.float32], part: int, rows_Bk: NDArray[np.int64]) -> None:
        """Those of a part behind all parts until now: of equal ones the earlier stay before."""
        cosines = np.concatenate([self._cosines_Bk, cosines_Bk], axis=1)
        parts = np.concatenate([self._parts_Bk, np.full_like(rows_Bk, part)], axis=1)
        rows = np.concatenate([self._rows_Bk, rows_Bk], axis=1)
        order = np.argsort(-cosines, axis=1, kind="stable")[:, : self._k]
        self._cosines_Bk = np.take_along_axis(cosines, order, axis=1)
        self._parts_Bk = np.take_along_axis(parts, order, axis=1)
        self._rows_Bk = np.take_along_axis(rows, order, axis=1)

    def rows(self, table: Table) -> pa.Table:
        """Of `SIMILAR_SCHEMA`; of each part that has some of them the columns are read once."""
        num_queries, count = self._rows_Bk.shape
        places: dict[int, list[int]] = defaultdict(list)
        for place, part in enumerate(self._parts_Bk.reshape(-1).tolist()):
            places[part].append(place)
        wanted = sorted(places)
        some = dataclasses.replace(table, parts=tuple(table.parts[part] for part in wanted))
        tables, order = [SIMILAR_SCHEMA.empty_table().select(_WITH_LABEL)], []
        for part, columns in zip(wanted, some.map_parts(lambda one: one, _WITH_LABEL), strict=True):
            tables.append(columns.select(_WITH_LABEL).take(self._rows_Bk.reshape(-1)[places[part]]))
            order += places[part]
        named = pa.concat_tables(tables).take(np.argsort(np.array(order, np.int64)))
        cosines = np.clip(self._cosines_Bk.reshape(-1), -1.0, 1.0)
        columns = {
            "query": np.repeat(np.arange(num_queries), count),
            "rank": np.tile(np.arange(1, count + 1), num_queries),
            "cosine": cosines,
            **{name: named[name] for name in _WITH_LABEL},
        }
        return pa.table(columns, schema=SIMILAR_SCHEMA)


# ---------------------------------------------------------------- a row by its name


def _the_row(table: Table, key: str | None, shard: str | None, index: int | None) -> tuple[int, int]:
    """The one row with this name: number of its part, and its number there."""
    asked = {
        name: value for name, value in (("key", key), ("shard", shard), ("index", index)) if value is not None
    }
    if key is None and (shard is None or index is None):
        raise RecipeError(
            "a row is named by its key, or by its shard and index",
            found=", ".join(asked) or "none of them",
        )
    said = ", ".join(f"{name} {value!r}" for name, value in asked.items())
    if any(_is_of_no_row(value) for value in asked.values()):
        raise _no_row(table, said)
    numbers = [
        number
        for number, (name, _) in enumerate(table.parts)
        if shard is None or name.path16 == path16_of(shard)
    ]
    some = dataclasses.replace(table, parts=tuple(table.parts[number] for number in numbers))
    found: list[tuple[int, int, dict[str, Any]]] = []
    several = 0
    for number, rows in zip(
        numbers, some.map_parts(lambda part: _rows_named(part, asked), ["key", "shard", "index"]), strict=True
    ):
        several += len(rows)
        found += [(number, row, facts) for row, facts in rows[: ROWS_NAMED - len(found)]]
    if not found:
        raise _no_row(table, said)
    if several > 1:
        shown = "; ".join(f"--shard {facts['shard']} --index {facts['index']}" for _, _, facts in found)
        more = f"; and {several - ROWS_NAMED:,} more" if several > ROWS_NAMED else ""
        raise RecipeError(
            f"{table.store.uri}: {several:,} rows have {said}",
            found=shown + more,
            wanted="one row",
            way_out="say which one of them",
        )
    ((number, row, _),) = found
    return number, row


def _is_of_no_row(value: str | int) -> bool:
    """Whether a column could not hold it: text is UTF-8 there, and a number has 64 bits."""
    if isinstance(value, int):
        return not 0 <= value < 1 << 63
    try:
        value.encode()
    except UnicodeEncodeError:
        return True
    return False


def _no_row(table: Table, said: str) -> RecipeError:
    return RecipeError(
        f"{table.store.uri}: no row has {said}",
        way_out="check the spelling; an image that was rejected has no row",
    )


def _rows_named(part: pa.Table, asked: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Numbers of the rows of a part that have all these values, with their key, shard and index."""
    is_it = np.ones(len(part), np.bool_)
    for name, value in asked.items():
        is_it &= pc.equal(part[name], value).to_numpy()
    rows = np.flatnonzero(is_it)
    return list(zip(rows.tolist(), part.take(rows).to_pylist(), strict=True))
