"""Confidences hold what they promise, and thresholds are the best there are."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from engine.heads.confidence import LEAST_TEMPERATURE, MOST_TEMPERATURE, Calibration, log_entropy, softmax
from engine.training.calibration import (
    calibrate,
    fit_temperature,
    threshold_for,
)
from engine.training.judgement import JudgedRows, judge
from engine.training.kinds import CalibrationConfig
from engine.training.metrics import (
    abstention_curve,
    calibration_error,
    coverage_curve,
    cross_entropy,
    reliability_bins,
)

Case = tuple[NDArray[np.float32], NDArray[np.int64]]


def overconfident(rows: int, too_hot: float, seed: int = 0, num_classes: int = 8) -> Case:
    """Logits `too_hot` times those by which the classes were drawn."""
    rng = np.random.default_rng(seed)
    honest_NK = 2 * rng.normal(size=(rows, num_classes))
    drawn_N = (softmax(honest_NK).cumsum(axis=1) > rng.random((rows, 1))).argmax(axis=1)
    return (too_hot * honest_NK).astype(np.float32), drawn_N


@pytest.mark.parametrize("too_hot", [0.3, 1.0, 4.0])
def test_the_temperature_is_the_one_of_lowest_loss_and_makes_confidences_honest(too_hot: float) -> None:
    logits_NK, classes_N = overconfident(20_000, too_hot)
    found = fit_temperature(logits_NK, classes_N)
    reference = minimize_scalar(
        lambda inverse: cross_entropy(inverse * logits_NK, classes_N), bounds=(0.05, 20), method="bounded"
    )
    assert found == pytest.approx(1 / reference.x, rel=0.01)  # it doubts each label by 1 in 20,002
    assert cross_entropy(logits_NK / found, classes_N) <= reference.fun + 1e-4
    assert found == pytest.approx(too_hot, rel=0.05)
    fresh_NK, fresh_classes_N = overconfident(20_000, too_hot, seed=1)
    confidences_N = softmax(fresh_NK / found).max(axis=1)
    is_right_N = fresh_NK.argmax(axis=1) == fresh_classes_N
    assert calibration_error(reliability_bins(confidences_N, is_right_N)) < 0.02


def test_where_nothing_can_be_learned_the_temperature_stays_within_bounds() -> None:
    always_right = 3 * np.eye(4, dtype=np.float32)
    sure = softmax(always_right / fit_temperature(always_right, np.arange(4))).max(axis=1)
    assert sure == pytest.approx([1 - 1 / 6] * 4, abs=1e-6)  # four rows do not show that it is never wrong
    blurred = fit_temperature(0.001 * always_right, np.arange(4))
    assert blurred == pytest.approx(LEAST_TEMPERATURE, rel=1e-3)
    always_wrong = fit_temperature(-always_right, np.arange(4))
    assert always_wrong == pytest.approx(MOST_TEMPERATURE, rel=1e-3)
    assert fit_temperature(np.zeros((3, 2), np.float32), np.array([0, 1, 1])) > 0
    assert fit_temperature(np.empty((0, 5), np.float32), np.empty(0, np.int64)) == 1.0
    assert np.isfinite(
        fit_temperature(np.array([[3e38, -3e38], [3e38, -3e38]], np.float32), np.array([0, 1]))
    )


def best_by_trying_all(
    precision: float, confidences_N: NDArray[np.float64], right_N: NDArray[np.bool_]
) -> float:
    given = [confidences_N >= value for value in np.unique(confidences_N)]
    return max((float(rows.mean()) for rows in given if right_N[rows].mean() >= precision), default=0.0)


@pytest.mark.parametrize("precision", [0.5, 0.8, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_threshold_answers_as_many_rows_as_any_of_its_precision(precision: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    confidences_N = rng.integers(1, 40, 200) / 40  # many ties
    right_N = rng.random(200) < confidences_N
    found = threshold_for(precision, confidences_N, right_N)
    assert found.coverage == best_by_trying_all(precision, confidences_N, right_N)
    if found.min_confidence is None:
        assert found.coverage == 0
        return
    given = confidences_N >= found.min_confidence
    assert given.mean() == found.coverage and right_N[given].mean() >= precision
    assert not np.isclose(confidences_N, found.min_confidence).any(), "a last bit would decide"


def test_thresholds_at_the_ends() -> None:
    confidences_N = np.array([0.9, 0.8, 0.7])
    everything = threshold_for(0.9, confidences_N, np.array([True, True, True]))
    assert (everything.min_confidence, everything.coverage) == (0.0, 1.0)
    nothing = threshold_for(0.9, confidences_N, np.array([False, True, True]))
    assert (nothing.min_confidence, nothing.coverage) == (None, 0.0)
    assert threshold_for(0.9, np.empty(0), np.empty(0, bool)).min_confidence is None


def test_the_calibration_error_is_the_mean_gap_by_rows() -> None:
    confidences_N = np.array([0.5, 0.52, 0.95, 1.0])
    is_right_N = np.array([True, False, True, True])
    bins = reliability_bins(confidences_N, is_right_N)
    assert [row["rows"] for row in bins] == [2, 2]
    assert bins[1] == {"above": 14 / 15, "up_to": 1.0, "rows": 2, "confidence": 0.975, "accuracy": 1.0}
    assert calibration_error(bins) == pytest.approx((2 * abs(0.51 - 0.5) + 2 * 0.025) / 4)


def test_the_coverage_curve_ends_with_all_rows_and_keeps_ties_together() -> None:
    confidences_N = np.array([0.9] * 30 + [0.6] * 70)
    is_right_N = np.array([True] * 30 + [False] * 70)
    assert coverage_curve(confidences_N, is_right_N) == [
        {"coverage": 0.3, "accuracy": 1.0, "min_confidence": 0.9},
        {"coverage": 1.0, "accuracy": 0.3, "min_confidence": 0.6},
    ]
    logits_NK, classes_N = overconfident(5_000, 1.0)
    curve = coverage_curve(softmax(logits_NK).max(axis=1), logits_NK.argmax(axis=1) == classes_N)
    assert len(curve) == 20 and curve[-1]["coverage"] == 1.0
    accuracies = [point["accuracy"] for point in curve]
    assert all(later <= earlier + 0.02 for earlier, later in pairwise(accuracies))


def judged(rows: Case, name: str) -> JudgedRows:
    logits_NK, classes_N = rows
    return JudgedRows(
        logits_NK,
        classes_N,
        [f"{name}{row}" for row in range(len(classes_N))],
        ["a.tar"] * len(classes_N),
        list(range(len(classes_N))),
    )


NAMES = tuple("abcdefgh")


def test_a_judgement_calibrates_on_validation_and_is_honest_about_test() -> None:
    splits = {
        "validation": judged(overconfident(4_000, 5.0), "v"),
        "test": judged(overconfident(4_000, 5.0, 1), "t"),
    }
    found = judge(splits, NAMES, CalibrationConfig(precisions=(0.8, 1.0)))
    assert found.calibration.temperature == pytest.approx(5, rel=0.1)
    before = found.metrics["calibration"]["calibration_error_before"]
    for name in ("validation", "test"):
        assert found.metrics[name]["calibration_error"] < 0.03
        assert before[name] > 0.2
    wished, impossible = found.metrics["calibration"]["suggested_min_confidence"]
    assert wished["test"]["precision"] == pytest.approx(0.8, abs=0.03)
    assert wished["test"]["coverage"] == pytest.approx(wished["coverage"], abs=0.03)
    assert impossible["coverage"] < wished["coverage"]
    mistakes = found.metrics["most_confident_mistakes"]
    assert len(mistakes) == 20
    assert [row["confidence"] for row in mistakes] == sorted(
        (row["confidence"] for row in mistakes), reverse=True
    )
    assert {row["split"] for row in mistakes} == {"validation", "test"}
    for row in mistakes:
        rows = splits[row["split"]]
        place = list(rows.keys).index(row["key"])
        assert row["label"] == NAMES[rows.targets_N[place]] != row["answer"]
        assert row["answer"] == NAMES[rows.logits_NK[place].argmax()]


def test_without_calibration_or_without_rows_logits_stay_as_they_are() -> None:
    nothing = judged((np.empty((0, 8), np.float32), np.empty(0, np.int64)), "n")
    some = judged(overconfident(100, 5.0), "s")
    assert (
        judge({"validation": some, "test": some}, NAMES, CalibrationConfig(kind="none")).calibration
        == Calibration()
    )
    found = judge({"validation": nothing, "test": some}, NAMES, CalibrationConfig())
    assert found.calibration == Calibration()
    assert found.metrics["calibration"]["suggested_min_confidence"] == []
    assert found.metrics["validation"] is None
    neither = judge({"validation": nothing, "test": nothing}, NAMES, CalibrationConfig())
    assert neither.metrics["most_confident_mistakes"] == []
    without_test = judge({"validation": some, "test": nothing}, NAMES, CalibrationConfig(precisions=(0.5,)))
    assert without_test.metrics["calibration"]["suggested_min_confidence"][0]["test"] is None


def bent(rows: int, seed: int) -> Case:
    """Logits too large where they are far apart and too small where they are not, as of a linear head on mixtures."""
    logits_NK, classes_N = overconfident(rows, 1.0, seed)
    return Calibration(temperature=1.0, entropy_exponent=0.6).apply(logits_NK), classes_N


def error_of(calibration: Calibration, case: Case) -> float:
    logits_NK, classes_N = case
    confidences_N = softmax(calibration.apply(logits_NK)).max(axis=1)
    return calibration_error(reliability_bins(confidences_N, logits_NK.argmax(axis=1) == classes_N))


def test_what_one_temperature_cannot_mend_an_adaptive_one_does() -> None:
    fitted_on, fresh = bent(6_000, 0), bent(20_000, 1)
    plain, adaptive = calibrate("temperature", *fitted_on), calibrate("adaptive", *fitted_on)
    assert plain.entropy_exponent == 0 != adaptive.entropy_exponent
    assert error_of(plain, fresh) > 0.04
    assert error_of(adaptive, fresh) < 0.025
    logits_NK = fresh[0]
    np.testing.assert_array_equal(
        np.argsort(-adaptive.apply(logits_NK), axis=1, kind="stable"),
        np.argsort(-logits_NK, axis=1, kind="stable"),
    )


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("rows", [1, 2, 30, 49])
def test_a_few_rows_never_show_that_two_numbers_are_needed(rows: int, seed: int) -> None:
    case = bent(rows, seed)
    assert calibrate("adaptive", *case) == calibrate("temperature", *case)


def test_where_one_temperature_is_enough_there_mostly_is_one() -> None:
    cases = [overconfident(400, 2.0, seed) for seed in range(40)]
    plain = [calibrate("adaptive", *case) == calibrate("temperature", *case) for case in cases]
    assert sum(plain) >= 36
    assert calibrate("none", *cases[0]) == Calibration()


@pytest.mark.parametrize("scale", [0.001, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("rows", [3, 60, 300])
def test_labels_that_nothing_explains_keep_temperatures_within_bounds(rows: int, scale: float) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        logits_NK = (scale * rng.normal(size=(rows, 5))).astype(np.float32)
        found = calibrate("adaptive", logits_NK, rng.integers(0, 5, rows))
        assert LEAST_TEMPERATURE <= found.temperature <= MOST_TEMPERATURE
        ratios_N = np.abs(logits_NK).max(axis=1) / np.abs(found.apply(logits_NK)).max(axis=1)
        assert ratios_N.min() > 0.99 * LEAST_TEMPERATURE and ratios_N.max() < 1.01 * MOST_TEMPERATURE


def test_logits_that_say_nothing_at_all_are_no_trouble() -> None:
    for rows in (1, 3, 60):
        zeros = np.zeros((rows, 2), np.float32)
        assert np.isfinite(calibrate("adaptive", zeros, np.arange(rows) % 2).apply(zeros)).all()
    clipped = np.log(np.full((60, 3), 1e-4, np.float32))
    clipped[np.arange(60), np.arange(60) % 3] = 0.0
    for wrong in (0, 1, 60):
        classes_N = (np.arange(60) + (np.arange(60) < wrong)) % 3
        assert np.isfinite(calibrate("adaptive", clipped, classes_N).apply(clipped)).all()


def test_rows_that_are_all_right_keep_an_adaptive_temperature_finite() -> None:
    logits_NK = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    found = calibrate("adaptive", logits_NK, logits_NK.argmax(axis=1))
    assert np.isfinite(softmax(found.apply(logits_NK))).all()
    assert calibrate("adaptive", logits_NK[:0], np.empty(0, np.int64)) == Calibration()


def test_the_entropy_is_exact_where_a_row_is_all_but_sure() -> None:
    logits_BK = np.array([[0, -12.0, -13.0], [0, 0, 0], [5, -95, -95]])
    expected_B = [
        -sum(p * np.log(p) for p in row) / np.log(3) for row in softmax(logits_BK.astype(np.longdouble))
    ]
    for dtype in (np.float64, np.float32):
        found_B = log_entropy(logits_BK.astype(dtype))
        assert found_B.dtype == dtype
        assert found_B[:2] == pytest.approx(np.log(np.array(expected_B[:2], float)), abs=1e-5)
        assert found_B[2] == pytest.approx(np.log(1e-6))


def test_every_threshold_is_told_with_the_rows_that_reach_it_and_how_many_of_them_are_right() -> None:
    confidences_N = np.array([0.9, 0.5, 0.75, 0.5])
    curve = abstention_curve(confidences_N, np.array([True, False, False, True]))
    assert len(curve) == 201
    assert [point["min_confidence"] for point in curve[::100]] == [0.0, 0.5, 1.0]
    at = {point["min_confidence"]: (point["coverage"], point["accuracy"]) for point in curve}
    assert at[0.0] == at[0.5] == (1.0, 0.5)  # not below it is enough
    assert at[0.505] == at[0.75] == (0.5, 0.5)
    assert at[0.755] == at[0.9] == (0.25, 1.0)
    assert at[0.905] == at[1.0] == (0.0, None)
    logits_NK, classes_N = overconfident(2_000, 1.0)
    confidences_N, is_right_N = softmax(logits_NK).max(axis=1), logits_NK.argmax(axis=1) == classes_N
    for point in abstention_curve(confidences_N, is_right_N)[:180:13]:
        given_N = confidences_N >= point["min_confidence"]
        assert (point["coverage"], point["accuracy"]) == (given_N.mean(), is_right_N[given_N].mean())
