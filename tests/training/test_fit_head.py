"""From an embedding table to a published bundle, through the real flow."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pytest
from numpy.typing import NDArray

from engine.errors import BundleError, LabelError, RecipeError, TableDamaged
from engine.heads.bundle import open_bundle
from engine.predictor import Predictor
from engine.report.page import render_report
from engine.schema import SampleId, embeddings_schema
from engine.storage import StorageConfig, open_store
from engine.training import passes
from engine.training.fit import FitSummary, fit_head
from engine.training.kinds import FitSettings
from engine.training.metrics import calibration_error, reliability_bins
from engine.training.rows import RowSource, fill_rows
from engine.training.split import hash_fraction

WIDTH = 7
RECORD = {"fingerprint": "f" * 64, "width": WIDTH}
NAMES = ("ant", "bee", "cat")


def made_table(num_rows: int = 211, **labels: Sequence[str | None]) -> pa.Table:
    """Embeddings in three well separated classes, cut into several Arrow chunks."""
    rng = np.random.default_rng(6)
    classes_N = rng.integers(0, 3, num_rows)
    embeddings_ND = (np.eye(3, WIDTH)[classes_N] * 3 + rng.normal(size=(num_rows, WIDTH))).astype(np.float32)
    given = labels.get("label") or [NAMES[number] for number in classes_N]
    schema = embeddings_schema(WIDTH, "float32", [name for name in labels if name != "label"])
    columns: dict[str, Any] = {
        "key": [f"img{row:04d}" for row in range(num_rows)],
        "shard": ["a.tar"] * num_rows,
        "index": list(range(num_rows)),
        "embedding": list(embeddings_ND),
        "label": given,
        "image_width": [64] * num_rows,
        "image_height": [64] * num_rows,
        "sha256": [bytes(32)] * num_rows,
        **{name: values for name, values in labels.items() if name != "label"},
    }
    whole = pa.table(columns, schema=schema)
    return pa.concat_tables([whole.slice(0, 50), whole.slice(50, 1), whole.slice(51)])


def fit(
    table: pa.Table, folder: Path, reports: list[dict[str, Any]] | None = None, **settings: Any
) -> tuple[FitSummary, dict[str, Any]]:
    """Fit on one device with few epochs; the summary and the bundle's metrics.json."""
    document = {
        "strategy": {"kind": "one_device"},
        "optimizer": {"learning_rate": 0.05},
        "training": {"epochs": 20, "batch_size": 32},
        **settings,
    }
    store = open_store(str(folder))
    report = (reports if reports is not None else []).append
    summary = fit_head(table, RECORD, FitSettings.model_validate(document), StorageConfig(), store, report)
    return summary, open_bundle(store).document("metrics")


def test_a_fit_publishes_a_bundle_that_predicts_what_it_claims(tmp_path: Path) -> None:
    table, reports = made_table(), list[dict[str, Any]]()
    summary, metrics = fit(table, tmp_path, reports)
    bundle = open_bundle(open_store(str(tmp_path)))
    assert list(summary) == [
        "bundle",
        "report",
        "rows",
        "classes",
        "metrics",
        "heads_tried",
        "published",
        "suspect_labels",
        "epochs",
        "seconds",
    ]
    assert (summary["heads_tried"], summary["published"]["head"]) == (1, {"kind": "linear"})
    assert (summary["bundle"], summary["rows"], summary["classes"]) == (bundle.store.uri, 211, 3)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert summary["report"] == f"{tmp_path}/report.html"
    assert page == render_report(bundle.documents()), "it can be made again from the bundle"
    assert f"{100 * metrics['test']['accuracy']:.2f} %" in page
    assert bundle.manifest.classes == NAMES
    assert bundle.manifest.fingerprint == "f" * 64
    assert bundle.document("embeddings_table") == RECORD
    assert bundle.document("recipe")["training"]["batch_size"] == 32

    in_test = [hash_fraction(0, key) >= 0.9 for key in table["key"].to_pylist()]
    predicted = Predictor(bundle, 3).predict_table(table.filter(pa.array(in_test)))
    truth = [label for label, is_test in zip(table["label"].to_pylist(), in_test, strict=True) if is_test]
    claimed = metrics["test"]
    assert claimed["rows"] == len(truth) > 10
    assert claimed["accuracy"] == np.mean(
        [a == b for a, b in zip(predicted["label"].to_pylist(), truth, strict=True)]
    )
    assert claimed["accuracy"] > 0.85
    assert summary["metrics"]["test"] == {
        name: claimed[name] for name in ("accuracy", "top_3_accuracy", "loss", "calibration_error")
    }

    history = metrics["training"]["history"]
    assert len(history) == len(reports) == summary["epochs"]
    assert [epoch["train_loss"] for epoch in history] == [report["train_loss"] for report in reports]
    assert metrics["labels"] == {
        "rows_in_table": 211,
        "labelled": 211,
        "unlabelled": 0,
        "unknown_keys": 0,
        "conflicting_keys": 0,
        "unlabelled_examples": [],
        "unknown_examples": [],
        "conflicting_examples": [],
        "classes_without_training_rows": {},
    }
    assert sum(sum(split["rows_per_class"].values()) for split in metrics["split"].values()) == 211


def test_a_fit_shows_rows_that_predict_the_same_and_asks_for_their_pictures(tmp_path: Path) -> None:
    labels = made_table()["label"].to_pylist()
    labels[::5] = [NAMES[(NAMES.index(label) + 1) % 3] for label in labels[::5]]
    table, asked = made_table(label=labels), list[list[SampleId]]()

    def look(wanted: Sequence[SampleId]) -> dict[str, Any]:
        asked.append(list(wanted))
        return {
            "pictures": {"wanted": len(wanted), "pictures": [], "missing": [{"why": "none", "samples": 1}]}
        }

    settings = {"strategy": {"kind": "one_device"}, "optimizer": {"learning_rate": 0.05}}
    store = open_store(str(tmp_path))
    fit_head(
        table,
        RECORD,
        FitSettings.model_validate({**settings, "training": {"epochs": 20, "batch_size": 32}}),
        StorageConfig(),
        store,
        lambda epoch: None,
        look=look,
    )
    bundle = open_bundle(store)
    told = bundle.documents()
    rows, metrics = told["gallery"]["rows"], told["metrics"]
    assert told["gallery"]["split"] == "test"
    assert {row["group"] for row in rows} == {"wrong", "unsure", "right"}
    predicted = Predictor(bundle, 3).predict_table(table.take([row["index"] for row in rows]))
    for row, given, top, confidences in zip(
        rows,
        predicted["label"].to_pylist(),
        predicted["top_labels"].to_pylist(),
        predicted["top_confidences"].to_pylist(),
        strict=True,
    ):
        assert row["key"] == f"img{row['index']:04d}" and row["labels"] == [labels[row["index"]]]
        assert row["answers"] == [given] and row["right"] == (given == labels[row["index"]])
        assert [one["label"] for one in row["top"]] == top
        assert [one["confidence"] for one in row["top"]] == pytest.approx(confidences, abs=1e-4)
    wrong = metrics["test"]["rows"] * (1 - metrics["test"]["accuracy"])
    assert sum(not row["right"] for row in rows) == round(wrong) > 0, "few enough to be shown all"
    (wanted,) = asked
    mistakes, suspects = metrics["most_confident_mistakes"], told["suspects"]["suspects"]
    assert wanted[0] == ("a.tar", mistakes[0]["index"])
    assert {("a.tar", one["index"]) for one in [*mistakes, *suspects[:20], *rows]} == set(wanted)
    assert len(set(wanted)) == len(wanted)
    assert len(told["embedding_map"]["x"]) == 211
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page == render_report(told) and "Pictures were not available: none." in page


def test_a_fit_whose_pictures_cannot_be_read_publishes_its_bundle_and_its_page_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def look(wanted: Sequence[SampleId]) -> dict[str, Any]:
        raise OSError(f"no archive for {len(wanted) > 0}")

    settings = {"strategy": {"kind": "one_device"}, "training": {"epochs": 1}}
    store = open_store(str(tmp_path))
    with caplog.at_level("WARNING", "engine.heads"):
        summary = fit_head(
            made_table(),
            RECORD,
            FitSettings.model_validate(settings),
            StorageConfig(),
            store,
            lambda epoch: None,
            look=look,
        )
    assert summary is not None and summary["report"] == f"{tmp_path}/report.html"
    told = open_bundle(store).documents()
    assert "pictures" not in told and told["gallery"]["rows"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_report(told)
    assert "pictures of the report could not be made: OSError: no archive for True" in caplog.messages


def test_a_bundle_remembers_the_rows_it_was_fitted_on(tmp_path: Path) -> None:
    table = made_table()
    side = ["wide" if row % 2 else "tall" for row in range(len(table))]
    table = table.append_column("shape", pa.array(side))
    fit(table, tmp_path, side_features=[{"column": "shape", "kind": "categorical"}])
    bundle = open_bundle(open_store(str(tmp_path)))
    reference = bundle.reference()
    assert reference is not None
    keys, labels = table["key"].to_pylist(), np.array(table["label"].to_pylist())
    embeddings_ND = np.array(table["embedding"].to_pylist(), np.float32)
    held_out_N = np.array([hash_fraction(0, key) >= 0.8 for key in keys])
    units_ND = embeddings_ND / np.linalg.norm(embeddings_ND, axis=1, keepdims=True)
    for name, centroid_D in zip(NAMES, reference.centroids_CD, strict=True):
        mean_D = units_ND[(labels == name) & ~held_out_N].mean(axis=0)
        np.testing.assert_allclose(centroid_D, mean_D / np.linalg.norm(mean_D), atol=1e-6)
    held_out = table.filter(pa.array(held_out_N))
    predicted = Predictor(bundle, 1).predict_table(held_out)["label"].to_pylist()
    assert reference.label_mix(NAMES) == {name: predicted.count(name) for name in NAMES}
    assert (reference.rows, reference.unlabelled) == (held_out_N.sum(), 0)
    assert reference.is_held_out
    found = reference.histogram(reference.cosines(embeddings_ND[held_out_N]))
    np.testing.assert_array_equal(found, reference.cosine_counts)

    fit(made_table(), tmp_path / "all", split={"train": 1, "validation": 0, "test": 0})
    reference = open_bundle(open_store(str(tmp_path / "all"))).reference()
    assert reference is not None
    assert (reference.rows, reference.cosine_counts.sum(), reference.is_held_out) == (211, 211, False)


def test_a_bundle_answers_with_the_confidences_and_thresholds_that_its_metrics_promise(
    tmp_path: Path,
) -> None:
    table = made_table(num_rows=900)
    _, metrics = fit(table, tmp_path / "honest", training={"epochs": 60, "batch_size": 32, "patience": 60})
    bundle = open_bundle(open_store(str(tmp_path / "honest")))
    assert bundle.manifest.calibration.temperature == metrics["calibration"]["temperature"] != 1.0
    in_test = pa.array([hash_fraction(0, key) >= 0.9 for key in table["key"].to_pylist()])
    rows = table.filter(in_test)
    suggestion = metrics["calibration"]["suggested_min_confidence"][0]
    predicted = Predictor(bundle, 3, suggestion["min_confidence"]).predict_table(rows)
    confidences_N = predicted["confidence"].to_numpy().astype(np.float64)
    best = [labels[0] for labels in predicted["top_labels"].to_pylist()]
    is_right_N = np.array([a == b for a, b in zip(best, rows["label"].to_pylist(), strict=True)])
    error = calibration_error(reliability_bins(confidences_N, is_right_N))
    assert error == pytest.approx(metrics["test"]["calibration_error"], abs=1e-6)
    answered_N = np.array([label is not None for label in predicted["label"].to_pylist()])
    assert suggestion["test"] == {
        "precision": pytest.approx(is_right_N[answered_N].mean()),
        "coverage": pytest.approx(answered_N.mean()),
    }
    _, as_trained = fit(
        table,
        tmp_path / "as-trained",
        training={"epochs": 60, "batch_size": 32, "patience": 60},
        calibration={"kind": "none"},
    )
    assert open_bundle(open_store(str(tmp_path / "as-trained"))).manifest.calibration.temperature == 1.0
    before = metrics["calibration"]["calibration_error_before"]
    assert {name: as_trained[name]["calibration_error"] for name in before} == pytest.approx(before)
    assert as_trained["test"]["accuracy"] == metrics["test"]["accuracy"]


def test_of_a_grid_the_head_with_the_lowest_validation_loss_is_published_and_all_are_told_of(
    tmp_path: Path,
) -> None:
    grid = {
        "learning_rate": [1e-6, 0.05],
        "weight_decay": [0.0, 0.1],
        "head": [{"kind": "linear"}, {"kind": "mlp", "hidden": [8], "dropout": 0.2}],
        "dropout": [0.0, 0.3],
    }
    table = made_table()
    summary, metrics = fit(table, tmp_path, grid=grid)
    tried = metrics["grid"]
    assert len(tried) == summary["heads_tried"] == 2 * 2 * (1 + 2)
    published = [one for one in tried if one["published"]]
    assert published == [min(tried, key=lambda one: one["validation_loss"])]
    assert published[0]["optimizer"]["learning_rate"] == 0.05
    assert {"head": published[0]["head"], "optimizer": published[0]["optimizer"]} == summary["published"]
    bundle = open_bundle(open_store(str(tmp_path)))
    assert bundle.manifest.head.model_dump(mode="json") == published[0]["head"]
    in_test = pa.array([hash_fraction(0, key) >= 0.9 for key in table["key"].to_pylist()])
    answers = Predictor(bundle, 3).predict_table(table.filter(in_test))
    right = pa.compute.equal(answers["label"], table.filter(in_test)["label"])
    assert pa.compute.mean(right).as_py() == pytest.approx(metrics["test"]["accuracy"])
    assert metrics["test"]["accuracy"] > 0.85


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": {"dropout": [0.1]}}, "grid.dropout: no head here has dropout"),
        ({"grid": {"learning_rate": [0.1 + n for n in range(65)]}}, "(?s)too many heads.*found: *65"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        fit(made_table(), tmp_path, **settings)


def test_a_grid_without_validation_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="no validation rows to choose a head by"):
        fit(
            made_table(),
            tmp_path,
            split={"train": 0.9, "validation": 0.0, "test": 0.1},
            grid={"learning_rate": [0.1, 0.2]},
        )


def test_numbers_of_any_scale_are_learned_from_and_the_bundle_takes_them_as_they_are(tmp_path: Path) -> None:
    table = made_table(num_rows=600)
    scale_D = np.array([1e4, 1e-4, 1.0, 1e-2, 1e2, 0.0, 1.0])  # one says nothing at all
    shift_D = np.array([0.0, 3.0, -50.0, 0.0, 1e4, 1.0, 0.0])
    rows_ND = np.stack(table["embedding"].to_numpy()) * scale_D + shift_D
    column = table.schema.get_field_index("embedding")
    embedding = pa.array(list(rows_ND.astype(np.float32)), table.schema.field("embedding").type)
    odd = table.set_column(column, table.schema.field("embedding"), embedding)
    _, plain = fit(table, tmp_path / "plain")
    training = {"epochs": 20, "batch_size": 32}
    _, metrics = fit(odd, tmp_path / "standardised", training={**training, "standardise": True})
    _, raw = fit(odd, tmp_path / "raw", training=training)
    assert metrics["test"]["accuracy"] >= plain["test"]["accuracy"] - 0.04
    assert metrics["validation"]["loss"] < raw["validation"]["loss"] - 0.1
    answers = Predictor(open_bundle(open_store(str(tmp_path / "standardised"))), 1).predict_table(odd)
    right = pa.compute.equal(answers["label"], odd["label"])
    assert pa.compute.mean(right).as_py() > 0.9


@pytest.mark.parametrize("kind", ["one_device", "mirrored"])
def test_labels_that_were_changed_are_suspected_and_few_others(tmp_path: Path, kind: str) -> None:
    table = made_table(num_rows=1_000)
    labels = table["label"].to_pylist()
    changed = {int(row) for row in np.random.default_rng(3).choice(1_000, 50, replace=False)}
    for row in changed:
        labels[row] = NAMES[(NAMES.index(labels[row]) + 1) % 3]
    summary, _ = fit(made_table(num_rows=1_000, label=labels), tmp_path, strategy={"kind": kind})
    suspects = open_bundle(open_store(str(tmp_path))).document("suspects")["suspects"]
    assert summary["suspect_labels"] == len(suspects) > 0
    found = {int(entry["key"].removeprefix("img")) for entry in suspects}
    assert len(found) == len(suspects)
    # The classes overlap: some rows lie nearer to another class than to their own, and are rightly doubted.
    assert len(found & changed) / len(changed) >= 0.6
    assert len(found & changed) / len(found) >= 0.5
    first = suspects[0]
    assert set(first) == {"key", "shard", "index", "label", "suggested", "margin"}
    assert first["key"] == f"img{first['index']:04d}"
    assert first["label"] == labels[int(first["key"].removeprefix("img"))] != first["suggested"]
    margins = [entry["margin"] for entry in suspects]
    assert margins == sorted(margins, reverse=True)


def test_without_folds_no_labels_are_doubted(tmp_path: Path) -> None:
    summary, _ = fit(made_table(), tmp_path, suspects={"folds": 0})
    assert summary["suspect_labels"] is None
    assert "suspects" not in open_bundle(open_store(str(tmp_path))).manifest.files


def test_rows_of_one_group_are_on_one_side_and_rows_without_one_stand_for_themselves(tmp_path: Path) -> None:
    scenes = [f"scene{row // 10}" if row < 150 else None for row in range(211)]
    _, metrics = fit(made_table(scene=scenes), tmp_path, split={"group": "scene"})
    of_scene = {f"scene{number}": hash_fraction(0, f"scene\nscene{number}") for number in range(15)}
    of_key = {f"img{row:04d}": hash_fraction(0, f"img{row:04d}") for row in range(150, 211)}
    in_train = 10 * sum(place < 0.8 for place in of_scene.values()) + sum(p < 0.8 for p in of_key.values())
    assert metrics["split"]["train"]["rows"] == in_train
    assert 0 < metrics["split"]["test"]["rows"] < 211 - in_train


def test_an_explicit_split_that_divides_a_group_is_refused(tmp_path: Path) -> None:
    scenes = [f"scene{row // 10}" for row in range(211)]
    fold = ["test" if row % 7 == 0 else "train" for row in range(211)]
    with pytest.raises(LabelError, match=r"(?s)21 groups are on both sides of the test.*scene0, scene1"):
        fit(made_table(scene=scenes, fold=fold), tmp_path, split={"group": "scene", "column": "fold"})
    whole = ["test" if row // 10 % 7 == 0 else "train" for row in range(211)]
    _, metrics = fit(
        made_table(scene=scenes, fold=whole), tmp_path, split={"group": "scene", "column": "fold"}
    )
    assert metrics["split"]["test"]["rows"] == whole.count("test")
    assert metrics["split"]["validation"]["rows"] % 10 in (0, 1), "validation was not taken by whole scenes"


def test_mirrored_is_the_default_and_gives_the_same_figures(tmp_path: Path) -> None:
    _, one_device = fit(made_table(), tmp_path / "one")
    _, mirrored = fit(made_table(), tmp_path / "mirrored", strategy={"kind": "mirrored"})
    for ours, theirs in zip(mirrored["training"]["history"], one_device["training"]["history"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert mirrored["test"]["confusion_matrix"] == one_device["test"]["confusion_matrix"]


def test_rows_without_a_label_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = made_table()["label"].to_pylist()
    labels[::10] = [None] * len(labels[::10])
    with caplog.at_level(logging.WARNING, "engine"):
        summary, metrics = fit(made_table(label=labels), tmp_path)
    assert summary["rows"] == 211 - 22
    assert (metrics["labels"]["labelled"], metrics["labels"]["unlabelled"]) == (189, 22)
    assert "22 of 211 rows have no label and are left out" in caplog.text


def test_labels_from_a_file_give_what_the_same_labels_in_the_table_give(tmp_path: Path) -> None:
    table = made_table()
    pairs = list(zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True))
    lines = [f"{key},{label}" for key, label in sorted(pairs, reverse=True)]
    (tmp_path / "labels.csv").write_text("\n".join(["key,label", *lines, "nowhere,ant", ""]))
    _, own = fit(table, tmp_path / "own")
    bare = table.drop_columns("label")
    _, joined = fit(bare, tmp_path / "joined", labels={"uri": str(tmp_path / "labels.csv")})
    assert joined["training"] == own["training"]
    assert joined["test"] == own["test"]
    assert joined["labels"]["unknown_keys"] == 1


def test_a_class_seen_only_outside_training_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels = made_table()["label"].to_pylist()
    fold = ["test" if row % 5 == 0 else "train" for row in range(211)]
    labels[0] = labels[5] = "rare"
    with caplog.at_level(logging.WARNING, "engine"):
        summary, metrics = fit(made_table(label=labels, fold=fold), tmp_path, split={"column": "fold"})
    assert metrics["labels"]["classes_without_training_rows"] == {"rare": 2}
    assert metrics["test"]["rows"] == 43 - 2
    assert (summary["rows"], summary["classes"]) == (209, 3)
    assert "class 'rare' has no training row and is left out, with the labels of its 2 rows" in caplog.text


def test_without_validation_and_test_rows_their_metrics_are_null(tmp_path: Path) -> None:
    split = {"train": 1.0, "validation": 0.0, "test": 0.0}
    summary, metrics = fit(made_table(), tmp_path, split=split, training={"epochs": 2})
    assert summary["metrics"] == {"validation": None, "test": None}
    assert summary["epochs"] == 2
    assert (metrics["validation"], metrics["test"]) == (None, None)
    assert "no validation rows" in metrics["training"]["stopped"]


def test_two_fits_with_one_recipe_publish_the_same_weights_and_metrics(tmp_path: Path) -> None:
    matrices, documents = [], []
    for _ in range(2):
        _, metrics = fit(made_table(), tmp_path)
        matrix = open_bundle(open_store(str(tmp_path))).matrix()
        assert matrix is not None
        matrices.append((matrix.kernel_DK.tobytes(), matrix.bias_K.tobytes()))
        documents.append(metrics)
    assert matrices[0] == matrices[1]
    assert documents[0] == documents[1]


def test_labels_that_cannot_be_used_publish_nothing(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="at least 2 classes"):
        fit(made_table(label=["ant"] * 211), tmp_path)
    with pytest.raises(BundleError, match="not published"):
        open_bundle(open_store(str(tmp_path)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_embeddings_are_gathered_across_chunks_in_their_dtype(dtype: type[np.floating[Any]]) -> None:
    whole_ND: NDArray[Any] = np.arange(11 * 3, dtype=dtype).reshape(11, 3)
    flat = pa.array(whole_ND.ravel())
    column = pa.FixedSizeListArray.from_arrays(flat, 3)
    chunked = pa.chunked_array([column.slice(0, 4), column.slice(4, 0), column.slice(4, 1), column.slice(5)])
    positions_N = np.array([0, 3, 4, 5, 9])
    gathered_ND = np.empty((5, 3), dtype)
    fill_rows(gathered_ND, [chunked.slice(0, 5), chunked.slice(5)], positions_N, 3)
    np.testing.assert_array_equal(gathered_ND, whole_ND[positions_N])
    with pytest.raises(TableDamaged, match=r"found: +3\n +wanted: +8"):
        fill_rows(np.empty((5, 8), dtype), [chunked], positions_N, 8)


@pytest.mark.parametrize("optimizer", [{"learning_rate": 0.05}, {"kind": "lbfgs"}])
def test_rows_on_the_disk_give_the_head_that_rows_in_memory_give(
    optimizer: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "ROWS_AT_ONCE", 50)
    monkeypatch.setattr(passes, "STEPS_PER_CALL", 2)
    table = made_table(fold=["x"] * 211)
    settings = FitSettings.model_validate(
        {
            "strategy": {"kind": "one_device"},
            "optimizer": optimizer,
            "side_features": [{"column": "fold", "kind": "categorical"}],
            "training": {"epochs": 6, "batch_size": 32, "standardise": True},
        }
    )
    scratch, asked = tmp_path / "scratch", []
    scratch.mkdir()

    def wants_disk(size: int) -> bool:
        asked.append(size)
        return True

    sources = {
        "memory": RowSource.of(table),
        "disk": RowSource(
            lambda: [part["embedding"] for part in (table.slice(0, 70), table.slice(70))],
            wants_disk,
            scratch,
        ),
    }
    found = {}
    for name, source in sources.items():
        store = open_store(str(tmp_path / name))
        fit_head(table, RECORD, settings, StorageConfig(), store, lambda report: None, source)
        found[name] = open_bundle(store)
    ours, theirs = (found[name].document("metrics") for name in ("disk", "memory"))
    for one, other in zip(ours["training"]["history"], theirs["training"]["history"], strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    assert ours["test"]["confusion_matrix"] == theirs["test"]["confusion_matrix"]
    assert found["disk"].document("suspects")["suspects"] == [
        {**suspect, "margin": pytest.approx(suspect["margin"], abs=1e-5)}
        for suspect in found["memory"].document("suspects")["suspects"]
    ]
    assert asked == [211 * (WIDTH + 2) * 4]
    assert not list(scratch.iterdir())  # files without names


def test_rows_outside_of_all_slices_are_said_and_counted_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fold = ["old" if row % 3 else "new" for row in range(211)]
    split = {"column": "fold", "train": "old[:70%]", "validation": "old[70%:90%]", "test": "new"}
    keys = [f"img{row:04d}" for row in range(211)]
    labels = [NAMES[row % 3] if hash_fraction(9, key) < 0.2 else None for row, key in enumerate(keys)]
    labels = [wrong or right for wrong, right in zip(labels, made_table()["label"].to_pylist(), strict=True)]
    with caplog.at_level(logging.WARNING, "engine"):
        summary, metrics = fit(
            made_table(fold=fold, label=labels), tmp_path, split=split, training={"epochs": 9}
        )
    rows = {name: metrics["split"][name]["rows"] for name in ("train", "validation", "test")}
    assert rows["test"] == 71 and rows["train"] > 3 * rows["validation"]
    left_out = 211 - sum(rows.values())
    assert 0 < left_out < 40 and summary["rows"] == 211 - left_out
    assert f"{left_out} labelled rows are outside of all slices" in caplog.text
    outside = {
        key for key, kept in zip(keys, fold, strict=True) if kept == "old" and hash_fraction(0, key) >= 0.9
    }
    assert len(outside) == left_out
    suspects = open_bundle(open_store(str(tmp_path))).document("suspects")["suspects"]
    assert suspects and not outside & {suspect["key"] for suspect in suspects}
