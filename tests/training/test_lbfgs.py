"""L-BFGS finds minima, and heads that it trained are those of scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize, rosen, rosen_der
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from engine.config import check_recipe
from engine.errors import EngineError, RecipeError
from engine.heads.kinds import LinearHeadConfig, MlpHeadConfig
from engine.strategies.kinds import OneDevice, open_strategy
from engine.training import passes
from engine.training.grid import Candidate, candidates
from engine.training.kinds import FitSettings, LbfgsConfig, TrainingConfig
from engine.training.lbfgs import Lbfgs
from engine.training.loop import Trained, TrainingRows, train_heads
from tests.training.test_loop import made_rows


def minimised(function: object, gradient: object, start: list[float], iterations: int) -> tuple[Lbfgs, int]:
    """After so many iterations at most, and how often it looked."""
    descent, looks = Lbfgs(np.array(start), history=10), 0
    for _ in range(iterations):
        over = False
        while not over:
            looks += 1
            point = descent.asked
            over = descent.tell(float(function(point)), gradient(point))  # type: ignore[operator]
        if descent.steepest < 1e-6:
            break
    return descent, looks


def test_a_curved_valley_is_followed_to_its_end_about_as_fast_as_by_scipy() -> None:
    start = [-1.2, 1.0, -0.5, 2.0]
    descent, looks = minimised(rosen, rosen_der, start, 200)
    assert descent.at_P == pytest.approx(np.ones(4), abs=1e-5)
    assert looks <= 1.5 * minimize(rosen, start, jac=rosen_der, method="L-BFGS-B").nfev


def test_a_loss_that_is_not_finite_somewhere_is_stepped_back_from() -> None:
    descent, _ = minimised(
        lambda point: point[0] - np.log(point[0]) if point[0] > 0 else np.nan,
        lambda point: 1 - 1 / point if point[0] > 0 else np.array([np.nan]),
        [0.01],
        50,
    )
    assert descent.at_P[0] == pytest.approx(1.0, abs=1e-5)


def test_where_no_step_helps_it_stays_and_ends_its_iteration() -> None:
    descent = Lbfgs(np.array([1.0]), history=3)
    descent.tell(1.0, np.array([1.0]))
    looks = 0
    while not descent.tell(2.0, np.array([1.0])):
        looks += 1
        assert looks < 100
    assert (descent.at_P[0], descent.loss) == (1.0, 1.0)


def test_a_start_at_the_minimum_ends_at_once() -> None:
    descent = Lbfgs(np.zeros(3), history=3)
    assert not descent.tell(1.0, np.zeros(3))
    assert descent.tell(1.0, np.zeros(3)) and descent.steepest == 0.0
    straight = Lbfgs(np.zeros(1), history=3)  # a loss whose gradient never changes
    for _ in range(5):
        while not straight.tell(float(-straight.asked[0]), np.array([-1.0])):
            assert abs(straight.asked[0]) < 1e12
    alike = TrainingRows(np.ones((8, 3), np.float32), np.arange(8) % 2, np.arange(8), np.arange(0))
    assert trained(0.0, alike).result.stopped.startswith("the gradient vanished after epoch 1")


def trained(l2: float, rows: TrainingRows, **training: object) -> Trained:
    config = TrainingConfig.model_validate({"epochs": 500, "patience": 500, **training})
    tried = [Candidate(LinearHeadConfig(), LbfgsConfig(kind="lbfgs", l2=l2, tolerance=1e-5))]
    (one,) = train_heads(tried, open_strategy(OneDevice()), rows, config, lambda report: None)
    return one


def test_the_head_is_that_of_scikit_learn_for_the_same_regularisation() -> None:
    pixels_ND, classes_N = load_digits(return_X_y=True)
    pixels_ND = (pixels_ND / 16).astype(np.float32)
    train, rest = np.arange(1400), np.arange(1400, len(classes_N))
    found = trained(0.001, TrainingRows(pixels_ND, classes_N, train, rest))
    assert found.result.stopped.startswith("the gradient vanished after epoch")
    reference = LogisticRegression(C=1 / (0.001 * len(train)), tol=1e-6, max_iter=1000)
    reference.fit(pixels_ND[train].astype(np.float64), classes_N[train])
    last = found.result.history[-1]
    probabilities_NK = reference.predict_proba(pixels_ND[rest])
    theirs = -np.log(probabilities_NK[np.arange(len(rest)), classes_N[rest]]).mean()
    print(f"validation loss: ours {last.validation_loss:.6f}, scikit-learn {theirs:.6f}")
    assert last.validation_loss == pytest.approx(theirs, abs=2e-3)
    assert last.validation_accuracy == pytest.approx(
        reference.score(pixels_ND[rest], classes_N[rest]), abs=0.006
    )


def test_portions_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = made_rows()
    whole = trained(0.01, rows, epochs=4)
    monkeypatch.setattr(passes, "ROWS_AT_ONCE", 50)
    portions = trained(0.01, rows, epochs=4)
    for ours, theirs in zip(portions.network.get_weights(), whole.network.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_row_weights_and_label_smoothing_count_as_they_do_for_other_optimizers() -> None:
    rows = made_rows(num_validation=0)
    doubled = TrainingRows(rows.embeddings_ND, rows.targets_N, np.repeat(rows.train, 2), rows.validation)
    plain, twice = trained(0.01, rows), trained(0.01, doubled)
    for ours, theirs in zip(plain.network.get_weights(), twice.network.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
    smoothed = trained(0.01, rows, label_smoothing=0.2)
    balanced = trained(0.01, rows, class_weights="balanced")
    for other in (smoothed, balanced):
        assert not np.allclose(other.network.get_weights()[0], plain.network.get_weights()[0], atol=0.01)
    assert np.abs(smoothed.network.get_weights()[0]).sum() < np.abs(plain.network.get_weights()[0]).sum()


def test_biases_are_not_pulled_to_zero() -> None:
    rows = made_rows(num_validation=0)
    kernel_DK, bias_K = trained(1e3, rows).network.get_weights()
    assert np.abs(kernel_DK).max() < 1e-2
    shares_K = np.bincount(rows.targets_N[rows.train]) / len(rows.train)
    assert np.exp(bias_K) / np.exp(bias_K).sum() == pytest.approx(shares_K, abs=1e-2)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    rows = made_rows()
    rows.embeddings_ND[rows.train[0], 0] = np.nan
    with pytest.raises(EngineError, match=r"(?s)the loss is (nan|inf) in epoch 1.*kind lbfgs"):
        trained(0.01, rows)


def test_what_does_not_go_together_is_refused() -> None:
    def tried(document: dict[str, object]) -> list[Candidate]:
        return candidates(check_recipe(FitSettings, document))

    lbfgs = {"kind": "lbfgs"}
    assert len(tried({"optimizer": lbfgs, "grid": {"l2": [0.1, 0.01]}})) == 2
    with pytest.raises(RecipeError, match=r"(?s)grid.learning_rate: optimizer lbfgs has no.*grid.l2"):
        tried({"optimizer": lbfgs, "grid": {"learning_rate": [0.1]}})
    with pytest.raises(RecipeError, match=r"(?s)grid.l2: optimizer adam has no.*grid.learning_rate"):
        tried({"grid": {"l2": [0.1]}})
    with pytest.raises(RecipeError, match="cannot train a head with dropout"):
        tried({"optimizer": lbfgs, "head": {"kind": "mlp"}})
    still = MlpHeadConfig(kind="mlp", dropout=0).model_dump()
    assert len(tried({"optimizer": lbfgs, "head": still})) == 1
