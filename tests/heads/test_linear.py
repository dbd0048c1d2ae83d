"""The linear head is one matrix and one bias, the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from engine.heads.kinds import LinearHeadConfig, build_head, open_head


def test_five_classes_on_width_1280_have_6405_parameters() -> None:
    network = build_head(LinearHeadConfig(), width=1280, num_classes=5, seed=0)
    assert network.count_params() == 6405
    assert (network.input_shape, network.output_shape) == ((None, 1280), (None, 5))


def test_a_fresh_head_prefers_no_class() -> None:
    network = build_head(LinearHeadConfig(), width=7, num_classes=3, seed=5)
    logits_BK = network(np.random.default_rng(0).normal(size=(2, 7)).astype(np.float32)).numpy()
    np.testing.assert_array_equal(logits_BK, np.zeros((2, 3)))


def test_outputs_are_logits_and_the_matrix_gives_the_same() -> None:
    rng = np.random.default_rng(1)
    network = build_head(LinearHeadConfig(), width=1280, num_classes=11, seed=0)
    network.set_weights([rng.normal(size=(1280, 11)), rng.normal(size=11)])
    embeddings_BD = rng.normal(size=(13, 1280)).astype(np.float32)
    matrix = open_head(LinearHeadConfig()).as_matrix(network)
    assert matrix is not None
    assert (matrix.kernel_DK.shape, matrix.bias_K.shape) == ((1280, 11), (11,))
    logits_BK = network(embeddings_BD).numpy()
    assert logits_BK.sum(axis=1) != pytest.approx(np.ones(13))
    np.testing.assert_allclose(matrix.logits(embeddings_BD), logits_BK, rtol=1e-5, atol=1e-4)


def test_layer_names_do_not_count_up_within_a_process() -> None:
    names = [[layer.name for layer in build_head(LinearHeadConfig(), 7, 3, 0).layers] for _ in range(2)]
    assert names == [["logits"], ["logits"]]
