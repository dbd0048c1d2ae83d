from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from engine.backbones.base import PixelScaling
from engine.backbones.cut import cut_and_freeze
from engine.backbones.kinds import EfficientNetLite0Config
from engine.runtimes.tensorflow import folded_graph, prepare_process
from tests.backbones.small_networks import fill_with_primes, run_python, small_network

SCALING = PixelScaling("own", multiply=(0.5, 0.25, 0.125), add=(1.0, 2.0, 3.0), bgr=True)


@pytest.fixture(scope="module")
def network() -> Any:
    network = small_network()
    fill_with_primes(network)
    return cut_and_freeze(network, EfficientNetLite0Config(input_size=11))


def test_graph_takes_bytes_holds_no_variable_and_swaps_and_scales_inside(network: Any) -> None:
    graph = folded_graph(network, SCALING, 11)
    assert graph.inputs[0].dtype == tf.uint8
    assert graph.variables == ()
    assert not [op.type for op in graph.graph.get_operations() if "Variable" in op.type or "Call" in op.type]
    pixels = (np.arange(2 * 11 * 11 * 3).reshape(2, 11, 11, 3) * 7 % 256).astype(np.uint8)
    scaled = pixels[..., ::-1] * np.array([0.5, 0.25, 0.125]) + [1.0, 2.0, 3.0]
    expected = np.asarray(network(scaled.astype(np.float32)))
    np.testing.assert_allclose(np.asarray(graph(tf.constant(pixels))[0]), expected, rtol=1e-5)


def test_batches_of_any_size_use_the_one_graph(network: Any) -> None:
    graph = folded_graph(network, SCALING, 11)
    assert graph.inputs[0].shape.as_list() == [None, 11, 11, 3]
    assert [graph(tf.zeros((size, 11, 11, 3), tf.uint8))[0].shape[0] for size in (1, 5, 2)] == [1, 5, 2]


def test_float32_means_float32() -> None:
    tf.config.experimental.enable_tensor_float_32_execution(True)
    prepare_process(None)
    assert not tf.config.experimental.tensor_float_32_execution_enabled()


def test_threads_asked_for_too_late_are_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    tf.zeros(1)  # TensorFlow has started
    with caplog.at_level(logging.WARNING):
        prepare_process(tf.config.threading.get_intra_op_parallelism_threads() + 3)
    assert "has already started in this process with" in caplog.text


def test_threads_are_set_in_a_fresh_process_and_may_be_asked_for_again() -> None:
    code = (
        "import logging; logging.basicConfig(level='WARNING', stream=__import__('sys').stdout)\n"
        "from engine.runtimes.kinds import TensorFlowRuntimeConfig, prepare_runtime\n"
        "prepare_runtime(TensorFlowRuntimeConfig(), 3)\n"
        "import tensorflow as tf; tf.zeros(1)\n"
        "prepare_runtime(TensorFlowRuntimeConfig(), 3)\n"
        "print('threads', tf.config.threading.get_intra_op_parallelism_threads())"
    )
    printed = run_python(code)
    assert "already started" not in printed
    assert printed.splitlines()[-1] == "threads 3"
