"""Multi-worker: the devices of several processes, on one machine or many; gradients are summed over all of them."""

from __future__ import annotations

import json
import os

import tensorflow as tf

from engine.errors import EngineError
from engine.strategies.kinds import MultiWorker


def open_multi_worker(config: MultiWorker) -> tf.distribute.Strategy:
    """`MultiWorkerMirroredStrategy` over the workers that TF_CONFIG names; waits until all of them are there.

    Every GPU that this process sees takes part, or its CPU as one device where it has none.

    Raises:
        EngineError: TF_CONFIG does not name as many workers as the recipe.
    """
    described = os.environ.get("TF_CONFIG", "")
    workers = len(json.loads(described or "{}").get("cluster", {}).get("worker", ())) or 1
    if workers != config.workers:
        raise EngineError(
            f"strategy.workers: this process is not one of {config.workers}",
            found=f"TF_CONFIG {described!r}",
            wanted=f"the addresses of {config.workers} workers",
            way_out="start it through the `engine` command, which starts all of them",
        )
    return tf.distribute.MultiWorkerMirroredStrategy()
