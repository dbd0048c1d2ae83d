"""Wrong labels are found by answers of heads that have not seen the row."""

from __future__ import annotations

import numpy as np
import pytest

from engine.training.suspects import assign_folds, find_suspects


def test_a_row_that_is_confidently_of_another_class_is_suspected() -> None:
    probabilities_NK = np.array(
        [
            [0.9, 0.1, 0.0],
            [0.8, 0.2, 0.0],
            [0.1, 0.9, 0.0],
            [0.05, 0.95, 0.0],  # labelled 0: as confident of 1 as rows of 1 are
            [0.3, 0.7, 0.0],  # labelled 0: less confident of 1 than rows of 1 are
            [0.2, 0.8, 0.0],
        ]
    )
    classes_N = np.array([0, 0, 1, 0, 0, 1])
    found = find_suspects(probabilities_NK, classes_N)
    assert found.rows.tolist() == [3]
    assert found.suggested.tolist() == [1]
    assert found.margins.tolist() == pytest.approx([0.9])
    entries = found.to_json(list("abcdef"), ["s"] * 6, range(6), classes_N, ["x", "y", "z"])
    assert entries == [
        {"key": "d", "shard": "s", "index": 3, "label": "x", "suggested": "y", "margin": pytest.approx(0.9)}
    ]


def test_a_class_that_no_row_is_labelled_with_is_never_suggested() -> None:
    probabilities_NK = np.array([[0.1, 0.0, 0.9], [0.2, 0.0, 0.8], [0.9, 0.1, 0.0]])
    assert find_suspects(probabilities_NK, np.array([0, 0, 0])).rows.tolist() == []


def test_of_flipped_labels_most_are_found_and_of_those_found_most_are_flipped() -> None:
    rng = np.random.default_rng(0)
    true_N = rng.integers(0, 20, 10_000)
    logits_NK = rng.normal(size=(10_000, 20))
    logits_NK[np.arange(10_000), true_N] += 5
    probabilities_NK = np.exp(logits_NK) / np.exp(logits_NK).sum(axis=1, keepdims=True)
    given_N = true_N.copy()
    flipped = rng.choice(10_000, 500, replace=False)
    given_N[flipped] = (true_N[flipped] + rng.integers(1, 20, 500)) % 20
    found = find_suspects(probabilities_NK, given_N)
    hits = np.isin(found.rows, flipped)
    assert hits.mean() >= 0.8 and hits.sum() / 500 >= 0.6
    assert (found.suggested[hits] == true_N[found.rows[hits]]).mean() > 0.9
    assert (np.diff(found.margins) <= 0).all()


def test_folds_are_of_the_key_alone_and_about_equal() -> None:
    keys = [f"img{row}" for row in range(5_000)]
    folds_N = assign_folds(keys, 5, seed=0)
    assert set(np.unique(folds_N)) == set(range(5))
    assert np.bincount(folds_N).min() > 900
    np.testing.assert_array_equal(assign_folds(keys[::-1], 5, seed=0), folds_N[::-1])
    assert (assign_folds(keys, 5, seed=1) != folds_N).any()
