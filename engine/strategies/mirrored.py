"""Mirrored: the devices of one process, each with a copy of the head; gradients are summed over them."""

from __future__ import annotations

import tensorflow as tf

from engine.errors import RecipeError
from engine.strategies.base import gpus, has_gpu, logical_cpus
from engine.strategies.kinds import Mirrored


def open_mirrored(config: Mirrored) -> tf.distribute.Strategy:
    """`MirroredStrategy` over the GPUs of this process, or over logical devices of its CPU where it has none.

    Raises:
        RecipeError: fewer GPUs than `devices_per_worker`.
        EngineError: the CPU can no longer be divided (see `logical_cpus`).
    """
    if not has_gpu():
        return tf.distribute.MirroredStrategy(logical_cpus(config.devices_per_worker or 1))
    devices = gpus()
    wanted = config.devices_per_worker or len(devices)
    if wanted > len(devices):
        raise RecipeError(
            f"strategy.devices_per_worker: {wanted} devices, but the worker has fewer GPUs",
            found=f"{len(devices)}: {', '.join(devices)}",
            way_out="ask for fewer, or null for all of them",
        )
    return tf.distribute.MirroredStrategy(devices[:wanted])
