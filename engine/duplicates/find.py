"""Groups of duplicates in an embedding table: by the digests of their bytes, then by the cosines of their embeddings.

One pass over the parts puts embeddings of unit length into a temporary file; digests, sizes and groups are in memory,
about 130 bytes a row. Up to EXACT_ROWS images every one is compared with every representative before it, and time
grows with their square. Beyond that it is compared within cells (`engine.duplicates.cells`), and time grows with their
number; what share of the near duplicates is found that way is measured on a sample in the same run.

Shape letters: N rows of the table, B rows of a part or block, U images of different bytes, D embedding width.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from engine.duplicates.cells import CELLS_OF_A_ROW, cells_of, num_cells
from engine.duplicates.unit_rows import UnitRows
from engine.errors import AlreadyExists, RecipeError
from engine.representatives import NearPairs, Representatives, of_unit_length
from engine.schema import SAMPLE_FIELDS
from engine.storage import StorageConfig, open_folder_of
from engine.tables import Table, embeddings_matrix

# What it finds with real weights is in `tests/benchmarks/duplicates.py`.
THRESHOLD = 0.95
EXACT_ROWS = 65_536
BLOCK_ROWS = 1024
SAMPLED_ROWS = 512  # of which the recall is measured
SEED = 0

REPRESENTATIVE, EXACT, NEAR = "representative", "exact", "near"
_COLUMNS = ("key", "shard", "index", "label", "image_width", "image_height")

DUPLICATES_SCHEMA = pa.schema(
    [
        pa.field("group", pa.int64(), nullable=False),  # from 0, the largest first
        pa.field("kind", pa.string(), nullable=False),  # representative; of the same bytes as it: exact; near
        pa.field("cosine", pa.float32(), nullable=False),  # to the representative
        *SAMPLE_FIELDS,
        pa.field("label", pa.string()),
        pa.field("image_width", pa.int32(), nullable=False),
        pa.field("image_height", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Duplicates:
    """What was found.

    Attributes:
        rows: of `DUPLICATES_SCHEMA`: the groups of two and more, the largest first; in each its representative, then
            the others by falling cosine.
        threshold: cosine above which two images are near duplicates.
        rows_read: of the table.
        images: of different bytes.
        groups: in `rows`.
        exact: rows of the same bytes as their representative.
        near: rows near to it.
        label_conflicts: groups whose rows have different labels.
        cells: in which images were compared; 1: every image with every representative, nothing is approximated.
        recall: of images that are near to a representative, the share that was found: 1.0 with one cell, else of a
            sample; None where the sample has none.
    """

    rows: pa.Table
    threshold: float
    rows_read: int
    images: int
    groups: int
    exact: int
    near: int
    label_conflicts: int
    cells: int
    recall: float | None


def find_duplicates(
    table: Table,
    threshold: float = THRESHOLD,
    scratch: Path | None = None,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Duplicates:
    """Group the rows of a table that show the same image.

    Images are taken by the number of their pixels, the largest first, and in the order of the table. One that is nearer
    than the threshold to a representative before it belongs to the nearest of these; any other becomes a
    representative. So every row of a group is near to the group's representative: groups do not chain, as those of
    connected components would, from one image to a stranger. Rows of the same bytes are one image.

    Args:
        table: of embeddings, as `engine.tables.open_table` gives it.
        threshold: cosine above which two images are near duplicates; 1.0: only the same bytes are. Which one is right
            hangs on the network, its input size and the images.
        scratch: folder for as many bytes as the table's embeddings have as float32; None: the system's for temporary
            files.
        report: told what is done ("parts" or "images"), how many of them, how many in all; in cells an image comes
            several times.

    Raises:
        RecipeError: the threshold is not above 0 and at most 1, or there is no such folder.
        StorageError: there is no room on the disk.
        ObjectChanged, TableDamaged: a part was rewritten meanwhile, or cannot be read.
    """
    if not 0.0 < threshold <= 1.0:
        raise RecipeError(
            "threshold: not a cosine that near duplicates could have",
            found=str(threshold),
            wanted="above 0, at most 1",
        )
    width = int(table.record["width"])
    times_larger = 2 if table.record["contract"].get("output.dtype") == "float16" else 1  # as float32
    num_bytes = times_larger * sum(info.size for _, info in table.parts)
    with UnitRows(width, num_bytes, scratch) as units:
        read = _read(table, units, report)
        order_N = np.argsort(-read.pixels_N, kind="stable")  # the rank of each row: place in this order
        first_N = _first_of_same_bytes(read.digests_N4[order_N])  # for each rank, the first with these bytes
        ranks_U = np.flatnonzero(first_N == np.arange(len(order_N)))
        nearness = _Nearness(units, order_N[ranks_U], threshold, report)
        own_U, cosines_U = nearness.groups()
        recall = nearness.recall(own_U)
    places_N = np.searchsorted(ranks_U, first_N)  # for each rank the place of its image among the U
    grouped = _grouped(first_N, ranks_U[own_U[places_N]], cosines_U[places_N])
    rows = _with_columns(table, read.part_rows, order_N, grouped)
    kinds = rows["kind"]
    return Duplicates(
        rows,
        threshold,
        rows_read=len(order_N),
        images=len(ranks_U),
        groups=pc.sum(pc.equal(kinds, REPRESENTATIVE)).as_py() or 0,
        exact=pc.sum(pc.equal(kinds, EXACT)).as_py() or 0,
        near=pc.sum(pc.equal(kinds, NEAR)).as_py() or 0,
        label_conflicts=_label_conflicts(rows),
        cells=nearness.cells,
        recall=recall,
    )


def write_duplicates(found: Duplicates, uri: str, storage: StorageConfig) -> None:
    """Write the groups as one Parquet file where nothing is yet.

    Raises:
        AlreadyExists: there is another file.
    """
    store, name = open_folder_of(uri, storage)
    sink = io.BytesIO()
    pq.write_table(found.rows, sink, compression="ZSTD")
    if not store.create(name, sink.getvalue()):
        raise _taken(uri)


def require_duplicates_uri(uri: str, storage: StorageConfig) -> None:
    """Refuse, before a table is read, a place where the groups cannot be written.

    Raises:
        RecipeError: it does not end in .parquet.
        AlreadyExists: there is a file.
    """
    if not uri.endswith(".parquet"):
        raise RecipeError(f"--output {uri}: unknown kind of file", wanted="a name ending in .parquet")
    store, name = open_folder_of(uri, storage)
    if name in set(store.names(name)):
        raise _taken(uri)


def _taken(uri: str) -> AlreadyExists:
    return AlreadyExists(f"{uri}: there is a file", way_out="remove it, or give another --output")


# ---------------------------------------------------------------- what is read


@dataclass(frozen=True)
class _Read:
    """Of all rows, in the order of the table.

    Attributes:
        digests_N4: sha-256 of the encoded bytes, as four numbers.
        pixels_N: of the image before it was resized.
        part_rows: rows of each part.
    """

    digests_N4: NDArray[np.uint64]
    pixels_N: NDArray[np.int64]
    part_rows: list[int]


def _read(table: Table, units: UnitRows, report: Callable[[str, int, int], None]) -> _Read:
    digests, pixels, part_rows = [np.empty((0, 4), np.uint64)], [np.empty(0, np.int64)], []
    columns = ("embedding", "sha256", "image_width", "image_height")
    for done, (units_BD, digests_B4, pixels_B) in enumerate(table.map_parts(_of_part, columns), 1):
        units.append(units_BD)
        digests.append(digests_B4)
        pixels.append(pixels_B)
        part_rows.append(len(pixels_B))
        report("parts", done, len(table.parts))
    return _Read(np.concatenate(digests), np.concatenate(pixels), part_rows)


def _of_part(part: pa.Table) -> tuple[NDArray[np.float32], NDArray[np.uint64], NDArray[np.int64]]:
    digests_B4 = np.frombuffer(b"".join(part["sha256"].to_pylist()), np.uint64).reshape(-1, 4)
    pixels_B = part["image_width"].to_numpy().astype(np.int64) * part["image_height"].to_numpy()
    return of_unit_length(embeddings_matrix(part["embedding"])), digests_B4, pixels_B


def _first_of_same_bytes(digests_N4: NDArray[np.uint64]) -> NDArray[np.int64]:
    """(N,) for each row the first one with the same digest."""
    order = np.lexsort(digests_N4.T)  # stable: of equal ones the first stays first
    is_other = np.ones(len(order), np.bool_)
    is_other[1:] = (digests_N4[order[1:]] != digests_N4[order[:-1]]).any(axis=1)
    first_N = np.empty(len(order), np.int64)
    first_N[order] = order[is_other][np.cumsum(is_other) - 1]
    return first_N


# ---------------------------------------------------------------- what is near


class _Nearness:
    """Which images are near to which, as places among the U images of different bytes.

    Attributes:
        cells: in which they are compared.
    """

    def __init__(
        self,
        units: UnitRows,
        numbers_U: NDArray[np.int64],
        threshold: float,
        report: Callable[[str, int, int], None],
    ) -> None:
        self._units, self._numbers_U, self._threshold, self._report = units, numbers_U, threshold, report
        self._random = np.random.default_rng(SEED)
        is_small = len(numbers_U) <= EXACT_ROWS or threshold >= 1.0
        self.cells = 1 if is_small else num_cells(len(numbers_U))

    def groups(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Of each image its representative, perhaps itself, and the cosine to it."""
        count = len(self._numbers_U)
        own_U, cosines_U = np.arange(count), np.ones(count, np.float32)
        pairs = self._pairs() if self._threshold < 1.0 else NearPairs.joined([])
        order = np.argsort(pairs.rows, kind="stable")
        rows, others, cosines = pairs.rows[order], pairs.representatives[order], pairs.cosines[order]
        # In their order, for in another cell a representative may have been found near to one before it.
        borders = np.flatnonzero(np.diff(rows, prepend=-1, append=-1)).tolist() if len(rows) else [0]
        for begin, end in itertools.pairwise(borders):
            near = others[begin:end]
            stands = own_U[near] == near
            if stands.any():
                best = int(np.where(stands, cosines[begin:end], -1.0).argmax())
                own_U[rows[begin]], cosines_U[rows[begin]] = near[best], min(cosines[begin + best], 1.0)
        return own_U, cosines_U

    def recall(self, own_U: NDArray[np.int64]) -> float | None:
        """Of sampled images that are near to a representative before them, the share that belongs to one."""
        if self.cells == 1:
            return 1.0
        count = len(own_U)
        sample = np.sort(self._random.choice(count, min(count, SAMPLED_ROWS), replace=False))
        alone = sample[own_U[sample] == sample]
        units_SD = self._units.read(self._numbers_U[alone])
        is_missed_S = np.zeros(len(alone), np.bool_)
        standing = np.flatnonzero(own_U == np.arange(count))
        for begin in range(0, len(standing), BLOCK_ROWS):
            some = standing[begin : begin + BLOCK_ROWS]
            near_SB = units_SD @ self._units.read(self._numbers_U[some]).T > self._threshold
            is_missed_S |= (near_SB & (some[None, :] < alone[:, None])).any(axis=1)
        found, missed = len(sample) - len(alone), int(is_missed_S.sum())
        return found / (found + missed) if found + missed else None

    def _pairs(self) -> NearPairs:
        """Images and representatives before them, in the cells where they meet."""
        count = len(self._numbers_U)
        whole = iter([np.arange(count)])
        cells = whole if self.cells == 1 else cells_of(self._units, self._numbers_U, self._random)
        done, found = 0, []
        total = count * min(self.cells, CELLS_OF_A_ROW)
        for cell in cells:
            representatives = Representatives(self._threshold)
            for begin in range(0, len(cell), BLOCK_ROWS):
                block = cell[begin : begin + BLOCK_ROWS]
                pairs = representatives.take(self._units.read(self._numbers_U[block]))
                found.append(NearPairs(cell[pairs.rows], cell[pairs.representatives], pairs.cosines))
                done += len(block)
                self._report("images", done, total)
        return NearPairs.joined(found)


# ---------------------------------------------------------------- what is said


@dataclass(frozen=True)
class _Grouped:
    """Rows of groups of two and more, in the order in which they are said; one entry for each.

    Attributes:
        ranks: which row.
        groups: from 0.
        kinds: as in `DUPLICATES_SCHEMA`.
        cosines: to the representative.
    """

    ranks: NDArray[np.int64]
    groups: NDArray[np.int64]
    kinds: list[str]
    cosines: NDArray[np.float32]


def _grouped(
    first_N: NDArray[np.int64], own_N: NDArray[np.int64], cosines_N: NDArray[np.float32]
) -> _Grouped:
    """Number the groups.

    Args:
        first_N: of each rank the first rank of the same bytes.
        own_N: of each rank its representative's.
        cosines_N: to it.
    """
    sizes_N = np.bincount(own_N, minlength=len(own_N))
    ranks = np.flatnonzero(sizes_N[own_N] > 1)
    own = own_N[ranks]
    is_near = first_N[ranks] != own
    kinds = np.where(ranks == own, 0, np.where(is_near, 2, 1))
    order = np.lexsort((ranks, -cosines_N[ranks], kinds, own, -sizes_N[own]))
    own, kinds = own[order], kinds[order]
    names = (REPRESENTATIVE, EXACT, NEAR)
    return _Grouped(
        ranks[order],
        np.cumsum(np.diff(own, prepend=-1) != 0) - 1,
        [names[kind] for kind in kinds.tolist()],
        cosines_N[ranks[order]],
    )


def _with_columns(
    table: Table, part_rows: list[int], order_N: NDArray[np.int64], grouped: _Grouped
) -> pa.Table:
    """Rows of `DUPLICATES_SCHEMA`; of each part that has some of them the columns are read once more."""
    numbers = order_N[grouped.ranks]
    ends = np.cumsum(part_rows)
    parts = np.searchsorted(ends, numbers, side="right")
    by_part = np.argsort(parts, kind="stable")
    wanted, firsts = np.unique(parts[by_part], return_index=True)
    some = dataclasses.replace(table, parts=tuple(table.parts[part] for part in wanted.tolist()))
    tables = [DUPLICATES_SCHEMA.empty_table().select(_COLUMNS)]
    places = np.split(by_part, firsts[1:])
    for part, own, columns in zip(wanted, places, some.map_parts(lambda one: one, _COLUMNS), strict=False):
        rows = numbers[own] - (ends[part] - part_rows[part])
        tables.append(columns.select(_COLUMNS).replace_schema_metadata(None).take(rows))
    back = np.empty(len(by_part), np.int64)
    back[by_part] = np.arange(len(by_part))
    named = pa.concat_tables(tables).take(back)
    said = {"group": grouped.groups, "kind": pa.array(grouped.kinds, pa.string()), "cosine": grouped.cosines}
    return pa.table({**said, **{name: named[name] for name in _COLUMNS}}, schema=DUPLICATES_SCHEMA)


def _label_conflicts(rows: pa.Table) -> int:
    labels = rows.group_by("group").aggregate([("label", "count_distinct")])
    return pc.sum(pc.greater(labels["label_count_distinct"], 1)).as_py() or 0
