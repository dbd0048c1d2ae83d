"""Before and after on the same rows, with an interval that means what it says."""

from __future__ import annotations

import numpy as np
import pytest

from engine.finetuning.comparison import compare


def logits_of(answers: np.ndarray) -> np.ndarray:
    return np.eye(3, dtype=np.float32)[answers]


def test_the_same_answers_differ_by_nothing() -> None:
    targets = np.array([0, 1, 2, 0])
    found = compare("test", logits_of(targets), logits_of(targets), targets)
    assert (found.before, found.after, found.difference, found.low, found.high) == (1.0, 1.0, 0.0, 0.0, 0.0)
    assert not found.is_better


def test_a_gain_is_counted_in_points_of_the_same_rows() -> None:
    targets = np.zeros(100, np.int64)
    before, after = np.zeros(100, np.int64), np.zeros(100, np.int64)
    before[:20], after[:12] = 1, 1
    found = compare("test", logits_of(before), logits_of(after), targets)
    assert (found.before, found.after) == (0.8, 0.88)
    assert found.is_better
    assert 0.02 <= found.low < 0.08 < found.high <= 0.14
    assert "+8.00 points" in found.in_words()


def test_the_interval_holds_the_true_difference_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    held = 0
    for trial in range(300):
        was_right, is_right = random.random((2, 400)) < [[0.80], [0.83]]
        targets = np.zeros(400, np.int64)
        found = compare("test", logits_of(~was_right * 1), logits_of(~is_right * 1), targets, seed=trial)
        held += found.low <= 0.03 <= found.high
    assert 0.90 <= held / 300 <= 0.99


def test_of_several_classes_every_question_counts() -> None:
    targets = np.array([[1, 0], [0, 1]], np.uint8)
    before = np.array([[1.0, 1.0], [-1.0, -1.0]])
    after = np.array([[1.0, -1.0], [-1.0, -1.0]])
    found = compare("validation", before, after, targets)
    assert (found.before, found.after) == (0.5, 0.75)
    assert found.split == "validation"


@pytest.mark.parametrize("rows", [1, 7])
def test_few_rows_are_compared_too(rows: int) -> None:
    found = compare(
        "test", logits_of(np.zeros(rows, np.int64)), logits_of(np.ones(rows, np.int64)), np.ones(rows)
    )
    assert found.difference == 1.0
    assert found.low == found.high == 1.0
