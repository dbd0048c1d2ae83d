"""The menu of strategies: their recipe blocks, and one function that opens the chosen kind. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from engine.config import Config

if TYPE_CHECKING:
    import tensorflow as tf


class OneDevice(Config):
    """Everything on one device: the first GPU of the worker, or its CPU where it has none."""

    kind: Literal["one_device"] = "one_device"
    """The kind of strategy: `one_device`."""
    workers: Literal[1] = 1
    """Training processes. One device is in one of them."""


class Mirrored(Config):
    """A copy of the head on each device of one worker; every batch is divided among them."""

    kind: Literal["mirrored"] = "mirrored"
    """The kind of strategy: `mirrored`."""
    workers: Literal[1] = 1
    """Training processes. A mirrored strategy is one process."""
    devices_per_worker: int | None = Field(default=None, ge=1)
    """Devices to use. null: every GPU of the worker, or its CPU as one device. On a worker without a GPU a
    number above 1 divides the CPU into that many logical devices."""


class MultiWorker(Config):
    """A copy of the head on each device of several workers, on as many machines as there are; every batch is divided
    among all of them. Each worker has all rows."""

    kind: Literal["multi_worker"]
    """The kind of strategy: `multi_worker`."""
    workers: int = Field(default=2, ge=1, le=1024)
    """Training processes, each with its share of the cluster's GPUs, or of its cores where it has none."""
    devices_per_worker: int | None = Field(default=None, ge=1)
    """GPUs of each worker. null: as many as every worker can have. Without GPUs a worker is one device."""


AnyStrategyConfig = OneDevice | Mirrored | MultiWorker
StrategyConfig = Annotated[AnyStrategyConfig, Field(discriminator="kind")]


def open_strategy(config: AnyStrategyConfig) -> tf.distribute.Strategy:
    """Prepare this process for training and open the chosen strategy.

    Call it before TensorFlow has touched a device: logical CPU devices cannot be made afterwards.

    Raises:
        EngineError: Keras is not Keras 3 on TensorFlow, the devices were already in use, or other workers are missing.
        RecipeError: the worker has fewer GPUs than `devices_per_worker`.
    """
    from engine.strategies.base import prepare_process

    prepare_process()
    if isinstance(config, OneDevice):
        from engine.strategies.one_device import open_one_device

        return open_one_device(config)
    if isinstance(config, MultiWorker):
        from engine.strategies.multi_worker import open_multi_worker

        return open_multi_worker(config)
    from engine.strategies.mirrored import open_mirrored

    return open_mirrored(config)
