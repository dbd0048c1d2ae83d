"""What every runtime keeps, over every network it must run. A new runtime adds one line to RUNTIMES and passes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from engine.backbones.base import Backbone
from engine.backbones.kinds import (
    BackboneConfig,
    EfficientNetLite0Config,
    KerasApplicationConfig,
    build_backbone,
)
from engine.runtimes.base import Runtime
from engine.runtimes.kinds import (
    OpenVINORuntimeConfig,
    ResolvedRuntime,
    TensorFlowRuntimeConfig,
    freeze_network,
    open_runtime,
    prepare_to_freeze,
)
from engine.storage import StorageConfig

SIDE = 96
RUNTIMES: dict[str, ResolvedRuntime] = {
    "tensorflow": TensorFlowRuntimeConfig(batch_size=4),
    "tensorflow-bfloat16": TensorFlowRuntimeConfig(batch_size=4, precision="bfloat16"),
    "tensorflow-float16": TensorFlowRuntimeConfig(batch_size=4, precision="float16"),
    "openvino": OpenVINORuntimeConfig(kind="openvino", batch_size=4),
    "openvino-bfloat16": OpenVINORuntimeConfig(kind="openvino", batch_size=4, precision="bfloat16"),
}
# In a process of their own, on a machine with a GPU: ENGINE_TEST_GPUS=0 pytest THIS_FILE -k gpu
ON_GPU: dict[str, ResolvedRuntime] = {
    "gpu-float32": TensorFlowRuntimeConfig(batch_size=4),
    "gpu-tf32": TensorFlowRuntimeConfig(batch_size=4, precision="tf32"),
    "gpu-bfloat16": TensorFlowRuntimeConfig(batch_size=4, precision="bfloat16"),
    "gpu-float16": TensorFlowRuntimeConfig(batch_size=4, precision="float16"),
}
# Of a reduced precision: that it is the same network. Whether it keeps 0.999 depends on where the processor rounds
# (Eigen adds up in bfloat16 where oneDNN has no instructions for it): `engine.runtime_choice` measures it each time.
MIN_COSINE = {"float32": 0.9999}
BACKBONES: dict[str, BackboneConfig] = {
    "MobileNetV2": KerasApplicationConfig(name="MobileNetV2", weights="random", seed=1, input_size=SIDE),
    "lite0": EfficientNetLite0Config(weights="package", input_size=SIDE),
}


@dataclass
class Opened:
    backbone: Backbone
    runtime: Runtime
    precision: str


@pytest.fixture(scope="module", params=list(BACKBONES))
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return build_backbone(BACKBONES[request.param], StorageConfig())


@pytest.fixture(scope="module", params=[*RUNTIMES, *ON_GPU])
def opened(request: pytest.FixtureRequest, backbone: Backbone) -> Opened:
    config = (RUNTIMES | ON_GPU)[request.param]
    use_gpu = request.param in ON_GPU
    if use_gpu and not prepare_to_freeze(None, use_gpu=True):
        pytest.skip("this process sees no GPU")
    graph = freeze_network(backbone.network, backbone.scaling, SIDE)
    return Opened(backbone, open_runtime(config, graph, None, use_gpu), config.precision)


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    """Seven different windows of real photos: uint8, (7, 96, 96, 3)."""
    from skimage import data

    corners = [(0, 0), (40, 130), (100, 200), (180, 60)]
    windows = [
        photo[y : y + SIDE, x : x + SIDE] for photo in (data.chelsea(), data.coffee()) for y, x in corners
    ]
    return np.stack(windows[:7])


def test_embeddings_are_those_of_keras_predict_on_the_scaled_pixels(
    opened: Opened, photos: np.ndarray
) -> None:
    scaled = np.asarray(opened.backbone.scaling.apply(photos.astype(np.float32)), np.float32)
    expected = opened.backbone.network.predict(scaled, verbose=0)
    found = opened.runtime.run(photos)
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() >= MIN_COSINE.get(opened.precision, 0.99)
    if opened.precision == "float32":
        assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()
    assert np.abs(found[0] - found[1]).max() > 1e-2 * np.abs(expected).max()  # else anything would pass


@pytest.mark.parametrize("num_images", [0, 1, 3, 4, 5, 7])
def test_any_number_of_images_gives_as_many_rows_in_their_order(
    opened: Opened, photos: np.ndarray, num_images: int
) -> None:
    embeddings = opened.runtime.run(photos[:num_images])
    assert (embeddings.shape, embeddings.dtype) == ((num_images, opened.backbone.width), np.float32)
    one_by_one: list[Any] = [opened.runtime.run(photos[i : i + 1])[0] for i in range(num_images)]
    tolerance = (
        1e-5 if opened.precision == "float32" else 0.05
    )  # kernels for other batch sizes round elsewhere
    np.testing.assert_allclose(
        embeddings, np.reshape(one_by_one, embeddings.shape), rtol=1e-3, atol=tolerance
    )


def test_several_threads_may_run_it_at_once_and_each_gets_its_own_rows(
    opened: Opened, photos: np.ndarray
) -> None:
    inputs = [photos[np.random.default_rng(seed).permutation(7)] for seed in range(8)]
    expected = [opened.runtime.run(pixels) for pixels in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(opened.runtime.run, inputs))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_pixels_are_left_as_they_are_and_may_be_read_only_or_strided(
    opened: Opened, photos: np.ndarray
) -> None:
    strided = np.repeat(photos, 2, axis=0)[::2]
    strided.flags.writeable = False
    np.testing.assert_array_equal(opened.runtime.run(strided), opened.runtime.run(photos))


def test_scaled_pixels_are_refused(opened: Opened, photos: np.ndarray) -> None:
    with pytest.raises(TypeError, match=r"float32, wanted a uint8 array of shape \(B, 96, 96, 3\)"):
        opened.runtime.run(photos.astype(np.float32))
    with pytest.raises(TypeError, match="list, wanted a uint8 array"):
        opened.runtime.run(photos.tolist())


@pytest.mark.parametrize("shape", [(96, 96, 3), (2, 96, 95, 3), (2, 95, 96, 3), (2, 96, 96, 4), (0, 3)])
def test_pixels_of_another_shape_are_refused_with_found_and_wanted(
    opened: Opened, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="wanted") as caught:
        opened.runtime.run(np.zeros(shape, np.uint8))
    assert str(caught.value) == f"pixels have shape {shape}, wanted (B, 96, 96, 3)"
