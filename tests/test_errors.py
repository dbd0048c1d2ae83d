"""The error tree: messages for people, exit codes, and the way through a pickle."""

import pickle

import pytest

from engine import errors

ALL_ERRORS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.EngineError)
]


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_every_error_survives_pickling_with_all_it_says(kind: type[errors.EngineError]) -> None:
    error = kind("the thing", found="17", wanted="19", way_out="use 19")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert (copy.thing, copy.found, copy.wanted, copy.way_out) == ("the thing", "17", "19", "use 19")


def test_message_leaves_out_what_is_not_known() -> None:
    assert str(errors.StorageError("s3://a/b: gone")) == "s3://a/b: gone"
    assert str(errors.StorageError("x", found="1", way_out="wait")) == "x\n  found:   1\n  way out: wait"


def test_exit_codes_are_those_that_operators_rely_on() -> None:
    codes = {kind.__name__: kind.exit_code for kind in ALL_ERRORS if kind.exit_code != 1}
    assert codes == {"RecipeError": 2, "OverBudget": 3, "NotBetter": 3, "HeldBack": 3, "Interrupted": 130}
