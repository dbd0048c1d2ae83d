"""What a trained head is worth on rows it was not fitted on, with honest confidences; for metrics.json.

Shape letters: N rows of a split, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.heads.confidence import Calibration, softmax
from engine.training.calibration import calibrate, threshold_for
from engine.training.kinds import CalibrationConfig
from engine.training.metrics import calibration_error, evaluate, reliability_bins

JUDGED = ("validation", "test")
MISTAKES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class JudgedRows:
    """The rows of one split, with what the head says of them.

    Attributes:
        logits_NK: as the head gives them.
        targets_N: their classes; where a row may have several, (N, K) with 1 where it has the class.
        keys, shards, indexes: which rows they are.
    """

    logits_NK: NDArray[np.float32]
    targets_N: NDArray[np.integer[Any]]
    keys: Sequence[str]
    shards: Sequence[str]
    indexes: Sequence[int]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What goes into a bundle.

    Attributes:
        calibration: what was found.
        metrics: validation and test as `evaluate` gives them with it (None without rows), calibration,
            most_confident_mistakes.
    """

    calibration: Calibration
    metrics: dict[str, Any]


def judge(
    splits: Mapping[str, JudgedRows], class_names: Sequence[str], config: CalibrationConfig
) -> Judgement:
    """Calibrate on the validation rows, then measure both splits with what came out.

    Args:
        splits: validation and test; either may have no rows.
        class_names: K names in the order of the logits.
    """
    validation = splits["validation"]
    calibration = calibrate(config.kind, validation.logits_NK, validation.targets_N)
    calibrated = {name: calibration.apply(rows.logits_NK) for name, rows in splits.items()}
    metrics: dict[str, Any] = {
        name: evaluate(calibrated[name], splits[name].targets_N, class_names) for name in JUDGED
    }
    metrics["calibration"] = {
        "kind": config.kind,
        **calibration.model_dump(mode="json"),
        "calibration_error_before": {
            name: _calibration_error(splits[name].logits_NK, splits[name].targets_N) for name in JUDGED
        },
        "suggested_min_confidence": _suggestions(splits, calibrated, config.precisions),
    }
    metrics["most_confident_mistakes"] = _mistakes(splits, calibrated, class_names)
    return Judgement(calibration, metrics)


def _calibration_error(
    logits_NK: NDArray[np.floating[Any]], classes_N: NDArray[np.integer[Any]]
) -> float | None:
    if not len(classes_N):
        return None
    return calibration_error(reliability_bins(*_answers(logits_NK, classes_N)))


def _answers(
    logits_NK: NDArray[np.floating[Any]], classes_N: NDArray[np.integer[Any]]
) -> tuple[NDArray[np.floating[Any]], NDArray[np.bool_]]:
    """Confidence of each answer, and whether it is right."""
    return softmax(logits_NK.astype(np.float64)).max(axis=1, initial=0.0), logits_NK.argmax(
        axis=1
    ) == classes_N


def _suggestions(
    splits: Mapping[str, JudgedRows],
    calibrated: Mapping[str, NDArray[np.floating[Any]]],
    precisions: Sequence[float],
) -> list[dict[str, Any]]:
    """A threshold for each wished precision, found on validation, and what it comes to on test."""
    if not len(splits["validation"].targets_N):
        return []
    found = _answers(calibrated["validation"], splits["validation"].targets_N)
    confidences_N, is_right_N = _answers(calibrated["test"], splits["test"].targets_N)
    suggestions = []
    for precision in precisions:
        threshold = threshold_for(precision, *found)
        on_test: dict[str, float] | None = None
        if threshold.min_confidence is not None and len(is_right_N):
            given_N = confidences_N >= threshold.min_confidence
            right = float(is_right_N[given_N].mean()) if given_N.any() else 0.0
            on_test = {"precision": right, "coverage": float(given_N.mean())}
        suggestions.append({**asdict(threshold), "test": on_test})
    return suggestions


def _mistakes(
    splits: Mapping[str, JudgedRows],
    calibrated: Mapping[str, NDArray[np.floating[Any]]],
    class_names: Sequence[str],
) -> list[dict[str, Any]]:
    """The wrong answers that were given with most confidence: wrong labels are found among them first."""
    rows = []
    for name in JUDGED:
        split = splits[name]
        confidences_N, is_right_N = _answers(calibrated[name], split.targets_N)
        answers_N = calibrated[name].argmax(axis=1)
        wrong = np.flatnonzero(~is_right_N)
        for row in wrong[np.argsort(-confidences_N[wrong], kind="stable")][:MISTAKES_SHOWN].tolist():
            rows.append(
                {
                    "key": split.keys[row],
                    "shard": split.shards[row],
                    "index": split.indexes[row],
                    "split": name,
                    "label": class_names[split.targets_N[row]],
                    "answer": class_names[answers_N[row]],
                    "confidence": float(confidences_N[row]),
                }
            )
    return sorted(rows, key=lambda row: -row["confidence"])[:MISTAKES_SHOWN]
