"""What every strategy kind rests on: a prepared process and a list of devices. Imported on workers only.

A strategy kind is one function `open_KIND(config) -> tf.distribute.Strategy`. Its contract, held by
tests/contracts/test_strategy_contract.py: for the same global batches every kind gives the loss trace of
`one_device` within 1e-4, whatever its number of replicas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from engine.errors import EngineError

Agreed = Callable[[NDArray[np.floating[Any]]], NDArray[np.float64]]


def prepare_process() -> None:
    """Make sure that this is Keras 3 on TensorFlow, that float32 means float32, and that runs repeat.

    Settings of the whole process: a training worker does nothing else.

    Raises:
        EngineError: another Keras, or another backend of it.
    """
    # Ray Train sets TF_USE_LEGACY_KERAS=1 in its workers; it bends `tf.keras`, which we never import, to Keras 2.
    found = f"Keras {keras.__version__} on {keras.config.backend()}"
    if not keras.__version__.startswith("3.") or keras.config.backend() != "tensorflow":
        raise EngineError(
            "training worker: the wrong Keras",
            found=found,
            wanted="Keras 3 on tensorflow",
            way_out="install keras >= 3.13.1 and unset KERAS_BACKEND in the worker's environment",
        )
    # TF32 has 10-bit mantissas and is a precision of its own; on a GPU it would be on by default.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    # On a GPU bias gradients are otherwise summed in any order.
    tf.config.experimental.enable_op_determinism()


def gpus() -> list[str]:
    """Names of the GPUs that this process sees, e.g. ["GPU:0"]."""
    return [f"GPU:{index}" for index in range(len(tf.config.list_logical_devices("GPU")))]


def has_gpu() -> bool:
    """Whether this process sees a GPU; unlike `gpus`, this leaves the devices untouched."""
    return bool(tf.config.get_visible_devices("GPU"))


def logical_cpus(count: int) -> list[str]:
    """Divide this process's CPU into `count` logical devices; they share its cores and memory.

    Returns:
        Their names, e.g. ["CPU:0", "CPU:1"].

    Raises:
        EngineError: TensorFlow is already running on fewer.
    """
    cpu = tf.config.list_physical_devices("CPU")[0]
    made = len(tf.config.get_logical_device_configuration(cpu) or [None])
    if made < count:
        try:
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
        except RuntimeError as error:  # TensorFlow's only way to say "already initialised"
            raise EngineError(
                f"strategy: cannot divide the CPU into {count} logical devices",
                found=f"TensorFlow already runs on {made} in this process ({error})",
                way_out="open the strategy first thing in a fresh process",
            ) from None
    return [f"CPU:{index}" for index in range(count)]


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this is the one worker that writes what all of them have found."""
    resolver = strategy.cluster_resolver
    return resolver is None or resolver.task_id in (None, 0)


def require_same(digest: str, agreed: Agreed, otherwise: EngineError) -> None:
    """Refuse what one worker has read otherwise than the chief: they would wait for each other for ever.

    Args:
        digest: of all that training hangs on, hex.

    Raises:
        EngineError: `otherwise`.
    """
    mine = float(int(digest[:12], 16))  # 48 bits are exact
    if agreed(np.array([mine]))[0] != mine:
        raise otherwise


def agreement(strategy: tf.distribute.Strategy) -> Agreed:
    """What makes workers decide alike: of numbers that each has computed, the first replica's.

    Processors of two kinds round differently. If one worker stopped training where another went on, the other would
    wait for ever.

    Returns:
        agreed(numbers) -> float64 of the same shape and the same on every worker; all must call it. NaN and infinity
        pass.
    """
    if strategy.cluster_resolver is None:
        return lambda numbers: np.asarray(numbers, np.float64)

    def of_first_replica(numbers: tf.Tensor) -> tf.Tensor:
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        return tf.where(tf.equal(replica, 0), numbers, tf.zeros_like(numbers))

    compiled = tf.function(
        lambda numbers: strategy.reduce("SUM", strategy.run(of_first_replica, args=(numbers,)), axis=None)
    )
    return lambda numbers: compiled(tf.constant(numbers, tf.float64)).numpy()
