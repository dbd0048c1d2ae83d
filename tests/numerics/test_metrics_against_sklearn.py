"""Our metrics are scikit-learn's, to the last digit that floats allow."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import (
    accuracy_score,
    classification_report,
    confusion_matrix,
    log_loss,
    roc_auc_score,
    top_k_accuracy_score,
)
from sklearn.utils.class_weight import compute_class_weight

from engine.training.metrics import evaluate, roc_auc, top_k_accuracy
from engine.training.passes import row_weights

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
Case = tuple[NDArray[np.float32], NDArray[np.int64]]


def unbalanced_case() -> Case:
    """211 rows, 7 classes: class 5 is never answered, class 6 never happens."""
    rng = np.random.default_rng(11)
    classes_N = rng.choice(6, 211, p=[0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
    logits_NK = rng.normal(size=(211, 7)).astype(np.float32)
    logits_NK[np.arange(211), classes_N] += 1.1
    logits_NK[:, 5] = -9
    return logits_NK, classes_N


def two_class_case() -> Case:
    rng = np.random.default_rng(12)
    return rng.normal(size=(53, 2)).astype(np.float32), rng.integers(0, 2, 53)


@pytest.mark.parametrize(("case", "num_classes"), [(unbalanced_case, 7), (two_class_case, 2)])
def test_every_figure_equals_scikit_learn(case: object, num_classes: int) -> None:
    logits_NK, classes_N = case()  # type: ignore[operator]
    answers_N, labels, names = logits_NK.argmax(axis=1), range(num_classes), NAMES[:num_classes]
    ours = evaluate(logits_NK, classes_N, names)
    assert ours is not None
    theirs = classification_report(
        classes_N, answers_N, labels=labels, target_names=names, zero_division=0, output_dict=True
    )
    for row in ours["per_class"]:
        reference = theirs[row["label"]]
        assert row["precision"] == pytest.approx(reference["precision"], abs=1e-12)
        assert row["recall"] == pytest.approx(reference["recall"], abs=1e-12)
        assert row["f1"] == pytest.approx(reference["f1-score"], abs=1e-12)
        assert row["support"] == reference["support"]
    for ours_name, theirs_name in (("macro_average", "macro avg"), ("weighted_average", "weighted avg")):
        reference = theirs[theirs_name]
        assert ours[ours_name]["precision"] == pytest.approx(reference["precision"], abs=1e-12)
        assert ours[ours_name]["recall"] == pytest.approx(reference["recall"], abs=1e-12)
        assert ours[ours_name]["f1"] == pytest.approx(reference["f1-score"], abs=1e-12)
    assert ours["confusion_matrix"] == confusion_matrix(classes_N, answers_N, labels=labels).tolist()
    assert ours["rows"] == len(classes_N)
    assert ours["accuracy"] == pytest.approx(accuracy_score(classes_N, answers_N), abs=1e-12)
    probabilities_NK = np.exp(logits_NK.astype(np.float64))
    probabilities_NK /= probabilities_NK.sum(axis=1, keepdims=True)
    assert ours["loss"] == pytest.approx(log_loss(classes_N, probabilities_NK, labels=labels), rel=1e-7)


@pytest.mark.parametrize(("case", "num_classes"), [(unbalanced_case, 7), (two_class_case, 2)])
@pytest.mark.parametrize("has_ties", [False, True])
def test_areas_under_the_roc_curve_equal_scikit_learn(case: object, num_classes: int, has_ties: bool) -> None:
    logits_NK, classes_N = case()  # type: ignore[operator]
    scores_NK = np.round(logits_NK) if has_ties else logits_NK
    areas = roc_auc(scores_NK, classes_N)
    for number, area in enumerate(areas):
        is_own_N = classes_N == number
        if is_own_N.any():
            assert area == pytest.approx(roc_auc_score(is_own_N, scores_NK[:, number]), abs=1e-12)
        else:
            assert area is None
    report = evaluate(logits_NK, classes_N, NAMES[:num_classes])
    assert report is not None
    own = [row["roc_auc"] for row in report["per_class"] if row["roc_auc"] is not None]
    assert report["roc_auc"] == pytest.approx(np.mean(own))


@pytest.mark.parametrize("k", [1, 2, 3, 6, 7])
def test_top_k_accuracy_equals_scikit_learn(k: int) -> None:
    logits_NK, classes_N = unbalanced_case()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns that top 7 of 7 is always 1
        reference = top_k_accuracy_score(classes_N, logits_NK, k=k, labels=range(7))
    assert top_k_accuracy(logits_NK, classes_N, k) == pytest.approx(reference, abs=1e-12)


def test_of_equal_logits_the_first_classes_are_the_answer() -> None:
    equal_NK = np.zeros((5, 5), np.float32)
    classes_N = np.array([0, 1, 1, 2, 4])
    assert [top_k_accuracy(equal_NK, classes_N, k) for k in (1, 2, 3, 4, 5)] == [0.2, 0.6, 0.8, 0.8, 1.0]
    report = evaluate(equal_NK, classes_N, NAMES[:5])
    assert report is not None
    assert (report["accuracy"], report["top_3_accuracy"]) == (0.2, 0.8)
    assert report["loss"] == pytest.approx(np.log(5), abs=1e-12)


def test_huge_logits_do_not_overflow() -> None:
    report = evaluate(np.array([[3e38, -3e38]], np.float32), np.array([0]), NAMES[:2])
    assert report is not None
    assert report["loss"] == 0.0


def test_a_split_without_rows_has_no_figures() -> None:
    assert evaluate(np.empty((0, 3), np.float32), np.empty(0, np.int64), NAMES[:3]) is None


def test_balanced_weights_equal_scikit_learn_and_leave_other_rows_at_one() -> None:
    classes_N = np.array([0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 1])
    train = np.arange(10)
    reference_K = compute_class_weight("balanced", classes=np.arange(3), y=classes_N[:10])
    weights_N = row_weights(classes_N, train, "balanced")
    np.testing.assert_allclose(weights_N[:10], reference_K[classes_N[:10]], rtol=1e-6)
    assert weights_N[10] == 1
    assert row_weights(classes_N, train, "none").tolist() == [1] * 11
