"""What a bundle remembers of its embeddings, against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from engine.heads import reference as module
from engine.heads.confidence import Calibration
from engine.heads.reference import Reference, given_classes, representatives

TRAIN_ND = np.array([[3, 4], [1, 0], [0, 2], [0, 7], [-5, 0]], np.float32)
TARGETS_N = np.array([0, 0, 1, 1, 2])


def of_rows(rows_ND: np.ndarray, targets_N: np.ndarray, held_out: int = 0, num_classes: int = 3) -> Reference:
    """The last rows are held out; what the head says of them is that they are of class 0."""
    rows = np.arange(len(rows_ND))
    compared = held_out or len(rows)
    given_MK = np.zeros((compared, num_classes), np.bool_)
    given_MK[:, 0] = True
    train = rows[: len(rows) - held_out]
    return Reference.of(rows_ND, targets_N, train, rows[len(rows) - held_out :], given_MK)


def test_a_centroid_is_the_mean_direction_of_the_rows_of_its_class() -> None:
    found = of_rows(TRAIN_ND, TARGETS_N)
    # (0.6, 0.8) and (1, 0) add up to (1.6, 0.8), whatever the lengths of the rows.
    np.testing.assert_allclose(found.centroids_CD, [[2 / 5**0.5, 1 / 5**0.5], [0, 1], [-1, 0]], atol=1e-7)
    assert found.classes_C.tolist() == [0, 1, 2]
    cosines_N = found.cosines(np.array([[0, 9], [-2, 0], [4, 2], [0, 0], [2, -11]], np.float16))
    np.testing.assert_allclose(cosines_N, [1, 1, 1, 0, -2 / 125**0.5], atol=1e-6)


def test_rows_of_several_labels_count_for_each() -> None:
    given_NK = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0]], np.uint8)
    found = of_rows(np.array([[2, 0], [0, 5], [0, 1]], np.float32), given_NK)
    np.testing.assert_allclose(found.centroids_CD, [[0.5**0.5, 0.5**0.5], [0, 1]], atol=1e-7)
    assert found.classes_C.tolist() == [0, 1], (
        "a class without rows has no centroid, and is nearest to nothing"
    )
    assert found.cosines(np.array([[0, -3]], np.float32))[0] == pytest.approx(-(0.5**0.5))


def test_a_class_whose_rows_point_everywhere_has_no_direction() -> None:
    found = of_rows(np.array([[1, 0], [-3, 0], [0, 1]], np.float32), np.array([0, 0, 1]))
    assert found.classes_C.tolist() == [1]
    nowhere = of_rows(np.array([[1, 0], [-3, 0]], np.float32), np.array([0, 0]))
    assert nowhere.cosines(np.ones((2, 2), np.float32)).tolist() == [0, 0]


def test_every_bin_has_a_hundredth_of_the_rows_that_were_held_out() -> None:
    rng = np.random.default_rng(8)
    rows_ND = rng.normal(size=(1300, 5)).astype(np.float32)
    found = of_rows(rows_ND, rng.integers(0, 3, 1300), held_out=700)
    assert (found.rows, found.is_held_out, len(found.cosine_counts)) == (700, True, 100)
    assert found.cosine_counts.sum() == 700
    assert (found.cosine_counts.min(), found.cosine_counts.max()) >= (6, 7) and found.cosine_counts.max() <= 8
    cosines_N = found.cosines(rows_ND[600:])
    np.testing.assert_array_equal(found.histogram(cosines_N), found.cosine_counts)
    parts = [found.histogram(cosines_N[:13]), found.histogram(cosines_N[13:]), found.histogram(cosines_N[:0])]
    np.testing.assert_array_equal(sum(parts), found.cosine_counts)


def test_a_last_bit_moves_none_of_many_equal_rows() -> None:
    rows_ND = np.repeat(np.array([[1, 2, 3], [3, 1, 2]], np.float32), [400, 300], axis=0)
    found = of_rows(rows_ND, np.zeros(700, np.int64))
    cosines_N = found.cosines(rows_ND)
    for nudged_N in (np.nextafter(cosines_N, np.float32(-1)), np.nextafter(cosines_N, np.float32(1))):
        np.testing.assert_array_equal(found.histogram(nudged_N), found.cosine_counts)


def test_answers_are_counted_by_class_whatever_their_confidence() -> None:
    logits_NK = np.array([[0.1, 0.2, 0.0], [5, -5, 0], [0, 0, 0]], np.float32)
    assert given_classes(logits_NK, Calibration(temperature=3), ()).astype(int).tolist() == [
        [0, 1, 0],
        [1, 0, 0],
        [1, 0, 0],
    ]
    several_NK = given_classes(logits_NK, Calibration(), (0.5, 0.51, 0.99))
    assert several_NK.astype(int).tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 0]]
    none_NK = given_classes(logits_NK[2:], Calibration(), (0.9, 0.9, 0.9))
    found = Reference.of(
        TRAIN_ND, TARGETS_N, np.arange(1, 5), np.array([0, 1]), np.concatenate([several_NK[:1], none_NK])
    )
    assert found.label_mix(("ant", "bee", "cat")) == {"ant": 1, "bee": 1, "cat": 0}
    assert (found.unlabelled, found.rows) == (1, 2)


def test_of_a_large_class_some_rows_are_taken_evenly_and_of_too_many_classes_the_largest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MOST_CENTROIDS", 2)
    monkeypatch.setattr(module, "ROWS_PER_CLASS", 3)
    targets_N = np.array([2, 0, 2, 2, 1, 0, 2, 2, 2])
    rows, classes = representatives(targets_N, np.arange(9), num_classes=3)
    assert rows.tolist() == [1, 5, 0, 3, 7]
    assert classes.tolist() == [0, 0, 2, 2, 2]


def test_portions_and_files_give_the_numbers_of_rows_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = np.random.default_rng(5)
    rows_ND, targets_N = rng.normal(size=(97, 7)).astype(np.float32), rng.integers(0, 3, 97)
    whole = of_rows(rows_ND, targets_N, held_out=31)
    file = np.memmap(tmp_path_factory.mktemp("rows") / "rows", np.float32, "w+", shape=(97, 7))
    file[:] = rows_ND
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 10)
    assert of_rows(file, targets_N, held_out=31).to_bytes() == whole.to_bytes()


def test_embeddings_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 3\), wanted \(N, 2\)"):
        of_rows(TRAIN_ND, TARGETS_N).cosines(np.ones((4, 3), np.float32))
    with pytest.raises(ValueError, match="answers for 1 rows, wanted those of 5"):
        Reference.of(TRAIN_ND, TARGETS_N, np.arange(5), np.arange(0), np.ones((1, 3), np.bool_))
