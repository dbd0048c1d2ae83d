"""One device: no copies, no sums between devices. The reference that every other strategy must equal."""

from __future__ import annotations

import tensorflow as tf

from engine.strategies.base import has_gpu
from engine.strategies.kinds import OneDevice


def open_one_device(config: OneDevice) -> tf.distribute.Strategy:
    """The first GPU of this process, or its CPU."""
    return tf.distribute.OneDeviceStrategy("GPU:0" if has_gpu() else "CPU:0")
