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


def test_slices_are_shares_of_the_same_order_that_fractions_have() -> None:
    keys = [f"img{number}" for number in range(1009)]
    by_fractions = assign_splits(keys, None, SplitConfig(seed=3))
    sliced = SplitConfig(train="all[:80%]", validation="all[80%:90%]", test="all[90%:]", seed=3)
    assert assign_splits(keys, None, sliced).tolist() == by_fractions.tolist()
    some = SplitConfig(train="all[:12.5%]", validation=0, test="all[50%:]", seed=3)
    found = Counter(assign_splits(keys, None, some).tolist())
    assert found["train"] == sum(hash_fraction(3, key) < 0.125 for key in keys)
    assert found[""] + found["train"] + found["test"] == 1009 and found["validation"] == 0


def test_slices_name_values_of_the_column() -> None:
    config = SplitConfig(column="fold", train="old", validation="new[:50%]", test="new[50%:]")
    values = ["old", "new", None, "other"] * 100
    splits = assign_splits([str(number) for number in range(400)], values, config)
    assert set(splits[::4]) == {"train"} and set(splits[1::4]) == {"validation", "test"}
    assert set(splits[2::4]) == set(splits[3::4]) == {""}
    with pytest.raises(LabelError, match=r"(?s)no row is of new.*\(empty\), old"):
        assign_splits(["a", "b"], ["old", None], config)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train": "train[80%]"}, "is no slice"),
        ({"train": "train[:80]"}, "is no slice"),
        ({"train": "train[80%:20%]"}, "holds no rows"),
        ({"train": "train[:120%]"}, "holds no rows"),
        ({"train": "train[:80%]"}, "validation: a fraction beside slices"),
        ({"train": "a", "validation": "b", "test": "c", "column": None}, "only the slice all"),
        ({"train": "a[:80%]", "validation": "a[70%:]", "test": 0}, "train and validation share rows"),
        ({"train": 0, "validation": "a", "test": 0}, "no rows to fit on"),
        ({"train": 0.0, "validation": 0.5, "test": 0.5}, "no rows to fit on"),
    ],
)
def test_slices_that_make_no_sense_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SplitConfig.model_validate({"column": "fold", **wrong})
