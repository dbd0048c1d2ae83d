"""The mlp head: its shape, its start, what it answers, and that it survives being published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from engine.config import check_recipe
from engine.heads.bundle import TrainedHead, open_bundle, publish_bundle
from engine.heads.confidence import softmax
from engine.heads.kinds import LinearHeadConfig, MlpHeadConfig, build_head, open_head
from engine.predictor import Predictor
from engine.storage import open_store

CONFIG = MlpHeadConfig(kind="mlp", hidden=(9, 5), dropout=0.5)


def test_layers_are_as_wide_as_the_recipe_says_and_dropout_is_no_part_of_what_answers() -> None:
    network = build_head(CONFIG, width=7, num_classes=3, seed=0)
    assert [layer.name for layer in network.layers] == ["hidden_0", "hidden_1", "logits"]
    assert network.count_params() == 7 * 9 + 9 + 9 * 5 + 5 + 5 * 3 + 3
    assert open_head(CONFIG).as_matrix(network) is None
    rows = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    np.testing.assert_array_equal(network(rows, training=True), network(rows, training=False))


def test_the_seed_decides_how_it_starts_and_no_class_is_preferred() -> None:
    first, same, other = (build_head(CONFIG, 7, 3, seed).get_weights() for seed in (1, 1, 2))
    for ours, theirs in zip(first, same, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(first[0], other[0])
    rows = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    np.testing.assert_array_equal(build_head(CONFIG, 7, 3, 1)(rows), np.zeros((4, 3)))


@pytest.mark.parametrize("config", [LinearHeadConfig(), CONFIG])
def test_what_was_done_to_embeddings_becomes_part_of_the_weights(
    config: LinearHeadConfig | MlpHeadConfig,
) -> None:
    rng = np.random.default_rng(1)
    head, network = open_head(config), build_head(config, 7, 3, 0)
    network.set_weights([rng.normal(size=weights.shape) for weights in network.get_weights()])
    rows = (5 + 3 * rng.normal(size=(20, 7))).astype(np.float32)
    subtract_D, multiply_D = rng.normal(size=7), rng.uniform(0.1, 3, 7)
    multiply_D[2] = 0.0
    wanted = network(((rows - subtract_D) * multiply_D).astype(np.float32)).numpy()
    network = head.absorb_scaling(network, subtract_D, multiply_D)
    np.testing.assert_allclose(network(rows).numpy(), wanted, atol=1e-4)


def test_a_published_mlp_answers_as_it_did_before(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    network = build_head(CONFIG, 7, 3, 0)
    network.set_weights([rng.normal(size=weights.shape) for weights in network.get_weights()])
    rows = rng.normal(size=(20, 7)).astype(np.float32)
    store = open_store(str(tmp_path))
    head = TrainedHead(CONFIG, network, tuple("abc"), "single_label")
    publish_bundle(store, head, table_record={"fingerprint": "f", "width": 7}, metrics={}, recipe={})
    bundle = open_bundle(store)
    assert bundle.manifest.head == CONFIG and bundle.matrix() is None
    found = Predictor(bundle, 3).probabilities(rows)
    np.testing.assert_allclose(found, softmax(network(rows).numpy()), atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"hidden": []}, {"hidden": [0]}, {"dropout": 1.0}, {"activation": "rellu"}]
)
def test_what_makes_no_network_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MlpHeadConfig.model_validate({"kind": "mlp", **wrong})
    assert check_recipe(MlpHeadConfig, {"kind": "mlp"}, origin="here").hidden == (512,)
