"""The knn head: scikit-learn's answers, from a bundle too, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from sklearn.neighbors import KNeighborsClassifier

from engine.errors import LabelError
from engine.heads.bundle import TrainedHead, open_bundle, publish_bundle
from engine.heads.confidence import sigmoid
from engine.heads.kinds import KnnHeadConfig, LinearHeadConfig, open_head
from engine.heads.network import compile_logits
from engine.predictor import Predictor
from engine.storage import open_store
from engine.strategies.kinds import OneDevice, open_strategy
from engine.training.grid import Candidate, best_of, candidates
from engine.training.kinds import AdamConfig, FitSettings, TrainingConfig
from engine.training.loop import TrainingRows, out_of_fold_logits, train_heads
from engine.training.step import hold_rows

CONFIG = KnnHeadConfig(kind="knn", k=7, temperature=0.1)


def made_rows(count: int = 210) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(4)
    classes_N = rng.integers(0, 3, count)
    return (np.eye(3, 9)[classes_N] + 0.6 * rng.normal(size=(count, 9))).astype(np.float32), classes_N


def reference(seen_ND: Any, classes_N: Any) -> KNeighborsClassifier:
    def weights(distances: Any) -> Any:
        return np.exp((1 - distances) / 0.1)

    return KNeighborsClassifier(7, metric="cosine", algorithm="brute", weights=weights).fit(
        seen_ND, classes_N
    )


def test_probabilities_are_those_of_scikit_learn_before_and_after_publishing(tmp_path: Path) -> None:
    rows_ND, classes_N = made_rows()
    seen_ND, fresh_ND = rows_ND[:150], rows_ND[150:]
    network = open_head(CONFIG).remember(seen_ND, classes_N[:150], 3)
    store = open_store(str(tmp_path))
    head = TrainedHead(CONFIG, network, ("a", "b", "c"), "single_label")
    publish_bundle(store, head, table_record={"fingerprint": "f", "width": 9}, metrics={}, recipe={})
    wanted = np.clip(reference(seen_ND, classes_N[:150]).predict_proba(fresh_ND), 1e-4, 1)
    wanted /= wanted.sum(axis=1, keepdims=True)
    found = Predictor(open_bundle(store), top_k=3).probabilities(fresh_ND)
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    logits_NK = compile_logits(network)(fresh_ND)
    assert np.isfinite(logits_NK).all()
    assert (logits_NK.argmax(axis=1) == classes_N[150:]).mean() > 0.8


def test_an_absorbed_scaling_is_that_of_the_rows_that_were_remembered(tmp_path: Path) -> None:
    rows_ND, classes_N = made_rows()
    subtract_D, multiply_D = rows_ND.mean(axis=0).astype(float), 1 / rows_ND.std(axis=0).astype(float)
    scaled_ND = ((rows_ND - subtract_D) * multiply_D).astype(np.float32)
    head = open_head(CONFIG)
    network = head.remember(scaled_ND[:150], classes_N[:150], 3)
    wanted = compile_logits(network)(scaled_ND[150:])
    absorbed = head.absorb_scaling(network, subtract_D, multiply_D)
    np.testing.assert_allclose(compile_logits(absorbed)(rows_ND[150:]), wanted, atol=1e-3)
    store = open_store(str(tmp_path))
    trained = TrainedHead(CONFIG, absorbed, ("a", "b", "c"), "single_label")
    publish_bundle(store, trained, table_record={"fingerprint": "f", "width": 9}, metrics={}, recipe={})
    again = open_bundle(store).network()
    np.testing.assert_allclose(compile_logits(again)(rows_ND[150:]), wanted, atol=1e-3)


def test_several_classes_of_a_row_are_voted_on_one_by_one() -> None:
    seen_ND = np.eye(4, dtype=np.float32)
    given_NK = np.array([[1, 1], [1, 0], [0, 0], [0, 1]], np.uint8)
    config = KnnHeadConfig(kind="knn", k=2, temperature=1.0)
    network = open_head(config).remember(seen_ND, given_NK, 2)
    row = np.array([[1.0, 1.0, 0.0, 0.0]], np.float32)  # between the first and the second
    np.testing.assert_allclose(sigmoid(compile_logits(network)(row)), [[1 - 1e-4, 0.5]], atol=1e-6)


def test_it_is_one_of_a_grid_and_is_tried_once() -> None:
    grid = {"head": [{"kind": "knn"}, {"kind": "linear"}], "learning_rate": [0.1, 0.01]}
    tried = candidates(FitSettings.model_validate({"grid": grid}))
    assert [candidate.head.kind for candidate in tried] == ["knn", "linear", "linear"]
    rows_ND, classes_N = made_rows()
    rows = TrainingRows(rows_ND, classes_N, np.arange(150), np.arange(150, 210))
    config = TrainingConfig(epochs=20, batch_size=32)
    trained = train_heads(tried, open_strategy(OneDevice()), rows, config, lambda report: None)
    (only,) = trained[0].result.history
    assert (only.epoch, only.train_loss) == (1, None)
    logits_NK = compile_logits(trained[0].network)(rows_ND[150:])
    assert only.validation_accuracy == pytest.approx((logits_NK.argmax(axis=1) == classes_N[150:]).mean())
    assert all(len(one.result.history) > 1 for one in trained[1:])
    assert best_of(trained, tried) in {0, 1, 2}


def test_out_of_fold_no_row_votes_for_itself() -> None:
    rng = np.random.default_rng(0)
    noise_ND, classes_N = rng.normal(size=(400, 16)).astype(np.float32), rng.integers(0, 4, 400)
    rows = TrainingRows(noise_ND, classes_N, np.arange(400), np.arange(0))
    candidate = Candidate(KnnHeadConfig(kind="knn", k=3, temperature=0.01), AdamConfig())
    strategy = open_strategy(OneDevice())
    held = hold_rows(strategy, noise_ND, classes_N)
    folds_N = rng.integers(0, 5, 400)
    logits_NK = out_of_fold_logits(candidate, strategy, rows, folds_N, 1, TrainingConfig(), held)
    assert 0.1 < (logits_NK.argmax(axis=1) == classes_N).mean() < 0.4  # chance


def test_few_rows_and_zero_rows_are_no_trouble_and_too_many_are_refused() -> None:
    rows_ND, classes_N = made_rows()
    few = open_head(CONFIG).remember(rows_ND[:2], classes_N[:2], 3)
    assert np.isfinite(compile_logits(few)(rows_ND)).all()
    with_zero = np.vstack([np.zeros((1, 9), np.float32), rows_ND[:20]])
    assert np.isfinite(
        compile_logits(open_head(CONFIG).remember(with_zero, classes_N[:21], 3))(with_zero)
    ).all()
    with pytest.raises(LabelError, match=r"(?s)210 rows of 9 numbers.*max_rows 100"):
        open_head(CONFIG.model_copy(update={"max_rows": 100})).check_room(*rows_ND.shape)
    open_head(CONFIG).check_room(*rows_ND.shape)
    with pytest.raises(ValidationError):
        KnnHeadConfig(kind="knn", k=0)
    assert open_head(LinearHeadConfig()).learns_by_gradient
