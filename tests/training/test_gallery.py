"""The rows that a person is shown: some of each kind, few of all, and what was answered for them."""

from __future__ import annotations

import numpy as np

from engine.training.gallery import (
    RIGHT_SHOWN,
    UNSURE_SHOWN,
    WRONG_SHOWN,
    choose_rows,
    gallery_of_classes,
    gallery_of_label_sets,
    wanted_pictures,
)
from engine.training.judgement import JudgedRows

NAMES = ("ant", "bee", "cat")


def judged(targets: np.ndarray) -> JudgedRows:
    count = len(targets)
    return JudgedRows(
        np.zeros((count, 3), np.float32),
        targets,
        [f"k{row}" for row in range(count)],
        [f"{row % 2}.tar" for row in range(count)],
        range(100, 100 + count),
    )


def test_of_each_row_labels_answers_and_the_most_probable_classes_are_told() -> None:
    probabilities_MK = np.array([[0.7, 0.2, 0.1], [0.25, 0.35, 0.4], [0.05, 0.9, 0.05]])
    told = gallery_of_classes("test", judged(np.array([0, 1, 1])), probabilities_MK, NAMES)
    assert told["split"] == "test"
    wrong, *unsure = told["rows"]
    assert wrong == {
        "key": "k1",
        "shard": "1.tar",
        "index": 101,
        "group": "wrong",
        "labels": ["bee"],
        "answers": ["cat"],
        "right": False,
        "top": [
            {"label": "cat", "confidence": 0.4},
            {"label": "bee", "confidence": 0.35},
            {"label": "ant", "confidence": 0.25},
        ],
    }
    assert [(row["key"], row["group"], row["right"]) for row in unsure] == [
        ("k0", "unsure", True),
        ("k2", "unsure", True),
    ]


def test_every_confusion_has_its_most_confident_row_before_any_has_a_second() -> None:
    cells_M = np.array([1] * 100 + [2] * 7 + [5] * 3)
    sureness_M = np.linspace(0.3, 0.9, 110)
    chosen = choose_rows(cells_M, np.zeros(110, np.bool_), sureness_M)
    assert chosen["wrong"][:6] == [99, 106, 109, 98, 105, 108]
    assert len(chosen["wrong"]) == WRONG_SHOWN == 48
    assert {cells_M[row] for row in chosen["wrong"]} == {1, 2, 5}
    assert not chosen["right"]


def test_of_right_rows_each_class_shows_its_surest_its_least_sure_and_one_between() -> None:
    cells_M = np.repeat([0, 4], 50)
    sureness_M = np.concatenate([np.linspace(0.5, 0.9, 50), np.linspace(0.95, 0.99, 50)])
    chosen = choose_rows(cells_M, np.ones(100, np.bool_), sureness_M)
    assert chosen["unsure"] == list(range(UNSURE_SHOWN))
    assert chosen["right"] == [49, 99, 50, 24, 74]  # 0, the least sure of its class, is among the unsure


def test_however_many_rows_and_classes_there_are_few_are_shown_and_each_once() -> None:
    random = np.random.default_rng(5)
    cells_M = random.integers(0, 1_000_000, 20_000)
    chosen = choose_rows(cells_M, random.random(20_000) < 0.5, random.random(20_000))
    assert {name: len(rows) for name, rows in chosen.items()} == {
        "wrong": WRONG_SHOWN,
        "unsure": UNSURE_SHOWN,
        "right": RIGHT_SHOWN,
    }
    rows = [row for some in chosen.values() for row in some]
    assert len(set(rows)) == len(rows)


def test_a_row_of_several_labels_is_right_where_all_questions_are() -> None:
    has_MK = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    probabilities_MK = np.array([[0.9, 0.1, 0.8], [0.1, 0.1, 0.05], [0.95, 0.4, 0.1]])
    told = gallery_of_label_sets("validation", judged(has_MK), probabilities_MK, (0.5, 0.3, 0.5), NAMES)
    by_key = {row["key"]: row for row in told["rows"]}
    assert (by_key["k0"]["labels"], by_key["k0"]["answers"], by_key["k0"]["right"]) == (
        ["ant", "cat"],
        ["ant", "cat"],
        True,
    )
    assert (by_key["k1"]["labels"], by_key["k1"]["right"]) == ([], True)
    assert (by_key["k2"]["answers"], by_key["k2"]["group"]) == (["ant", "bee"], "wrong")


def test_without_rows_there_is_nothing_to_show() -> None:
    nothing = JudgedRows(np.empty((0, 3), np.float32), np.empty(0, np.int64), [], [], [])
    told = gallery_of_classes("test", nothing, np.empty((0, 3)), NAMES)
    assert told == {"split": "test", "rows": []}


def test_pictures_are_wanted_of_mistakes_first_then_of_doubted_labels_each_once() -> None:
    def row(number: int) -> dict[str, object]:
        return {"shard": "a.tar", "index": number}

    metrics = {"most_confident_mistakes": [row(3), row(1)]}
    suspects = [row(1), *(row(number) for number in range(50, 100))]
    wanted = wanted_pictures(metrics, suspects, {"rows": [row(3), row(7)]})
    assert wanted[:3] == [("a.tar", 3), ("a.tar", 1), ("a.tar", 50)]
    assert wanted[-1] == ("a.tar", 7) and len(wanted) == 2 + 19 + 1
    assert wanted_pictures({"most_confident_mistakes": []}, None, {"rows": []}) == []
