"""Splits by hash never move a row, and explicit splits are taken at their word."""

from __future__ import annotations

from collections import Counter

import pytest

from engine.errors import LabelError
from engine.training.kinds import SplitConfig
from engine.training.split import assign_splits, hash_fraction


@pytest.mark.parametrize(
    ("seed", "key", "fraction"),
    [
        (0, "a/0001", 0.7947952016057219),
        (1, "a/0001", 0.4854278177221242),
        (0, "", 0.6021594504285696),
        (-7, "schön/猫", 0.7797584995096619),
    ],
)
def test_golden_hash_fractions(seed: int, key: str, fraction: float) -> None:
    assert hash_fraction(seed, key) == fraction


def test_golden_splits() -> None:
    keys = [f"img{number}" for number in range(40)]
    splits = assign_splits(keys, None, SplitConfig())
    assert (
        "".join(split[1] for split in splits) == "rrarrrrrrrrrerrrrarrrrrerrrrrerarrrrrrrr"
    )  # r: train, a: validation, e: test


def test_new_rows_never_move_old_ones() -> None:
    keys = [f"img{number}" for number in range(1009)]
    today, tomorrow = keys[:503], keys[::-1]
    config = SplitConfig(train=0.5, validation=0.3, test=0.2, seed=3)
    was = dict(zip(today, assign_splits(today, None, config), strict=True))
    now = dict(zip(tomorrow, assign_splits(tomorrow, None, config), strict=True))
    assert {key: now[key] for key in today} == was


def test_shares_are_close_to_the_fractions_and_differ_by_seed() -> None:
    keys = [f"img{number}" for number in range(10_007)]
    counts = [Counter(assign_splits(keys, None, SplitConfig(seed=seed)).tolist()) for seed in (0, 1)]
    for count in counts:
        assert abs(count["train"] / 10_007 - 0.8) < 0.012  # 3 standard deviations
        assert abs(count["validation"] / 10_007 - 0.1) < 0.009
    assert counts[0] != counts[1]


def test_a_fraction_of_zero_gets_no_row_whatever_the_rounding() -> None:
    keys = [f"img{number}" for number in range(1009)]
    assert hash_fraction(0, "img469234") > 0.9999995
    nearly_one = SplitConfig(train=0.9999995, validation=0, test=0)
    assert set(assign_splits([*keys, "img469234"], None, nearly_one)) == {"train"}
    assert set(assign_splits(keys, None, SplitConfig(train=0.5, validation=0, test=0.5))) == {"train", "test"}


def test_explicit_values_are_kept() -> None:
    values = ["test", "train", "validation", "train"]
    assert assign_splits(list("abcd"), values, SplitConfig(column="fold")).tolist() == values


def test_other_words_in_the_split_column_are_listed() -> None:
    with pytest.raises(LabelError) as error:
        assign_splits(list("abcde"), ["train", "Train", None, "val", "val"], SplitConfig(column="fold"))
    assert "split.column fold: 3 unknown values" in str(error.value)
    assert "(empty), Train, val" in str(error.value)
    assert "train, validation, test" in str(error.value)


def test_without_explicit_validation_rows_some_of_train_are_taken_by_hash() -> None:
    keys = [f"img{number}" for number in range(1009)]
    values = ["train"] * 900 + ["test"] * 109
    config = SplitConfig(column="fold", train=0.6, validation=0.2, test=0.2)
    splits = assign_splits(keys, values, config).tolist()
    assert splits[900:] == ["test"] * 109
    expected = ["train" if hash_fraction(0, key) < 0.75 else "validation" for key in keys[:900]]
    assert splits[:900] == expected
    assert 180 < expected.count("validation") < 270


def test_no_validation_share_takes_nothing_from_train() -> None:
    config = SplitConfig(column="fold", train=0.9, validation=0, test=0.1)
    assert assign_splits(["a", "b"], ["train", "test"], config).tolist() == ["train", "test"]


def test_no_training_rows_are_refused() -> None:
    with pytest.raises(LabelError, match=r"(?s)no rows to train on.*3 labelled rows: 2 test, 1 validation"):
        assign_splits(list("abc"), ["test", "validation", "test"], SplitConfig(column="fold"))
