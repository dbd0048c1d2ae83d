"""What every kind of head that is trained keeps. A new kind adds one line to KINDS and passes.

The kind that is not trained (knn) and the one whose network is somebody's own (custom) have suites in tests/heads/.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.heads.base import Head
from engine.heads.kinds import AnyHeadConfig, LinearHeadConfig, MlpHeadConfig, open_head
from engine.strategies.kinds import OneDevice, open_strategy
from engine.training.grid import Candidate
from engine.training.kinds import AdamConfig, TrainingConfig
from engine.training.loop import TrainingRows, train_heads

WIDTH, CLASSES = 7, 3
KINDS: dict[str, AnyHeadConfig] = {
    "linear": LinearHeadConfig(),
    "mlp": MlpHeadConfig(kind="mlp", hidden=(5, 11), dropout=0.25),
}


@pytest.fixture(params=list(KINDS))
def config(request: pytest.FixtureRequest) -> AnyHeadConfig:
    return KINDS[request.param]


@pytest.fixture
def head(config: AnyHeadConfig) -> Head:
    return open_head(config)


def built(head: Head) -> Any:
    """A network as if it had been trained: every kernel of a new one may be zero."""
    network = head.build(WIDTH, CLASSES, seed=1)
    random = np.random.default_rng(2)
    network.set_weights([random.normal(size=weights.shape) for weights in network.get_weights()])
    return network


def rows(count: int = 13) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(count, WIDTH)).astype(np.float32)


def test_it_states_its_recipe(head: Head, config: AnyHeadConfig) -> None:
    assert head.stated == config


def test_embeddings_become_one_float32_logit_for_each_class(head: Head) -> None:
    logits_BK = np.asarray(built(head)(rows()))
    assert (logits_BK.shape, logits_BK.dtype) == ((13, CLASSES), np.float32)
    assert len(np.unique(logits_BK.round(4))) > CLASSES, "rows differ, and so must answers"


def test_the_same_seed_gives_the_same_weights_under_the_same_names(head: Head) -> None:
    """Names that Keras numbers count up in a process, and would differ between workers."""
    first, second = (head.build(WIDTH, CLASSES, seed=19) for _ in range(2))
    assert [weight.path for weight in first.weights] == [weight.path for weight in second.weights]
    for ours, theirs in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_first_batch_costs_the_logarithm_of_the_number_of_classes(head: Head) -> None:
    logits_BK = np.asarray(head.build(WIDTH, CLASSES, seed=1)(rows()))
    np.testing.assert_array_equal(logits_BK, np.zeros((13, CLASSES), np.float32))


def test_training_sees_what_is_answered_where_nothing_is_left_out(head: Head) -> None:
    network, embeddings_BD = built(head), rows()
    places: list[int] = []

    def keep(numbers: Any, place: int) -> Any:
        places.append(place)
        return numbers

    seen = np.asarray(head.training_logits(network, embeddings_BD, keep))
    np.testing.assert_allclose(seen, np.asarray(network(embeddings_BD)), rtol=1e-5, atol=1e-5)
    assert places == list(range(head.dropouts.count))


def test_scaling_becomes_part_of_the_network(head: Head) -> None:
    network, embeddings_BD = built(head), 4 + rows()
    random = np.random.default_rng(5)
    subtract_D, multiply_D = random.normal(size=WIDTH), random.uniform(0.5, 2, WIDTH)
    wanted = np.asarray(network(((embeddings_BD - subtract_D) * multiply_D).astype(np.float32)))
    absorbed = head.absorb_scaling(network, subtract_D, multiply_D)
    np.testing.assert_allclose(np.asarray(absorbed(embeddings_BD)), wanted, rtol=1e-3, atol=1e-4)


def test_a_matrix_answers_as_the_network_does(head: Head) -> None:
    network, embeddings_BD = built(head), rows()
    if (matrix := head.as_matrix(network)) is None:
        pytest.skip("more than one matrix")
    np.testing.assert_allclose(matrix.logits(embeddings_BD), np.asarray(network(embeddings_BD)), atol=1e-5)


def test_it_learns(config: AnyHeadConfig) -> None:
    random = np.random.default_rng(7)
    embeddings_ND = random.normal(size=(509, WIDTH)).astype(np.float32)
    classes_N = (embeddings_ND @ random.normal(size=(WIDTH, CLASSES))).argmax(axis=1)
    order = random.permutation(509)
    to_learn = TrainingRows(embeddings_ND, classes_N, order[:401], order[401:])
    tried = [Candidate(config, AdamConfig(learning_rate=0.05))]
    training = TrainingConfig(epochs=5, batch_size=64)
    (trained,) = train_heads(tried, open_strategy(OneDevice()), to_learn, training, lambda report: None)
    losses = [epoch.validation_loss for epoch in trained.result.history]
    assert min(losses) < 0.5 * np.log(CLASSES)
