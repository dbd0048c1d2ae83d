"""Rows with any number of classes: figures as scikit-learn's, the best thresholds, and the way to predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from sklearn import metrics as reference

from engine.errors import LabelError
from engine.heads.bundle import open_bundle
from engine.heads.confidence import sigmoid
from engine.predictor import Predictor
from engine.schema import predictions_schema
from engine.storage import StorageConfig, open_store
from engine.training.fit import fit_head
from engine.training.judgement import JudgedRows
from engine.training.kinds import CalibrationConfig, FitSettings, LabelsConfig
from engine.training.labels import encode_label_sets, join_labels, label_set
from engine.training.multi_label import (
    average_precision,
    binary_cross_entropy,
    choose_thresholds,
    evaluate_label_sets,
    find_suspect_label_sets,
    judge_label_sets,
    share_right,
)
from engine.training.split import hash_fraction

NAMES = ("ant", "bee", "cat")
WIDTH = 6
RECORD = {"fingerprint": "f" * 64, "width": WIDTH}


def made_rows(count: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Embeddings of which each class has a direction of its own, with noise; 1 where a row has the class."""
    rng = np.random.default_rng(seed)
    embeddings_ND = rng.normal(size=(count, WIDTH)).astype(np.float32)
    chances_NK = sigmoid(3 * embeddings_ND[:, :3] + [-1.0, 0.0, 1.0])
    return embeddings_ND, (rng.random((count, 3)) < chances_NK).astype(np.uint8)


def sets_of(given_NK: NDArray[np.uint8]) -> list[list[str]]:
    return [[NAMES[number] for number in np.flatnonzero(row)] for row in given_NK]


def made_table(count: int = 900, labels: Any = None) -> pa.Table:
    embeddings_ND, given_NK = made_rows(count)
    return pa.table(
        {
            "key": [f"img{row:04d}" for row in range(count)],
            "shard": ["a.tar"] * count,
            "index": range(count),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(embeddings_ND.ravel()), WIDTH),
            "labels": sets_of(given_NK) if labels is None else labels,
        }
    )


def fit(table: pa.Table, folder: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    document = {
        "task": "multi_label",
        "labels": {"label": "labels"},
        "split": {"train": 0.6, "validation": 0.2, "test": 0.2},
        "optimizer": {"kind": "lbfgs", "l2": 0.01},
        "strategy": {"kind": "one_device"},
        **settings,
    }
    store = open_store(str(folder))
    checked = FitSettings.model_validate(document)
    summary = fit_head(table, RECORD, checked, StorageConfig(), store, lambda report: None)
    assert summary is not None
    return dict(summary), open_bundle(store).document("metrics")


def test_figures_equal_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    given_NK = (rng.random((301, 4)) < [0.5, 0.1, 0.9, 0.0]).astype(np.uint8)
    logits_NK = np.round(rng.normal(size=(301, 4)) + given_NK, 1)  # with ties
    probabilities_NK = sigmoid(logits_NK)
    names = ["a", "b", "c", "nobody"]
    found = evaluate_label_sets(probabilities_NK, given_NK, [0.5, 0.3, 0.7, 0.5], names)
    assert found is not None
    answers_NK = probabilities_NK >= [0.5, 0.3, 0.7, 0.5]
    report = reference.classification_report(
        given_NK, answers_NK, target_names=names, output_dict=True, zero_division=0
    )
    for row in found["per_class"]:
        theirs = report[row["label"]]
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx(
            (theirs["precision"], theirs["recall"], theirs["f1-score"])
        )
        assert row["support"] == theirs["support"]
    for ours, theirs in (
        ("micro_average", "micro avg"),
        ("macro_average", "macro avg"),
        ("weighted_average", "weighted avg"),
    ):
        wanted = report[theirs]
        assert found[ours] == pytest.approx(
            {"precision": wanted["precision"], "recall": wanted["recall"], "f1": wanted["f1-score"]}
        )
    for number in range(3):
        wanted = reference.average_precision_score(given_NK[:, number], probabilities_NK[:, number])
        assert found["per_class"][number]["average_precision"] == pytest.approx(wanted)
        area = reference.roc_auc_score(given_NK[:, number], probabilities_NK[:, number])
        assert found["per_class"][number]["roc_auc"] == pytest.approx(area)
    assert (found["per_class"][3]["average_precision"], found["per_class"][3]["roc_auc"]) == (None, None)
    assert found["exact_match"] == pytest.approx(reference.accuracy_score(given_NK, answers_NK))
    assert found["loss"] == pytest.approx(reference.log_loss(given_NK.ravel(), probabilities_NK.ravel()))
    assert found["loss"] == pytest.approx(binary_cross_entropy(logits_NK, given_NK))
    assert share_right(logits_NK, given_NK) == pytest.approx(np.mean((logits_NK > 0) == given_NK))
    json.dumps(found, allow_nan=False)
    assert evaluate_label_sets(probabilities_NK[:0], given_NK[:0], [0.5] * 4, names) is None
    assert average_precision(probabilities_NK[:0], given_NK[:0]) == [None] * 4


def test_thresholds_are_those_with_the_best_f1() -> None:
    rng = np.random.default_rng(2)
    given_NK = (rng.random((200, 3)) < [0.3, 0.7, 0.0]).astype(np.uint8)
    probabilities_NK = np.round(sigmoid(rng.normal(size=(200, 3)) + 2 * given_NK - 1), 2)
    chosen = choose_thresholds(probabilities_NK, given_NK)
    assert chosen[2] == 0.5  # no row has the class
    for number in (0, 1):
        scores_N, given_N = probabilities_NK[:, number], given_NK[:, number]
        best = max(reference.f1_score(given_N, scores_N >= cut) for cut in np.linspace(0, 1, 1001))
        assert reference.f1_score(given_N, scores_N >= chosen[number]) == pytest.approx(best)
    assert choose_thresholds(np.empty((0, 2)), np.empty((0, 2), np.uint8)) == (0.5, 0.5)
    assert choose_thresholds(np.full((4, 1), 0.8), np.ones((4, 1), np.uint8)) == (0.4,)


def test_a_judgement_calibrates_on_validation() -> None:
    embeddings_ND, given_NK = made_rows(4_000)
    logits_NK = (4 * (3 * embeddings_ND[:, :3] + [-1.0, 0.0, 1.0])).astype(np.float32)  # four times too sure
    keys = [str(row) for row in range(4_000)]
    half = {
        name: JudgedRows(logits_NK[part], given_NK[part], keys[part], keys[part], range(4_000)[part])
        for name, part in (("validation", slice(0, 2_000)), ("test", slice(2_000, None)))
    }
    calibration, thresholds, metrics = judge_label_sets(half, NAMES, CalibrationConfig())
    assert calibration.temperature == pytest.approx(4, rel=0.1)
    before = metrics["calibration"]["calibration_error_before"]["test"]
    assert metrics["test"]["calibration_error"] < 0.02 < before
    assert len(thresholds) == 3
    mistakes = metrics["most_confident_mistakes"]
    assert [one["confidence"] for one in mistakes] == sorted(
        (one["confidence"] for one in mistakes), reverse=True
    )
    for mistake in mistakes[:5]:
        row, number = int(mistake["key"]), NAMES.index(mistake["label"])
        assert bool(given_NK[row, number]) == mistake["given"]
        assert (logits_NK[row, number] > 0) != mistake["given"]
    as_trained, _, _ = judge_label_sets(half, NAMES, CalibrationConfig(kind="none"))
    assert as_trained.temperature == 1.0


def test_a_head_is_as_good_as_scikit_learns_and_its_bundle_answers_with_sets(tmp_path: Path) -> None:
    summary, _ = fit(made_table(), tmp_path)
    assert (summary["rows"], summary["classes"]) == (900, 3)
    assert set(summary["metrics"]["test"]) == {
        "mean_average_precision", "micro_f1", "loss", "calibration_error",
    }  # fmt: skip
    bundle = open_bundle(open_store(str(tmp_path)))
    assert (bundle.manifest.task, bundle.manifest.classes) == ("multi_label", NAMES)
    assert len(bundle.manifest.thresholds) == 3
    fresh_ND, given_NK = made_rows(3_000, seed=9)
    from sklearn.linear_model import LogisticRegression

    theirs = []
    seen_ND, seen_NK = made_rows(900)
    for number in range(3):
        model = LogisticRegression(C=1 / (3 * 0.01 * 540)).fit(seen_ND[:540], seen_NK[:540, number])
        theirs.append(
            reference.average_precision_score(given_NK[:, number], model.decision_function(fresh_ND))
        )
    predictor = Predictor(bundle, top_k=2)
    ours = [value or 0 for value in average_precision(predictor.probabilities(fresh_ND), given_NK)]
    print(f"mean average precision: ours {np.mean(ours):.4f}, scikit-learn {np.mean(theirs):.4f}")
    assert np.mean(ours) >= np.mean(theirs) - 0.01 and np.mean(theirs) > 0.8

    table = made_table(50)
    answers = predictor.predict_table(table)
    assert answers.schema == predictions_schema(2, several=True)
    probabilities_NK = predictor.probabilities(made_rows(50)[0])
    wanted = sets_of((probabilities_NK >= np.float32(bundle.manifest.thresholds)).astype(np.uint8))
    assert answers["labels"].to_pylist() == wanted
    assert any(len(labels) > 1 for labels in wanted) and any(not labels for labels in wanted)
    np.testing.assert_allclose(answers["confidence"], probabilities_NK.max(axis=1), atol=1e-6)
    remembered = bundle.reference()
    assert remembered is not None and remembered.rows == remembered.cosine_counts.sum() > 300
    keys = made_table()["key"].to_pylist()
    held_out = pa.array([hash_fraction(0, key) >= 0.6 for key in keys])
    given = predictor.predict_table(made_table().filter(held_out))["labels"].to_pylist()
    assert remembered.label_mix(NAMES) == {name: sum(name in one for one in given) for name in NAMES}
    assert (remembered.unlabelled, remembered.rows) == (given.count([]), len(given))
    sure = Predictor(bundle, top_k=2, min_confidence=0.99).predict_table(table)["labels"].to_pylist()
    assert sure == sets_of((probabilities_NK >= 0.99).astype(np.uint8))


def test_missing_and_wrong_labels_are_among_the_suspects(tmp_path: Path) -> None:
    embeddings_ND, _ = made_rows(900)
    right_NK = (embeddings_ND[:, :3] > 0).astype(np.uint8)
    wrong_NK = right_NK.copy()
    changed = [(5, 0), (77, 1), (300, 2), (512, 0)]
    for row, number in changed:
        embeddings_ND[row, number] = 3.0 if right_NK[row, number] else -3.0
        wrong_NK[row, number] ^= 1
    table = made_table(900, sets_of(wrong_NK)).set_column(
        3, "embedding", pa.FixedSizeListArray.from_arrays(pa.array(embeddings_ND.ravel()), WIDTH)
    )
    fit(table, tmp_path)
    suspects = open_bundle(open_store(str(tmp_path))).document("suspects")["suspects"]
    first = {(suspect["key"], suspect["label"], suspect["given"]) for suspect in suspects[:4]}
    assert first == {(f"img{row:04d}", NAMES[number], bool(wrong_NK[row, number])) for row, number in changed}
    calm = find_suspect_label_sets(
        np.array([[0.9], [0.2], [0.6]]), np.array([[1], [0], [0]], np.uint8), "abc", "abc", range(3), ["x"]
    )
    assert calm == []  # 0.6 is less than what rows with the class have


def joined(table: pa.Table, **labels: Any) -> list[tuple[str, ...] | None]:
    """The labels of each row of a table; None: left out."""
    found = join_labels(table, LabelsConfig(**labels), [], StorageConfig(), several=True)
    by_row = dict(zip(found.positions_N.tolist(), map(label_set, found.labels), strict=True))
    return [by_row.get(row) for row in range(table.num_rows)]


def test_labels_come_as_lists_as_text_with_a_separator_or_line_by_line(tmp_path: Path) -> None:
    table = made_table(5, [["bee", "ant"], [], None, ["cat", "cat"], ["ant"]])
    assert joined(table, label="labels") == [("ant", "bee"), (), None, ("cat",), ("ant",)]
    (tmp_path / "lines.csv").write_text(
        "key,label\nimg0000,bee\nimg0003,cat\nimg0000,ant\nimg0004,\nnobody,ant\n"
    )
    by_line = joined(table, uri=str(tmp_path / "lines.csv"))
    assert by_line == [("ant", "bee"), None, None, ("cat",), None]
    (tmp_path / "texts.csv").write_text("key,label\nimg0000,bee| ant\nimg0001,cat\n")
    by_text = joined(table, uri=str(tmp_path / "texts.csv"), separator="|")
    assert by_text == [("ant", "bee"), ("cat",), None, None, None]
    whole = joined(table, uri=str(tmp_path / "texts.csv"))
    assert whole[0] == ("bee| ant",)
    numbers = table.set_column(4, "labels", pa.array([[1], [2], [3], [4], [5]]))
    with pytest.raises(LabelError, match=r"(?s)'labels' holds no labels.*list<.*int64.*a list of texts"):
        joined(numbers, label="labels")


def test_a_class_without_training_rows_is_counted_and_its_rows_stay() -> None:
    found = encode_label_sets([("a", "b"), (), ("b", "rare")], np.array([True, True, False]))
    assert (found.names, found.unseen) == (("a", "b"), {"rare": 1})
    assert found.given_NK.tolist() == [[1, 1], [0, 0], [0, 1]]
    with pytest.raises(LabelError, match=r"(?s)nothing to learn.*2 training rows without a label"):
        encode_label_sets([(), (), ("a",)], np.array([True, True, False]))


def test_what_does_not_go_with_several_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="class_weights"):
        FitSettings.model_validate({"task": "multi_label", "training": {"class_weights": "balanced"}})
    with pytest.raises(ValueError, match="precisions"):
        FitSettings.model_validate({"task": "multi_label", "calibration": {"precisions": [0.9]}})
    with pytest.raises(ValueError, match=r"labels\.separator"):
        FitSettings.model_validate({"labels": {"separator": "|"}})
