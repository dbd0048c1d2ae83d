"""Embeddings to probabilities, the top classes and a decision. Not for: reading or writing tables.

Shape letters: B rows, D embedding width, K classes, k top entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from engine.errors import TableDamaged
from engine.heads.bundle import Bundle
from engine.heads.confidence import sigmoid, softmax
from engine.heads.side_features import SideEncoder, side_columns
from engine.schema import predictions_schema
from engine.tables import embeddings_matrix

Floats = NDArray[np.float32]
ROW_COLUMNS = ("key", "shard", "index", "embedding")
# Up to here k passes of argmax are faster than one stable sort. Measured with NumPy 2.4 on 1,024 rows: K = 100,
# k = 5: 0.43 against 3.5 ms, k = 32: 2.6 against 3.8; K = 1,000, k = 5: 1.1 against 58 ms, k = 32: 5 against 59.
TOP_K_BY_PASSES = 32


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a bundle answers for B rows."""

    top_classes_Bk: NDArray[
        np.int64
    ]  # class numbers, most confident first; of equals the first class comes first
    top_confidences_Bk: Floats
    abstains_B: NDArray[
        np.bool_
    ]  # the best confidence is below its class's minimum, or no class reaches its threshold
    given_BK: NDArray[np.bool_] | None = None  # the classes that each row is given, where it may have several


class Predictor:
    """A bundle ready to answer; what it needs is loaded once, here.

    Args:
        bundle: opened. A head that is only a matrix product is computed in NumPy, any other by Keras, on the CPU.
        top_k: entries wanted; never more than there are classes.
        min_confidence: below it the label is null, or not among the labels; the candidates stay. One for all classes,
            or one for each.
        labels: what each class is called in a table; None: as the bundle calls it.
    """

    def __init__(
        self,
        bundle: Bundle,
        top_k: int,
        min_confidence: float | Sequence[float] = 0.0,
        labels: Sequence[str] | None = None,
    ) -> None:
        self.bundle_id = bundle.id
        self.classes = bundle.manifest.classes
        self.top_k = min(top_k, len(self.classes))
        self._labels_K = pa.array(self.classes if labels is None else labels, pa.string())
        self._several = bundle.manifest.task == "multi_label"
        thresholds = np.maximum(bundle.manifest.thresholds or 0.0, min_confidence).astype(np.float32)
        self._thresholds_K = np.broadcast_to(thresholds, len(self.classes))
        self.schema = predictions_schema(self.top_k, self._several)
        self._side = _side_encoder(bundle)
        self._width = bundle.manifest.width + (self._side.width if self._side else 0)
        self.columns = [*ROW_COLUMNS, *side_columns(bundle.manifest.side_features)]
        self._calibration = bundle.manifest.calibration
        self._logits = _logits_function(bundle)

    def probabilities(self, embeddings_BD: NDArray[np.floating[Any]]) -> Floats:
        """Softmax of the head's logits as the bundle calibrates them: (B, D) float32 or float16 to (B, K) float32.

        Rows of a head that takes side features have them behind the embedding, as `inputs_of` puts them.
        Of a multi_label bundle the sigmoid: each class has a probability of its own.

        Raises:
            ValueError: the rows are not D numbers wide.
        """
        if embeddings_BD.ndim != 2 or embeddings_BD.shape[1] != self._width:
            raise ValueError(f"embeddings of shape {embeddings_BD.shape}, wanted (B, {self._width})")
        logits_BK = self._calibration.apply(self._logits(embeddings_BD.astype(np.float32, copy=False)))
        return sigmoid(logits_BK) if self._several else softmax(logits_BK)

    def predict(self, embeddings_BD: NDArray[np.floating[Any]]) -> Predictions:
        """The top classes of each row, and whether the best is good enough.

        Raises:
            TableDamaged: an embedding holds NaN or infinity, which a table never does.
        """
        probabilities_BK = self.probabilities(embeddings_BD)
        classes_Bk, confidences_Bk = top_k(probabilities_BK, self.top_k)
        broken = np.flatnonzero(~np.isfinite(confidences_Bk[:, 0]))
        if len(broken):
            raise TableDamaged(
                "embeddings: rows without a prediction",
                found=f"{len(broken)} rows with NaN or infinity, the first is row {broken[0]} of {len(confidences_Bk)}",
                way_out="delete the part and run extract again: it makes only what is missing",
            )
        if self._several:
            given_BK = np.asarray(probabilities_BK >= self._thresholds_K)
            return Predictions(classes_Bk, confidences_Bk, np.logical_not(given_BK.any(axis=1)), given_BK)
        abstains_B = confidences_Bk[:, 0] < self._thresholds_K[classes_Bk[:, 0]]
        return Predictions(classes_Bk, confidences_Bk, abstains_B)

    def inputs_of(self, embeddings: pa.Table) -> NDArray[np.floating[Any]]:
        """What the head takes of the rows of a table: their embeddings, and their side features behind them.

        Raises:
            LabelError: a column is missing, or a numeric one holds something else than numbers.
        """
        embeddings_BD = embeddings_matrix(embeddings["embedding"])
        if self._side is None:
            return embeddings_BD
        return np.hstack([embeddings_BD.astype(np.float32, copy=False), self._side.encode(embeddings)])

    def predict_table(self, embeddings: pa.Table) -> pa.Table:
        """Predictions for the rows of (part of) an embedding table, in their order.

        Args:
            embeddings: with `columns`: key, shard, index, embedding, and the head's side features.

        Returns:
            A table with the schema `predictions_schema(min(top_k, K))`, or that of several labels.
        """
        answers = self.predict(self.inputs_of(embeddings))
        names = self._labels_K
        top_labels = names.take(pa.array(answers.top_classes_Bk.ravel()))
        best = pa.array(answers.top_classes_Bk[:, 0], mask=answers.abstains_B)  # null takes null
        columns = {
            **{name: embeddings[name] for name in ("key", "shard", "index")},
            **(
                {"label": names.take(best)} if answers.given_BK is None else {"labels": self._labels(answers)}
            ),
            "confidence": pa.array(answers.top_confidences_Bk[:, 0]),
            "top_labels": self._lists("top_labels", top_labels),
            "top_confidences": self._lists("top_confidences", pa.array(answers.top_confidences_Bk.ravel())),
            "bundle": pa.repeat(pa.scalar(self.bundle_id, pa.string()), embeddings.num_rows),
        }
        return pa.table(columns, schema=self.schema)

    def _labels(self, answers: Predictions) -> pa.ListArray:
        """The labels of each row, in the order of the classes."""
        assert answers.given_BK is not None
        rows, numbers = np.nonzero(answers.given_BK)
        ends = np.searchsorted(rows, np.arange(len(answers.given_BK) + 1))
        names = self._labels_K.take(pa.array(numbers))
        return pa.ListArray.from_arrays(
            pa.array(ends, pa.int32()), names, type=self.schema.field("labels").type
        )

    def _lists(self, name: str, values: pa.Array) -> pa.FixedSizeListArray:
        return pa.FixedSizeListArray.from_arrays(values, type=self.schema.field(name).type)


@dataclass
class BundleCounts:
    """What was written for one bundle."""

    parts: int = 0
    rows: int = 0
    abstained: int = 0
    label_counts: dict[str, int] = field(default_factory=dict)

    def add(self, other: BundleCounts) -> None:
        """Count these too."""
        self.parts, self.rows = self.parts + other.parts, self.rows + other.rows
        self.abstained += other.abstained
        for label, count in other.label_counts.items():
            self.label_counts[label] = self.label_counts.get(label, 0) + count


def counted(predictions: pa.Table) -> BundleCounts:
    """Of one part: its rows, how many have no label, and how many have each."""
    if "labels" in predictions.column_names:
        labels = pc.list_flatten(predictions["labels"])
        abstained = int(np.count_nonzero(pc.list_value_length(predictions["labels"]).to_numpy() == 0))
    else:
        labels, abstained = predictions["label"].drop_null(), predictions["label"].null_count
    return BundleCounts(1, predictions.num_rows, abstained, value_counts(labels))


def value_counts(labels: pa.ChunkedArray) -> dict[str, int]:
    """How often each stands there."""
    counts = pc.value_counts(labels)
    return dict(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True))


def top_k(values_BK: Floats, k: int) -> tuple[NDArray[np.int64], Floats]:
    """Column numbers and values of the k largest of each row, largest first; of equals the first column first."""
    if k > TOP_K_BY_PASSES:
        columns_Bk = np.argsort(-values_BK, axis=1, kind="stable")[:, :k]
        return columns_Bk, np.take_along_axis(values_BK, columns_Bk, axis=1)
    left_BK = values_BK.copy()
    rows_B = np.arange(len(values_BK))
    columns_Bk = np.empty((len(values_BK), k), np.int64)
    for place in range(k):
        columns_Bk[:, place] = left_BK.argmax(axis=1)
        left_BK[rows_B, columns_Bk[:, place]] = -np.inf
    return columns_Bk, np.take_along_axis(values_BK, columns_Bk, axis=1)


def _logits_function(bundle: Bundle) -> Callable[[Floats], Floats]:
    matrix = bundle.matrix()
    if matrix is not None:
        return matrix.logits
    from engine.heads.network import logits_on_cpu  # TensorFlow, only for heads that need it

    return logits_on_cpu(bundle.network)


def _side_encoder(bundle: Bundle) -> SideEncoder | None:
    if not bundle.manifest.side_features:
        return None
    from engine.heads.network import leave_gpus_alone

    leave_gpus_alone()
    return bundle.side_encoder()
