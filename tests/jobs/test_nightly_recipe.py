"""The budget of a night, and what is said of a wrong one."""

from __future__ import annotations

import datetime

import pytest

from engine.config import check_recipe
from engine.errors import RecipeError
from jobs.nightly import Budget

EVENING = datetime.datetime(2026, 11, 23, 20, 0, 0)


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({}, None),
        ({"max_seconds": 90}, 90.0),
        ({"deadline": "22:30"}, 9000.0),
        ({"deadline": "05:30"}, 9.5 * 3600),
        ({"deadline": "22:30", "max_seconds": 90}, 90.0),
        ({"deadline": "20:01", "max_seconds": 90}, 60.0),
    ],
)
def test_a_budget_ends_at_the_earlier_of_its_two(fields: dict[str, object], seconds: float | None) -> None:
    assert check_recipe(Budget, fields, "budget").seconds(EVENING) == seconds


def test_a_deadline_that_yaml_took_for_a_number_is_to_be_quoted() -> None:
    with pytest.raises(RecipeError, match=r'deadline: found 1350; put it in quotes: deadline: "22:30"'):
        check_recipe(Budget, {"deadline": 22 * 60 + 30}, "budget")
    with pytest.raises(RecipeError, match="deadline: found '25:00'; string should match pattern"):
        check_recipe(Budget, {"deadline": "25:00"}, "budget")
