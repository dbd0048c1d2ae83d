"""Prediction tables of given labels, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from engine.parts import prediction_name
from engine.schema import predictions_schema
from engine.storage import Store, open_store
from engine.tables import PredictionPartFacts, claim_table, open_table, read_part, write_prediction_part
from tests.embedding_tables import FINGERPRINT


def write_predictions(
    folder: Path | str, embeddings: Store, labels: Mapping[str, str | None], bundle: str = "made"
) -> Store:
    """A table with a prediction for each row of an embedding table.

    Args:
        labels: of each key its label; None: abstained. The second candidate is always "other".
    """
    store = open_store(str(folder), embeddings.config)
    record = {"kind": "predictions", "schema_version": 1, "fingerprint": FINGERPRINT, "bundle": bundle}
    record |= {"contract": {"top_k": 2}, "source_uri": embeddings.uri}  # type: ignore[dict-item]
    claim_table(store, record)
    for name, info in open_table(embeddings).parts:
        rows = read_part(embeddings, info, ["key", "shard", "index"])
        given = [labels[key] for key in rows["key"].to_pylist()]
        columns = {
            **{column: rows[column] for column in ("key", "shard", "index")},
            "label": pa.array(given, pa.string()),
            "confidence": np.full(len(given), 0.75, np.float32),
            "top_labels": [[label or "unsure", "other"] for label in given],
            "top_confidences": [[0.75, 0.25]] * len(given),
            "bundle": [bundle] * len(given),
        }
        data = pa.table(columns, schema=predictions_schema(top_k=2))
        facts = PredictionPartFacts(bundle, FINGERPRINT, str(name), info.identity, len(given))
        write_prediction_part(store, prediction_name(name, info.identity), data, facts)
    return store
