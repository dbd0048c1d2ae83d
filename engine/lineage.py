"""Where predictions come from: bundle, embeddings, shards, as they were when they were used and as they are now.

Reads records, footers and what stores say of single objects. What is gone or cannot be reached is a sentence, no error.
Not for: whether a table is whole (`engine.verification`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.config import stable_hash
from engine.errors import BundleError, EngineError, ObjectNotFound
from engine.heads.bundle import MANIFEST, Bundle, open_bundle
from engine.parts import PartName, hash8_of, parse_part_name
from engine.shards.kinds import open_reader, source_of_contract
from engine.storage import Store, open_store
from engine.tables import (
    DATA_FOLDER,
    EmbeddingPartFacts,
    PredictionPartFacts,
    Record,
    ShardPartFacts,
    ShardPredictionFacts,
    is_of_images,
    read_embedding_facts,
    read_part,
    read_prediction_facts,
    read_record,
    read_shard_prediction_facts,
)

State = Literal["same", "changed", "gone", "unreadable", "unknown", "none"]
NOT_SAID = "not said: written by an older engine"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that predictions were made from.

    Attributes:
        what: "bundle", "fitted on", "embeddings", "embedding part", "source" or "shard".
        uri: where it lay; None where nothing says so.
        state: as it was (`same`), another one is there (`changed`), `gone`, out of reach or damaged (`unreadable`),
            `unknown`, or `none` where there never was one.
        says: the same for people, with what there is to know.
    """

    what: str
    uri: str | None
    state: State
    says: str


def lineage_of_table(table: Store, record: Mapping[str, Any]) -> list[Step]:
    """What a prediction table was made from, nearest first.

    Args:
        table: rooted at it; the rest is reached with the same storage settings.
        record: its `_table.json`.
    """
    if is_of_images(record):
        steps = _bundle_steps(table, record.get("bundle_uri"), record.get("bundle"))
        return [*steps, _no_embeddings(record), _source_step(table, record)]
    scored, embeddings = _embeddings_step(table, record)
    steps = [*_bundle_steps(table, record.get("bundle_uri"), record.get("bundle")), scored]
    return [*steps, _source_step(table, embeddings)]


def lineage_of_part(table: Store, record: Mapping[str, Any], path: str) -> tuple[dict[str, Any], list[Step]]:
    """What one prediction part says of itself, and what it was made from.

    Args:
        table: rooted at the prediction table.
        record: its `_table.json`; empty where that is gone.
        path: of the part below the table.

    Raises:
        ObjectNotFound, TableDamaged: it is gone, or not a prediction part.
    """
    name = parse_part_name(path)
    assert name is not None
    if name.embedding8 is None:
        return _lineage_of_shard_part(table, record, name)
    info = table.info(path)
    facts = read_prediction_facts(table, info)
    told = {"rows": facts.rows, **_told(facts, record)}
    embeddings_uri = record.get("source_uri")
    part, scored = _embedding_part_step(table, embeddings_uri, facts)
    steps = [*_bundle_steps(table, record.get("bundle_uri"), facts.bundle), part]
    _, embeddings = _embeddings_step(table, record)
    shard = scored.shard if scored is not None else _shard_of_rows(table, path)
    return told, [*steps, _shard_step(table, embeddings, name, shard, scored)]


def _lineage_of_shard_part(
    table: Store, record: Mapping[str, Any], name: PartName
) -> tuple[dict[str, Any], list[Step]]:
    """Of a part that was made straight from a shard."""
    facts = read_shard_prediction_facts(table, name)
    rows, rejects = facts.samples - facts.rejects, facts.rejects
    steps = _bundle_steps(table, record.get("bundle_uri"), facts.bundle)
    shard = _shard_step(table, record if "contract" in record else None, name, facts.shard, facts)
    return {"rows": rows, "rejects": rejects, **_told(facts, record)}, [
        *steps,
        _no_embeddings(record),
        shard,
    ]


def _told(facts: PredictionPartFacts | ShardPredictionFacts, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the footer of either kind says."""
    return {
        "bundle": facts.bundle,
        "fingerprint": facts.fingerprint,
        "recipe_sha256": facts.recipe_sha256 or NOT_SAID,
        "recipe": _recipe_in_words(facts.recipe_sha256, record),
        "engine_version": facts.engine_version or NOT_SAID,
    }


def _recipe_in_words(recipe_sha256: str | None, record: Mapping[str, Any]) -> str:
    if recipe_sha256 is None or "contract" not in record:
        return "not compared with the table's"
    same = recipe_sha256 == stable_hash(record["contract"])
    return "that of the table" if same else "another one than the table's"


# ---------------------------------------------------------------- the bundle


def _bundle_steps(table: Store, uri: str | None, bundle_id: str | None) -> list[Step]:
    """The bundle, and the embeddings it was fitted on."""
    fitted = "fitted on"
    if uri is None:
        unknown = Step(
            "bundle", None, "unknown", f"{bundle_id}: the table's record does not say where it lay"
        )
        return [unknown, Step(fitted, None, "unknown", "only the bundle says")]
    try:
        store = open_store(uri, table.config)
        store.info(MANIFEST)
        bundle = open_bundle(store)
    except ObjectNotFound:
        gone = Step("bundle", uri, "gone", f"{bundle_id}: there is no {MANIFEST} any more")
        return [gone, Step(fitted, None, "unknown", "only the bundle says")]
    except EngineError as error:
        failed = Step("bundle", uri, "unreadable", f"{bundle_id}: {error.thing}")
        return [failed, Step(fitted, None, "unknown", "only the bundle says")]
    if bundle.id != bundle_id:
        says = f"republished since: {bundle.id} of {bundle.manifest.created} is there, wanted {bundle_id}"
        return [Step("bundle", uri, "changed", says), Step(fitted, None, "unknown", "only that bundle said")]
    says = f"{bundle.id}, published {bundle.manifest.created}"
    return [Step("bundle", uri, "same", says), _fitted_step(bundle)]


def _fitted_step(bundle: Bundle) -> Step:
    what = "fitted on"
    try:
        then, recipe = bundle.document("embeddings_table"), bundle.document("recipe")
    except BundleError as error:
        return Step(what, None, "unknown", error.thing)
    uri = (recipe.get("embeddings") or {}).get("uri")
    if uri is None:
        return Step(what, None, "unknown", f"no embedding table is named; {_made(then)}")
    return _compared(what, bundle.store, uri, then.get("created"), then.get("fingerprint"))[0]


# ---------------------------------------------------------------- embeddings


def _no_embeddings(record: Mapping[str, Any]) -> Step:
    return Step("embeddings", None, "none", f"not kept: labelled straight from images; {_made(record)}")


def _embeddings_step(table: Store, record: Mapping[str, Any]) -> tuple[Step, Record | None]:
    """The embedding table that was scored, and its record if it is there."""
    uri = record.get("source_uri")
    if uri is None:
        return Step("embeddings", None, "unknown", "the table's record does not say"), None
    return _compared("embeddings", table, uri, None, record.get("fingerprint"))


def _compared(
    what: str, near: Store, uri: str, created: str | None, fingerprint: str | None
) -> tuple[Step, Record | None]:
    """Whether the embedding table at `uri` is the one it was; None: that is not known of it."""
    try:
        now = read_record(open_store(uri, near.config), "embeddings")
    except EngineError as error:
        return Step(what, uri, "unreadable", error.thing), None
    if now is None:
        return Step(what, uri, "gone", "there is no table any more"), None
    if fingerprint != now.get("fingerprint") or created not in (None, now.get("created")):
        return Step(what, uri, "changed", f"another table is there since, {_made(now)}"), None
    return Step(what, uri, "same", _made(now)), now


def _made(record: Mapping[str, Any]) -> str:
    """When, and of which network and shards."""
    backbone = record.get("backbone") or {}
    network = backbone.get("name") or backbone.get("weights") or backbone.get("kind") or "a network"
    of = f"{network} (fingerprint {str(record.get('fingerprint'))[:16]})"
    source = f" of {record['source_uri']}" if record.get("source_uri") else ""
    return f"made {record.get('created', 'at an unknown time')} by {of}{source}"


def _embedding_part_step(
    table: Store, embeddings_uri: str | None, facts: PredictionPartFacts
) -> tuple[Step, EmbeddingPartFacts | None]:
    """The embedding part, and its footer while it is of the same shard's version."""
    what, name = "embedding part", parse_part_name(facts.embedding_part)
    if embeddings_uri is None or name is None:
        return Step(
            what, None, "unknown", f"{facts.embedding_part}: the table's record does not say where"
        ), None
    path = f"{DATA_FOLDER}{facts.embedding_part}"
    uri = f"{embeddings_uri}/{path}"
    try:
        store = open_store(embeddings_uri, table.config)
        now = store.info(path).identity
        footer = read_embedding_facts(store, name)
    except ObjectNotFound:
        return Step(what, uri, "gone", "its shard was replaced or pruned, or the part was deleted"), None
    except EngineError as error:
        return Step(what, uri, "unreadable", error.thing), None
    if now != facts.embedding_identity:
        says = f"rewritten since: {now} now, {facts.embedding_identity} when it was scored"
        return Step(what, uri, "changed", says), footer
    return Step(what, uri, "same", f"{facts.embedding_identity}, {footer.samples:,} samples"), footer


# ---------------------------------------------------------------- shards


def _source_step(table: Store, embeddings: Record | None) -> Step:
    """Of the record of the table that was made from it."""
    uri = None if embeddings is None else embeddings.get("source_uri")
    if uri is None:
        return Step("source", None, "unknown", "only the embedding table says")
    try:
        first = next(iter(open_store(uri, table.config).names()), None)
    except EngineError as error:
        return Step("source", uri, "unreadable", error.thing)
    if first is None:
        return Step("source", uri, "gone", "nothing lies there any more")
    return Step("source", uri, "same", "can be reached; `engine verify --source` compares every shard")


def _shard_of_rows(table: Store, path: str) -> str | None:
    """The shard that a prediction part's rows name; None where it has no rows."""
    shards = read_part(table, table.info(path), ["shard"])["shard"]
    shard: str | None = shards[0].as_py() if len(shards) else None
    return shard


def _shard_step(
    table: Store,
    embeddings: Record | None,
    name: PartName,
    shard: str | None,
    then: ShardPartFacts | None,
) -> Step:
    """The shard as it was when its embeddings were made, of which a part's name has a digest, and as it is now."""
    if shard is None:
        return Step("shard", None, "unknown", f"a part without rows, of a shard like {name.slug}")
    was = f"then {then.identity}" if then is not None else f"then of version {name.source8}"
    source_uri = then.source_uri if then is not None else (embeddings or {}).get("source_uri")
    source = source_of_contract(embeddings["contract"]) if embeddings is not None else None
    if source_uri is None or source is None:
        uri = None if source_uri is None else f"{source_uri}/{shard}"
        return Step("shard", uri, "unknown", f"{shard}, {was}; nothing says how to look for it now")
    uri = f"{source_uri}/{shard}"
    try:
        now = open_reader(source, max_sample_bytes=1).identity_now(
            open_store(source_uri, table.config), shard
        )
    except EngineError as error:
        return Step("shard", uri, "unreadable", f"{was}; {error.thing}")
    if now is None:
        return Step("shard", uri, "gone", f"{was}; the source has none of that name now")
    if hash8_of(now) == name.source8:
        return Step("shard", uri, "same", now)
    group = " (groups are looked for with the kind's own pattern)" if source.kind == "files" else ""
    return Step("shard", uri, "changed", f"{was}, {now} now{group}")
