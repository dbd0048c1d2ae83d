"""What stands between a night's predictions and their readers: parts that are held back, what they come to, publishing.

Held parts lie in `<predictions>/held/`, under the paths that they will have in the table. Publishing copies each to its
place and then removes it, so that what is left to publish is what is still held: a publishing that was killed goes on.
Parts that the gate refused are named in `held/refused.json`, and stay until a person publishes them: in the crowd of
later nights they might pass. Not for: judging a night (`engine.gate`), or scoring it.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from engine.errors import ObjectNotFound, TableDamaged
from engine.parts import COPIES_FOLDER, PartName, parse_copy_path, parse_part_name
from engine.storage import ObjectInfo, Store
from engine.tables import (
    DATA_FOLDER,
    PredictionPartFacts,
    list_parts,
    part_names,
    read_embedding_facts,
    read_part,
    read_prediction_facts,
)

HELD_FOLDER = "held"
NIGHTS_FOLDER = "nights/"
READ_THREADS = 16  # footers of a few KiB: bound by the store's latency
REFUSED = "refused.json"
COMPARED_PARTS = 256  # of replaced shards: 262,144 rows tell a share of a thousandth from none


@dataclass(frozen=True, slots=True)
class Held:
    """One part that is held back."""

    name: PartName
    info: ObjectInfo
    facts: PredictionPartFacts


@dataclass(frozen=True, slots=True)
class Tally:
    """What the held parts of one table come to.

    Attributes:
        parts: that are held.
        rows: predicted; `rows_expected` have an embedding.
        samples, rejects: of the embedding parts that they were made from.
        answer_counts: rows by their first candidate, or each of their several labels.
        abstained: rows without a label.
        cosine_counts: by nearness to what the bundle was fitted on, in its reference's bins; None: it has none.
        compared, agreeing: keys that had a prediction before their shard was replaced, and of those with the same now.
        parts_with_rejects: embedding parts among them that have any.
    """

    parts: int
    rows: int
    rows_expected: int
    samples: int
    rejects: int
    answer_counts: dict[str, int]
    abstained: int
    cosine_counts: tuple[int, ...] | None
    compared: int
    agreeing: int
    parts_with_rejects: tuple[PartName, ...] = ()


def held_store(table: Store) -> Store:
    """Where the table's held parts are, laid out as a table is."""
    return table.sub(HELD_FOLDER)


def drop_stale(table: Store, wanted: set[PartName]) -> int:
    """Remove held parts that the embeddings no longer call for or that readers have already, and copies of no part; how
    many parts."""
    store = held_store(table)
    names = {name for name, _ in list_parts(store)}
    stale = {name for name in names if name not in wanted} | (names & set(part_names(table)))
    for name in stale:
        store.delete(f"{DATA_FOLDER}{name}")
    for info, name in _copies(store):
        if name in stale or name not in names | wanted:  # of one that is wanted the data may still come
            store.delete(info.path)
    return len(stale)


def is_held_back(table: Store) -> bool:
    """Whether any part is."""
    return next(iter(list_parts(held_store(table))), None) is not None


def refused(table: Store) -> dict[str, str]:
    """Paths of the held parts that the gate refused, and the night in which it did."""
    try:
        found = json.loads(held_store(table).read(REFUSED))
    except ObjectNotFound:
        return {}
    return {str(path): str(night) for path, night in found.items()}


def refuse(table: Store, held: Sequence[Held], run_id: str) -> None:
    """Keep these parts from being published by a later night."""
    names = refused(table) | {part.info.path: run_id for part in held}
    held_store(table).write(REFUSED, json.dumps(names, indent=1, sort_keys=True).encode())


def held_parts(table: Store) -> list[Held]:
    """All of them, with what they say of themselves."""
    store = held_store(table)
    listed = list(list_parts(store))
    with ThreadPoolExecutor(READ_THREADS) as pool:
        facts = list(pool.map(lambda part: read_prediction_facts(store, part[1]), listed))
    return [Held(name, info, one) for (name, info), one in zip(listed, facts, strict=True)]


def tally(
    table: Store, embeddings: Store, held: Sequence[Held], reference_sha256: str | None = None
) -> Tally:
    """Add up what the held parts say of themselves, and what their embedding parts do.

    Args:
        reference_sha256: of what the bundle remembers now; counts that were made with another are left out.

    Raises:
        TableDamaged: a part was not made for this: it does not say what is in it.
    """
    with ThreadPoolExecutor(READ_THREADS) as pool:
        names = [embedding_part_of(part) for part in held]
        sources = list(pool.map(lambda name: read_embedding_facts(embeddings, name), names))
    labels: Counter[str] = Counter()
    cosines: list[int] | None = [] if held else None
    for part in held:
        if part.facts.answer_counts is None or part.facts.abstained is None:
            raise TableDamaged(
                f"{held_store(table).uri}/{part.info.path}: does not say what is in it",
                way_out="delete the file and run `engine nightly` again",
            )
        labels.update(part.facts.answer_counts)
        is_comparable = part.facts.reference_sha256 == reference_sha256
        cosines = _added(cosines, part.facts.cosine_counts if is_comparable else None)
    compared, agreeing = _agreement(table, held)
    return Tally(
        parts=len(held),
        rows=sum(part.facts.rows for part in held),
        rows_expected=sum(source.samples - source.rejects for source in sources),
        samples=sum(source.samples for source in sources),
        rejects=sum(source.rejects for source in sources),
        answer_counts=dict(sorted(labels.items())),
        abstained=sum(part.facts.abstained or 0 for part in held),
        cosine_counts=None if cosines is None else tuple(cosines),
        compared=compared,
        agreeing=agreeing,
        parts_with_rejects=tuple(name for name, source in zip(names, sources, strict=True) if source.rejects),
    )


def publish(table: Store, held: Sequence[Held], check: Callable[[], None] = lambda: None) -> int:
    """Copy these held parts to their places, copies for people first, then remove them; how many parts.

    Args:
        held: those that were judged; what came after is left.
        check: called before each step that readers see; what it raises ends the publishing where it is.
    """
    store = held_store(table)
    names = {part.name for part in held}
    copies = [info for info, name in _copies(store) if name in names]
    parts = [part.info for part in held]
    for infos in (copies, parts):  # a part's data commits its copies
        check()
        with ThreadPoolExecutor(READ_THREADS) as pool:
            list(pool.map(lambda info: table.copy(_seen_from_table(info), info.path), infos))
    check()
    with ThreadPoolExecutor(READ_THREADS) as pool:  # data first: a copy without it is nobody's
        list(pool.map(lambda info: store.delete(info.path), parts))
        list(pool.map(lambda info: store.delete(info.path), copies))
    left = {
        path: night for path, night in refused(table).items() if path not in {info.path for info in parts}
    }
    if left:
        store.write(REFUSED, json.dumps(left, indent=1, sort_keys=True).encode())
    else:
        store.delete(REFUSED)
    return len(parts)


def keep_night(table: Store, run_id: str, summary: Mapping[str, Any]) -> str:
    """Write a night's summary beside the table; its path."""
    path = f"{NIGHTS_FOLDER}{run_id}.json"
    table.write(path, json.dumps(dict(summary), indent=1).encode())
    return path


def last_night(table: Store) -> dict[str, Any] | None:
    """The summary of the last night, also of one that was held back."""
    return next(nights(table), None)


def last_published(table: Store) -> dict[str, Any] | None:
    """The summary of the last night that published something here."""
    counts = ("answer_counts", "abstained")
    for night in nights(table):
        if night.get("published_rows") and all(night.get(name) is not None for name in counts):
            return night
    return None


def nights(table: Store) -> Iterator[dict[str, Any]]:
    """Summaries, the latest first: their names begin with the time."""
    paths = (path for path in table.names(NIGHTS_FOLDER) if path.endswith(".json"))
    for path in sorted(paths, reverse=True):
        try:
            night = json.loads(table.read(path))
        except (ObjectNotFound, ValueError):
            continue  # somebody else's file, or gone meanwhile
        if isinstance(night, dict) and "run_id" in night:
            yield night


def _added(sums: list[int] | None, counts: tuple[int, ...] | None) -> list[int] | None:
    """Nothing, once a part has nothing."""
    if sums is None or counts is None:
        return None
    return [left + right for left, right in zip(sums or [0] * len(counts), counts, strict=True)]


def embedding_part_of(part: Held) -> PartName:
    """What it was made from.

    Raises:
        TableDamaged: the part does not say.
    """
    name = parse_part_name(part.facts.embedding_part)
    if name is None:
        raise TableDamaged(f"{part.info.path}: made from {part.facts.embedding_part!r}, which is not a part")
    return name


def _seen_from_table(info: ObjectInfo) -> ObjectInfo:
    return dataclasses.replace(info, path=f"{HELD_FOLDER}/{info.path}")


def _copies(store: Store) -> Iterator[tuple[ObjectInfo, PartName]]:
    for info in store.list(COPIES_FOLDER):
        parsed = parse_copy_path(info.path)
        if parsed is not None:
            yield info, parsed[0]


def _agreement(table: Store, held: Sequence[Held]) -> tuple[int, int]:
    """Of shards that were replaced: keys with a prediction then and now, and how many of them say the same."""
    names = {part.name for part in held}
    replaced = {part.name.path16 for part in held}
    before = [info for name, info in list_parts(table) if name.path16 in replaced and name not in names][
        :COMPARED_PARTS
    ]
    if not before:
        return 0, 0
    shards = {name.path16 for info in before if (name := parse_part_name(info.path)) is not None}
    now = [part.info for part in held if part.name.path16 in shards]
    old, new = _labels(table, before), _labels(held_store(table), now)
    common = old.keys() & new.keys()
    return len(common), sum(old[key] == new[key] for key in common)


def _labels(store: Store, infos: list[ObjectInfo]) -> dict[tuple[str, str], Any]:
    """(shard, key) -> what the row says; keys that stand twice in a shard are left out."""
    found: dict[tuple[str, str], Any] = {}
    twice: set[tuple[str, str]] = set()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for part in pool.map(lambda info: read_part(store, info), infos):
            column = "labels" if "labels" in part.column_names else "label"
            rows = zip(*(part[name].to_pylist() for name in ("shard", "key", column)), strict=True)
            for shard, key, label in rows:
                if (shard, key) in found:
                    twice.add((shard, key))
                found[shard, key] = label
    return {key: label for key, label in found.items() if key not in twice}
