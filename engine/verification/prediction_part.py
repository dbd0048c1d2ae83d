"""A prediction part, made of an embedding part or straight from a shard. Shape letters: N rows of the part, k top
entries."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.parts import parse_part_name, path16_of, prediction_name
from engine.schema import predictions_schema
from engine.storage import Store
from engine.tables import PredictionPartFacts, ShardPredictionFacts, embeddings_matrix
from engine.verification.findings import Damage
from engine.verification.part import Checked, ListedPart, check_indexes, columns_fit, open_part
from engine.verification.record import Claims
from engine.verification.shard_samples import check_origin, check_rejects, check_samples, check_shard_column


def check_prediction_part(store: Store, claims: Claims, part: ListedPart) -> Checked:
    checked = Checked(part)
    opened = open_part(store, checked, PredictionPartFacts)
    if opened is None:
        return checked
    data, facts = opened
    checked.compare(Damage.FINGERPRINT, "fingerprint", facts.fingerprint, claims.fingerprint)
    checked.compare(Damage.BUNDLE, "bundle", facts.bundle, claims.bundle)
    if facts.recipe_sha256 is not None:
        checked.compare(Damage.RECIPE, "recipe_sha256", facts.recipe_sha256, claims.recipe_sha256)
    checked.compare(Damage.ROW_COUNT, "rows", data.num_rows, facts.rows)
    scored = parse_part_name(facts.embedding_part)
    wanted = prediction_name(scored, facts.embedding_identity) if scored else "a part's name in the footer"
    made_from = f"made from {facts.embedding_part}, {facts.embedding_identity!r}"
    checked.compare(Damage.PART_NAME, made_from, part.name, wanted)
    if not _columns_fit(checked, data, claims):
        return checked
    _check_rows_of_predictions(checked, data, facts.bundle, claims.rows_per_part)
    _check_confidences(checked, data)
    return checked


def check_shard_prediction_part(store: Store, claims: Claims, part: ListedPart) -> Checked:
    """One that was made straight from a shard: it accounts for every sample of its part of it."""
    checked = Checked(part)
    opened = open_part(store, checked, ShardPredictionFacts)
    if opened is None:
        return checked
    data, facts = opened
    is_named_right = check_origin(checked, claims, facts)
    checked.compare(Damage.BUNDLE, "bundle", facts.bundle, claims.bundle)
    checked.compare(Damage.RECIPE, "recipe_sha256", facts.recipe_sha256, claims.recipe_sha256)
    rejects = check_rejects(store, claims, checked, facts)
    if not _columns_fit(checked, data, claims):
        return checked
    tables = [data] if rejects is None else [data, rejects]
    if is_named_right:
        check_shard_column(checked, tables, facts.shard)
    check_samples(checked, tables, facts, claims.rows_per_part, has_all=rejects is not None)
    _check_bundle_column(checked, data, facts.bundle)
    _check_confidences(checked, data)
    return checked


def _columns_fit(checked: Checked, data: pa.Table, claims: Claims) -> bool:
    """Whether they are those of a prediction part; notes how many top entries it has."""
    k = _top_k_of(checked, data, claims)
    if k is None or not columns_fit(checked, data, predictions_schema(k, "labels" in data.column_names)):
        return False
    checked.top_k = k
    return True


def _top_k_of(checked: Checked, data: pa.Table, claims: Claims) -> int | None:
    """Length of the lists, from the part itself: the record only says the most that there may be."""
    lists = data.schema.get_field_index("top_labels")
    found = data.schema.field(lists).type if lists >= 0 else None
    if found is None or not pa.types.is_fixed_size_list(found):
        checked.note(Damage.COLUMNS, f"top_labels: found {found}, wanted a list of fixed size")
        return None
    k = int(found.list_size)
    if not 1 <= k <= (claims.max_top_k or k):
        checked.note(Damage.COLUMNS, f"{k} top entries, wanted 1 to {claims.max_top_k}")
        return None
    return k


def _check_rows_of_predictions(
    checked: Checked, data: pa.Table, bundle: str, rows_per_part: int | None
) -> None:
    shards = pc.unique(data["shard"]).to_pylist()
    if others := [shard for shard in shards if path16_of(shard) != checked.part.name.path16]:
        wanted = f"the shard whose path hashes to {checked.part.name.path16}"
        checked.note(Damage.SHARD_COLUMN, f"found {', '.join(map(repr, others[:3]))}, wanted {wanted}")
    _check_bundle_column(checked, data, bundle)
    check_indexes(checked, data["index"].to_numpy(), rows_per_part or 0, rows_per_part)


def _check_bundle_column(checked: Checked, data: pa.Table, bundle: str) -> None:
    if strangers := [other for other in pc.unique(data["bundle"]).to_pylist() if other != bundle]:
        checked.note(Damage.BUNDLE, f"rows of bundle {strangers[0]!r}, wanted {bundle!r}")


def _check_confidences(checked: Checked, data: pa.Table) -> None:
    if not data.num_rows:
        return
    confidence_N = data["confidence"].to_numpy()
    top_Nk = embeddings_matrix(data["top_confidences"])
    for what, values in (("confidence", confidence_N), ("top_confidences", top_Nk.ravel())):
        outside = values[~((values >= 0) & (values <= 1))]  # NaN is in no range
        if len(outside):
            message = f"{what}: {len(outside)} outside of 0 to 1, the first is {outside[0]}"
            checked.note(Damage.CONFIDENCE_RANGE, message)
    rising_N = (top_Nk[:, 1:] > top_Nk[:, :-1]).any(axis=1)
    if rising_N.any():
        message = f"top_confidences do not descend in {rising_N.sum()} rows, first row {rising_N.argmax()}"
        checked.note(Damage.CONFIDENCE_ORDER, message)
    _check_top_entry(checked, data, confidence_N, top_Nk)


def _check_top_entry(
    checked: Checked, data: pa.Table, confidence_N: NDArray[np.float32], top_Nk: NDArray[np.float32]
) -> None:
    """`confidence` is that of the first top entry, and `label` its label, unless the row abstains (null)."""
    differs_N = (confidence_N != top_Nk[:, 0]) & np.isfinite(confidence_N) & np.isfinite(top_Nk[:, 0])
    if "label" in data.column_names:
        first_labels = pc.list_element(data["top_labels"], 0)
        differs_N |= pc.fill_null(pc.not_equal(data["label"], first_labels), False).to_numpy()
    if differs_N.any():
        message = f"label or confidence is not that of the first top entry in {differs_N.sum()} rows"
        checked.note(Damage.TOP_ENTRY, f"{message}, first row {differs_N.argmax()}")
