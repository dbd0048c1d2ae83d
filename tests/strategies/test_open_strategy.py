"""Strategies open on what this machine has, or say what it lacks."""

from __future__ import annotations

import pytest
import tensorflow as tf

from engine.errors import EngineError
from engine.strategies.base import prepare_process
from engine.strategies.kinds import Mirrored, OneDevice, open_strategy

WITHOUT_GPU = pytest.mark.skipif(
    bool(tf.config.list_physical_devices("GPU")), reason="this machine has a GPU"
)


def test_one_device_is_one_replica() -> None:
    strategy = open_strategy(OneDevice())
    assert isinstance(strategy, tf.distribute.OneDeviceStrategy)
    assert strategy.num_replicas_in_sync == 1


@WITHOUT_GPU
def test_mirrored_without_a_gpu_is_one_replica_on_the_cpu() -> None:
    strategy = open_strategy(Mirrored())
    assert isinstance(strategy, tf.distribute.MirroredStrategy)
    assert [device.rpartition("device:")[2] for device in strategy.extended.worker_devices] == ["CPU:0"]


@WITHOUT_GPU
def test_dividing_a_cpu_that_is_already_in_use_says_how_to() -> None:
    tf.constant(1.0)  # TensorFlow now runs
    with pytest.raises(EngineError) as error:
        open_strategy(Mirrored(devices_per_worker=64))
    assert "cannot divide the CPU into 64 logical devices" in str(error.value)
    assert "fresh process" in str(error.value)


def test_a_prepared_process_computes_float32_as_float32_and_repeatably() -> None:
    tf.config.experimental.enable_tensor_float_32_execution(True)
    prepare_process()
    assert not tf.config.experimental.tensor_float_32_execution_enabled()
