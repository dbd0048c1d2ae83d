"""Predictions are the softmax of the head's logits, in a fixed order, with or without Keras."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from engine.errors import TableDamaged
from engine.heads.bundle import Bundle, TrainedHead, publish_bundle
from engine.heads.confidence import Calibration
from engine.heads.kinds import LinearHeadConfig, build_head
from engine.predictor import TOP_K_BY_PASSES, Predictor, top_k
from engine.schema import predictions_schema
from engine.storage import open_store

ROOT = Path(__file__).parents[1]
CLASSES = ("ant", "bee", "cat", "dog", "eel")


def published(folder: Path, kernel_DK: NDArray[Any], bias_K: NDArray[Any]) -> Bundle:
    width, num_classes = kernel_DK.shape
    network = build_head(LinearHeadConfig(), width, num_classes, seed=0)
    network.set_weights([kernel_DK, bias_K])
    names = CLASSES if num_classes == 5 else tuple(f"class {number:04d}" for number in range(num_classes))
    return publish_bundle(
        open_store(str(folder)),
        TrainedHead(LinearHeadConfig(), network, names, "single_label"),
        table_record={"fingerprint": "f" * 64, "width": width},
        metrics={},
        recipe={},
    )


def without_matrix(bundle: Bundle) -> Bundle:
    """The same bundle as a head kind would publish it that is more than a matrix."""
    files = {role: file for role, file in bundle.manifest.files.items() if role != "matrix"}
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"files": files}))


def logits_are(folder: Path) -> Bundle:
    """A bundle whose logits are the embedding itself."""
    return published(folder, np.eye(5), np.zeros(5))


def embedding_table(embeddings_BD: NDArray[Any], number: pa.DataType) -> pa.Table:
    flat = pa.array(embeddings_BD.ravel()).cast(number)
    return pa.table(
        {
            "key": [f"k{row}" for row in range(len(embeddings_BD))],
            "shard": ["a.tar"] * len(embeddings_BD),
            "index": pa.array(range(3, 3 + len(embeddings_BD)), pa.int64()),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, embeddings_BD.shape[1]),
        }
    )


def test_probabilities_in_numpy_equal_those_of_keras(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    bundle = published(tmp_path, rng.normal(size=(1280, 11), scale=0.1), rng.normal(size=11))
    rows_BD = rng.normal(size=(257, 1280)).astype(np.float32)
    in_numpy, in_keras = Predictor(bundle, 5), Predictor(without_matrix(bundle), 5)
    assert bundle.matrix() is not None and without_matrix(bundle).matrix() is None
    probabilities_BK = in_numpy.probabilities(rows_BD)
    assert probabilities_BK.dtype == np.float32
    assert probabilities_BK.shape == (257, 11)
    np.testing.assert_allclose(probabilities_BK, in_keras.probabilities(rows_BD), atol=1e-5)
    np.testing.assert_allclose(probabilities_BK.sum(axis=1), 1, atol=1e-6)
    assert (
        in_numpy.predict(rows_BD).top_classes_Bk.tolist() == in_keras.predict(rows_BD).top_classes_Bk.tolist()
    )


def test_a_linear_head_predicts_without_loading_keras(tmp_path: Path) -> None:
    bundle = logits_are(tmp_path)
    script = f"""
import sys
import numpy as np
from engine.heads.bundle import open_bundle
from engine.predictor import Predictor
from engine.storage import open_store
answer = Predictor(open_bundle(open_store({bundle.store.uri!r})), 2).predict(np.eye(5, dtype=np.float32))
print(answer.top_classes_Bk[:, 0].tolist(), sorted({{"tensorflow", "keras", "ray"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[0, 1, 2, 3, 4] []\n"


def test_predictions_are_sorted_and_of_equals_the_first_class_comes_first(tmp_path: Path) -> None:
    predictor = Predictor(logits_are(tmp_path), top_k=4)
    answers = predictor.predict(np.array([[1, 3, 3, 0, 3], [0, 0, 0, 0, 0], [-2, 5, 1, 9, 0]], np.float32))
    assert answers.top_classes_Bk.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [3, 1, 2, 4]]
    assert (np.diff(answers.top_confidences_Bk, axis=1) <= 0).all()
    np.testing.assert_allclose(answers.top_confidences_Bk[1], 0.2, atol=1e-7)


@pytest.mark.parametrize("k", [1, 5, TOP_K_BY_PASSES, TOP_K_BY_PASSES + 1, 97])
def test_top_k_equals_a_stable_sort_also_where_values_repeat(k: int) -> None:
    values_BK = np.random.default_rng(k).integers(0, 23, size=(53, 97)).astype(np.float32)
    kept = values_BK.copy()
    columns_Bk, found_Bk = top_k(values_BK, k)
    expected = [sorted(range(97), key=lambda column: (-row[column], column))[:k] for row in values_BK]
    assert columns_Bk.tolist() == expected
    np.testing.assert_array_equal(found_Bk, np.take_along_axis(values_BK, np.array(expected), axis=1))
    np.testing.assert_array_equal(values_BK, kept)


def test_temperature_divides_the_logits(tmp_path: Path) -> None:
    bundle = logits_are(tmp_path)
    warm = replace(
        bundle, manifest=bundle.manifest.model_copy(update={"calibration": Calibration(temperature=2.0)})
    )
    logits_BK = np.array([[np.log(16), 0, 0, 0, 0]], np.float32)
    np.testing.assert_allclose(Predictor(bundle, 1).probabilities(logits_BK)[0, 0], 16 / 20, atol=1e-6)
    np.testing.assert_allclose(Predictor(warm, 1).probabilities(logits_BK)[0, 0], 4 / 8, atol=1e-6)


def test_below_min_confidence_the_label_is_null_and_the_candidates_stay(tmp_path: Path) -> None:
    logits_BD = np.log(np.array([[0.6, 0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.3, 0.4]])).astype(np.float32)
    table = Predictor(logits_are(tmp_path), top_k=2, min_confidence=0.5).predict_table(
        embedding_table(logits_BD, pa.float32())
    )
    assert table["label"].to_pylist() == ["ant", None]
    assert table["top_labels"].to_pylist() == [["ant", "bee"], ["eel", "dog"]]
    np.testing.assert_allclose(table["confidence"].to_numpy(), [0.6, 0.4], atol=1e-6)


def test_a_confidence_equal_to_min_confidence_is_enough(tmp_path: Path) -> None:
    bundle = published(tmp_path, np.zeros((3, 2)), np.zeros(2))
    answers = Predictor(bundle, 1, min_confidence=0.5).predict(np.ones((1, 3), np.float32))
    assert answers.top_confidences_Bk.tolist() == [[0.5]]
    assert answers.abstains_B.tolist() == [False]


def test_each_class_may_have_a_least_confidence_of_its_own(tmp_path: Path) -> None:
    shares = [[0.6, 0.1, 0.1, 0.1, 0.1], [0.1, 0.6, 0.1, 0.1, 0.1], [0.3, 0.1, 0.1, 0.2, 0.3]]
    logits_BD = np.log(np.array(shares)).astype(np.float32)
    predictor = Predictor(logits_are(tmp_path), 2, [0.7, 0.5, 0.0, 0.0, 0.0], ["A", "B", "C", "D", "A"])
    table = predictor.predict_table(embedding_table(logits_BD, pa.float32()))
    assert table["label"].to_pylist() == [None, "B", None]
    assert table["top_labels"].to_pylist() == [["A", "B"], ["B", "A"], ["A", "A"]]


@pytest.mark.parametrize("number", [pa.float32(), pa.float16()])
def test_a_prediction_table_has_the_schema_and_the_rows_of_its_embeddings(
    tmp_path: Path, number: pa.DataType
) -> None:
    bundle = logits_are(tmp_path)
    embeddings = embedding_table(np.eye(5, dtype=np.float32) * 4, number)
    pieces = pa.concat_tables([embeddings.slice(0, 2), embeddings.slice(2)])
    predicted = Predictor(bundle, top_k=9).predict_table(pieces)
    assert predicted.schema == predictions_schema(5)
    predicted.validate(full=True)
    assert predicted["key"].to_pylist() == ["k0", "k1", "k2", "k3", "k4"]
    assert predicted["index"].to_pylist() == [3, 4, 5, 6, 7]
    assert predicted["label"].to_pylist() == list(CLASSES)
    assert predicted["top_labels"][3].as_py() == ["dog", "ant", "bee", "cat", "eel"]
    assert predicted["bundle"].to_pylist() == [bundle.id] * 5
    for row, best in zip(
        predicted["top_confidences"].to_pylist(), predicted["confidence"].to_pylist(), strict=True
    ):
        assert row[0] == best


def test_a_part_without_rows_gives_a_prediction_table_without_rows(tmp_path: Path) -> None:
    bundle = logits_are(tmp_path)
    no_rows = embedding_table(np.empty((0, 5), np.float32), pa.float32())
    no_chunks = no_rows.schema.empty_table()
    for opened, embeddings in ((bundle, no_rows), (bundle, no_chunks), (without_matrix(bundle), no_rows)):
        predicted = Predictor(opened, top_k=3).predict_table(embeddings)
        assert (predicted.num_rows, predicted.schema) == (0, predictions_schema(3))


def test_rows_of_another_width_or_without_numbers_are_refused(tmp_path: Path) -> None:
    predictor = Predictor(logits_are(tmp_path), top_k=3)
    with pytest.raises(ValueError, match=r"\(2, 6\), wanted \(B, 5\)"):
        predictor.predict(np.zeros((2, 6), np.float32))
    broken = np.zeros((3, 5), np.float32)
    broken[1, 2] = np.nan
    with pytest.raises(TableDamaged, match="1 rows with NaN or infinity, the first is row 1 of 3"):
        predictor.predict(broken)
