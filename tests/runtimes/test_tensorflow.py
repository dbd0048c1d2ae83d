from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from engine.runtimes.base import FrozenGraph
from engine.runtimes.kinds import TensorFlowRuntimeConfig
from engine.runtimes.tensorflow import TensorFlowRuntime, compiled_if_faster, prepare_process
from tests.backbones.small_networks import run_python


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
        "from engine.runtimes.tensorflow import prepare_process\n"
        "prepare_process(3)\n"
        "import tensorflow as tf; tf.zeros(1)\n"
        "prepare_process(3)\n"
        "print('threads', tf.config.threading.get_intra_op_parallelism_threads(),"
        " tf.config.threading.get_inter_op_parallelism_threads())"
    )
    printed = run_python(code)
    assert "already started" not in printed
    assert printed.splitlines()[-1] == "threads 1 3"


def test_xla_is_used_where_it_is_faster_and_does_not_have_to_work() -> None:
    def slow(pixels: tf.Tensor) -> tf.Tensor:  # outside XLA every step of the loop is an operation
        total = tf.reduce_sum(tf.cast(pixels, tf.float32))
        return tf.while_loop(lambda i, _: i < 3000, lambda i, x: (i + 1, tf.sin(x) + 1.0), (0, total))[1]

    def text(pixels: tf.Tensor) -> tf.Tensor:  # XLA has no strings
        return tf.strings.length(tf.strings.as_string(pixels))

    slow_function, text_function = tf.function(slow), tf.function(text)
    pixels = tf.zeros((2, 3, 3, 3), tf.uint8)
    chosen = compiled_if_faster(slow_function, 3, 2)
    assert chosen is not slow_function
    assert float(chosen(pixels)) == pytest.approx(float(slow_function(pixels)), rel=1e-4)
    assert compiled_if_faster(text_function, 3, 2) is text_function


def graph_of(forward: Callable[[tf.Tensor], tf.Tensor], side: int, width: int) -> FrozenGraph:
    graph = tf.Graph()
    with graph.as_default():
        pixels = tf.compat.v1.placeholder(tf.uint8, (None, side, side, 3), name="pixels")
        tf.identity(forward(tf.cast(pixels, tf.float32)), name="embeddings")
    return FrozenGraph(graph.as_graph_def().SerializeToString(), side, width)


def test_a_network_that_cannot_be_computed_here_is_an_error_that_needs_no_tensorflow_to_be_caught() -> None:
    broken = graph_of(lambda pixels: tf.reshape(pixels, (-1, 7)), side=3, width=7)
    runtime = TensorFlowRuntime(TensorFlowRuntimeConfig(), broken, None)
    with pytest.raises(RuntimeError, match="multiple of 7"):
        runtime.run(np.zeros((2, 3, 3, 3), np.uint8))


@pytest.mark.parametrize("num_images", [0, 1, 4, 11])
def test_batches_that_are_on_their_way_at_once_come_to_their_own_rows(num_images: int) -> None:
    """The way to a GPU, on the CPU: fixed batches, several transfers, a remainder that is filled up."""
    means = graph_of(lambda pixels: tf.reduce_mean(pixels, (1, 2)), side=5, width=3)
    runtime = TensorFlowRuntime(TensorFlowRuntimeConfig(batch_size=4), means, None)
    sizes: list[int] = []
    function = runtime._function

    def noted(pixels: tf.Tensor) -> tf.Tensor:
        sizes.append(len(pixels))
        return function(pixels)

    runtime._function, runtime._on_gpu = noted, True
    pixels = np.random.default_rng(0).integers(0, 256, (num_images, 5, 5, 3), dtype=np.uint8)
    np.testing.assert_allclose(runtime.run(pixels), pixels.mean((1, 2)).reshape(-1, 3), rtol=1e-5)
    assert sizes == [4] * -(-num_images // 4)


def test_a_runtime_loads_no_keras() -> None:
    code = (
        "import sys\nimport engine.runtimes.tensorflow\n"
        "print(sorted({'keras', 'sklearn'} & set(sys.modules)))\n"
        "import keras\nprint(keras.ops.relu(-1.0).numpy())"
    )
    assert run_python(code).splitlines()[-2:] == ["[]", "0.0"]
