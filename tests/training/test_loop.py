"""Training repeats exactly, stops when it should, keeps the best weights, and is as good as the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from engine.errors import EngineError
from engine.heads.kinds import LinearHeadConfig, MlpHeadConfig
from engine.heads.network import compile_logits
from engine.strategies.kinds import OneDevice, open_strategy
from engine.training.grid import Candidate, best_of
from engine.training.kinds import AdamConfig, SgdConfig, TrainingConfig
from engine.training.loop import TrainingResult, TrainingRows, train_heads
from engine.training.metrics import accuracy, cross_entropy
from engine.training.passes import global_batches


def made_rows(num_validation: int = 60) -> TrainingRows:
    """307 rows of width 13 in 3 classes, a tenth of the labels wrong, so that a head can overfit."""
    rng = np.random.default_rng(2)
    embeddings_ND = rng.normal(size=(307, 13)).astype(np.float32)
    classes_N = (embeddings_ND @ rng.normal(size=(13, 3))).argmax(axis=1)
    classes_N[:31] = rng.integers(0, 3, 31)
    order = rng.permutation(307)
    return TrainingRows(embeddings_ND, classes_N, order[num_validation:], order[:num_validation])


def train(rows: TrainingRows, rate: float, **config: Any) -> tuple[TrainingResult, list[NDArray[np.float32]]]:
    reports: list[dict[str, Any]] = []
    strategy = open_strategy(OneDevice())
    settings = TrainingConfig(**config)
    candidate = Candidate(LinearHeadConfig(), AdamConfig(learning_rate=rate))
    (trained,) = train_heads([candidate], strategy, rows, settings, reports.append)
    network, result = trained.network, trained.result
    assert [report["train_loss"] for report in reports] == [epoch.train_loss for epoch in result.history]
    assert all(report["epochs"] == settings.epochs for report in reports)
    return result, network.get_weights()


def test_two_runs_with_one_seed_are_equal_to_the_last_bit() -> None:
    first, second, other = (
        train(made_rows(), 0.01, epochs=4, batch_size=32, seed=seed) for seed in (7, 7, 8)
    )
    assert first[0] == second[0]
    assert [array.tobytes() for array in first[1]] == [array.tobytes() for array in second[1]]
    assert first[0] != other[0]


def test_golden_trace() -> None:
    """Fixed once; another order of the rows (say, the same in every epoch) differs by 1e-3."""
    result, _ = train(made_rows(), 0.01, epochs=3, batch_size=32, seed=5)
    losses = [(epoch.train_loss, epoch.validation_loss) for epoch in result.history]
    for ours, golden in zip(
        losses, [(1.035194, 0.945939), (0.891662, 0.833669), (0.790337, 0.751284)], strict=True
    ):
        assert ours == pytest.approx(golden, abs=1e-4)


def test_training_stops_after_patience_and_keeps_the_weights_of_the_best_epoch() -> None:
    rows = made_rows()
    result, (kernel_DK, bias_K) = train(rows, 0.2, epochs=100, batch_size=16, patience=4)
    losses = [epoch.validation_loss for epoch in result.history]
    assert len(losses) < 100
    assert result.best_epoch == 1 + int(np.argmin(np.array(losses, float)))
    assert len(losses) == result.best_epoch + 4
    assert result.stopped.startswith("the validation loss did not fall for 4 epochs")
    kept = cross_entropy(
        rows.embeddings_ND[rows.validation] @ kernel_DK + bias_K, rows.targets_N[rows.validation]
    )
    assert kept == pytest.approx(losses[result.best_epoch - 1], abs=1e-5)
    assert kept < float(losses[-1] or 0) - 1e-3


def test_the_best_weights_are_kept_when_epochs_run_out_too() -> None:
    stopped, weights = train(made_rows(), 0.2, epochs=100, batch_size=16, patience=4)
    ran_out, same_weights = train(made_rows(), 0.2, epochs=stopped.best_epoch + 2, batch_size=16, patience=4)
    assert ran_out.best_epoch == stopped.best_epoch
    assert ran_out.stopped.startswith(f"all {stopped.best_epoch + 2} epochs were run")
    np.testing.assert_array_equal(weights[0], same_weights[0])


def test_without_validation_rows_all_epochs_are_run() -> None:
    result, weights = train(made_rows(num_validation=0), 0.2, epochs=9, batch_size=64, patience=1)
    assert (len(result.history), result.best_epoch) == (9, 9)
    assert {(epoch.validation_loss, epoch.validation_accuracy) for epoch in result.history} == {(None, None)}
    assert "no validation rows" in result.stopped
    assert np.abs(weights[0]).max() > 0.5


def test_a_batch_larger_than_the_data_is_all_of_it() -> None:
    whole, weights = train(made_rows(), 0.05, epochs=3, batch_size=247)
    larger, same_weights = train(made_rows(), 0.05, epochs=3, batch_size=1_000_000)
    assert whole == larger
    np.testing.assert_array_equal(weights[0], same_weights[0])


def test_two_rows_can_be_trained_on() -> None:
    rows = TrainingRows(
        np.eye(2, 5, dtype=np.float32), np.array([0, 1]), np.array([0, 1]), np.array([], np.int64)
    )
    result, (kernel_DK, bias_K) = train(rows, 0.1, epochs=30)
    assert (rows.embeddings_ND @ kernel_DK + bias_K).argmax(axis=1).tolist() == [0, 1]
    assert result.history[-1].train_loss < 0.1 < result.history[0].train_loss


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    rows = made_rows()
    rows.embeddings_ND[rows.train[0], 0] = np.nan
    with pytest.raises(EngineError, match=r"(?s)the loss is nan in epoch 1.*learning_rate"):
        train(rows, 0.01, epochs=2)


def test_global_batches_hold_every_row_once_and_have_one_shape() -> None:
    order = np.random.default_rng(0).permutation(np.arange(100, 117))
    weights_N = np.arange(117, dtype=np.float32)
    batches = list(global_batches(order, weights_N, batch_size=5, num_replicas=2))
    assert {(rows.shape, weights.shape) for rows, weights in batches} == {((2, 3), (2, 3))}
    assert len(batches) == 4
    counted = [row for rows, weights in batches for row in rows[weights > 0]]
    assert counted == order.tolist()
    for rows, weights in batches:
        np.testing.assert_array_equal(weights[weights > 0], rows[weights > 0])
        # Padding repeats a row of the batch: any other row might have no class, and 0 * NaN is NaN.
        assert set(rows[weights == 0]) <= {rows[0, 0]}


def test_digits_are_told_apart_as_well_as_by_scikit_learn() -> None:
    pixels_ND, classes_N = load_digits(return_X_y=True)
    pixels_ND = pixels_ND / 16  # to 0..1
    order = np.random.default_rng(0).permutation(len(classes_N))
    parts = {"train": order[:1257], "validation": order[1257:1437], "test": order[1437:]}
    rows = TrainingRows(pixels_ND.astype(np.float32), classes_N, parts["train"], parts["validation"])
    strategy = open_strategy(OneDevice())
    config = TrainingConfig(epochs=20, batch_size=128)
    tried = [Candidate(LinearHeadConfig(), AdamConfig(learning_rate=0.03))]
    (trained,) = train_heads(tried, strategy, rows, config, lambda report: None)
    ours = accuracy(
        compile_logits(trained.network)(rows.embeddings_ND[parts["test"]]), classes_N[parts["test"]]
    )
    reference = LogisticRegression(solver="newton-cholesky")
    reference.fit(pixels_ND[parts["train"]], classes_N[parts["train"]])
    theirs = reference.score(pixels_ND[parts["test"]], classes_N[parts["test"]])
    print(f"digits, test accuracy: ours {ours:.4f}, scikit-learn {theirs:.4f}")
    assert theirs > 0.9
    assert ours >= theirs - 0.03


def test_heads_of_a_grid_stop_each_at_its_own_time_with_its_own_best_weights() -> None:
    rows = made_rows()
    config = TrainingConfig(epochs=60, batch_size=16, patience=4)
    tried = [
        Candidate(LinearHeadConfig(), AdamConfig(learning_rate=0.2)),
        Candidate(LinearHeadConfig(), AdamConfig(learning_rate=0.01)),
        Candidate(MlpHeadConfig(kind="mlp", hidden=(8,)), AdamConfig(learning_rate=0.01)),
    ]
    reports: list[dict[str, Any]] = []
    together = train_heads(tried, open_strategy(OneDevice()), rows, config, reports.append)
    for one, candidate in zip(together, tried, strict=True):
        (alone,) = train_heads([candidate], open_strategy(OneDevice()), rows, config, lambda report: None)
        assert one.result.best_epoch == alone.result.best_epoch
        assert len(one.result.history) == len(alone.result.history)
        for ours, theirs in zip(one.result.history, alone.result.history, strict=True):
            assert ours.validation_loss == pytest.approx(theirs.validation_loss, abs=1e-5)
        for ours, theirs in zip(one.network.get_weights(), alone.network.get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
    lengths = [len(one.result.history) for one in together]
    assert len(set(lengths)) > 1 and len(reports) == max(lengths)
    leaders = [report["validation_loss"] for report in reports]
    assert min(leaders) == min(e.validation_loss or 9 for one in together for e in one.result.history)


def test_a_head_that_diverges_does_not_take_the_others_with_it() -> None:
    rows = made_rows()
    rows.embeddings_ND[:] *= 1e4
    tried = [
        Candidate(LinearHeadConfig(), SgdConfig(kind="sgd", learning_rate=1e36)),
        Candidate(LinearHeadConfig(), AdamConfig(learning_rate=1e-6)),
    ]
    config = TrainingConfig(epochs=3, batch_size=16)
    lost, kept = train_heads(tried, open_strategy(OneDevice()), rows, config, lambda report: None)
    assert "weights of epoch 0 kept" in lost.result.stopped and not lost.result.history
    assert len(kept.result.history) == 3
    assert best_of([lost, kept], tried) == 1
    with pytest.raises(EngineError, match="every head of the grid is infinite"):
        best_of([lost], tried[:1])
