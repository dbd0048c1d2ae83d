"""Optimizer steps do what the recipe says, and padding does nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import pytest
from numpy.typing import NDArray

from engine.heads.base import Dropouts
from engine.heads.kinds import LinearHeadConfig, MlpHeadConfig, open_head
from engine.strategies.kinds import OneDevice, open_strategy
from engine.training.kinds import AdamConfig, SgdConfig
from engine.training.step import Learner, build_optimizer, compile_steps, draws, hold_rows


def one_step(
    embeddings_ND: NDArray[np.floating[Any]],
    classes_N: NDArray[np.int64],
    rows: list[int],
    weights: list[float],
    optimizer: AdamConfig | SgdConfig,
    start: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    label_smoothing: float = 0.0,
) -> tuple[float, list[NDArray[np.float32]]]:
    """The loss of one step on these rows, and the weights after it."""
    strategy = open_strategy(OneDevice())
    head = open_head(LinearHeadConfig())
    with strategy.scope():
        network = head.build(embeddings_ND.shape[1], 3, seed=0)
        if start is not None:
            network.set_weights(start)
        learner = Learner(head, network, optimizer, build_optimizer(optimizer, 1, 1))
        held = hold_rows(strategy, embeddings_ND, classes_N)
        steps = compile_steps(strategy, [learner], held, label_smoothing)
    ((loss,),) = steps(0, np.array([[rows]]), np.array([[[weights]]], np.float32)).numpy()
    return float(loss), network.get_weights()


@pytest.fixture(scope="module")
def embeddings_ND() -> NDArray[np.float32]:
    return np.random.default_rng(4).normal(size=(11, 7)).astype(np.float32)


CLASSES_N = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1])


def test_the_first_loss_of_a_fresh_head_is_ln_of_the_number_of_classes(
    embeddings_ND: NDArray[np.float32],
) -> None:
    loss, _ = one_step(embeddings_ND, CLASSES_N, [1, 2, 3, 5, 7], [1] * 5, AdamConfig())
    assert loss == pytest.approx(np.log(3), abs=1e-6)


def test_the_first_adam_step_moves_every_weight_by_the_learning_rate(
    embeddings_ND: NDArray[np.float32],
) -> None:
    _, (kernel_DK, _) = one_step(
        embeddings_ND, CLASSES_N, [1, 2, 3, 5, 7], [1] * 5, AdamConfig(learning_rate=0.013)
    )
    moved_DK = np.abs(kernel_DK)
    assert moved_DK.max() <= 0.013 * (1 + 1e-6)
    # A gradient g moves its weight by learning_rate * |g| / (|g| + epsilon): nearly all of it, unless g is tiny.
    assert np.median(moved_DK) == pytest.approx(0.013, rel=1e-4)


def test_padding_of_weight_zero_changes_nothing(embeddings_ND: NDArray[np.float32]) -> None:
    start = (np.random.default_rng(5).normal(size=(7, 3)).astype(np.float32), np.zeros(3, np.float32))
    plain = one_step(embeddings_ND, CLASSES_N, [3, 1, 4], [1, 1, 1], AdamConfig(), start)
    padded = one_step(embeddings_ND, CLASSES_N, [3, 1, 4, 0, 0, 0], [1, 1, 1, 0, 0, 0], AdamConfig(), start)
    assert padded[0] == pytest.approx(plain[0], abs=1e-6)
    for ours, theirs in zip(padded[1], plain[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_row_of_weight_two_is_that_row_twice(embeddings_ND: NDArray[np.float32]) -> None:
    start = (np.random.default_rng(5).normal(size=(7, 3)).astype(np.float32), np.zeros(3, np.float32))
    weighed, _ = one_step(embeddings_ND, CLASSES_N, [3, 1], [2, 1], AdamConfig(), start)
    repeated, _ = one_step(embeddings_ND, CLASSES_N, [3, 3, 1], [1, 1, 1], AdamConfig(), start)
    plain, _ = one_step(embeddings_ND, CLASSES_N, [3, 1], [1, 1], AdamConfig(), start)
    assert weighed == pytest.approx(repeated, abs=1e-6)
    assert abs(weighed - plain) > 1e-3


def test_float16_rows_count_as_their_float32_values(embeddings_ND: NDArray[np.float32]) -> None:
    start = (np.random.default_rng(5).normal(size=(7, 3)).astype(np.float32), np.zeros(3, np.float32))
    half_ND = embeddings_ND.astype(np.float16)
    assert not np.array_equal(half_ND, embeddings_ND)
    half = one_step(half_ND, CLASSES_N, [3, 1, 4], [1, 1, 1], AdamConfig(), start)
    cast = one_step(half_ND.astype(np.float32), CLASSES_N, [3, 1, 4], [1, 1, 1], AdamConfig(), start)
    assert half[0] == cast[0]
    np.testing.assert_array_equal(half[1][0], cast[1][0])


def test_weight_decay_is_decoupled_and_spares_the_bias(embeddings_ND: NDArray[np.float32]) -> None:
    start = (np.full((7, 3), 2.0, np.float32), np.full(3, 2.0, np.float32))
    plain, decayed = (
        one_step(
            embeddings_ND,
            CLASSES_N,
            [3, 1, 4],
            [1] * 3,
            AdamConfig(learning_rate=0.1, weight_decay=decay),
            start,
        )
        for decay in (0.0, 0.5)
    )
    # Adam's own move does not see the decay: the two differ by exactly learning_rate * weight_decay * weight.
    np.testing.assert_allclose(plain[1][0] - decayed[1][0], 0.1 * 0.5 * 2.0, rtol=1e-4)
    np.testing.assert_array_equal(plain[1][1], decayed[1][1])
    assert plain[0] == decayed[0]


def test_without_weight_decay_the_optimizer_is_plain_adam() -> None:
    optimizer = build_optimizer(AdamConfig(learning_rate=0.25), 10, 3)
    assert isinstance(optimizer, keras.optimizers.Adam)
    assert (float(optimizer.learning_rate), optimizer.weight_decay) == (0.25, None)


def test_sgd_follows_the_gradient(embeddings_ND: NDArray[np.float32]) -> None:
    start = (np.zeros((7, 3), np.float32), np.zeros(3, np.float32))
    sgd = SgdConfig(kind="sgd", learning_rate=0.5, momentum=0.0, nesterov=False)
    _, (kernel_DK, bias_K) = one_step(embeddings_ND, CLASSES_N, [3, 1, 4], [1] * 3, sgd, start)
    errors_BK = np.eye(3)[CLASSES_N[[3, 1, 4]]] - 1 / 3
    np.testing.assert_allclose(kernel_DK, 0.5 * embeddings_ND[[3, 1, 4]].T @ errors_BK / 3, atol=1e-6)
    np.testing.assert_allclose(bias_K, 0.5 * errors_BK.mean(axis=0), atol=1e-6)


def test_label_smoothing_gives_every_class_its_share(embeddings_ND: NDArray[np.float32]) -> None:
    rng = np.random.default_rng(5)
    kernel_DK = rng.normal(size=(7, 3)).astype(np.float32)
    start = (kernel_DK, np.zeros(3, np.float32))
    rows = [3, 1, 4]
    smoothed, _ = one_step(embeddings_ND, CLASSES_N, rows, [1] * 3, AdamConfig(), start, label_smoothing=0.3)
    logits_BK = (embeddings_ND[rows] @ kernel_DK).astype(np.float64)
    log_BK = logits_BK - np.log(np.exp(logits_BK).sum(axis=1, keepdims=True))
    wanted_BK = 0.7 * np.eye(3)[CLASSES_N[rows]] + 0.1
    assert smoothed == pytest.approx(-(wanted_BK * log_BK).sum(axis=1).mean(), abs=1e-5)


@pytest.mark.parametrize(
    ("schedule", "warmup", "wanted"),
    [
        ("constant", 0.0, [1, 1, 1, 1, 1]),
        ("constant", 1.0, [0, 0.5, 1, 1, 1]),
        ("cosine", 0.0, [1, 0.933, 0.75, 0.5, 0.25]),
        ("cosine", 1.0, [0, 0.5, 1, 0.854, 0.5]),
    ],
)
def test_learning_rates_follow_their_schedule(schedule: str, warmup: float, wanted: list[float]) -> None:
    """Three epochs of two steps each."""
    config = AdamConfig.model_validate({"schedule": schedule, "warmup_epochs": warmup, "learning_rate": 1.0})
    optimizer = build_optimizer(config, steps_per_epoch=2, epochs=3)
    optimizer.build([keras.Variable(np.zeros(1))])
    found = []
    for step in range(5):
        optimizer.iterations.assign(step)
        found.append(float(optimizer.learning_rate))
    assert found == pytest.approx(wanted, abs=1e-3)


def test_heads_trained_together_learn_what_each_learns_alone(embeddings_ND: NDArray[np.float32]) -> None:
    rows, weights = np.array([[3, 1, 4, 8, 5]]), np.ones((1, 1, 5), np.float32)
    kinds = (
        (LinearHeadConfig(), AdamConfig(learning_rate=0.1)),
        (MlpHeadConfig(kind="mlp", hidden=(5,), dropout=0.5), AdamConfig(learning_rate=0.01)),
        (LinearHeadConfig(), SgdConfig(kind="sgd")),
    )

    def trained(chosen: Sequence[int]) -> list[tuple[list[float], list[NDArray[np.float32]]]]:
        strategy = open_strategy(OneDevice())
        with strategy.scope():
            learners = [
                Learner(
                    head := open_head(kinds[one][0]),
                    head.build(7, 3, 0),
                    kinds[one][1],
                    build_optimizer(kinds[one][1], 1, 4),
                )
                for one in chosen
            ]
            steps = compile_steps(strategy, learners, hold_rows(strategy, embeddings_ND, CLASSES_N))
        losses_SH = np.concatenate(  # three steps in one call, and one by itself
            [
                steps(0, np.stack([rows] * 3), np.stack([weights] * 3)).numpy(),
                steps(3, rows[None], weights[None]).numpy(),
            ]
        )
        return [
            (losses_SH[:, place].tolist(), one.network.get_weights()) for place, one in enumerate(learners)
        ]

    for together, alone in zip(trained([0, 1, 2]), [trained([one])[0] for one in range(3)], strict=True):
        assert together[0] == pytest.approx(alone[0], abs=1e-6)
        for ours, theirs in zip(together[1], alone[1], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_row_may_count_for_one_head_and_not_for_another(embeddings_ND: NDArray[np.float32]) -> None:
    weights_HRB = np.array([[[1, 1, 0]], [[0, 1, 1]]], np.float32)
    head, strategy = open_head(LinearHeadConfig()), open_strategy(OneDevice())
    with strategy.scope():
        learners = [
            Learner(head, head.build(7, 3, 0), AdamConfig(), build_optimizer(AdamConfig(), 1, 1))
            for _ in range(2)
        ]
        steps = compile_steps(strategy, learners, hold_rows(strategy, embeddings_ND, CLASSES_N))
    steps(0, np.array([[[3, 1, 4]]]), weights_HRB[None])
    for learner, rows in zip(learners, ([3, 1], [1, 4]), strict=True):
        _, alone = one_step(embeddings_ND, CLASSES_N, rows, [1, 1], AdamConfig())
        np.testing.assert_allclose(learner.network.get_weights()[0], alone[0], atol=1e-6)


def test_dropout_leaves_out_its_share_anew_in_every_step_and_nothing_when_answering() -> None:
    config = MlpHeadConfig(kind="mlp", hidden=(2_000,), dropout=0.25)
    head = open_head(config)
    network = head.build(7, 3, seed=0)
    seen: list[NDArray[np.float32]] = []

    def drop(numbers_BH: Any, which: int) -> Any:
        assert which == 0
        seen.append(numbers_BH.numpy())
        return numbers_BH

    rows = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    head.training_logits(network, rows, drop)
    assert seen[0].shape == (4, 2_000)
    assert head.dropouts == Dropouts(0.25, 1, 2_000)
    drawn = [draws(np.zeros((2, 3)), 1, 2_000, 7, np.int64(step)).numpy() for step in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert drawn[0].shape == (2, 3, 1, 2_000)
    assert float((drawn[0] >= 0.25).mean()) == pytest.approx(0.75, abs=0.02)
    padded = draws(np.zeros((4, 2)), 1, 2_000, 7, np.int64(0)).numpy()
    np.testing.assert_array_equal(padded.reshape(8, -1)[:6], drawn[0].reshape(6, -1), "they belong to rows")
    assert open_head(config.model_copy(update={"dropout": 0.0})).dropouts == Dropouts()
