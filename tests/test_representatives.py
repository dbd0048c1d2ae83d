"""Which rows stand for others: in the order in which they come, and never along a chain."""

from __future__ import annotations

import numpy as np
import pytest

from engine import representatives
from engine.representatives import Representatives, of_unit_length


def at_degrees(*angles: float) -> np.ndarray:
    """Rows of unit length in a plane: cosines between them are those of the differences."""
    radians = np.deg2rad(angles)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def test_a_chain_of_near_rows_is_cut_where_its_representative_is_no_longer_near() -> None:
    taken = Representatives(np.cos(np.deg2rad(10.5)))
    pairs = taken.take(at_degrees(0, 10, 20, 30, 40))
    assert len(taken) == 3  # 0, 20 and 40 degrees
    assert list(zip(pairs.rows.tolist(), pairs.representatives.tolist(), strict=True)) == [(1, 0), (3, 2)]
    np.testing.assert_allclose(pairs.cosines, np.cos(np.deg2rad(10)), atol=1e-6)


def test_a_row_names_every_representative_before_it_that_it_is_near_to_and_none_behind_it() -> None:
    pairs = Representatives(np.cos(np.deg2rad(10.5))).take(at_degrees(8, 0, 20, 10, -9))
    found = list(zip(pairs.rows.tolist(), pairs.representatives.tolist(), strict=True))
    assert found == [(1, 0), (3, 0), (3, 2)]  # -9 is near to 0 degrees, which stands for nothing


@pytest.mark.parametrize("cuts", [[], [1, 2, 3], [40], [7, 8, 90]])
def test_rows_in_portions_give_the_pairs_of_all_rows_at_once(
    cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(representatives, "COMPARED_AT_ONCE", 11)  # representatives, of which there are more
    units_ND = of_unit_length(np.random.default_rng(5).normal(size=(97, 3)))
    at_once = pairs_in_portions(units_ND, [])
    assert len(at_once) > 50
    assert pairs_in_portions(units_ND, cuts) == at_once == pairs_one_by_one(units_ND)


def pairs_in_portions(units_ND: np.ndarray, cuts: list[int]) -> set[tuple[int, int]]:
    taken, found = Representatives(0.9), set()
    for block in np.split(units_ND, cuts):
        pairs = taken.take(block)
        found |= set(zip(pairs.rows.tolist(), pairs.representatives.tolist(), strict=True))
    return found


def pairs_one_by_one(units_ND: np.ndarray) -> set[tuple[int, int]]:
    """As the rule says it."""
    standing: list[int] = []
    found = set()
    for row in range(len(units_ND)):
        near = [one for one in standing if units_ND[row] @ units_ND[one] > 0.9]
        found |= {(row, one) for one in near}
        if not near:
            standing.append(row)
    return found


def test_at_one_only_itself_would_be_near_and_so_nothing_is() -> None:
    twice = of_unit_length(np.repeat(np.random.default_rng(3).normal(size=(50, 1280)), 2, axis=0))
    taken = Representatives(1.0)
    assert len(taken.take(twice).rows) == 0 and len(taken) == 100
    assert not taken.is_near(twice[0])


def test_lengths_are_divided_out_and_zeros_stay() -> None:
    rows_ND = np.array([[3, 4], [0, 0], [-5, 12]], np.float16)
    units_ND = of_unit_length(rows_ND)
    assert units_ND.dtype == np.float32
    np.testing.assert_allclose(units_ND, [[0.6, 0.8], [0, 0], [-5 / 13, 12 / 13]], rtol=1e-6)
    assert rows_ND[0, 0] == 3
