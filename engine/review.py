"""The rows of a prediction table that are most worth a person's look, as a file to fill in and to fit on.

From tables and a bundle to one small table; `LabelsConfig(uri=..., label="answer")` reads the answers back. Parts are
read one after another, and what is kept does not grow with the table. Not for: showing images, or fitting.

Shape letters: N rows of a part, C candidates of a part, D embedding width, Q rows of the queue, k top entries.
"""

from __future__ import annotations

import dataclasses
import heapq
import io
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from engine.copies import written_as
from engine.errors import AlreadyExists, ContractMismatch, EngineError, RecipeError, TableDamaged
from engine.heads.bundle import open_bundle
from engine.heads.reference import Reference
from engine.night import held_store
from engine.parts import PartName, prediction_name
from engine.representatives import Representatives, of_unit_length
from engine.schema import SAMPLE_FIELDS
from engine.storage import ObjectInfo, StorageConfig, Store, open_folder_of, open_store
from engine.tables import (
    READ_THREADS,
    Table,
    embeddings_matrix,
    is_of_images,
    list_parts,
    open_table,
    read_part,
)

CANDIDATES_PER_ROW = 20  # kept while the table is read, for each row of the queue
HELD_BYTES = 1 << 30  # of candidates' embeddings, as float32: 200,000 at width 1,280
NEAR_DUPLICATE = 0.98  # cosine above which two images are one to a person
DISAGREEMENT, MARGIN, ABSTAINED, CONFIDENCE, FAR = "disagreement", "margin", "abstained", "confidence", "far"
_LOT = "lot"
_WITHOUT_EMBEDDINGS = "without embeddings, so rows by margin and confidence only, duplicates too: {}"
_COLUMNS = ("key", "shard", "index", "label", "confidence", "top_labels", "top_confidences")


@dataclass(slots=True)
class _Candidate:
    """One row that may be asked about.

    Attributes:
        row: its columns in the prediction table.
        order: its place among the candidates, as they were read; equal ones are taken in this order.
        margin: between its first two confidences; NaN with one.
        other_label: first candidate of the other table, where that was asked.
        disagrees: whether that is another label.
        place: the embedding part that it is from; None where that is not known.
        nearness, unit_D, sha256: of its embedding and image, once they were looked at.
    """

    row: dict[str, Any]
    order: int
    margin: float
    other_label: str | None
    disagrees: bool
    place: ObjectInfo | None
    nearness: float | None = None
    unit_D: NDArray[np.float32] | None = None
    sha256: bytes | None = None

    @property
    def certainty(self) -> float:
        """The margin, or with one candidate its confidence."""
        return float(self.row["confidence"]) if math.isnan(self.margin) else self.margin


@dataclass(frozen=True)
class Review:
    """A queue, and what could not be taken into account.

    Attributes:
        rows: (Q) of `review_schema`, the one to look at first first.
        rows_read: of the prediction table.
        notes: sentences for people.
    """

    rows: pa.Table
    rows_read: int
    notes: tuple[str, ...]


def review_schema(top_k: int, compares: bool = False) -> pa.Schema:
    """Columns of a queue.

    Args:
        top_k: entries of the prediction table.
        compares: with a second table, whose first candidates stand in `other_label`.
    """
    return pa.schema(
        [
            *SAMPLE_FIELDS,
            pa.field("source_uri", pa.string()),  # of the shard
            pa.field("label", pa.string()),
            pa.field("confidence", pa.float32(), nullable=False),
            pa.field("top_labels", pa.list_(pa.string(), top_k), nullable=False),
            pa.field("top_confidences", pa.list_(pa.float32(), top_k), nullable=False),
            *([pa.field("other_label", pa.string())] if compares else []),
            pa.field("reason", pa.string(), nullable=False),
            pa.field("margin", pa.float32()),  # between the first two confidences; null with one candidate
            pa.field("nearness", pa.float32()),  # to what the bundle was fitted on; null where not known
            pa.field("answer", pa.string()),  # for the person
        ]
    )


def review_queue(
    predictions: Store,
    count: int = 200,
    other: Store | None = None,
    near_duplicate: float = NEAR_DUPLICATE,
    report: Callable[[int, int], None] = lambda done, total: None,
    held: bool = False,
) -> Review:
    """Choose the rows of a prediction table to ask a person about.

    Rows on which a second table's first candidate differs come first, the least certain first. The rest is taken by
    turns: the lowest margin between the first two confidences, the lowest confidence (abstained rows among them), and
    the farthest from what the bundle was fitted on, among these rows and as many by lot. Of rows whose embeddings are
    near duplicates, or whose images are the same bytes, one is asked about. The same tables give the same queue.

    Args:
        predictions: rooted at the table; embeddings and bundle are reached with the same storage settings.
        count: rows wanted; there may be fewer.
        other: a table of another bundle over the same shards.
        near_duplicate: cosine above which two rows are one to a person; some networks put all images nearer than 0.98,
            and a note says so where that leaves fewer rows than are wanted. 1.0: equal images only.
        report: told parts read, parts in all.
        held: look at the rows that a night holds back, and not at those that readers have.

    Raises:
        ContractMismatch: one is no prediction table, or is one of several labels for a row.
        ObjectNotFound, TableDamaged: there is no table, or it has no parts.
    """
    opened = open_table(predictions, "predictions")
    table = _single_label(_held_of(opened) if held else opened)
    second = None if other is None else _Other(_single_label(open_table(other, "predictions")))
    notes: list[str] = []
    embeddings = _embeddings_of(table, notes)
    top_k = _top_k(table)
    table, places = _of_present_embeddings(table, embeddings, notes)
    width = 1 if embeddings is None else int(embeddings.record["width"])
    pool = _Pool(max(count, min(CANDIDATES_PER_ROW * count, HELD_BYTES // (4 * width))), second is not None)
    for done, ((name, _), part) in enumerate(zip(table.parts, table.read_by_part(_COLUMNS), strict=True), 1):
        told = None if second is None else second.labels_of(name, part)
        pool.offer(name, part, told, places.get(name))
        report(done, len(table.parts))
    candidates = pool.candidates()
    if embeddings is not None:
        _look_at_embeddings(embeddings.store, candidates, _reference_of(table, notes))
    if second is not None and second.parts_absent:
        notes.append(f"{second.parts_absent:,} parts have rows that the other table does not label")
    of_shards = table if is_of_images(table.record) else embeddings
    source_uri = None if of_shards is None else of_shards.record.get("source_uri")
    chosen = _chosen(candidates, count, near_duplicate)
    if len(chosen) < min(count, len(candidates)):
        notes.append(
            f"{len(chosen):,} rows of {count:,}: the other {len(candidates) - len(chosen):,} candidates are near "
            f"duplicates of these (cosine above {near_duplicate}); a higher --near-duplicate tells more of them apart"
        )
    rows = [_asked(one, reason, source_uri) for one, reason in chosen]
    schema = review_schema(top_k, second is not None)
    return Review(pa.Table.from_pylist(rows, schema=schema), pool.rows_read, tuple(notes))


def write_review(rows: pa.Table, uri: str, storage: StorageConfig) -> None:
    """Write a queue where nothing is yet: a file with a person's answers is never replaced.

    Args:
        uri: of the file, as `require_review_uri` takes it.

    Raises:
        AlreadyExists: there is another file.
    """
    store, name = open_folder_of(uri, storage)
    if name.endswith(".csv"):
        content = written_as(rows, "csv")
    else:
        sink = io.BytesIO()
        pq.write_table(rows, sink)
        content = sink.getvalue()
    if not store.create(name, content):
        raise AlreadyExists(
            f"{uri}: there is a file, which may hold a person's answers", way_out="give another --out"
        )


def require_review_uri(uri: str, storage: StorageConfig) -> None:
    """Refuse, before a table is read, a place where a queue cannot be written.

    Raises:
        RecipeError: it does not end in .parquet or .csv.
        AlreadyExists: there is a file.
    """
    if not uri.endswith((".parquet", ".csv")):
        raise RecipeError(f"--out {uri}: unknown kind of file", wanted="a name ending in .parquet or .csv")
    store, name = open_folder_of(uri, storage)
    if name in set(store.names(name)):
        raise AlreadyExists(
            f"{uri}: there is a file, which may hold a person's answers", way_out="give another --out"
        )


# ---------------------------------------------------------------- what there is


def _held_of(table: Table) -> Table:
    """What is held back of it, as a table."""
    store = held_store(table.store)
    parts = tuple(list_parts(store))
    if not parts:
        raise TableDamaged(
            f"{table.store.uri}: nothing is held back here",
            way_out="leave --held out: readers have all there is",
        )
    return dataclasses.replace(table, store=store, parts=parts)


def _single_label(table: Table) -> Table:
    if "labels" in table.column_names():
        raise ContractMismatch(
            f"{table.store.uri}: has several labels for a row",
            found="a column `labels`",
            wanted="predictions of a single_label bundle: the margin between two labels says nothing where both hold",
        )
    return table


def _top_k(table: Table) -> int:
    part = read_part(table.store, table.parts[0][1], ["top_labels"])
    return int(part.schema.field("top_labels").type.list_size)


def _embeddings_of(table: Table, notes: list[str]) -> Table | None:
    """The table that was scored; None, and a note, where it cannot be had."""
    if is_of_images(table.record):
        notes.append(_WITHOUT_EMBEDDINGS.format("they were not kept when the images were scored"))
        return None
    try:
        return open_table(open_store(table.record["source_uri"], table.store.config))
    except (EngineError, KeyError) as error:
        said = error.thing if isinstance(error, EngineError) else f"the table's record has no {error}"
        notes.append(_WITHOUT_EMBEDDINGS.format(said))
        return None


def _of_present_embeddings(
    table: Table, embeddings: Table | None, notes: list[str]
) -> tuple[Table, dict[PartName, ObjectInfo]]:
    """The table without parts whose embeddings were rewritten since, and of each part the one it was made from."""
    if embeddings is None:
        return table, {}
    made_from = {prediction_name(name, info.identity): info for name, info in embeddings.parts}
    parts = tuple((name, info) for name, info in table.parts if name in made_from)
    if stale := len(table.parts) - len(parts):
        notes.append(f"{stale:,} parts are left out: their embeddings are gone or were rewritten since")
    return dataclasses.replace(table, parts=parts), made_from


def _reference_of(table: Table, notes: list[str]) -> Reference | None:
    """What the bundle remembers of its embeddings; None, and a note, where that cannot be had."""
    try:
        bundle = open_bundle(
            open_store(table.record["bundle_uri"], table.store.config), table.record["bundle"]
        )
        reference = bundle.reference()
        said = "the bundle remembers nothing of the embeddings it was fitted on"
    except (EngineError, KeyError) as error:
        reference = None
        said = error.thing if isinstance(error, EngineError) else f"the table's record has no {error}"
    if reference is None:
        notes.append(f"without nearness: {said}")
    return reference


class _Other:
    """First candidates of a second table; those of one shard are in memory."""

    def __init__(self, table: Table) -> None:
        self._store = table.store
        self._parts: dict[tuple[str, str], list[ObjectInfo]] = defaultdict(list)
        for name, info in table.parts:
            self._parts[name.path16, name.source8].append(info)
        self._shard: tuple[str, str] | None = None
        self._labels: dict[int, str] = {}
        self.parts_absent = 0

    def labels_of(self, name: PartName, part: pa.Table) -> list[str | None]:
        """For each row the label it has there; None: none, or of another version of the shard."""
        shard = (name.path16, name.source8)
        if shard != self._shard:  # parts come shard by shard
            self._shard, self._labels = shard, {}
            for info in self._parts.get(shard, ()):
                there = read_part(self._store, info, ["index", "top_labels"])
                firsts = pc.list_element(there["top_labels"], 0).to_pylist()
                self._labels.update(zip(there["index"].to_pylist(), firsts, strict=True))
        labels = [self._labels.get(index) for index in part["index"].to_pylist()]
        self.parts_absent += None in labels
        return labels


# ---------------------------------------------------------------- candidates


class _Lowest:
    """The rows with the lowest values of one kind, a bounded number."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[float, int, _Candidate]] = []

    def wanted(self, values_N: NDArray[np.floating[Any]]) -> list[int]:
        """Rows that would be kept, the lowest first; infinite ones never are."""
        worst = -self._heap[0][0] if len(self._heap) == self._most else math.inf
        order = np.argsort(values_N, kind="stable")[: self._most]
        kept: list[int] = order[values_N[order] < worst].tolist()
        return kept

    def add(self, value: float, candidate: _Candidate) -> None:
        entry = (-value, -candidate.order, candidate)
        if len(self._heap) < self._most:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def __iter__(self) -> Iterator[_Candidate]:
        return (candidate for _, _, candidate in self._heap)


class _Pool:
    """Candidates, at most `most` of them, as many for each reason and by lot."""

    def __init__(self, most: int, compares: bool) -> None:
        kinds = (*([DISAGREEMENT] if compares else []), MARGIN, CONFIDENCE, _LOT)
        self._lowest = {kind: _Lowest(max(1, most // len(kinds))) for kind in kinds}
        self._orders = itertools.count()
        self.rows_read = 0

    def offer(
        self, name: PartName, part: pa.Table, other: Sequence[str | None] | None, place: ObjectInfo | None
    ) -> None:
        """Look at the rows of a part.

        Args:
            other: the labels of a second table; None: there is none.
            place: the embedding part that it was made from.
        """
        self.rows_read += part.num_rows
        if not part.num_rows:
            return
        firsts = pc.list_element(part["top_labels"], 0).to_pylist()
        told = other or [None] * part.num_rows
        differs_N = np.array(
            [label is not None and label != first for label, first in zip(told, firsts, strict=True)]
        )
        margins_N = _margins(part)
        values = _values(name, part, margins_N, differs_N)
        values = {kind: values_N for kind, values_N in values.items() if kind in self._lowest}
        wanted = {kind: self._lowest[kind].wanted(values_N) for kind, values_N in values.items()}
        made: dict[int, _Candidate] = {}
        for row in sorted({row for rows in wanted.values() for row in rows}):
            (columns,) = part.slice(row, 1).to_pylist()
            order, margin = next(self._orders), float(margins_N[row])
            made[row] = _Candidate(columns, order, margin, told[row], bool(differs_N[row]), place)
        for kind, rows in wanted.items():
            for row in rows:
                self._lowest[kind].add(float(values[kind][row]), made[row])

    def candidates(self) -> list[_Candidate]:
        """Each once, as they were read."""
        found = {candidate.order: candidate for lowest in self._lowest.values() for candidate in lowest}
        return [found[order] for order in sorted(found)]


def _margins(part: pa.Table) -> NDArray[np.float32]:
    """(N,) between the first two confidences; NaN where there is one."""
    top_Nk = embeddings_matrix(part["top_confidences"])
    if top_Nk.shape[1] < 2:
        return np.full(len(top_Nk), np.nan, np.float32)
    margins_N: NDArray[np.float32] = top_Nk[:, 0] - top_Nk[:, 1]
    return margins_N


def _values(
    name: PartName, part: pa.Table, margins_N: NDArray[np.float32], differs_N: NDArray[np.bool_]
) -> Mapping[str, NDArray[np.floating[Any]]]:
    """Of each kind a value for each row: the lower, the rather it is asked about; infinite: not for this reason."""
    confidences_N = part["confidence"].to_numpy()
    certainties_N = np.where(np.isnan(margins_N), confidences_N, margins_N)
    lots = np.random.default_rng([int(name.path16, 16), int(name.source8, 16), name.number])
    return {
        DISAGREEMENT: np.where(differs_N, certainties_N, np.inf),
        MARGIN: np.where(np.isnan(margins_N), np.inf, margins_N),
        CONFIDENCE: confidences_N,
        _LOT: lots.random(part.num_rows),
    }


def _look_at_embeddings(store: Store, candidates: Sequence[_Candidate], reference: Reference | None) -> None:
    """Fill in what embeddings and images say; each part is read once, and only rows of candidates are kept."""
    by_part: dict[ObjectInfo, list[_Candidate]] = defaultdict(list)
    for candidate in candidates:
        if candidate.place is not None:
            by_part[candidate.place].append(candidate)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for _ in pool.map(lambda item: _look_at_part(store, item[0], item[1], reference), by_part.items()):
            pass


def _look_at_part(
    store: Store, info: ObjectInfo, candidates: Sequence[_Candidate], reference: Reference | None
) -> None:
    part = read_part(store, info, ["index", "embedding", "sha256"])
    row_of = {index: row for row, index in enumerate(part["index"].to_pylist())}
    wanted = [candidate.row["index"] for candidate in candidates]
    if absent := [index for index in wanted if index not in row_of]:
        raise TableDamaged(
            f"{store.uri}/{info.path}: has no row with index {absent[0]}, of which there is a prediction",
            way_out="`engine verify` both tables",
        )
    rows = [row_of[index] for index in wanted]
    embeddings_CD = embeddings_matrix(part["embedding"])[rows].astype(np.float32)
    nearness_C = None if reference is None else reference.cosines(embeddings_CD)
    units_CD = of_unit_length(embeddings_CD)
    for place, (candidate, row) in enumerate(zip(candidates, rows, strict=True)):
        candidate.unit_D = units_CD[place]
        candidate.sha256 = part["sha256"][row].as_py()
        candidate.nearness = None if nearness_C is None else float(nearness_C[place])


# ---------------------------------------------------------------- the choice


def _chosen(
    candidates: Sequence[_Candidate], count: int, near_duplicate: float
) -> list[tuple[_Candidate, str]]:
    """At most `count` candidates with the reason for each, one of each group of near duplicates."""
    differing = sorted((one for one in candidates if one.disagrees), key=lambda one: one.certainty)
    by_margin = sorted((one for one in candidates if not math.isnan(one.margin)), key=lambda one: one.margin)
    by_confidence = sorted(candidates, key=lambda one: one.row["confidence"])
    by_nearness = sorted(
        (one for one in candidates if one.nearness is not None), key=lambda one: one.nearness or 0.0
    )
    turns = ((MARGIN, by_margin), (CONFIDENCE, by_confidence), (FAR, by_nearness))
    taken = _Taken(near_duplicate)
    chosen: list[tuple[_Candidate, str]] = []
    for reason, one in itertools.chain(((DISAGREEMENT, one) for one in differing), _by_turns(turns, taken)):
        if len(chosen) == count:
            break
        if taken.take(one):
            abstained = reason == CONFIDENCE and one.row["label"] is None
            chosen.append((one, ABSTAINED if abstained else reason))
    return chosen


def _by_turns(
    turns: Sequence[tuple[str, Sequence[_Candidate]]], taken: _Taken
) -> Iterator[tuple[str, _Candidate]]:
    """One of each in turn, as long as there are some; those that stand for nothing new cost no turn."""
    waiting = [(reason, iter(ones)) for reason, ones in turns]
    while waiting:
        for entry in tuple(waiting):
            reason, ones = entry
            one = next((one for one in ones if taken.is_new(one)), None)
            if one is None:
                waiting.remove(entry)
            else:
                yield reason, one


class _Taken:
    """What is in the queue, to tell what would be in it twice."""

    def __init__(self, near_duplicate: float) -> None:
        self._near = Representatives(near_duplicate)
        self._orders: set[int] = set()
        self._sha256: set[bytes] = set()

    def is_new(self, one: _Candidate) -> bool:
        if one.order in self._orders or one.sha256 in self._sha256:
            return False
        return one.unit_D is None or not self._near.is_near(one.unit_D)

    def take(self, one: _Candidate) -> bool:
        """Whether it was taken; one that stands for nothing new is not."""
        if not self.is_new(one):
            return False
        self._orders.add(one.order)
        if one.sha256 is not None:
            self._sha256.add(one.sha256)
        if one.unit_D is not None:
            self._near.take(one.unit_D[None])
        return True


def _asked(one: _Candidate, reason: str, source_uri: str | None) -> dict[str, Any]:
    """A row of the queue, without an answer."""
    return {
        **one.row,
        "source_uri": None if source_uri is None else f"{source_uri.rstrip('/')}/{one.row['shard']}",
        "other_label": one.other_label,
        "reason": reason,
        "margin": None if math.isnan(one.margin) else one.margin,
        "nearness": one.nearness,
        "answer": None,
    }
