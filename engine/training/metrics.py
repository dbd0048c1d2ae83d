"""How well logits match classes, in NumPy; the numbers equal scikit-learn's. Not for: deciding anything with them.

scikit-learn is a test dependency only: tests/numerics/ compares with its classification_report, confusion_matrix,
top_k_accuracy_score, log_loss and roc_auc_score. Shape letters: N rows, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.heads.confidence import softmax

Logits = NDArray[np.floating[Any]]
ClassNumbers = NDArray[np.integer[Any]]
TOP_K = 3  # of the `top_3_accuracy` that summaries show
CALIBRATION_BINS = 15  # of equal width, as in Guo et al., On Calibration of Modern Neural Networks (2017)
COVERAGE_STEPS = 20  # points of the coverage-accuracy curve
THRESHOLD_STEPS = 200  # of min_confidence, from 0 to 1, that `abstention_curve` tells of


def evaluate(logits_NK: Logits, classes_N: ClassNumbers, class_names: Sequence[str]) -> dict[str, Any] | None:
    """All figures of one split, ready for JSON; None where the split has no rows.

    Returns:
        rows, accuracy, top_3_accuracy, loss (mean cross-entropy in nats), roc_auc (mean over the classes that have it),
        calibration_error, reliability, coverage, by_min_confidence, per_class (label, precision, recall, f1, support,
        roc_auc), macro_average, weighted_average, and confusion_matrix (row: true class, column: answer).
    """
    if len(classes_N) == 0:
        return None
    probabilities_NK = softmax(logits_NK.astype(np.float64))
    confidences_N = probabilities_NK.max(axis=1)
    is_right_N = logits_NK.argmax(axis=1) == classes_N
    areas_K = roc_auc(probabilities_NK, classes_N)
    reliability = reliability_bins(confidences_N, is_right_N)
    confusion_KK = confusion_matrix(classes_N, logits_NK.argmax(axis=1), len(class_names))
    per_class, macro, weighted = class_report(confusion_KK, class_names)
    known = [area for area in areas_K if area is not None]
    return {
        "rows": len(classes_N),
        "accuracy": accuracy(logits_NK, classes_N),
        "top_3_accuracy": top_k_accuracy(logits_NK, classes_N, TOP_K),
        "loss": cross_entropy(logits_NK, classes_N),
        "roc_auc": float(np.mean(known)) if known else None,
        "calibration_error": calibration_error(reliability),
        "reliability": reliability,
        "coverage": coverage_curve(confidences_N, is_right_N),
        "by_min_confidence": abstention_curve(confidences_N, is_right_N),
        "per_class": [row | {"roc_auc": area} for row, area in zip(per_class, areas_K, strict=True)],
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
    support_K = confusion_KK.sum(axis=1)
    columns, macro, weighted = class_figures(np.diag(confusion_KK), confusion_KK.sum(axis=0), support_K)
    per_class = [
        {
            "label": name,
            **{word: float(values[number]) for word, values in columns.items()},
            "support": int(support_K[number]),
        }
        for number, name in enumerate(class_names)
    ]
    return per_class, macro, weighted


def class_figures(
    hits_K: NDArray[np.int64], answered_K: NDArray[np.int64], support_K: NDArray[np.int64]
) -> tuple[dict[str, NDArray[np.float64]], dict[str, float], dict[str, float]]:
    """precision, recall and f1 of each class, their plain mean, and their mean weighted by support."""
    columns = {
        "precision": _ratio(hits_K, answered_K),
        "recall": _ratio(hits_K, support_K),
        "f1": _ratio(2 * hits_K, answered_K + support_K),
    }
    macro = {word: float(values.mean()) for word, values in columns.items()}
    total = max(1, int(support_K.sum()))
    weighted = {word: float(values @ support_K / total) for word, values in columns.items()}
    return columns, macro, weighted


def _ratio(numerator_K: NDArray[np.int64], denominator_K: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(numerator_K, denominator_K, out=np.zeros(len(numerator_K)), where=denominator_K > 0)


def roc_auc(scores_NK: Logits, classes_N: ClassNumbers) -> list[float | None]:
    """Area under the ROC curve of each class against all others; None for a class that no row or every row has."""
    return [area_under_roc(scores_NK[:, number], classes_N == number) for number in range(scores_NK.shape[1])]


def area_under_roc(scores_N: Logits, is_own_N: NDArray[np.bool_]) -> float | None:
    """The share of pairs (a row that is, a row that is not) that the score puts in the right order, ties counting half.

    Hanley and McNeil (1982). None: there are no such pairs.
    """
    own = int(is_own_N.sum())
    if own in (0, len(is_own_N)):
        return None
    _, places_N, counts = np.unique(scores_N, return_inverse=True, return_counts=True)
    ranks_N = (np.cumsum(counts) - (counts - 1) / 2)[places_N]
    pairs = own * (len(is_own_N) - own)
    return float((ranks_N[is_own_N].sum() - own * (own + 1) / 2) / pairs)


def reliability_bins(confidences_N: Logits, is_right_N: NDArray[np.bool_]) -> list[dict[str, float]]:
    """What confidences promise and what answers keep: one entry per bin that has rows, from low to high.

    Returns:
        For each: above, up_to (borders of confidence), rows, confidence (mean), accuracy.
    """
    bins_N = np.clip(np.ceil(confidences_N * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1)
    return [
        {
            "above": number / CALIBRATION_BINS,
            "up_to": (number + 1) / CALIBRATION_BINS,
            "rows": int(inside.sum()),
            "confidence": float(confidences_N[inside].mean()),
            "accuracy": float(is_right_N[inside].mean()),
        }
        for number in range(CALIBRATION_BINS)
        if (inside := bins_N == number).any()
    ]


def calibration_error(reliability: Sequence[dict[str, float]]) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy over the bins, by their rows."""
    gaps = [row["rows"] * abs(row["confidence"] - row["accuracy"]) for row in reliability]
    return float(sum(gaps) / sum(row["rows"] for row in reliability))


def coverage_curve(confidences_N: Logits, is_right_N: NDArray[np.bool_]) -> list[dict[str, float]]:
    """How accurate the most confident answers are, from a few of them to all; rows of equal confidence stay together.

    Returns:
        For each point: coverage (share of rows), accuracy of those, min_confidence (the lowest among them).
    """
    order = np.argsort(-confidences_N, kind="stable")
    sorted_N, right_N = confidences_N[order], np.cumsum(is_right_N[order])
    points: list[dict[str, float]] = []
    for step in range(1, COVERAGE_STEPS + 1):
        lowest = sorted_N[-(-len(order) * step // COVERAGE_STEPS) - 1]
        count = int(np.searchsorted(-sorted_N, -lowest, side="right"))
        point = {
            "coverage": count / len(order),
            "accuracy": float(right_N[count - 1] / count),
            "min_confidence": float(lowest),
        }
        if not points or points[-1] != point:
            points.append(point)
    return points


def abstention_curve(confidences_N: Logits, is_right_N: NDArray[np.bool_]) -> list[dict[str, float | None]]:
    """What each `min_confidence` comes to, for thresholds from 0 to 1 in steps of 0.005.

    Returns:
        For each: min_confidence, coverage (share of rows whose confidence is not below it), accuracy of those; None
        where there are none.
    """
    order = np.argsort(confidences_N, kind="stable")
    right_N = np.append(np.cumsum(is_right_N[order][::-1])[::-1], 0)  # from each row on to the surest
    thresholds = np.arange(THRESHOLD_STEPS + 1) / THRESHOLD_STEPS
    begins = np.searchsorted(confidences_N[order], thresholds, side="left")
    given = len(order) - begins
    return [
        {
            "min_confidence": float(threshold),
            "coverage": float(count / len(order)),
            "accuracy": float(right_N[begin] / count) if count else None,
        }
        for threshold, begin, count in zip(thresholds, begins, given, strict=True)
    ]
