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
