"""Tiny Keras networks and fresh processes for the tests of backbones and runtimes."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def small_network(width: int = 7, name: str = "small") -> Any:
    """Conv, BatchNorm and ReLU over (11, 11, 3) pixels to a (6, 6, width) feature map; names numbered by Keras."""
    import keras

    pixels = keras.layers.Input((11, 11, 3))
    x = keras.layers.Conv2D(5, 3, 2, "same", use_bias=False)(pixels)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.ReLU(6.0)(x)
    x = keras.layers.Conv2D(width, 1, name="last_conv")(x)
    return keras.Model(pixels, x, name=name)


def uneven_network(side_px: int = 64, width: int = 24) -> Any:
    """A network with much that a file must keep: scaling inside, BatchNorms, a depthwise convolution, a sum written as
    `+`; (side, side, 3) pixels to a feature map of `width` channels; every number at random, seeded."""
    import keras
    from keras import layers

    pixels = keras.Input((side_px, side_px, 3), name="pixels")
    x = layers.Rescaling(1 / 127.5, offset=-1.0)(pixels)
    x = layers.ReLU(6.0)(
        layers.BatchNormalization(name="stem_bn")(layers.Conv2D(8, 3, 2, "same", name="stem")(x))
    )
    y = layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x))
    x = x + layers.Activation("swish")(y)
    x = layers.Conv2D(width, 1, name="head")(x)
    return with_uneven_statistics(
        keras.Model(pixels, layers.Activation("relu", name="head_relu")(x), name="uneven")
    )


def with_uneven_statistics(network: Any) -> Any:
    """Every weight at random: with Keras' own, a BatchNorm does next to nothing."""
    random = np.random.default_rng(3)
    for weight in network.weights:
        if weight.dtype == "float32":
            low = 0.5 if "variance" in weight.path or "gamma" in weight.path else -0.5
            weight.assign(random.uniform(low, 1.0, weight.shape))
    return network


def fill_with_primes(network: Any) -> None:
    """Other numbers in every tensor, so that a swap of two cannot go unseen; variances stay positive."""
    for index, weight in enumerate(network.weights):
        values = (np.arange(math.prod(weight.shape)).reshape(weight.shape) * 7 + index * 13) % 31
        weight.assign((values + 1) / 37.0)


def tensors(network: Any) -> list[np.ndarray]:
    """Copies of all weights, in order."""
    return [weight.value.numpy() for weight in network.weights]


def run_python(code: str) -> str:
    """What a fresh Python process prints, run at the root of the project."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
