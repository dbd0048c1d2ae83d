"""Small pictures of some samples of an embedding table, read again from its archive; and examples of its rejects.

Best effort, within seconds and bytes: what cannot be had is told, and nothing fails for it. A sample is reached through
the part that has it, whose footer says at which byte of the shard it begins, and in a long part of a tar by a search; a
reject whose bytes the table keeps is not looked for in the archive. A picture counts only if its bytes are those that
extraction saw. Not for: choosing the samples, or showing them.

119 samples anywhere in eight parts of 77 MB: 153 MB were read in 0.4 s, where reading the parts from their beginnings
took 598 MB and 0.9 s (a local disk, two cores, 2026-11-23).
"""

from __future__ import annotations

import hashlib
import io
import logging
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.errors import EngineError, ObjectChanged, ObjectNotFound
from engine.images import ImageRejected
from engine.parts import PartName, path16_of
from engine.schema import RejectReason, SampleId
from engine.shards.base import Resume
from engine.shards.kinds import FilesSource, SourceConfig, open_reader, source_of_contract
from engine.shards.tar_search import Stretch
from engine.shards.webdataset import WebDatasetReader
from engine.storage import ObjectInfo, Store, open_store
from engine.tables import (
    READ_THREADS,
    REJECTS_FOLDER,
    Record,
    ShardPartFacts,
    Table,
    part_names,
    read_part,
    read_shard_facts,
)
from engine.thumbnails import Thumbnail, no_pictures, pictures_document, thumbnail_of_image

log = logging.getLogger(__name__)

SECONDS = 30.0  # a fit takes minutes to hours; nobody should notice that it also takes pictures
SIZE = 1 << 30  # a hundred looks of a few MB into tars; compressed shards are read from their beginning
LOOKS_PER_SAMPLE = 3  # of a search in a tar, as a rule
REJECTS_BYTES = 64 << 20  # of a file of rejects, which may keep images; larger ones are left alone
REJECT_FILES = 200  # that are read for reasons and examples; each is a request
EXAMPLES = 3  # of each reason
# Of other rejects there is no image, or none that can be decoded.
WITH_IMAGE = (
    RejectReason.BAD_LABEL,
    RejectReason.TOO_MANY_PIXELS,
    RejectReason.NON_FINITE_EMBEDDING,
    RejectReason.ZERO_EMBEDDING,
)
OTHER_BYTES = "the archive has another image there now, or none"
NOT_FOUND = "it was not found in its shard"
SWITCHED_OFF = "report.pictures is false"


@dataclass(frozen=True, slots=True)
class Budget:
    """What reading pictures may cost. A request that is under way when it ends is not waited for."""

    seconds: float = SECONDS
    size: int = SIZE  # bytes from the source


@dataclass(frozen=True, slots=True)
class TableParts:
    """An embedding table whose parts are asked for one by one: who knows their names need not list it.

    Attributes:
        store: rooted at the table.
        record: `_table.json`.
        part_at: path16 of a shard and number -> name and object of the part with these samples, None where there is
            none; asked by several threads, while the budget lasts. It may raise EngineError.
    """

    store: Store
    record: Record
    part_at: Callable[[str, int], tuple[PartName, ObjectInfo] | None]

    @staticmethod
    def of(table: Table) -> TableParts:
        """Those of a listing."""
        parts = {(name.path16, name.number): (name, info) for name, info in table.parts}
        return TableParts(table.store, table.record, lambda path16, number: parts.get((path16, number)))


def documents_of_samples(
    table: Table, wanted: Sequence[SampleId], with_pictures: bool, budget: Budget | None = None
) -> dict[str, dict[str, Any]]:
    """What a report of a bundle shows beside the bundle's own numbers, by role: `pictures`, and `rejects` if any.

    Args:
        table: that the bundle was fitted on.
        wanted: samples, the most wanted first, each once. Examples of rejects come after them.
        with_pictures: False: the archive is not asked, and no image is copied.
    """
    rejects = rejects_document(table)
    documents = {"rejects": rejects} if rejects["reasons"] else {}
    if not with_pictures:
        return {**documents, "pictures": no_pictures(SWITCHED_OFF)}
    pictures = read_pictures(TableParts.of(table), wanted, rejects["examples"], budget or Budget())
    return {**documents, "pictures": pictures}


def read_pictures(
    parts: TableParts, wanted: Sequence[SampleId], rejects: Sequence[Mapping[str, Any]], budget: Budget
) -> dict[str, Any]:
    """Small pictures of samples, and of those rejects that have an image, as for pictures.json.

    Args:
        parts: of the table that the samples are of.
        wanted: samples that have an embedding, the most wanted first, each once.
        rejects: key, shard, index, error and sha256 (hex, or None) of others, which come after them.

    Returns:
        As of `pictures_document`: what could be had, and why the rest could not.
    """
    with_image = {
        (one["shard"], one["index"]): {**one, "sha256": bytes.fromhex(one["sha256"])}
        for one in rejects
        if one["error"] in WITH_IMAGE and one["sha256"]
    }
    asked = list(dict.fromkeys([*wanted, *with_image]))
    found = _Found(budget)
    _read_part_by_part(parts, asked, with_image, found)
    pictures = pictures_document(asked, *found.told(len(asked)))
    if asked and not pictures["pictures"]:
        log.warning("the report has no pictures: %s", "; ".join(one["why"] for one in pictures["missing"]))
    return pictures


def rejects_document(table: Table) -> dict[str, Any]:
    """For rejects.json: reasons (with their number), files_read, has_more (files that were not read), and examples."""
    names = {name for name, _ in table.parts}  # others are of replaced shards
    reasons: Counter[str] = Counter()
    examples: dict[str, list[dict[str, Any]]] = defaultdict(list)
    listed: list[PartName] = []
    try:
        listed += islice(part_names(table.store, REJECTS_FOLDER), REJECT_FILES + 1)
    except EngineError as error:
        log.warning("the rejects of the table cannot be listed: %s", error.thing)
    read = sorted((name for name in listed[:REJECT_FILES] if name in names), key=str)
    too_large = 0
    for name in read:
        rows = _reject_rows(table.store, name)
        too_large += rows is None
        for row in rows or ():
            reasons[row["error"]] += 1
            if len(examples[row["error"]]) < EXAMPLES:
                sha256 = row.pop("sha256")
                examples[row["error"]].append({**row, "sha256": sha256 and sha256.hex()})
    return {
        "reasons": dict(sorted(reasons.items())),
        "files_read": len(read) - too_large,
        "has_more": len(listed) > REJECT_FILES or too_large > 0,
        "examples": [row for _, rows in sorted(examples.items()) for row in rows],
    }


def _reject_rows(store: Store, name: PartName) -> list[dict[str, Any]] | None:
    """None where the file is too large; no rows of one that is gone or damaged, which `engine verify` names."""
    path = f"{REJECTS_FOLDER}{name}"
    wanted = ["key", "shard", "index", "error", "message", "sha256"]
    try:
        if store.info(path).size > REJECTS_BYTES:
            return None
        content = pq.read_table(io.BytesIO(store.read(path)), columns=wanted)
        rows: list[dict[str, Any]] = content.select(wanted).to_pylist()
    except (EngineError, pa.ArrowException, OSError, KeyError):
        return []
    return rows


class _Found:
    """Pictures so far, what is missing and why, and what it cost; threads add to it."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._pictures: dict[SampleId, Thumbnail] = {}
        self._missing: Counter[str] = Counter()
        self._bytes_read, self._started = 0, time.monotonic()
        self._lock = threading.Lock()

    def add_bytes(self, count: int) -> None:
        with self._lock:
            self._bytes_read += count

    def lack(self, why: str, samples: int = 1) -> None:
        with self._lock:
            self._missing[why] += samples

    def add(self, sample: SampleId, encoded: bytes | None, sha256: bytes) -> None:
        """The picture of a sample, if these are its bytes."""
        if encoded is None or hashlib.sha256(encoded).digest() != sha256:
            return self.lack(OTHER_BYTES)
        try:
            thumbnail = thumbnail_of_image(encoded)
        except ImageRejected as rejected:
            return self.lack(f"cannot be decoded: {rejected.reason}")
        with self._lock:
            self._pictures[sample] = thumbnail
        return None

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._budget.seconds - (time.monotonic() - self._started))

    @property
    def spent(self) -> str:
        """Which part of the budget is used up; empty: none."""
        if not self.seconds_left:
            return f"the {self._budget.seconds:g} seconds for reading pictures had passed"
        if self._bytes_read >= self._budget.size:
            return f"the {self._budget.size / 1e6:,.0f} MB for reading pictures were used up"
        return ""

    def told(self, asked: int) -> tuple[dict[SampleId, Thumbnail], Counter[str]]:
        """All of it, as it is now; whatever is not accounted for is late."""
        with self._lock:
            pictures, missing = dict(self._pictures), self._missing.copy()
        late = asked - len(pictures) - missing.total()
        if late > 0:
            missing[self.spent or "reading them was given up"] += late
        return pictures, missing


def _read_part_by_part(
    parts: TableParts,
    asked: Sequence[SampleId],
    rejects: Mapping[SampleId, Mapping[str, Any]],
    found: _Found,
) -> None:
    """Those with the most wanted samples first; rejects are rows of samples that have no embedding."""
    source = source_of_contract(parts.record.get("contract", {}))
    rows_per_part = parts.record.get("rows_per_part")
    if source is None or rows_per_part is None:
        return found.lack("the table does not say where its images are", len(asked))
    by_part: dict[tuple[str, int], list[int]] = defaultdict(list)
    for shard, index in asked:
        by_part[shard, index // rows_per_part].append(index)

    def read(shard: str, number: int) -> None:
        indexes, begun = sorted(by_part[shard, number]), 0
        own = [rejects[shard, index] for index in indexes if (shard, index) in rejects]
        try:
            for index, encoded, sha256 in _images(parts, source, (shard, number), indexes, own, found):
                begun += 1
                found.add((shard, index), encoded, sha256)
            why = found.spent or NOT_FOUND
        except EngineError as error:
            why = error.thing
        if begun < len(indexes):
            found.lack(why, len(indexes) - begun)

    waiting = deque(sorted(by_part, key=lambda place: -len(by_part[place])))
    broken: list[Exception] = []

    def work() -> None:
        try:
            while (place := _next_of(waiting)) is not None:
                read(*place)
        except Exception as error:  # noqa: BLE001 (raised below, where somebody hears it)
            broken.append(error)

    # Daemons: a process that is done does not wait for a store that takes minutes to say that it does not answer.
    threads = [
        threading.Thread(target=work, name=f"pictures_{number}", daemon=True)
        for number in range(min(READ_THREADS, len(waiting)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(found.seconds_left)
    waiting.clear()
    if broken:
        raise broken[0]
    return None


def _next_of(waiting: deque[tuple[str, int]]) -> tuple[str, int] | None:
    """None: nothing is left."""
    try:
        return waiting.popleft()
    except IndexError:
        return None


def _images(
    parts: TableParts,
    source: SourceConfig,
    place: tuple[str, int],
    indexes: Sequence[int],
    rejects: Sequence[Mapping[str, Any]],
    found: _Found,
) -> Iterator[tuple[int, bytes | None, bytes]]:
    """Index, encoded image, and the digest that it should have, of samples of one part, while budgets last.

    Args:
        place: shard, and number of the part.
        indexes: that are wanted, ascending.
        rejects: rows of those among them that have no embedding.

    Raises:
        EngineError: the part, or its shard, cannot be read.
    """
    shard, number = place
    if found.spent or (part := parts.part_at(path16_of(shard), number)) is None:  # it may have gone since
        return
    name, info = part
    kept = _kept_images(parts, name, rejects, found)
    for row in rejects:
        if row["index"] in kept:
            yield row["index"], kept[row["index"]], row["sha256"]
    indexes = [index for index in indexes if index not in kept]
    if found.spent or not indexes:
        return
    rows = [*read_part(parts.store, info, ["key", "index", "sha256"]).to_pylist(), *rejects]
    digests = {row["index"]: row["sha256"] for row in rows}
    if isinstance(source, FilesSource):
        images = _images_of_files(parts, source, rows, indexes, found)
    else:
        images = _images_of_shard(parts, source, (shard, name), rows, indexes, found)
    for index, encoded in images:
        if index in digests:
            yield index, encoded, digests[index]


def _images_of_files(
    parts: TableParts,
    source: FilesSource,
    rows: Sequence[Mapping[str, Any]],
    indexes: Sequence[int],
    found: _Found,
) -> Iterator[tuple[int, bytes | None]]:
    """A sample is a file by itself, and its key the path."""
    store, paths = open_store(source.uri, parts.store.config), {row["index"]: row["key"] for row in rows}
    for index in indexes:
        if found.spent:
            return
        if index in paths:
            yield index, _file(store, paths[index], _max_bytes(parts), found)


def _images_of_shard(
    parts: TableParts,
    source: SourceConfig,
    part: tuple[str, PartName],
    rows: Sequence[Mapping[str, Any]],
    indexes: Sequence[int],
    found: _Found,
) -> Iterator[tuple[int, bytes | None]]:
    """By search, or from where the part begins; samples of a shard that was replaced may be others.

    Args:
        part: the shard, and the name of the part.
        rows: key and index of its samples, as far as they are known.
    """
    shard, name = part
    store, facts = open_store(source.uri, parts.store.config), read_shard_facts(parts.store, name)
    first = name.number * parts.record["rows_per_part"]
    reader, shard_info = open_reader(source, _max_bytes(parts)), store.info(shard)
    if isinstance(reader, WebDatasetReader) and (stretch := _long_stretch(facts, first, rows, indexes)):
        keys = {index: key for key, index in stretch.indexes.items()}
        for index in indexes:
            if found.spent:
                return
            if (key := keys.get(index)) is not None and (
                sample := reader.find(store, shard_info, key, stretch, found.add_bytes)
            ):
                yield index, sample.image
        return
    begin = Resume(indexes[0] if facts.begin_offset is None else first, facts.begin_offset)
    wanted, last = set(indexes), indexes[-1]
    with closing(reader.read(store, shard_info, begin, found.add_bytes)) as samples:  # type: ignore[type-var]  # readers are generators
        for sample in samples:
            if sample.index in wanted:
                yield sample.index, sample.image
            if sample.index >= last or found.spent:
                return


def _kept_images(
    parts: TableParts, name: PartName, rejects: Sequence[Mapping[str, Any]], found: _Found
) -> dict[int, bytes]:
    """By index, what the table keeps of rejects of one part; the archive may have the others."""
    if not rejects or not parts.record["contract"].get("limits.keep_reject_bytes"):
        return {}
    path, indexes = f"{REJECTS_FOLDER}{name}", [row["index"] for row in rejects]
    try:
        info = parts.store.info(path)
        if info.size > REJECTS_BYTES:
            return {}
        found.add_bytes(info.size)
        content = io.BytesIO(parts.store.read(path, expected=info))
        rows = pq.read_table(content, columns=["index", "bytes"]).filter(pc.field("index").isin(indexes))
    except (ObjectNotFound, ObjectChanged, pa.ArrowException, OSError):
        return {}
    return {row["index"]: row["bytes"] for row in rows.to_pylist() if row.get("bytes")}


def _long_stretch(
    facts: ShardPartFacts, first: int, rows: Sequence[Mapping[str, Any]], indexes: Sequence[int]
) -> Stretch | None:
    """The part as records to search in, where that costs less than reading it from its beginning.

    Args:
        first: index of its first sample.
        rows: key and index of those that are known.
    """
    if facts.begin_offset is None or facts.end_offset is None:
        return None
    counts = Counter(row["key"] for row in rows)
    once = {row["key"]: row["index"] for row in rows if counts[row["key"]] == 1}
    stretch = Stretch(first, facts.begin_offset, first + facts.samples, facts.end_offset, once)
    to_last = (facts.end_offset - facts.begin_offset) * (indexes[-1] - first) / facts.samples
    return stretch if to_last > LOOKS_PER_SAMPLE * stretch.window_bytes * len(indexes) else None


def _max_bytes(parts: TableParts) -> int:
    """Of an encoded image."""
    return int(parts.record["contract"].get("limits.max_sample_bytes", SIZE))


def _file(store: Store, path: str, max_bytes: int, found: _Found) -> bytes | None:
    """None: it is gone, or has become too large."""
    try:
        info = store.info(path)
        if info.size > max_bytes:
            return None
        found.add_bytes(info.size)
        return store.read(path, expected=info)
    except (ObjectNotFound, ObjectChanged):
        return None
