"""Rows that have any number of classes: what a head is worth on them, its thresholds, and labels that look wrong.

Each class is a question of its own, answered yes or no. Not for: training, or reading labels. Shape letters: N rows, V
validation rows, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.heads.confidence import Calibration, sigmoid
from engine.training.calibration import fit_temperature
from engine.training.judgement import JUDGED, MISTAKES_SHOWN, JudgedRows
from engine.training.kinds import CalibrationConfig
from engine.training.metrics import area_under_roc, calibration_error, class_figures, reliability_bins

UNCHOSEN_THRESHOLD = 0.5  # of a class that no validation row has

Logits = NDArray[np.floating[Any]]
Given = NDArray[np.integer[Any]]  # (N, K): 1 where the row has the class


def binary_cross_entropy(logits_NK: Logits, given_NK: Given) -> float:
    """Mean over rows and classes, in nats, summed in float64."""
    exact_NK = logits_NK.astype(np.float64)
    return float(np.mean(np.logaddexp(0.0, exact_NK) - exact_NK * given_NK))


def share_right(logits_NK: Logits, given_NK: Given) -> float:
    """Of all questions (row, class), those answered right at a probability of one half."""
    return float(np.mean((logits_NK > 0) == given_NK.astype(bool)))


def average_precision(scores_NK: Logits, given_NK: Given) -> list[float | None]:
    """Of each class: the mean, over its rows, of the precision down to that row; None for a class without rows.

    Precision at a score counts every row with that score or a higher one, as scikit-learn's average_precision_score.
    """
    found: list[float | None] = []
    for scores_N, given_N in zip(scores_NK.T, given_NK.T, strict=True):
        if not given_N.any():
            found.append(None)
            continue
        order = np.argsort(-scores_N, kind="stable")
        hits_N = np.cumsum(given_N[order], dtype=np.int64)
        is_last_N = np.append(scores_N[order][:-1] > scores_N[order][1:], True)
        ends = np.flatnonzero(is_last_N)
        gained = np.diff(hits_N[ends], prepend=0)
        found.append(float((gained * hits_N[ends] / (ends + 1)).sum() / hits_N[-1]))
    return found


def choose_thresholds(probabilities_VK: Logits, given_VK: Given) -> tuple[float, ...]:
    """Of each class the probability from which on it is given: that with the best F1 on validation rows.

    Of several equally good ones the highest. It lies halfway to the next lower probability, so that a last bit more or
    less decides nothing.
    """
    chosen = []
    for probabilities_V, given_V in zip(probabilities_VK.T.astype(np.float64), given_VK.T, strict=True):
        order = np.argsort(-probabilities_V, kind="stable")
        sorted_V = probabilities_V[order]
        hits_V = np.cumsum(given_V[order], dtype=np.int64)
        if not len(sorted_V) or not hits_V[-1]:
            chosen.append(UNCHOSEN_THRESHOLD)
            continue
        f1_V = 2 * hits_V / (np.arange(1, len(order) + 1) + hits_V[-1])
        ends = np.flatnonzero(np.append(sorted_V[:-1] > sorted_V[1:], True))
        last = int(ends[f1_V[ends].argmax()])
        below = sorted_V[last + 1] if last + 1 < len(order) else 0.0
        chosen.append(float((sorted_V[last] + below) / 2))
    return tuple(chosen)


def evaluate_label_sets(
    probabilities_NK: Logits, given_NK: Given, thresholds_K: Sequence[float], class_names: Sequence[str]
) -> dict[str, Any] | None:
    """All figures of one split, ready for JSON; None where the split has no rows.

    Returns:
        rows, mean_average_precision, micro_f1, exact_match (rows whose classes are all right), loss, roc_auc (mean),
        calibration_error and reliability (over all questions), per_class (label, average_precision, precision, recall,
        f1, support, threshold, roc_auc), micro_average, macro_average, weighted_average.
    """
    if not len(given_NK):
        return None
    answers_NK = probabilities_NK >= np.asarray(thresholds_K)
    given = given_NK.astype(bool)
    hits_K, answered_K, support_K = (
        (answers_NK & given).sum(axis=0),
        answers_NK.sum(axis=0),
        given.sum(axis=0),
    )
    columns, macro, weighted = class_figures(hits_K, answered_K, support_K)
    micro = {
        word: float(values[0])
        for word, values in class_figures(
            hits_K.sum(keepdims=True), answered_K.sum(keepdims=True), support_K.sum(keepdims=True)
        )[0].items()
    }
    precisions = average_precision(probabilities_NK, given_NK)
    areas = [
        area_under_roc(scores_N, given_N)
        for scores_N, given_N in zip(probabilities_NK.T, given.T, strict=True)
    ]
    reliability = reliability_bins(probabilities_NK.ravel(), given.ravel())
    known = [value for value in precisions if value is not None]
    known_areas = [area for area in areas if area is not None]
    with np.errstate(divide="ignore"):
        own_NK = np.where(given, probabilities_NK, 1 - probabilities_NK).astype(np.float64)
    return {
        "rows": len(given_NK),
        "mean_average_precision": float(np.mean(known)) if known else None,
        "micro_f1": micro["f1"],
        "exact_match": float((answers_NK == given).all(axis=1).mean()),
        "loss": float(-np.log(np.maximum(own_NK, np.finfo(np.float64).tiny)).mean()),
        "roc_auc": float(np.mean(known_areas)) if known_areas else None,
        "calibration_error": calibration_error(reliability),
        "reliability": reliability,
        "per_class": [
            {
                "label": name,
                "average_precision": precisions[number],
                **{word: float(values[number]) for word, values in columns.items()},
                "support": int(support_K[number]),
                "threshold": float(thresholds_K[number]),
                "roc_auc": areas[number],
            }
            for number, name in enumerate(class_names)
        ],
        "micro_average": micro,
        "macro_average": macro,
        "weighted_average": weighted,
    }


def judge_label_sets(
    splits: Mapping[str, JudgedRows], class_names: Sequence[str], config: CalibrationConfig
) -> tuple[Calibration, tuple[float, ...], dict[str, Any]]:
    """Calibrate and choose thresholds on the validation rows, then measure both splits with what came out.

    Returns:
        calibration, thresholds of the K classes, and metrics: validation and test as `evaluate_label_sets` gives them,
        calibration, most_confident_mistakes.
    """
    validation = splits["validation"]
    calibration = Calibration()
    if config.kind != "none" and len(validation.targets_N):
        calibration = Calibration(temperature=_fit_temperature(validation.logits_NK, validation.targets_N))
    probabilities = {name: sigmoid(calibration.apply(rows.logits_NK)) for name, rows in splits.items()}
    thresholds = choose_thresholds(probabilities["validation"], validation.targets_N)
    metrics: dict[str, Any] = {
        name: evaluate_label_sets(probabilities[name], splits[name].targets_N, thresholds, class_names)
        for name in JUDGED
    }
    metrics["calibration"] = {
        "kind": "none" if config.kind == "none" else "temperature",
        **calibration.model_dump(mode="json"),
        "calibration_error_before": {
            name: _error(sigmoid(splits[name].logits_NK), splits[name].targets_N) for name in JUDGED
        },
    }
    metrics["most_confident_mistakes"] = _mistakes(splits, probabilities, class_names)
    return calibration, thresholds, metrics


def _fit_temperature(logits_VK: Logits, given_VK: Given) -> float:
    """The T for which sigmoid(logits / T) has the lowest cross-entropy: each question is one of two classes."""
    flat = logits_VK.reshape(-1, 1)
    return fit_temperature(np.hstack([np.zeros_like(flat), flat]), given_VK.reshape(-1).astype(np.int64))


def _error(probabilities_NK: Logits, given_NK: Given) -> float | None:
    if not len(given_NK):
        return None
    return calibration_error(reliability_bins(probabilities_NK.ravel(), given_NK.ravel().astype(bool)))


def _mistakes(
    splits: Mapping[str, JudgedRows], probabilities: Mapping[str, Logits], class_names: Sequence[str]
) -> list[dict[str, Any]]:
    """The questions that were answered wrong with most confidence."""
    mistakes = []
    for name in JUDGED:
        split, probabilities_NK = splits[name], probabilities[name]
        surety_NK = np.where(split.targets_N.astype(bool), 1 - probabilities_NK, probabilities_NK)
        for place in np.argsort(-surety_NK, axis=None, kind="stable")[:MISTAKES_SHOWN].tolist():
            row, number = divmod(place, len(class_names))
            if surety_NK[row, number] <= 0.5:
                break
            mistakes.append(
                {
                    "key": split.keys[row],
                    "shard": split.shards[row],
                    "index": split.indexes[row],
                    "split": name,
                    "label": class_names[number],
                    "given": bool(split.targets_N[row, number]),
                    "confidence": float(surety_NK[row, number]),
                }
            )
    return sorted(mistakes, key=lambda mistake: -mistake["confidence"])[:MISTAKES_SHOWN]


def find_suspect_label_sets(
    probabilities_NK: Logits,
    given_NK: Given,
    keys: Sequence[str],
    shards: Sequence[str],
    indexes: Sequence[int],
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """Labels that are probably missing, or there by mistake; the most doubtful first.

    Confident learning on each class as a question of its own: the other answer has at least the probability that rows
    with that answer have on average, and more than one half.

    Args:
        probabilities_NK: of heads that were not fitted on the row.
        given_NK: as labelled.
    """
    found = []
    for number, name in enumerate(names):
        given_N, yes_N = given_NK[:, number].astype(bool), probabilities_NK[:, number]
        typical_yes = float(yes_N[given_N].mean()) if given_N.any() else np.inf
        typical_no = float((1 - yes_N[~given_N]).mean()) if not given_N.all() else np.inf
        other_N = np.where(given_N, 1 - yes_N, yes_N)
        doubted_N = (other_N > 0.5) & (other_N >= np.where(given_N, typical_no, typical_yes))
        found += [
            {
                "key": keys[row],
                "shard": shards[row],
                "index": indexes[row],
                "label": name,
                "given": bool(given_N[row]),
                "margin": float(2 * other_N[row] - 1),
            }
            for row in np.flatnonzero(doubted_N).tolist()
        ]
    return sorted(found, key=lambda suspect: -suspect["margin"])
