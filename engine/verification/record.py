"""What `_table.json` promises of every part; where it cannot be read, parts are compared with each other only."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from engine.config import stable_hash
from engine.errors import ObjectNotFound
from engine.schema import SCHEMA_VERSION, EmbeddingDtype, embeddings_schema
from engine.shards.kinds import SourceConfig, source_of_contract
from engine.storage import Store
from engine.tables import RECORD_NAME
from engine.verification.findings import Damage, Finding, version_finding


class _Record(BaseModel):
    """Fields that every record has; those that only inform are passed over."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    fingerprint: str
    source_uri: str
    contract: dict[str, Any]


class _EmbeddingsRecord(_Record):
    kind: Literal["embeddings"]
    width: int = Field(ge=1)
    rows_per_part: int = Field(ge=1)


class _PredictionsRecord(_Record):
    kind: Literal["predictions"]
    bundle: str
    rows_per_part: int | None = Field(default=None, ge=1)  # of those that were made straight from images


_RECORD: TypeAdapter[_EmbeddingsRecord | _PredictionsRecord] = TypeAdapter(
    Annotated[_EmbeddingsRecord | _PredictionsRecord, Field(discriminator="kind")]
)


@dataclass(frozen=True)
class Claims:
    """What every part must agree with; None where the record does not say, so nothing is compared.

    Attributes:
        schema: columns of an embedding part.
        rows_per_part: of the embeddings, for a prediction table too, where they can be reached.
        has_more_columns: the record's source is not understood: other string columns are allowed.
        recipe_sha256: of a prediction table's contract.
        max_top_k: most entries of a prediction.
        also: forms of the copies for people that each prediction part has.
        is_of_embeddings: of a prediction table, whether its parts were made of embedding parts.
    """

    kind: Literal["embeddings", "predictions"] = "embeddings"
    is_absent: bool = False
    fingerprint: str | None = None
    source_uri: str | None = None
    rows_per_part: int | None = None
    schema: pa.Schema | None = None
    has_more_columns: bool = False
    keeps_reject_bytes: bool | None = None
    source: SourceConfig | None = None
    bundle: str | None = None
    recipe_sha256: str | None = None
    max_top_k: int | None = None
    also: tuple[str, ...] | None = None
    is_of_embeddings: bool = True

    @property
    def is_of_shards(self) -> bool:
        """Whether its parts account for the samples of shards."""
        return self.kind == "embeddings" or not self.is_of_embeddings


def read_claims(store: Store) -> tuple[Claims, list[Finding]]:
    """Without a usable record parts are still compared with themselves and with each other."""
    try:
        text = store.read(RECORD_NAME)
    except ObjectNotFound:
        return Claims(is_absent=True), [Finding(Damage.RECORD_MISSING, RECORD_NAME, "parts without a record")]
    try:
        document = json.loads(text)
        version = document["schema_version"]
        if version != SCHEMA_VERSION:
            return Claims(), [version_finding(RECORD_NAME, version)]
        record = _RECORD.validate_json(text)
        _require_agreement(record)
        return _claims_of(record), []
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        said = f"{'.'.join(map(str, problem['loc'][1:]))}: {problem['msg']}".removeprefix(": ")
    except KeyError as error:
        said = f"it has no field {error}"
    except (ValueError, TypeError, RecursionError) as error:
        said = f"{type(error).__name__}: {error}"
    return Claims(), [Finding(Damage.RECORD_DAMAGED, RECORD_NAME, said)]


def _require_agreement(record: _EmbeddingsRecord | _PredictionsRecord) -> None:
    """Some fields stand in the record and in its contract.

    Raises:
        KeyError, ValueError: one is missing there, or differs.
    """
    twice: dict[str, Any] = {"fingerprint": record.fingerprint}
    if isinstance(record, _PredictionsRecord):
        twice["bundle"] = record.bundle
    if _is_of_embeddings(record):
        twice["embeddings.uri"] = record.source_uri
    else:
        twice |= {"source.uri": record.source_uri, "output.rows_per_part": record.rows_per_part}
    for name, value in twice.items():
        if record.contract[name] != value:
            raise ValueError(f"its {name} is {value!r}, that of its contract {record.contract[name]!r}")


def _is_of_embeddings(record: _EmbeddingsRecord | _PredictionsRecord) -> bool:
    return isinstance(record, _PredictionsRecord) and "embeddings.uri" in record.contract


def _claims_of(record: _EmbeddingsRecord | _PredictionsRecord) -> Claims:
    claims = Claims(record.kind, fingerprint=record.fingerprint, source_uri=record.source_uri)
    contract = record.contract
    if isinstance(record, _PredictionsRecord):
        also = tuple(map(str, contract.get("also", ())))
        top_k, recipe_sha256 = int(contract["top_k"]), stable_hash(contract)
        claims = replace(
            claims, bundle=record.bundle, recipe_sha256=recipe_sha256, max_top_k=top_k, also=also
        )
    if _is_of_embeddings(record):
        return claims
    source = source_of_contract(contract)
    claims = replace(
        claims,
        rows_per_part=record.rows_per_part,
        keeps_reject_bytes=bool(contract["limits.keep_reject_bytes"]),
        source=source,
        is_of_embeddings=False,
    )
    if isinstance(record, _PredictionsRecord):
        return claims
    dtype: EmbeddingDtype = TypeAdapter(EmbeddingDtype).validate_python(contract["output.dtype"])
    return replace(
        claims,
        schema=embeddings_schema(record.width, dtype, source.metadata_columns() if source else ()),
        has_more_columns=source is None,
    )
