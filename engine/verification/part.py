"""One part under a check: what was found in it, and what parts of both kinds of table have in common."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from engine.errors import ObjectChanged, ObjectNotFound
from engine.parts import PartName
from engine.schema import SCHEMA_VERSION
from engine.storage import ObjectInfo, Store
from engine.tables import FOOTER_KEY, EmbeddingPartFacts, PredictionPartFacts, ShardPredictionFacts
from engine.verification.findings import Damage, Finding, Leftover, Unfinished, version_finding

FactsT = TypeVar("FactsT", EmbeddingPartFacts, PredictionPartFacts, ShardPredictionFacts)
Indexes = NDArray[np.int64]
# What pyarrow raises for damaged Parquet; its ArrowException covers sizes beyond memory too.
UNREADABLE = (pa.ArrowException, OSError, ValueError, OverflowError)
_FACTS: dict[type, TypeAdapter[Any]] = {  # making one takes as long as checking a small part
    facts_class: TypeAdapter(facts_class)
    for facts_class in (EmbeddingPartFacts, PredictionPartFacts, ShardPredictionFacts)
}


@dataclass(frozen=True, slots=True)
class ListedPart:
    """A part as the listing has it, and the rejects file beside it."""

    name: PartName
    info: ObjectInfo
    rejects: ObjectInfo | None = None

    @property
    def size(self) -> int:
        return self.info.size + (self.rejects.size if self.rejects else 0)


@dataclass
class Checked:
    """What was found in one part, and what is compared with other parts."""

    part: ListedPart
    findings: list[Finding] = field(default_factory=list)
    rows: int = 0
    rejects: int = 0
    bytes_read: int = 0
    begin_offset: int | None = None
    end_offset: int | None = None
    top_k: int | None = None

    def note(self, kind: Damage | Leftover | Unfinished, message: str, path: str | None = None) -> None:
        self.findings.append(Finding(kind, path or self.part.info.path, message))

    def compare(self, kind: Damage, what: str, found: object, wanted: object) -> bool:
        """Whether both are the same; a finding where not. Nothing is wanted where `wanted` is None."""
        if wanted is None or found == wanted:
            return True
        self.note(kind, f"{what}: found {found}, wanted {wanted}")
        return False


def read_object(store: Store, checked: Checked, info: ObjectInfo) -> bytes | None:
    """The bytes of exactly the listed version; None, and a finding, where it is no longer there."""
    try:
        encoded = store.read(info.path, expected=info)
    except (ObjectChanged, ObjectNotFound):
        checked.note(
            Unfinished.CHANGED_MEANWHILE, "rewritten or removed since it was listed; verify again", info.path
        )
        return None
    checked.bytes_read += len(encoded)
    return encoded


def open_part(store: Store, checked: Checked, facts_class: type[FactsT]) -> tuple[pa.Table, FactsT] | None:
    """The table and its footer's facts of the part that is checked; None, and a finding, where it has not got them."""
    encoded = read_object(store, checked, checked.part.info)
    if encoded is None:
        return None
    try:
        file = pq.ParquetFile(io.BytesIO(encoded))
        footer = (file.schema_arrow.metadata or {}).get(FOOTER_KEY)
    except UNREADABLE as error:
        checked.note(Damage.UNREADABLE_PART, in_one_line(error))
        return None
    facts = _facts_of(checked, footer, facts_class)
    if facts is None:
        return None
    try:
        table = file.read()
        table.validate(full=True)  # also that texts are UTF-8
    except UNREADABLE as error:
        checked.note(Damage.UNREADABLE_PART, in_one_line(error))
        return None
    checked.rows = table.num_rows
    return table, facts


def _facts_of(checked: Checked, footer: bytes | None, facts_class: type[FactsT]) -> FactsT | None:
    if footer is None:
        checked.note(Damage.FOOTER, f"no {FOOTER_KEY.decode()!r} in the Parquet footer")
        return None
    try:
        version = json.loads(footer)["schema_version"]
        if version != SCHEMA_VERSION:
            checked.findings.append(version_finding(checked.part.info.path, version))
            return None
        facts: FactsT = _FACTS[facts_class].validate_json(footer, strict=True)
        return facts
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        said = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        said = f"{type(error).__name__}: {error}"
    checked.note(Damage.FOOTER, said)
    return None


def columns_fit(checked: Checked, table: pa.Table, wanted: pa.Schema, path: str | None = None) -> bool:
    """Whether the columns are those of the schema and have no nulls where it allows none; findings where not."""
    found = table.schema
    differences = [
        *(f"{name} is missing" for name in wanted.names if name not in found.names),
        *(f"{name} is not of this table" for name in found.names if name not in wanted.names),
    ]
    if not differences and found.names != wanted.names:
        differences.append(f"their order is {', '.join(found.names)}")
    for name in () if differences else wanted.names:
        is_type, wanted_type = found.field(name).type, wanted.field(name).type
        if is_type != wanted_type:
            differences.append(f"{name} is {is_type}, wanted {wanted_type}")
    if differences:
        checked.note(Damage.COLUMNS, "; ".join(differences), path)
        return False
    return _nulls_fit(checked, table, wanted, path)


def _nulls_fit(checked: Checked, table: pa.Table, wanted: pa.Schema, path: str | None) -> bool:
    loose = [f.name for f in wanted if not f.nullable and table.schema.field(f.name).nullable]
    nulls = {name: table[name].null_count for name in loose if table[name].null_count}
    if nulls:
        said = ", ".join(f"{count} in {name}" for name, count in nulls.items())
        checked.note(Damage.NULL_VALUES, f"nulls where none are allowed: {said}", path)
    elif loose:
        checked.note(Damage.COLUMNS, f"declared as nullable: {', '.join(loose)}", path)
    return not loose


def check_indexes(checked: Checked, index: Indexes, samples: int, rows_per_part: int | None) -> None:
    """Each once, and inside the range of the part's number.

    Where there are as many as samples, that is the same as: exactly that range.
    """
    values, counts = np.unique(index, return_counts=True)
    repeated = values[counts > 1]
    if len(repeated):
        checked.note(Damage.DUPLICATE_INDEX, f"{len(repeated)} more than once, the first is {repeated[0]}")
    if rows_per_part is None:
        return
    begin = checked.part.name.number * rows_per_part
    outside = values[(values < begin) | (values >= begin + samples)]
    if len(outside):
        message = f"{len(outside)} outside of {begin} to {begin + samples - 1}, the first is {outside[0]}"
        checked.note(Damage.INDEX_RANGE, message)


def in_one_line(error: BaseException) -> str:
    """What a library said, for a finding's message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
