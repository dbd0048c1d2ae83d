from __future__ import annotations

import hashlib
import pickle
import socket

import numpy as np
import pytest

from engine.backbones.kinds import EfficientNetLite0Config, build_backbone
from engine.embedder import Embedder, canary_pixels, cosine_per_row
from engine.errors import CanaryMismatch
from engine.runtimes.base import FrozenGraph
from engine.runtimes.kinds import OpenVINORuntimeConfig, TensorFlowRuntimeConfig, freeze_network
from engine.storage import StorageConfig

RUNTIME = TensorFlowRuntimeConfig(batch_size=3)


def graph_of(seed: int) -> FrozenGraph:
    config = EfficientNetLite0Config(weights="random", input_size=32, layer="block2_add", seed=seed)
    built = build_backbone(config, StorageConfig())
    return freeze_network(built.network, built.scaling, built.input_size)


@pytest.fixture(scope="module")
def graph() -> FrozenGraph:
    return graph_of(seed=0)


@pytest.fixture(scope="module")
def embedder(graph: FrozenGraph) -> Embedder:
    return Embedder(graph, RUNTIME)


def test_embeddings_have_the_width_of_the_cut_and_one_row_per_image(embedder: Embedder) -> None:
    pixels = (np.arange(5 * 32 * 32 * 3).reshape(5, 32, 32, 3) ** 2 % 251).astype(np.uint8)
    embeddings = embedder.embed(pixels)
    assert (embeddings.shape, embeddings.dtype, embedder.width) == ((5, 24), np.float32, 24)
    assert embedder.embed(pixels[:0]).shape == (0, 24)
    np.testing.assert_allclose(embedder.embed(pixels[3:]), embeddings[3:], rtol=1e-4, atol=1e-6)


def test_other_processes_and_other_runtimes_of_the_same_graph_pass_the_check(
    embedder: Embedder, graph: FrozenGraph
) -> None:
    Embedder(pickle.loads(pickle.dumps(graph)), RUNTIME).check(embedder.canary())
    Embedder(graph, OpenVINORuntimeConfig(kind="openvino")).check(embedder.canary())


def test_another_network_is_refused_with_host_and_cosines(embedder: Embedder) -> None:
    with pytest.raises(CanaryMismatch) as caught:
        Embedder(graph_of(seed=1), RUNTIME).check(embedder.canary())
    message = str(caught.value)
    assert socket.gethostname() in message and "cosines" in message and "way out" in message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


def test_how_much_canaries_may_differ_depends_on_the_precision(
    embedder: Embedder, graph: FrozenGraph
) -> None:
    canary_CD = embedder.canary()
    turned = canary_CD.copy()
    axis = np.zeros(24, np.float32)
    axis[int(np.abs(canary_CD[2]).argmin())] = np.linalg.norm(canary_CD[2])
    turned[2] = canary_CD[2] + 0.02 * axis  # cosine about 0.9998
    with pytest.raises(CanaryMismatch, match=r"1\.000000, 1\.000000, 0\.9998\d\d, 1\.000000"):
        embedder.check(turned)
    reduced = Embedder(graph, RUNTIME.model_copy(update={"precision": "bfloat16"}))
    reduced.check(turned)
    turned[2] = canary_CD[2] + 0.01 * axis  # about 0.99995
    embedder.check(turned)
    turned[2] = canary_CD[2] + 0.1 * axis  # about 0.995
    with pytest.raises(CanaryMismatch, match=r"each at least 0\.999$|each at least 0\.999\b"):
        reduced.check(turned)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_canary_that_is_not_finite_is_refused(embedder: Embedder, bad: float) -> None:
    broken = embedder.canary()
    broken[1, 7] = bad
    with pytest.raises(CanaryMismatch, match="nan"):
        embedder.check(broken)


def test_canary_of_another_shape_is_refused(embedder: Embedder) -> None:
    with pytest.raises(CanaryMismatch, match=r"\(4, 24\)"):
        embedder.check(embedder.canary()[:, :23])


def test_canary_images_are_these_bytes_for_ever() -> None:
    images = canary_pixels(37)
    assert (images.shape, images.dtype) == ((4, 37, 37, 3), np.uint8)
    assert (
        hashlib.sha256(images.tobytes()).hexdigest()
        == "9ba1624819e55fbeae932ddcf414e66c1bbe73de326be1488bcb9bf4ca6faec8"
    )
    assert [len(np.unique(image)) for image in images] == [1, 145, 2, 256]
    assert canary_pixels(1).shape == (4, 1, 1, 3)


def test_cosine_of_zero_rows_is_one_only_if_both_are_zero() -> None:
    left = np.array([[0, 0], [0, 0], [3, 4], [3, 4]], np.float32)
    right = np.array([[0, 0], [1, 0], [6, 8], [4, -3]], np.float32)
    assert cosine_per_row(left, right).tolist() == [1.0, 0.0, 1.0, 0.0]
