"""The check of a whole table, in the order it goes: record, listing, every part, shards, source."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from engine.errors import ContractMismatch, ObjectNotFound, RecipeError, StorageError, TableDamaged
from engine.parts import COPIES_FOLDER, PartName, copy_path, parse_copy_path, parse_part_name, prediction_name
from engine.shards.kinds import open_reader
from engine.storage import ObjectInfo, Store, open_store
from engine.tables import DATA_FOLDER, READ_THREADS, RECORD_NAME, REJECTS_FOLDER, open_table
from engine.verification.embedding_part import check_embedding_part
from engine.verification.findings import Damage, Finding, Leftover, Unfinished, Verification
from engine.verification.part import Checked, ListedPart
from engine.verification.prediction_part import check_prediction_part, check_shard_prediction_part
from engine.verification.record import Claims, read_claims
from engine.verification.shards import source_findings, version_findings, versions_of

_CANNOT_OPEN = (StorageError, TableDamaged, ContractMismatch, RecipeError)
HELD_BYTES = 256 << 20  # of parts that are being checked at once; a larger part is checked alone


def verify_table(
    store: Store,
    source: Iterable[ObjectInfo] | None = None,
    report: Callable[[int, int, int], None] = lambda done, total, bytes_read: None,
) -> Verification:
    """Read the whole table, a few parts at a time, and list what is not as it should be.

    Args:
        store: rooted at the table.
        source: shards that the source lists now (`source_shards`); None: they are not compared.
        report: told parts done, parts in all, bytes read.

    Raises:
        ObjectNotFound: there is no table.
        StorageError: the store itself is at fault.
    """
    claims, found = read_claims(store)
    listed, strangers = _listing(store, claims)
    if claims.is_absent and not listed:
        raise ObjectNotFound(
            f"{store.uri}: no table here",
            wanted=f"a folder with {RECORD_NAME} and {DATA_FOLDER}",
            way_out="check the uri, or run the job that writes the table first",
        )
    if claims.fingerprint is None and any(part.name.embedding8 for part in listed):
        claims = replace(
            claims, kind="predictions"
        )  # without a record the names tell, of those made of embeddings
    claims, embeddings = _with_embeddings(claims, store, listed)
    result = Verification(store.uri, claims.kind, parts=len(listed))
    result.shards = len({part.name.path16 for part in listed})
    result.add([*found, *strangers, *embeddings])
    _check_parts(store, claims, listed, result, report)
    if claims.is_of_shards:
        versions = versions_of(listed)
        result.add(version_findings(versions))
        if source is not None:
            result.add(source_findings(versions, source))
    return result


def source_shards(store: Store, pattern: str | None = None) -> Iterator[ObjectInfo]:
    """The shards that the source of a table lists now, of embeddings or of predictions straight from images.

    Args:
        store: rooted at the table; its source is opened with the same storage settings.
        pattern: as in the recipe (the table does not keep it); None: the default of the source's kind.

    Raises:
        RecipeError: the table's record does not say what its source is.
    """
    claims, _ = read_claims(store)
    if claims.source is None:
        raise RecipeError(
            f"{store.uri}/{RECORD_NAME}: does not name a source of shards",
            wanted="the record of an embedding table, or of predictions that were made straight from images",
            way_out="leave --source out",
        )
    config = claims.source if pattern is None else claims.source.model_copy(update={"pattern": pattern})
    reader = open_reader(config, max_sample_bytes=1)  # nothing is read
    return reader.list_shards(open_store(config.uri, store.config))


def _with_embeddings(
    claims: Claims, store: Store, listed: Sequence[ListedPart]
) -> tuple[Claims, list[Finding]]:
    """For predictions: what the embedding table calls for now, and how that differs from what is there."""
    if claims.is_of_shards or claims.source_uri is None:
        return claims, []
    try:
        table = open_table(open_store(claims.source_uri, store.config))
        rows_per_part = int(table.record["rows_per_part"])
    except (*_CANNOT_OPEN, KeyError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())
        return claims, [Finding(Unfinished.EMBEDDINGS_UNREACHABLE, claims.source_uri, said)]
    wanted = {prediction_name(name, info.identity): name for name, info in table.parts}
    present = {part.name for part in listed}
    findings = [
        Finding(Unfinished.UNSCORED_PART, f"{table.store.uri}/{DATA_FOLDER}{part}", "has no predictions yet")
        for name, part in wanted.items()
        if name not in present
    ]
    findings += [
        Finding(
            Leftover.STALE_PREDICTIONS, part.info.path, "its embedding part is gone, or was rewritten since"
        )
        for part in listed
        if part.name not in wanted
    ]
    return replace(claims, rows_per_part=rows_per_part), findings


def _listing(store: Store, claims: Claims) -> tuple[list[ListedPart], list[Finding]]:
    """Parts by shard, version and number, and a finding for everything else.

    Data is listed first: a rejects file is written before its data part, so none is missed.
    """
    data, found = _files(store, DATA_FOLDER, claims)
    rejects, strange = _files(store, REJECTS_FOLDER, claims)
    found += strange
    found += [
        Finding(Leftover.ORPHANED_REJECTS, info.path, "there is no data part of that name")
        for name, info in rejects.items()
        if name not in data
    ]
    found += _copy_findings(store, claims, data)
    parts = [ListedPart(name, info, rejects.get(name)) for name, info in data.items()]
    parts.sort(key=lambda part: (part.name.path16, part.name.source8, part.name.number, part.info.path))
    return parts, found


def _copy_findings(store: Store, claims: Claims, data: Mapping[PartName, ObjectInfo]) -> Iterator[Finding]:
    """Copies for people: each part that was listed has all of them, as they are written before it."""
    there: set[tuple[PartName, str]] = set()
    for path in store.names(COPIES_FOLDER):
        copy = parse_copy_path(path)
        if copy is None:
            yield Finding(Leftover.FOREIGN_FILE, path, "not the name of a copy of a part")
            continue
        there.add(copy)
        name, form = copy
        if name not in data:
            yield Finding(Leftover.ORPHANED_COPY, path, "there is no data part of that name")
        elif claims.also is not None and form not in claims.also:
            yield Finding(Leftover.ORPHANED_COPY, path, f"the table has no copies as {form}")
    for name, info in data.items():
        for form in claims.also or ():
            if (name, form) not in there:
                message = f"{copy_path(name, form)} is not there; delete the part and score again"
                yield Finding(Damage.COPY_MISSING, info.path, message)


def _files(store: Store, folder: str, claims: Claims) -> tuple[dict[PartName, ObjectInfo], list[Finding]]:
    parts: dict[PartName, ObjectInfo] = {}
    found: list[Finding] = []
    of_embeddings = not claims.is_of_shards
    for info in store.list(folder):
        name = parse_part_name(info.path)
        if name is None:
            found.append(Finding(Leftover.FOREIGN_FILE, info.path, "not the name of a part"))
        elif info.path != f"{folder}{name}":
            where = f"{folder}{name}"
            found.append(Finding(Damage.MISPLACED_PART, info.path, f"readers count it; its place is {where}"))
        elif (name.embedding8 is not None) != of_embeddings and claims.fingerprint is not None:
            made_of = "embedding parts" if of_embeddings else "shards"
            message = f"not a part of a table of {claims.kind} that is made of {made_of}"
            found.append(Finding(Damage.MISPLACED_PART, info.path, message))
        else:
            parts[name] = info
    return parts, found


def _check_parts(
    store: Store,
    claims: Claims,
    listed: Sequence[ListedPart],
    result: Verification,
    report: Callable[[int, int, int], None],
) -> None:
    """Check each part, and each with the one before it."""
    before: Checked | None = None
    paths_by_k: dict[int, list[str]] = {}
    report(0, len(listed), 0)
    for done, checked in enumerate(_in_order(store, claims, listed), 1):
        result.add(checked.findings)
        result.add(_offset_findings(before, checked))
        result.rows += checked.rows
        result.rejects += checked.rejects
        result.bytes_read += checked.bytes_read
        if checked.top_k is not None:
            paths_by_k.setdefault(checked.top_k, []).append(checked.part.info.path)
        before = checked
        report(done, len(listed), result.bytes_read)
    result.add(_top_k_findings(paths_by_k))


def _in_order(store: Store, claims: Claims, listed: Sequence[ListedPart]) -> Iterator[Checked]:
    """Check parts side by side; only as many are in memory as HELD_BYTES allows, and at least one."""
    waiting: deque[tuple[int, Future[Checked]]] = deque()
    held = 0
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="verify") as pool:
        for part in listed:
            while waiting and (len(waiting) >= 2 * READ_THREADS or held + part.size > HELD_BYTES):
                size, future = waiting.popleft()
                held -= size
                yield future.result()
            held += part.size
            waiting.append((part.size, pool.submit(_check_part, store, claims, part)))
        for _, future in waiting:
            yield future.result()


def _check_part(store: Store, claims: Claims, part: ListedPart) -> Checked:
    if part.name.embedding8 is not None:
        return check_prediction_part(store, claims, part)
    if claims.kind == "predictions":
        return check_shard_prediction_part(store, claims, part)
    return check_embedding_part(store, claims, part)


def _offset_findings(before: Checked | None, after: Checked) -> Iterator[Finding]:
    """Parts of one version join without a gap and without an overlap, where both know their bytes."""
    begin, end, path = after.begin_offset, after.end_offset, after.part.info.path
    if begin is not None and end is not None and end < begin:
        yield Finding(Damage.BYTE_OFFSETS, path, f"ends at byte {end} and begins at {begin}")
    if before is None or before.end_offset is None or begin is None:
        return
    one, other = before.part.name, after.part.name
    if (one.path16, one.source8, one.number + 1) != (other.path16, other.source8, other.number):
        return
    if begin != before.end_offset:
        message = f"begins at byte {begin}, wanted {before.end_offset}, where part {one.number} ends"
        yield Finding(Damage.BYTE_OFFSETS, path, message)


def _top_k_findings(paths_by_k: Mapping[int, Sequence[str]]) -> Iterator[Finding]:
    """All parts of a prediction table have as many top entries; the minority is named."""
    if len(paths_by_k) < 2:
        return
    usual = max(paths_by_k, key=lambda k: len(paths_by_k[k]))
    for k, paths in paths_by_k.items():
        for path in paths if k != usual else ():
            yield Finding(Damage.COLUMNS, path, f"{k} top entries, wanted {usual} as in most parts")
