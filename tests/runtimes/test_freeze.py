"""What a frozen graph holds: constants only, its two names, no BatchNorm, and the numbers of the network."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from engine.backbones.base import PixelScaling
from engine.backbones.cut import cut_and_freeze
from engine.backbones.kinds import EfficientNetLite0Config
from engine.runtimes.base import FrozenGraph
from engine.runtimes.freeze import freeze
from engine.runtimes.half import in_half_precision
from engine.runtimes.tensorflow import imported
from tests.backbones.small_networks import fill_with_primes, small_network, with_uneven_statistics

SCALING = PixelScaling("own", multiply=(0.5, 0.25, 0.125), add=(1.0, 2.0, 3.0), bgr=True)
UNCHANGED = PixelScaling("none", multiply=(1.0, 1.0, 1.0), add=(0.0, 0.0, 0.0))


def parsed(graph: FrozenGraph) -> Any:
    return tf.compat.v1.GraphDef.FromString(graph.graph_def)


def operations(graph_def: Any) -> Counter[str]:
    return Counter(node.op for node in graph_def.node)


def mixed_network() -> Any:
    """Convolutions of every sort, each with a BatchNorm; one that is used twice, one whose output branches."""
    import keras
    from keras import layers

    pixels = keras.Input((12, 12, 3))
    x = layers.Conv2D(4, 3, use_bias=True)(pixels)
    x = layers.Activation("relu")(layers.BatchNormalization()(x))
    x = layers.BatchNormalization()(layers.DepthwiseConv2D(3, depth_multiplier=2)(x))
    x = layers.Rescaling(0.5, offset=0.25)(x)
    branch = layers.Conv2D(8, 1)(x)
    x = layers.Add()([layers.BatchNormalization()(branch), layers.ReLU(6.0)(branch)])
    x = layers.BatchNormalization()(layers.Conv2D(8, 3, groups=8, padding="same")(x))
    x = layers.BatchNormalization()(layers.SeparableConv2D(6, 3)(layers.BatchNormalization()(x)))
    return keras.Model(pixels, layers.GlobalAveragePooling2D()(x))


@pytest.fixture(scope="module")
def network() -> Any:
    network = small_network()
    fill_with_primes(network)
    return cut_and_freeze(network, EfficientNetLite0Config(input_size=11))


def test_graph_takes_bytes_holds_no_variable_and_swaps_and_scales_inside(network: Any) -> None:
    frozen = freeze(network, SCALING, 11)
    graph_def = parsed(frozen)
    assert not [op for op in operations(graph_def) if "Variable" in op or "Call" in op]
    assert not graph_def.library.function
    assert [node.name for node in graph_def.node if node.op == "Placeholder"] == ["pixels"]
    pixels = (np.arange(2 * 11 * 11 * 3).reshape(2, 11, 11, 3) * 7 % 256).astype(np.uint8)
    scaled = pixels[..., ::-1] * np.array([0.5, 0.25, 0.125]) + [1.0, 2.0, 3.0]
    expected = np.asarray(network(scaled.astype(np.float32)))
    np.testing.assert_allclose(imported(graph_def, 11)(tf.constant(pixels)), expected, rtol=1e-5)
    assert (frozen.input_size, frozen.width) == (11, expected.shape[1])


def test_batches_of_any_size_use_the_one_graph(network: Any) -> None:
    function = imported(parsed(freeze(network, SCALING, 11)), 11)
    assert [function(tf.zeros((size, 11, 11, 3), tf.uint8)).shape[0] for size in (1, 5, 2)] == [1, 5, 2]


def test_batch_norm_behind_a_convolution_is_gone_and_the_numbers_stay() -> None:
    network = with_uneven_statistics(mixed_network())
    graph_def = parsed(freeze(network, UNCHANGED, 12))
    counts = operations(graph_def)
    assert counts["DepthwiseConv2dNative"] == 3  # the grouped one has become one
    assert counts["Conv2D"] == 3 and not graph_def.library.function
    # Left: behind the branch (used twice), before the separable convolution's product with the grouped one's.
    assert counts["Mul"] + counts["AddV2"] <= 4, counts
    pixels = np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)
    expected = np.asarray(network(pixels.astype(np.float32), training=False))
    found = np.asarray(imported(graph_def, 12)(tf.constant(pixels)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16])
def test_half_precision_is_all_that_lies_between_scaling_and_pooling(dtype: Any) -> None:
    network = with_uneven_statistics(mixed_network())
    scaling = PixelScaling("tf", multiply=(1 / 127.5,) * 3, add=(-1.0,) * 3)
    graph_def = parsed(freeze(network, scaling, 12))
    lowered = in_half_precision(graph_def, dtype)
    types = {(node.op, node.attr["T"].type) for node in lowered.node if "T" in node.attr}
    assert {kind for op, kind in types if op in ("Conv2D", "DepthwiseConv2dNative", "Relu6")} == {
        dtype.as_datatype_enum
    }
    assert {kind for op, kind in types if op == "Mean"} == {tf.float32.as_datatype_enum}
    grey = np.full(
        (1, 12, 12, 3), 127, np.uint8
    )  # scaled: -0.004, of which bfloat16 arithmetic would leave nothing
    ramp = np.broadcast_to(np.arange(100, 112, dtype=np.uint8)[None, None, :, None], (1, 12, 12, 3))
    pixels = tf.constant(np.concatenate([grey, ramp]))
    expected = np.asarray(imported(graph_def, 12)(pixels))
    found = np.asarray(imported(lowered, 12)(pixels))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())
    assert np.abs(found - expected).max() > 0  # it is another precision
