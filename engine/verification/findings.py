"""What a check of a table can find, by stable short names, and the result it is put into."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from engine.schema import SCHEMA_VERSION


class Damage(StrEnum):
    """The table is wrong; each name is stable."""

    RECORD_MISSING = "record_missing"  # parts without a `_table.json`
    RECORD_DAMAGED = "record_damaged"  # `_table.json` is not a record, or contradicts itself
    SCHEMA_VERSION = "schema_version"  # of the record or of a part: not the one this engine reads
    MISPLACED_PART = "misplaced_part"  # a part below a folder of its own, or of the other kind of table
    UNREADABLE_PART = "unreadable_part"  # not Parquet, or cut
    FOOTER = "footer"  # no facts in the footer, or malformed ones
    FINGERPRINT = "fingerprint"  # the part's network is not the table's
    SOURCE_URI = "source_uri"  # the part's source is not the table's
    BUNDLE = "bundle"  # the part's bundle, or that of a row, is not the table's
    RECIPE = "recipe"  # the part was decided on by another contract than the table's
    PART_NAME = "part_name"  # shard and identity (or embedding part) in the footer give another name
    COLUMNS = "columns"  # names, types or nullability are not the schema's
    NULL_VALUES = "null_values"  # nulls where the schema allows none
    EMBEDDINGS_CHECKSUM = "embeddings_checksum"  # the numbers are not those that were written
    ZERO_EMBEDDING = "zero_embedding"
    NON_FINITE_EMBEDDING = "non_finite_embedding"
    SAMPLE_COUNT = "sample_count"  # rows + rejects are not the footer's samples
    ROW_COUNT = "row_count"  # rows of a prediction part are not the footer's
    PART_SIZE = "part_size"  # not rows_per_part samples, or more than that in a last part
    SHARD_COLUMN = "shard_column"  # rows of another shard
    DUPLICATE_INDEX = "duplicate_index"
    INDEX_RANGE = "index_range"  # outside of what the part's number gives
    BYTE_OFFSETS = "byte_offsets"  # a part does not begin where the one before it ends
    REJECTS_MISSING = "rejects_missing"
    REJECTS_CHECKSUM = "rejects_checksum"
    REJECTS_COUNT = "rejects_count"
    UNREADABLE_REJECTS = "unreadable_rejects"
    MISSING_PARTS = "missing_parts"  # below an end that is there
    PART_BEHIND_LAST = "part_behind_last"
    TWO_LAST_PARTS = "two_last_parts"
    REPEATED_PART = "repeated_part"  # one number of one version under two names
    CONFIDENCE_RANGE = "confidence_range"
    CONFIDENCE_ORDER = "confidence_order"
    COPY_MISSING = "copy_missing"  # of a prediction part, in a form that the table has
    TOP_ENTRY = "top_entry"  # label or confidence are not those of the first of the top entries


class Leftover(StrEnum):
    """Nobody needs it."""

    FOREIGN_FILE = "foreign_file"  # not a part; readers that open whole folders may trip over it
    ORPHANED_REJECTS = "orphaned_rejects"  # no data part names them
    ORPHANED_COPY = "orphaned_copy"  # for people, of a part or in a form that the table has not got
    STALE_VERSION = "stale_version"  # a second version of a shard, which `open_table` does not read
    STALE_PREDICTIONS = "stale_predictions"  # their embedding part is gone or was rewritten
    REMOVED_SHARD = "removed_shard"  # the source no longer lists it


class Unfinished(StrEnum):
    """The next job does it."""

    INCOMPLETE_SHARD = "incomplete_shard"  # its end was not written yet
    UNSCORED_PART = "unscored_part"  # an embedding part without predictions
    NEW_SHARD = "new_shard"  # the source lists it, the table has no part of it
    REPLACED_SHARD = "replaced_shard"  # the table has only other versions of it
    CHANGED_MEANWHILE = "changed_meanwhile"  # rewritten or removed while the table was read: not checked
    EMBEDDINGS_UNREACHABLE = "embeddings_unreachable"  # so predictions were not compared with them


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        kind: a stable short name; its class says which group it belongs to.
        object: path below the table; a shard's version is `data/<slug>.<path16>.<source8>.*`; or a shard's path.
        message: what was found and what was wanted.
    """

    kind: Damage | Leftover | Unfinished
    object: str
    message: str


@dataclass
class Verification:
    """What a check found; counts are of parts that could be read.

    Attributes:
        table: URI.
        kind: "embeddings" or "predictions".
        shards, parts, rows, rejects: of all versions that stand in the table.
        bytes_read: of parts and rejects files.
    """

    table: str
    kind: str
    shards: int = 0
    parts: int = 0
    rows: int = 0
    rejects: int = 0
    bytes_read: int = 0
    damage: list[Finding] = field(default_factory=list)
    leftovers: list[Finding] = field(default_factory=list)
    unfinished: list[Finding] = field(default_factory=list)

    def add(self, findings: Iterable[Finding]) -> None:
        """Put each finding into its group."""
        for finding in findings:
            if isinstance(finding.kind, Damage):
                self.damage.append(finding)
            elif isinstance(finding.kind, Leftover):
                self.leftovers.append(finding)
            else:
                self.unfinished.append(finding)


def version_finding(path: str, found: object) -> Finding:
    message = f"found schema version {found!r}, wanted {SCHEMA_VERSION}: another engine wrote it"
    return Finding(Damage.SCHEMA_VERSION, path, message)
