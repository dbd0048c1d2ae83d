"""What lies at a URI, in a screenful: a bundle, a table, a prediction part, or files. Reads records and listings, and
footers; of predictions it tells what they were made from.

Not for: whether a table is whole (`engine.verification`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from engine.config import stable_hash
from engine.errors import BundleError, EngineError, ObjectChanged, ObjectNotFound, TableDamaged
from engine.heads.bundle import MANIFEST, Bundle, open_bundle, report_uri
from engine.images import ImageRejected, decode_image
from engine.lineage import lineage_of_part, lineage_of_table
from engine.night import HELD_FOLDER, held_store, last_night
from engine.parts import PartName, TableProgress, parse_part_name
from engine.recipes import Limits
from engine.run_record import last_run
from engine.shards.base import Resume
from engine.shards.guess import SourceGuess, Tally, guess_or_reason
from engine.shards.kinds import open_reader
from engine.storage import ObjectInfo, Store, open_store
from engine.tables import (
    DATA_FOLDER,
    RECORD_NAME,
    REJECTS_FOLDER,
    is_of_images,
    part_names,
    parts_to_read,
    rows_and_columns,
)

CLASSES_SHOWN = 12
EXAMPLES = 3
FOOTERS_READ = 500  # 60 round trips, one after another; of larger tables rows are not counted
SIDE_LOOKED_AT_PX = 32  # of the first sample: enough to know that it can be decoded
BUNDLE, TABLE, FILES = "bundle", "table", "files"
_DAMAGED = "DAMAGED"
# Of a table's record, those fields that it has, in this order.
_OF_RECORD = (
    "schema_version",
    "engine_version",
    "created",
    "source_uri",
    "bundle_uri",
    "bundle",
    "fingerprint",
    "width",
)


def inspect_uri(store: Store) -> dict[str, Any]:
    """Facts by name, in the order in which they are best read.

    Raises:
        BundleError, TableDamaged: there is one, and it cannot be read.
        ObjectNotFound: nothing lies there.
        StorageError: the store cannot be read.
    """
    part = parse_part_name(store.uri)
    if part is not None and f"/{DATA_FOLDER}" in store.uri and _is_of_predictions(part, store):
        return _inspect_prediction_part(store)
    inspect = {BUNDLE: _inspect_bundle, TABLE: _inspect_table, FILES: _inspect_files}
    return inspect[kind_at(store)](store)


def kind_at(store: Store) -> str:
    """What the record at a URI says: BUNDLE or TABLE, or without one FILES."""
    for name, kind in ((MANIFEST, BUNDLE), (RECORD_NAME, TABLE)):
        try:
            store.info(name)
        except ObjectNotFound:
            continue
        return kind
    return FILES


def _inspect_bundle(store: Store) -> dict[str, Any]:
    bundle = open_bundle(store)
    manifest = bundle.manifest
    files = {role: _state(bundle, role) for role in manifest.files}
    damaged = [role for role, state in files.items() if state.startswith(_DAMAGED)]
    metrics = bundle.document("metrics") if "metrics" not in damaged else {}
    suspects = bundle.document("suspects") if "suspects" in set(files) - set(damaged) else None
    return {
        "kind": "bundle",
        "uri": store.uri,
        "id": bundle.id,
        "created": manifest.created,
        "task": manifest.task,
        "classes": _some_of(manifest.classes),
        "class_ids": _some_of(manifest.class_ids) or None,
        "head": manifest.head.model_dump(mode="json"),
        "side_features": [one.column for one in manifest.side_features],
        "width": manifest.width,
        "fingerprint": manifest.fingerprint,
        "calibration": manifest.calibration.model_dump(mode="json"),
        "validation": _figures(metrics.get("validation")),
        "test": _figures(metrics.get("test")),
        "heads_tried": len(metrics.get("grid", [None])),
        "suspect_labels": suspects and len(suspects["suspects"]),
        "report": report_uri(bundle),
        "files": files,
        **_last_run_of(store),
        "damaged": damaged,
        "versions": manifest.versions,
    }


def _some_of(names: Sequence[str]) -> str:
    more = len(names) - CLASSES_SHOWN
    return ", ".join(names[:CLASSES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _figures(split: dict[str, Any] | None) -> dict[str, Any] | None:
    """Rows, and the single numbers, of a split in metrics.json."""
    return split and {name: value for name, value in split.items() if isinstance(value, int | float)}


def _state(bundle: Bundle, role: str) -> str:
    file = bundle.manifest.files[role]
    try:
        bundle.read(role)
    except BundleError as error:
        return f"{_DAMAGED} {file.path}: {error.found}"
    return f"{file.path}, {file.size_bytes:,} bytes"


def _record_of(store: Store) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(store.read(RECORD_NAME))
        record["kind"]  # is looked at first
    except (ValueError, KeyError, TypeError) as error:
        raise TableDamaged(f"{store.uri}/{RECORD_NAME}: not a table record", found=repr(error)) from None
    return record


def _inspect_table(store: Store) -> dict[str, Any]:
    record = _record_of(store)
    facts: dict[str, Any] = {"kind": f"table of {record['kind']}", "uri": store.uri}
    facts |= {name: record[name] for name in _OF_RECORD if record.get(name) is not None}
    if "backbone" in record:
        facts["backbone"], facts["runtime"] = record["backbone"], record.get("runtime")
    if "contract" in record:
        facts["recipe_sha256"] = stable_hash(record["contract"])
    listed = list(store.list(DATA_FOLDER))
    progress = TableProgress.of_paths((info.path for info in listed), DATA_FOLDER)
    whole = sum(any(one.is_complete for one in versions.values()) for versions in progress.values())
    facts |= {
        "shards": len(progress),
        "shards_complete": whole,
        "parts": len(listed),
        "bytes": sum(info.size for info in listed),
        **_rows_of(store, progress, listed),
    }
    if record["kind"] != "predictions" or is_of_images(record):
        facts["parts_with_rejects"] = sum(1 for _ in store.names(REJECTS_FOLDER))
    facts |= _last_run_of(store)
    if record["kind"] != "predictions":
        return facts
    steps = [asdict(step) for step in lineage_of_table(store, record)]
    return facts | _nights_of(store) | {"lineage": steps}


def _rows_of(store: Store, progress: TableProgress, listed: Sequence[ObjectInfo]) -> dict[str, Any]:
    """Rows that readers see and the columns that they have, where that takes no more than a moment."""
    names = ((parse_part_name(info.path), info) for info in listed)
    named = ((name, info) for name, info in names if name is not None and name.path16 in progress)
    read = [info for _, info in parts_to_read(named, progress)]
    if not read or len(read) > FOOTERS_READ:
        return {}
    try:
        rows, columns = rows_and_columns(store, read)
    except (TableDamaged, ObjectChanged, ObjectNotFound) as error:
        return {"rows": f"{_DAMAGED}: {error.thing}"}
    return {"rows": rows, "columns": columns}


def _last_run_of(store: Store) -> dict[str, Any]:
    """How the last run that is kept here ended, and what it met; nothing where none is kept."""
    run = last_run(store)
    if run is None:
        return {}
    error = run.get("error") or {}
    told = {name: run.get(name) for name in ("run_id", "ended", "outcome")} | {"error": error.get("thing")}
    return {"last_run": {name: value for name, value in told.items() if value is not None}}


def _nights_of(store: Store) -> dict[str, Any]:
    """How many parts are held back from readers, and how the last night ended; None: there was none."""
    night = last_night(store)
    wanted = ("run_id", "published_parts", "published_rows", "held_parts", "by_hand")
    last = night and {name: night[name] for name in wanted if night.get(name) is not None}
    if last and isinstance(gate := (night or {}).get("gate"), dict):
        last["passes_gate"] = gate.get("passes")
    if last and isinstance(error := (night or {}).get("error"), dict):
        last["error"] = error.get("thing")
    return {"held_parts": sum(1 for _ in part_names(held_store(store))), "last_night": last}


def _is_of_predictions(part: PartName, file: Store) -> bool:
    """By its name, or else by what its table says; one that says nothing is taken for one of embeddings."""
    if part.embedding8 is not None:
        return True
    try:
        return is_of_images(_record_of(open_store(file.uri.rpartition(f"/{DATA_FOLDER}")[0], file.config)))
    except EngineError:
        return False


def _inspect_prediction_part(file: Store) -> dict[str, Any]:
    """Of one part, by the URI of its file: published, or held back."""
    folder, _, name = file.uri.rpartition(f"/{DATA_FOLDER}")
    table = open_store(folder, file.config)
    is_held = folder.endswith(f"/{HELD_FOLDER}")
    owner = open_store(folder.removesuffix(f"/{HELD_FOLDER}"), file.config)
    record: Mapping[str, Any] = {}
    said = owner.uri
    try:
        record = _record_of(owner)
    except EngineError as error:
        said = f"{owner.uri}, of which nothing is known: {error.thing}"
    facts, steps = lineage_of_part(table, record, f"{DATA_FOLDER}{name}")
    told = {"kind": "part of predictions", "uri": file.uri, "table": said, "is_held_back": is_held}
    return {**told, **facts, "lineage": [asdict(step) for step in steps]}


def _inspect_files(store: Store) -> dict[str, Any]:
    count = size = 0
    endings: Counter[str] = Counter()
    examples: list[str] = []
    tally = Tally()
    for info in store.list():
        tally.add(info)
        count, size = count + 1, size + info.size
        endings[_ending(info.path)] += 1
        if len(examples) < EXAMPLES:
            examples.append(info.path)
    if not count:
        raise ObjectNotFound(
            f"{store.uri}: nothing here",
            wanted=f"a bundle ({MANIFEST}), a table ({RECORD_NAME}) or files",
            way_out="check the URI",
        )
    facts = {
        "kind": "files",
        "uri": store.uri,
        "files": count,
        "bytes": size,
        "endings": dict(endings.most_common(EXAMPLES * 2)),
        "examples": examples,
    }
    return facts | _source_of(tally, store)


def _source_of(tally: Tally, store: Store) -> dict[str, Any]:
    """What the files seem to be as a source of images, and the first sample as a recipe's reader gives it."""
    guess = guess_or_reason(tally, store)
    if not isinstance(guess, SourceGuess):
        return {} if guess is None else {"no_source": guess}
    return {
        "source_kind": guess.config.kind,
        ("images" if guess.config.kind == "files" else "shards"): guess.shards,
        "bytes_of_one": {"smallest": guess.smallest, "largest": guess.largest},
        "first_record": guess.record,
        "first_sample": _first_sample(guess, store),
        "source": guess.block(),
    }


def _first_sample(guess: SourceGuess, store: Store) -> dict[str, Any] | str:
    """Read with the block that is suggested, and its image decoded; or what is in the way."""
    limits = Limits()
    reader = open_reader(guess.config, limits.max_sample_bytes)
    try:
        shard = next(reader.list_shards(store))
        sample = next(reader.read(store, shard, Resume()))
        if sample.problem is not None or sample.image is None:
            return f"{sample.key}: {': '.join(sample.problem or ('no image',))}"
        decoded = decode_image(sample.image, SIDE_LOOKED_AT_PX, "stretch", limits.max_pixels)
    except StopIteration:
        return "the first shard has no samples"
    except (EngineError, ImageRejected) as error:
        return " ".join(str(error).split())
    told: dict[str, Any] = {"key": sample.key, "label": sample.label}
    told |= dict(zip(guess.config.metadata_columns(), sample.metadata, strict=True))
    size = {"width_px": decoded.width_px, "height_px": decoded.height_px, "bytes": sample.size_bytes}
    return told | size


def _ending(path: str) -> str:
    """With what was done to it, as in .tar.gz."""
    parts = path.rpartition("/")[2].lower().split(".")
    return (
        "." + ".".join(parts[-2:] if parts[-1] in ("gz", "zst", "bz2") else parts[-1:])
        if parts[1:]
        else "none"
    )
