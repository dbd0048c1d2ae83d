from __future__ import annotations

import logging

import pytest
import tensorflow as tf

from engine.runtimes.tensorflow import compiled_if_faster, prepare_process
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
        "print('threads', tf.config.threading.get_intra_op_parallelism_threads())"
    )
    printed = run_python(code)
    assert "already started" not in printed
    assert printed.splitlines()[-1] == "threads 3"


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


def test_a_runtime_loads_no_keras() -> None:
    code = (
        "import sys\nimport engine.runtimes.tensorflow\n"
        "print(sorted({'keras', 'sklearn'} & set(sys.modules)))\n"
        "import keras\nprint(keras.ops.relu(-1.0).numpy())"
    )
    assert run_python(code).splitlines()[-2:] == ["[]", "0.0"]
