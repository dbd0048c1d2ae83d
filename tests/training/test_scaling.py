"""Every number has mean 0 and deviation 1 over the rows that count, whatever it was before."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.preprocessing import StandardScaler

from engine.training.scaling import ROWS_AT_ONCE, Scaling


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_it_is_what_scikit_learn_does(dtype: type) -> None:
    rng = np.random.default_rng(0)
    count = 2 * ROWS_AT_ONCE + 5
    embeddings_ND = (rng.normal(size=(count, 6)) * [1, 5, 0.1, 1, 20, 3] + [0, 9, 1, -4, 100, 0]).astype(
        dtype
    )
    rows = np.sort(rng.permutation(count)[: count // 2])
    reference = StandardScaler().fit(embeddings_ND[rows].astype(np.float64))
    found = Scaling.of(embeddings_ND, rows)
    np.testing.assert_allclose(found.subtract_D, reference.mean_, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.multiply_D, 1 / reference.scale_, rtol=1e-6)
    scaled_ND = found.apply(embeddings_ND)
    assert scaled_ND.dtype == np.float32
    np.testing.assert_allclose(scaled_ND, reference.transform(embeddings_ND.astype(np.float64)), atol=1e-4)


def test_what_never_changes_is_left_out_and_nothing_becomes_infinite() -> None:
    rows = np.array([[1.0, 7.0, 1e-30], [2.0, 7.0, 2e-30]], np.float32)
    found = Scaling.of(rows, np.arange(2))
    np.testing.assert_array_equal(found.multiply_D, [2.0, 0.0, 0.0])
    assert np.isfinite(found.apply(rows)).all()
    alike = Scaling.of(np.ones((3, 2), np.float32), np.arange(3))
    np.testing.assert_array_equal(alike.apply(np.ones((3, 2), np.float32)), np.zeros((3, 2)))
    one_row = Scaling.of(np.ones((3, 2), np.float32), np.array([1]))
    np.testing.assert_array_equal(one_row.multiply_D, [0.0, 0.0])


def test_a_number_that_few_training_rows_move_cannot_outweigh_all_others_elsewhere() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1_000, 4)).astype(np.float32)
    rows[:, 1:3] = 0
    rows[17, 1], rows[999, 1] = 0.001, 1.0  # once in the training rows, and once, larger, in the others
    rows[:12, 2] = 0.001  # often enough
    found = Scaling.of(rows, np.arange(900))
    assert (found.multiply_D > 0).tolist() == [True, False, True, True]
    assert np.abs(found.apply(rows)).max() < 30
    few = Scaling.of(rows[:12], np.arange(12))  # of twelve rows each may be the only one
    assert (found.multiply_D[[0, 3]] > 0).all() and (few.multiply_D[[0, 3]] > 0).all()
