"""An embedding part and the rejects beside it. Shape letters: N rows of the part, D embedding width."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from engine.schema import EmbeddingDtype, embeddings_schema
from engine.storage import Store
from engine.tables import EmbeddingPartFacts, embeddings_digest, embeddings_matrix
from engine.verification.findings import Damage
from engine.verification.part import Checked, ListedPart, columns_fit, open_part
from engine.verification.record import Claims
from engine.verification.shard_samples import check_origin, check_rejects, check_samples, check_shard_column


def check_embedding_part(store: Store, claims: Claims, part: ListedPart) -> Checked:
    checked = Checked(part)
    opened = open_part(store, checked, EmbeddingPartFacts)
    if opened is None:
        return checked
    data, facts = opened
    is_named_right = check_origin(checked, claims, facts)
    rejects = check_rejects(store, claims, checked, facts)
    if not columns_fit(checked, data, _wanted_columns(claims, data)):
        return checked
    _check_numbers(checked, data["embedding"], facts)
    tables = [data] if rejects is None else [data, rejects]
    if is_named_right:
        check_shard_column(checked, tables, facts.shard)
    check_samples(checked, tables, facts, claims.rows_per_part, has_all=rejects is not None)
    return checked


def _wanted_columns(claims: Claims, data: pa.Table) -> pa.Schema:
    """The table's columns; as far as the record does not tell, those that this part could rightly have."""
    schema = claims.schema
    if schema is None:
        found = data.schema.field("embedding").type if "embedding" in data.schema.names else pa.null()
        is_list = pa.types.is_fixed_size_list(found)
        dtype: EmbeddingDtype = "float16" if is_list and found.value_type == pa.float16() else "float32"
        schema = embeddings_schema(found.list_size if is_list else 1, dtype)
    if claims.schema is None or claims.has_more_columns:
        more = [f for f in data.schema if f.name not in schema.names and f.type == pa.string()]
        schema = pa.schema([*schema, *(pa.field(f.name, pa.string()) for f in more)])
    return schema


def _check_numbers(checked: Checked, embedding: pa.ChunkedArray, facts: EmbeddingPartFacts) -> None:
    found = embeddings_digest(embedding)
    checked.compare(Damage.EMBEDDINGS_CHECKSUM, "sha-256 of the numbers", found, facts.embeddings_sha256)
    embeddings_ND = embeddings_matrix(embedding)
    finite_N = np.isfinite(embeddings_ND).all(axis=1)
    zero_N = ~embeddings_ND.any(axis=1)
    if not finite_N.all():
        first = int(np.flatnonzero(~finite_N)[0])
        checked.note(
            Damage.NON_FINITE_EMBEDDING,
            f"{int((~finite_N).sum())} rows with NaN or infinity, first row {first}",
        )
    if zero_N.any():
        first = int(np.flatnonzero(zero_N)[0])
        checked.note(Damage.ZERO_EMBEDDING, f"{int(zero_N.sum())} rows of zeros, first row {first}")
