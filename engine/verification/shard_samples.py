"""What every part that was made from a shard must hold, of embeddings or predictions: each sample, as row or reject."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.parts import part_name
from engine.schema import rejects_schema
from engine.storage import Store
from engine.tables import REJECTS_FOLDER, ShardPartFacts
from engine.verification.findings import Damage, Leftover
from engine.verification.part import UNREADABLE, Checked, check_indexes, columns_fit, in_one_line, read_object
from engine.verification.record import Claims


def check_origin(checked: Checked, claims: Claims, facts: ShardPartFacts) -> bool:
    """Network, source and bytes of the shard as the table and the name have them; whether the name is right."""
    checked.begin_offset, checked.end_offset = facts.begin_offset, facts.end_offset
    checked.compare(Damage.FINGERPRINT, "fingerprint", facts.fingerprint, claims.fingerprint)
    checked.compare(Damage.SOURCE_URI, "source URI", facts.source_uri, claims.source_uri)
    found = checked.part.name
    name = part_name(facts.shard, facts.identity, found.number, found.last)
    return checked.compare(Damage.PART_NAME, f"of {facts.shard!r}, {facts.identity!r}", found, name)


def check_shard_column(checked: Checked, tables: Sequence[pa.Table], shard: str) -> None:
    shards = {value for table in tables for value in pc.unique(table["shard"]).to_pylist()}
    if others := sorted(shards - {shard}):
        checked.note(Damage.SHARD_COLUMN, f"found {', '.join(map(repr, others[:3]))}, wanted {shard!r}")


def check_samples(
    checked: Checked,
    tables: Sequence[pa.Table],
    facts: ShardPartFacts,
    rows_per_part: int | None,
    has_all: bool,
) -> None:
    """Rows and rejects account for every sample, and their places are those of the part's number."""
    counted = checked.rows + (checked.rejects if has_all else facts.rejects)
    counts_agree = checked.compare(Damage.SAMPLE_COUNT, "rows + rejects", counted, facts.samples)
    name = checked.part.name
    if rows_per_part is not None:
        # A shard that fills its parts has no empty part behind; only an empty shard has an empty part.
        fewest = min(name.number, 1) if name.last else rows_per_part
        if not fewest <= facts.samples <= rows_per_part:
            wanted = f"{fewest} to {rows_per_part}" if name.last else f"{rows_per_part}"
            checked.note(Damage.PART_SIZE, f"found {facts.samples} samples, wanted {wanted}")
    index = np.concatenate([table["index"].to_numpy() for table in tables])
    check_indexes(
        checked, index, facts.samples if counts_agree else max(counted, facts.samples), rows_per_part
    )


def check_rejects(store: Store, claims: Claims, checked: Checked, facts: ShardPartFacts) -> pa.Table | None:
    """The rejects that the footer names (perhaps none, as an empty table); None where they cannot be had."""
    info = checked.part.rejects
    path = f"{REJECTS_FOLDER}{checked.part.name}"
    if facts.rejects_sha256 is None:
        if info is not None:
            checked.note(Leftover.ORPHANED_REJECTS, "its data part names no rejects", info.path)
        checked.compare(Damage.REJECTS_COUNT, "rejects, of which no file is named", facts.rejects, 0)
        return rejects_schema(keep_bytes=False).empty_table() if facts.rejects == 0 else None
    if info is None:
        checked.note(Damage.REJECTS_MISSING, f"its data part names it, with {facts.rejects} rejects", path)
        return None
    encoded = read_object(store, checked, info)
    if encoded is None:
        return None
    digest = hashlib.sha256(encoded).hexdigest()
    if digest != facts.rejects_sha256:
        message = f"sha-256: found {digest}, wanted {facts.rejects_sha256}"
        checked.note(Damage.REJECTS_CHECKSUM, message, path)
        return None
    return _open_rejects(claims, checked, facts, encoded, path)


def _open_rejects(
    claims: Claims, checked: Checked, facts: ShardPartFacts, encoded: bytes, path: str
) -> pa.Table | None:
    try:
        rejects = pq.ParquetFile(io.BytesIO(encoded)).read()
        rejects.validate(full=True)
    except UNREADABLE as error:
        checked.note(Damage.UNREADABLE_REJECTS, in_one_line(error), path)
        return None
    keeps_bytes = claims.keeps_reject_bytes
    if keeps_bytes is None:
        keeps_bytes = "bytes" in rejects.schema.names
    if not columns_fit(checked, rejects, rejects_schema(keeps_bytes), path):
        return None
    checked.rejects = rejects.num_rows
    if rejects.num_rows != facts.rejects:
        message = f"{rejects.num_rows} rejects, wanted {facts.rejects} as its data part says"
        checked.note(Damage.REJECTS_COUNT, message, path)
    return rejects
