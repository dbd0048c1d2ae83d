"""Runs a frozen graph with OpenVINO on a CPU: an asynchronous queue keeps one small batch in flight on each thread.

Needs no TensorFlow: OpenVINO reads the frozen graph itself. Small batches stay in the processor's caches, and streams
of one thread each do not wait for one another when decoding takes a core away for a while.

Shape letters: B images, S side in pixels, D embedding width.
"""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from engine.errors import RecipeError
from engine.runtimes.base import FrozenGraph, Runtime

if TYPE_CHECKING:
    from engine.runtimes.kinds import OpenVINORuntimeConfig

_STALL_S = 30.0  # no batch takes that long: then see what has become of it
_PRECISION_HINTS = {"float32": "f32", "bfloat16": "bf16"}


@final
class OpenVINORuntime(Runtime):
    """A network compiled for this processor, with one stream for each thread.

    Raises:
        RecipeError: OpenVINO is not installed.
    """

    def __init__(self, config: OpenVINORuntimeConfig, graph: FrozenGraph, num_threads: int | None) -> None:
        super().__init__(graph, config.batch_size)
        threads = num_threads or len(os.sched_getaffinity(0))
        openvino = _library()
        model = _read(openvino, graph)
        model.reshape([self.batch_size, self.input_size, self.input_size, 3])
        compiled = openvino.Core().compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": _PRECISION_HINTS[config.precision],
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": threads,
                # Threads tied to cores would wait for the decoders that the system has put there.
                "ENABLE_CPU_PINNING": False,
            },
        )
        # One more than streams: a batch waits ready while another's results are copied.
        self._queue = openvino.AsyncInferQueue(compiled, threads + 1)
        self._queue.set_callback(_take_results)
        self._one_at_a_time = threading.Lock()  # the queue hands out its requests to one thread

    def _run_into(self, embeddings_BD: np.ndarray, pixels_BSS3: np.ndarray) -> None:
        call = _Call(embeddings_BD, -(-len(pixels_BSS3) // self.batch_size))
        for start in range(0, len(pixels_BSS3), self.batch_size):
            batch = self._batch(pixels_BSS3, start)
            with self._one_at_a_time:
                self._queue.start_async({0: batch}, (call, start))
        while not call.done.wait(_STALL_S):
            self._queue.wait_all()  # raises what a batch ended with; returns once none is under way
            if not call.done.is_set():
                raise RuntimeError("OpenVINO gave no answer for a batch")


class _Call:
    """One `run`, whose batches come back in any order."""

    def __init__(self, embeddings_BD: np.ndarray, batches: int) -> None:
        self._embeddings_BD, self._open = embeddings_BD, batches
        self._lock, self.done = threading.Lock(), threading.Event()
        if not batches:
            self.done.set()

    def take(self, start: int, results_BD: np.ndarray) -> None:
        rows = self._embeddings_BD[start : start + len(results_BD)]
        rows[:] = results_BD[: len(rows)]
        with self._lock:
            self._open -= 1
            if not self._open:
                self.done.set()


def _take_results(request: Any, place: tuple[_Call, int]) -> None:
    """Runs on a thread of OpenVINO as soon as a batch is done."""
    call, start = place
    call.take(start, request.get_output_tensor().data)


def _library() -> Any:
    try:
        import openvino
    except ImportError:
        raise RecipeError(
            "runtime.kind: openvino is not installed here",
            wanted="the package openvino",
            way_out="pip install 'image-feature-engine[openvino]' on every node, or set runtime.kind: tensorflow",
        ) from None
    return openvino


def _read(openvino: Any, graph: FrozenGraph) -> Any:
    """Only files are read as TensorFlow graphs (OpenVINO 2026.4 takes bytes of its own format alone)."""
    with tempfile.TemporaryDirectory(prefix="engine-graph-") as folder:
        path = Path(folder) / "frozen.pb"
        path.write_bytes(graph.graph_def)
        return openvino.Core().read_model(str(path))
