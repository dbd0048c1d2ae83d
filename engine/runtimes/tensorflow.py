"""Runs a frozen graph with TensorFlow: on a GPU where the process sees one, else on the CPU.

Importing this module imports TensorFlow, without Keras where that is not loaded yet: a runtime has no use for it, and
it is a third of the import (2.1 of 5.6 s; TensorFlow 2.21, 2026-11-22).

On a CPU the batch axis is open, so a remainder compiles nothing anew, and oneDNN's kernels are switched on (TensorFlow
does that by itself on processors with AVX-512 only): MobileNetV2 ran 1.8 times, EfficientNetB0 2.0 and ResNet50 1.3
times as fast with them on two cores of an AVX2 machine (2026-11-22).

Each core has small batches of its own: threads that share an operation wait for each other after every one, the longer
the more often a decoder takes a core away. MobileNetV2 ran 1.25 times, EfficientNetB0 1.1 times as fast as with 64
images at a time over both cores, ResNet50 0.95 times (the same machine; 3, 2 and 2 alternating processes of each).

Shape letters: B images, S side in pixels, D embedding width.
"""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, final

import numpy as np

from engine.import_without import import_without
from engine.runtimes.base import EMBEDDINGS, PIXELS, FrozenGraph, Runtime

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # read at the import
with import_without("keras"):
    import tensorflow as tf

if TYPE_CHECKING:
    from engine.runtimes.kinds import TensorFlowRuntimeConfig

logger = logging.getLogger(__name__)

# Batches on their way to the GPU while another is computed. Fed from NumPy arrays 64 images at a time, ResNet50 (tf32)
# ran at 8.0, 11.3 and 12.9 thousand images/s with 1, 2 and 4 of them, of the 14.5 that the GPU alone does; larger
# batches gained nothing, for beyond 32 MB each is copied into fresh pages (one H100, TensorFlow 2.21, 2026-11-22).
TRANSFERS_AT_ONCE = 4
BATCH_SIZE_GPU = 64
BATCH_SIZE_CPU = 8  # on each core; 16 was within a twentieth of it, for three networks
_HALF = {"bfloat16": tf.bfloat16, "float16": tf.float16}


@final
class TensorFlowRuntime(Runtime):
    """A frozen graph as one TensorFlow function."""

    def __init__(
        self,
        config: TensorFlowRuntimeConfig,
        graph: FrozenGraph,
        num_threads: int | None,
        use_gpu: bool = False,
    ) -> None:
        prepare_process(num_threads, use_gpu, allow_tf32=config.precision == "tf32")
        self._on_gpu = use_gpu and gpus_in_use() > 0
        super().__init__(graph, config.batch_size or (BATCH_SIZE_GPU if self._on_gpu else BATCH_SIZE_CPU))
        graph_def = tf.compat.v1.GraphDef.FromString(graph.graph_def)
        if config.precision in _HALF:
            from engine.runtimes.half import in_half_precision

            graph_def = in_half_precision(graph_def, _HALF[config.precision])
        self._function = imported(graph_def, self.input_size)
        # One for each core. With one more, three threads took turns on two cores: 0.9 of the rate of MobileNetV2 and
        # EfficientNetB0 (medians of three alternating processes), and 0.8 GB more for ResNet50 (2026-11-23).
        at_once = num_threads or len(os.sched_getaffinity(0))
        if self._on_gpu:
            self._function = compiled_if_faster(self._function, self.input_size, self.batch_size)
            at_once = TRANSFERS_AT_ONCE
        self._calls = ThreadPoolExecutor(at_once, thread_name_prefix="forward")

    def _run_into(self, embeddings_BD: np.ndarray, pixels_BSS3: np.ndarray) -> None:
        starts = range(0, len(pixels_BSS3), self.batch_size)
        run_batch = self._run_on_gpu if self._on_gpu else self._run_on_cpu
        try:
            for _ in self._calls.map(lambda start: run_batch(embeddings_BD, pixels_BSS3, start), starts):
                pass
        except tf.errors.OpError as error:  # of no class that others could catch without TensorFlow
            raise RuntimeError(str(error)) from None

    def _run_on_cpu(self, embeddings_BD: np.ndarray, pixels_BSS3: np.ndarray, start: int) -> None:
        batch = pixels_BSS3[start : start + self.batch_size]
        embeddings_BD[start : start + len(batch)] = self._function(tf.constant(batch))

    def _run_on_gpu(self, embeddings_BD: np.ndarray, pixels_BSS3: np.ndarray, start: int) -> None:
        """One batch, always of the one size that XLA has compiled the network for."""
        rows = embeddings_BD[start : start + self.batch_size]
        rows[:] = np.asarray(self._function(tf.constant(self._batch(pixels_BSS3, start))))[: len(rows)]


def compiled_if_faster(function: Any, input_size: int, batch_size: int) -> Any:
    """The function itself, or what XLA makes of it where that is faster; one that XLA cannot compile stays as it is.

    On one H100, 64 images at a time, XLA's was faster by 1.3 (MobileNetV2) and 1.1 (ResNet50) in float32, 2.6 in tf32,
    3.2 and 2.9 in bfloat16, after 16 and 4 to 7 s of compiling (TensorFlow 2.21, 2026-11-22).
    """
    pixels = tf.zeros((batch_size, input_size, input_size, 3), tf.uint8)
    compiled = tf.function(function, jit_compile=True, autograph=False)
    try:
        seconds = {candidate: _seconds(candidate, pixels) for candidate in (function, compiled)}
    except (tf.errors.OpError, ValueError) as error:
        logger.info("XLA cannot compile the network: %s", error)
        return function
    return min(seconds, key=lambda candidate: seconds[candidate])


def _seconds(function: Any, pixels_BSS3: tf.Tensor) -> float:
    """Of one call, when it has been called before; the best of three."""
    np.asarray(function(pixels_BSS3))
    times = []
    for _ in range(3):
        started = time.perf_counter()
        np.asarray(function(pixels_BSS3))
        times.append(time.perf_counter() - started)
    return min(times)


def imported(graph_def: Any, input_size: int) -> Any:
    """A function of the graph, uint8 pixels (B, S, S, 3) -> float32 embeddings (B, D), without variables."""

    def forward(pixels_BSS3: tf.Tensor) -> tf.Tensor:
        inputs = {f"{PIXELS}:0": pixels_BSS3}
        (embeddings_BD,) = tf.graph_util.import_graph_def(
            graph_def, input_map=inputs, return_elements=[f"{EMBEDDINGS}:0"], name=""
        )
        return embeddings_BD

    pixels = tf.TensorSpec((None, input_size, input_size, 3), tf.uint8, name=PIXELS)
    return tf.compat.v1.wrap_function(forward, [pixels])


def prepare_process(num_threads: int | None, use_gpu: bool = True, allow_tf32: bool = False) -> None:
    """TF32 off, GPU memory taken as needed, CPU threads as given. May be called again with the same values.

    Without a GPU the threads are for so many operations at once, of one thread each; beside a GPU, for one operation.

    TensorFlow fixes threads and memory growth at its first operation. Where that has happened with other values
    they stay as they are, with a warning in the log: results are the same, speed is not as asked.

    Args:
        num_threads: None: TensorFlow's choice, all cores for either.
        use_gpu: otherwise none is touched, though this process may see one.
        allow_tf32: 10 bits of mantissa in products on a GPU, which float32 must not have.
    """
    tf.config.experimental.enable_tensor_float_32_execution(allow_tf32)
    try:
        if not use_gpu:
            tf.config.set_visible_devices([], "GPU")
        for gpu in tf.config.list_physical_devices("GPU") if use_gpu else ():
            tf.config.experimental.set_memory_growth(gpu, True)
    except RuntimeError as error:
        logger.warning(
            "TensorFlow has already started: GPU memory growth stays as it is (%s)",
            error,
        )
    if num_threads is not None:
        on_gpu = use_gpu and gpus_in_use() > 0
        _set_threads(*((num_threads, 1) if on_gpu else (1, num_threads)))


def gpus_in_use() -> int:
    """GPUs that this process computes on."""
    return len(tf.config.get_visible_devices("GPU"))


def _set_threads(within_one: int, at_once: int) -> None:
    threading = tf.config.threading
    try:
        threading.set_intra_op_parallelism_threads(within_one)
        threading.set_inter_op_parallelism_threads(at_once)
    except RuntimeError:
        logger.warning(
            "TensorFlow has already started in this process with %s threads within an operation and %s operations at "
            "once (0: all cores), not %d and %d; set them before the first operation, as the Embedder of a fresh "
            "process does",
            threading.get_intra_op_parallelism_threads(),
            threading.get_inter_op_parallelism_threads(),
            within_one,
            at_once,
        )
