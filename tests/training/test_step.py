"""One optimizer step does what the recipe says, and padding does nothing."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from numpy.typing import NDArray

from engine.heads.kinds import LinearHeadConfig, build_head
from engine.strategies.kinds import OneDevice, open_strategy
from engine.training.kinds import AdamConfig
from engine.training.step import build_optimizer, compile_step


def one_step(
    embeddings_ND: NDArray[np.floating[Any]],
    classes_N: NDArray[np.int64],
    rows: list[int],
    weights: list[float],
    optimizer: AdamConfig,
    start: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
) -> tuple[float, list[NDArray[np.float32]]]:
    """The loss of one step on these rows, and the weights after it."""
    strategy = open_strategy(OneDevice())
    with strategy.scope():
        network = build_head(LinearHeadConfig(), embeddings_ND.shape[1], 3, seed=0)
        if start is not None:
            network.set_weights(start)
        step = compile_step(strategy, network, build_optimizer(optimizer), embeddings_ND, classes_N)
    loss = step(np.array([rows]), np.array([weights], np.float32))
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
    optimizer = build_optimizer(AdamConfig(learning_rate=0.25))
    assert isinstance(optimizer, keras.optimizers.Adam)
    assert (float(optimizer.learning_rate), optimizer.weight_decay) == (0.25, None)
