"""The plane of most variance is that of a singular value decomposition, and always the same."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engine.training.embedding_map import MOST_POINTS, embedding_map, principal_plane


@pytest.mark.parametrize("shape", [(211, 7), (11, 37), (5, 1)])
def test_points_and_shares_are_those_of_the_singular_values(shape: tuple[int, int]) -> None:
    rows_PD = np.random.default_rng(3).normal(size=shape) * (1 + np.arange(shape[1])) + 5
    points_P2, explained = principal_plane(rows_PD)
    left, singular, _ = np.linalg.svd(rows_PD - rows_PD.mean(axis=0), full_matrices=False)
    expected = (left * singular)[:, :2]
    np.testing.assert_allclose(np.abs(points_P2[:, : expected.shape[1]]), np.abs(expected), atol=1e-8)
    shares = (singular**2 / (singular**2).sum())[:2]
    assert explained[: len(shares)] == pytest.approx(shares)
    for axis in range(expected.shape[1]):
        assert points_P2[np.abs(points_P2[:, axis]).argmax(), axis] > 0


def test_rows_that_are_all_the_same_lie_on_one_point() -> None:
    points_P2, explained = principal_plane(np.ones((9, 4)))
    assert np.abs(points_P2).max() < 1e-6
    assert explained == (0.0, 0.0)


def test_of_many_rows_a_lot_is_drawn_that_is_the_same_each_time_and_knows_no_stride() -> None:
    embeddings_ND = np.random.default_rng(1).normal(size=(24_000, 3)).astype(np.float32)
    classes_N = np.arange(24_000) % 12  # every twelfth row would be of one class
    rows = np.arange(0, 24_000)
    told = embedding_map(embeddings_ND, rows, classes_N)
    assert told is not None
    assert told == embedding_map(embeddings_ND, rows, classes_N)
    assert told["of_rows"] == 24_000
    assert len(told["x"]) == len(told["y"]) == len(told["class"]) == MOST_POINTS == 2_000
    assert min(np.bincount(told["class"], minlength=12)) > 100
    assert len(json.dumps(told)) < 60_000


def test_rows_of_several_labels_count_as_their_first_and_too_few_rows_have_no_map() -> None:
    embeddings_ND = np.eye(4, 5, dtype=np.float16)
    has_NK = np.array([[0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1]])
    told = embedding_map(embeddings_ND, np.arange(4), has_NK)
    assert told is not None
    assert told["class"] == [1, -1, 0, 2]
    assert embedding_map(embeddings_ND, np.arange(2), has_NK) is None
