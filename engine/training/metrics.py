"""How well logits match classes, in NumPy; the numbers equal scikit-learn's. Not for: deciding anything with them.

scikit-learn is a test dependency only: tests/numerics/ compares with its classification_report,
confusion_matrix, top_k_accuracy_score and log_loss. Shape letters: N rows, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.floating[Any]]
ClassNumbers = NDArray[np.int64]
TOP_K = 3  # of the `top_3_accuracy` that summaries show


def evaluate(logits_NK: Logits, classes_N: ClassNumbers, class_names: Sequence[str]) -> dict[str, Any] | None:
    """All figures of one split, ready for JSON; None where the split has no rows.

    Returns:
        rows, accuracy, top_3_accuracy, loss (mean cross-entropy in nats), per_class (label, precision, recall,
        f1, support), macro_average, weighted_average, and confusion_matrix (row: true class, column: answer).
    """
    if len(classes_N) == 0:
        return None
    confusion_KK = confusion_matrix(classes_N, logits_NK.argmax(axis=1), len(class_names))
    per_class, macro, weighted = class_report(confusion_KK, class_names)
    return {
        "rows": len(classes_N),
        "accuracy": accuracy(logits_NK, classes_N),
        "top_3_accuracy": top_k_accuracy(logits_NK, classes_N, TOP_K),
        "loss": cross_entropy(logits_NK, classes_N),
        "per_class": per_class,
        "macro_average": macro,
        "weighted_average": weighted,
        "confusion_matrix": confusion_KK.tolist(),
    }


def accuracy(logits_NK: Logits, classes_N: ClassNumbers) -> float:
    """Fraction of rows whose largest logit is their class; of equal logits the first counts."""
    return float(np.mean(logits_NK.argmax(axis=1) == classes_N))


def top_k_accuracy(logits_NK: Logits, classes_N: ClassNumbers, k: int) -> float:
    """Fraction of rows whose class is among their k largest logits; of equal logits the first count."""
    own_N1 = np.take_along_axis(logits_NK, classes_N[:, None], axis=1)
    before_NK = (logits_NK > own_N1) | (
        (logits_NK == own_N1) & (np.arange(logits_NK.shape[1])[None, :] < classes_N[:, None])
    )
    return float(np.mean(before_NK.sum(axis=1) < k))


def cross_entropy(logits_NK: Logits, classes_N: ClassNumbers) -> float:
    """Mean of -log softmax(logits)[class] in nats, summed in float64."""
    shifted_NK = logits_NK.astype(np.float64) - logits_NK.max(axis=1, keepdims=True)
    own_N = np.take_along_axis(shifted_NK, classes_N[:, None], axis=1)[:, 0]
    return float(np.mean(np.log(np.exp(shifted_NK).sum(axis=1)) - own_N))


def confusion_matrix(classes_N: ClassNumbers, answers_N: ClassNumbers, num_classes: int) -> NDArray[np.int64]:
    """(K, K) counts; row: true class, column: answer."""
    cells = np.bincount(classes_N * num_classes + answers_N, minlength=num_classes * num_classes)
    return cells.reshape(num_classes, num_classes)


def class_report(
    confusion_KK: NDArray[np.int64], class_names: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, float], dict[str, float]]:
    """Precision, recall, F1 and support of each class, their plain mean, and their mean weighted by support.

    A ratio without a denominator is 0, as scikit-learn's zero_division=0.
    """
    hits_K = np.diag(confusion_KK)
    answered_K, support_K = confusion_KK.sum(axis=0), confusion_KK.sum(axis=1)
    columns = {
        "precision": _ratio(hits_K, answered_K),
        "recall": _ratio(hits_K, support_K),
        "f1": _ratio(2 * hits_K, answered_K + support_K),
    }
    per_class = [
        {
            "label": name,
            **{word: float(values[number]) for word, values in columns.items()},
            "support": int(support_K[number]),
        }
        for number, name in enumerate(class_names)
    ]
    macro = {word: float(values.mean()) for word, values in columns.items()}
    weighted = {word: float(np.average(values, weights=support_K)) for word, values in columns.items()}
    return per_class, macro, weighted


def _ratio(numerator_K: NDArray[np.int64], denominator_K: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(numerator_K, denominator_K, out=np.zeros(len(numerator_K)), where=denominator_K > 0)
