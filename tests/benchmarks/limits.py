"""What the machine can do at most: the forward pass alone and the decoder alone, each over all cores.

    python -m tests.benchmarks.limits forward ARCHIVE --network MobileNetV2 --side 160 --weights FILE --runtime openvino
    python -m tests.benchmarks.limits decode  ARCHIVE --network MobileNetV2 --side 160 --weights FILE

The last line of stdout is JSON with `images_per_second`, the best of all settings tried, and each of them. A machine
that must do both one after the other on the same cores cannot do better than `limit(forward, decode)`.
Shape letters: B images, S side in pixels, D embedding width.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from tests.benchmarks.archive import build_network, preprocess_input, read_shard
from tests.benchmarks.rivals import (
    MAX_PIXELS,
    arguments,
    hide_gpus,
    in_groups,
    open_embedder,
    runtime_of,
    runtime_refusals,
    shards,
)

BATCHES = (8, 16, 32, 64, 128, 256)
BATCHES_GPU = (256, 1024)  # what the engine hands to its runtime at once; it cuts them into its own
STREAMS = sorted({1, 2, 4, os.cpu_count() or 1})
BATCHES_PER_STREAM = 2  # in one round, so that streams do not wait for each other after every batch
SLOWEST_ROUND_S = (
    4.0  # a setting of which one round is expected to take longer is left out: ResNet50 on two cores
)
DECODE_IMAGES = 500
DECODE_GROUP = 16  # images per task of a thread, so that the pool itself costs nothing

Rates = dict[str, float]


def limit(forward: float, decode: float, on_gpu: bool) -> float:
    """Images per second where each image takes both: on the same cores, or beside each other where one is on a GPU."""
    return min(forward, decode) if on_gpu else 1.0 / (1.0 / forward + 1.0 / decode)


def forward_only(options: argparse.Namespace) -> Rates:
    """Images/s by setting: the engine's runtime, called by some threads; OpenVINO's own queue beside it."""
    # OpenVINO's shapes are fixed: there the engine's own batch size cuts whatever it is given.
    # On a GPU the engine's batches have one size, too, and several are on their way at once.
    batch_size = {} if options.runtime == "openvino" or options.gpu else {"batch_size": max(options.batches)}
    runtime = {**runtime_of(options), **batch_size}
    embed = open_embedder(options.network, options.side, options.weights, runtime, options.gpu)
    rates = _grid("engine", lambda batch, streams: _called_by_threads(embed, streams), options)
    if options.runtime == "openvino":
        rates |= _openvino(options)
    return rates


def decode_only(options: argparse.Namespace) -> Rates:
    """Images/s by number of threads, from memory, with the engine's decoder."""
    from engine.images import decode_image

    samples = (jpeg for path in shards(options.archive) for _, jpeg in read_shard(path))
    groups = list(in_groups(next(in_groups(samples, DECODE_IMAGES)), DECODE_GROUP))

    def decode(group: tuple[bytes, ...]) -> None:
        for jpeg in group:
            decode_image(jpeg, options.side, "stretch", MAX_PIXELS)

    cores, rates = os.cpu_count() or 1, {}
    for threads in (cores, 2 * cores):
        with ThreadPoolExecutor(threads) as pool:

            def decode_all(pool: ThreadPoolExecutor = pool) -> None:
                list(pool.map(decode, groups))

            rates[f"{threads} threads"] = _rate(decode_all, sum(map(len, groups)), options.seconds)
    return rates


def _grid(name: str, opened: Callable[[int, int], Any], options: argparse.Namespace) -> Rates:
    """Rates of all batches and streams; `opened` gives a context with a function that runs a list of batches."""
    random, rates = np.random.Generator(np.random.PCG64(0)), {}
    for batch, streams in product(options.batches, STREAMS):
        best = max(rates.values(), default=float("inf"))
        images = batch * streams * BATCHES_PER_STREAM
        if images / best > SLOWEST_ROUND_S:
            continue
        shape = (batch, options.side, options.side, 3)
        batches = [random.integers(0, 256, shape, np.uint8) for _ in range(images // batch)]
        with opened(batch, streams) as run_all:
            setting = f"{name}, batch {batch} x {streams}"
            rates[setting] = _rate(partial(run_all, batches), images, options.seconds)
    return rates


@contextmanager
def _called_by_threads(
    embed: Callable[[np.ndarray], np.ndarray], threads: int
) -> Iterator[Callable[[list[np.ndarray]], Any]]:
    with ThreadPoolExecutor(threads) as pool:
        yield lambda batches: list(pool.map(embed, batches))


def _openvino(options: argparse.Namespace) -> Rates:
    """OpenVINO as its manual advises for throughput, without the engine: fixed shapes and several streams."""
    import openvino
    import tensorflow as tf

    model, scale, side = (
        build_network(options.network, options.side),
        preprocess_input(options.network),
        options.side,
    )
    model.load_weights(options.weights)
    forward = tf.function(lambda pixels: model(scale(tf.cast(pixels, tf.float32)), training=False))
    pixels = tf.TensorSpec((None, side, side, 3), tf.uint8)
    converted = openvino.convert_model(forward.get_concrete_function(pixels))

    @contextmanager
    def opened(batch: int, streams: int) -> Iterator[Callable[[list[np.ndarray]], Any]]:
        converted.reshape([batch, side, side, 3])
        hints = {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": streams,
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[options.precision],
        }
        requests = openvino.AsyncInferQueue(
            openvino.Core().compile_model(converted, "CPU", hints), streams + 1
        )

        def run_all(batches: list[np.ndarray]) -> None:
            for pixels_BSS3 in batches:
                requests.start_async([pixels_BSS3], share_inputs=True)
            requests.wait_all()

        yield run_all

    return _grid("openvino alone", opened, options)


def _rate(run: Callable[[], Any], images: int, seconds: float) -> float:
    """Images/s of as many rounds as begin within `seconds`, after one that does not count."""
    run()
    started, rounds = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        run()
        rounds += 1
    return round(images * rounds / passed, 1)


KINDS: dict[str, Callable[[argparse.Namespace], Rates]] = {"forward": forward_only, "decode": decode_only}


def main() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    parser = arguments()
    parser.add_argument("--seconds", type=float, default=2.0, help="for each setting")
    parser.add_argument("--batches", type=int, nargs="+", help="sizes to try")
    options = parser.parse_args()
    options.batches = options.batches or (BATCHES_GPU if options.gpu else BATCHES)
    hide_gpus(options)
    try:
        rates = KINDS[options.kind](options)
    except runtime_refusals() as error:
        print(" ".join(str(error).split())[:200], file=sys.stderr)
        raise SystemExit(2) from None
    print(json.dumps({"kind": options.kind, "images_per_second": max(rates.values()), "settings": rates}))


if __name__ == "__main__":
    main()
