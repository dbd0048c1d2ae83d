from __future__ import annotations

import hashlib
import pickle
import socket

import numpy as np
import pytest

from engine.backbones.kinds import EfficientNetLite0Config
from engine.embedder import Embedder, canary_pixels, cosine_per_row
from engine.errors import CanaryMismatch
from engine.images import DECODE_VERSION
from engine.runtimes.kinds import TensorFlowRuntimeConfig
from engine.storage import StorageConfig

RUNTIME = TensorFlowRuntimeConfig(batch_size=3)
CUT = {"weights": "random", "input_size": 32, "layer": "block2_add"}


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(EfficientNetLite0Config.model_validate(CUT), RUNTIME, StorageConfig(), None)


@pytest.fixture(scope="module")
def other_seed() -> Embedder:
    return Embedder(EfficientNetLite0Config.model_validate(CUT | {"seed": 1}), RUNTIME, StorageConfig(), None)


def test_embeddings_have_the_width_of_the_cut_and_one_row_per_image(embedder: Embedder) -> None:
    pixels = (np.arange(5 * 32 * 32 * 3).reshape(5, 32, 32, 3) ** 2 % 251).astype(np.uint8)
    embeddings = embedder.embed(pixels)
    assert (embeddings.shape, embeddings.dtype, embedder.width) == ((5, 24), np.float32, 24)
    assert embedder.embed(pixels[:0]).shape == (0, 24)
    np.testing.assert_allclose(embedder.embed(pixels[3:]), embeddings[3:], rtol=1e-4, atol=1e-6)


def test_fingerprint_is_made_of_what_the_embedder_says_about_itself(
    embedder: Embedder, other_seed: Embedder
) -> None:
    assert embedder.fingerprint_fields["tensor_digest"] == embedder.tensor_digest
    assert embedder.fingerprint_fields["decode_version"] == DECODE_VERSION
    assert embedder.fingerprint_fields["layer"] == "block2_add"
    assert len(embedder.fingerprint) == 64
    assert embedder.fingerprint != other_seed.fingerprint


def test_second_embedder_of_the_same_config_passes_the_check(embedder: Embedder) -> None:
    again = Embedder(EfficientNetLite0Config.model_validate(CUT), RUNTIME, StorageConfig(), None)
    assert again.fingerprint == embedder.fingerprint
    again.check(embedder.fingerprint_fields, embedder.canary())


def test_other_weights_are_refused_with_host_and_both_digests(
    embedder: Embedder, other_seed: Embedder
) -> None:
    with pytest.raises(CanaryMismatch) as caught:
        other_seed.check(embedder.fingerprint_fields, embedder.canary())
    message = str(caught.value)
    assert socket.gethostname() in message
    assert embedder.tensor_digest in message
    assert other_seed.tensor_digest in message
    assert "way out" in message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


def test_other_numbers_from_the_same_weights_are_refused_with_the_cosines(embedder: Embedder) -> None:
    canary_CD = embedder.canary()
    turned = canary_CD.copy()
    axis = np.zeros(24, np.float32)
    axis[int(np.abs(canary_CD[2]).argmin())] = np.linalg.norm(canary_CD[2])
    turned[2] = canary_CD[2] + 0.02 * axis  # cosine about 0.9998
    with pytest.raises(CanaryMismatch, match=r"1\.000000, 1\.000000, 0\.9998\d\d, 1\.000000") as caught:
        embedder.check(embedder.fingerprint_fields, turned)
    assert socket.gethostname() in str(caught.value)
    turned[2] = canary_CD[2] + 0.01 * axis  # about 0.99995
    embedder.check(embedder.fingerprint_fields, turned)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_canary_that_is_not_finite_is_refused(embedder: Embedder, bad: float) -> None:
    broken = embedder.canary()
    broken[1, 7] = bad
    with pytest.raises(CanaryMismatch, match="nan"):
        embedder.check(embedder.fingerprint_fields, broken)


def test_canary_of_another_shape_is_refused(embedder: Embedder) -> None:
    with pytest.raises(CanaryMismatch, match=r"\(4, 24\)"):
        embedder.check(embedder.fingerprint_fields, embedder.canary()[:, :23])


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
