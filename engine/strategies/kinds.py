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


class Mirrored(Config):
    """A copy of the head on each device of one worker; every batch is divided among them."""

    kind: Literal["mirrored"] = "mirrored"
    """The kind of strategy: `mirrored`."""
    workers: Literal[1] = 1
    """Training processes. A mirrored strategy is one process."""
    devices_per_worker: int | None = Field(default=None, ge=1)
    """Devices to use. null: every GPU of the worker, or its CPU as one device. On a worker without a GPU a
    number above 1 divides the CPU into that many logical devices."""


StrategyConfig = Annotated[OneDevice | Mirrored, Field(discriminator="kind")]


def open_strategy(config: OneDevice | Mirrored) -> tf.distribute.Strategy:
    """Prepare this process for training and open the chosen strategy.

    Call it before TensorFlow has touched a device: logical CPU devices cannot be made afterwards.

    Raises:
        EngineError: Keras is not Keras 3 on TensorFlow, or the devices were already in use.
        RecipeError: the worker has fewer GPUs than `devices_per_worker`.
    """
    from engine.strategies.base import prepare_process

    prepare_process()
    if isinstance(config, OneDevice):
        from engine.strategies.one_device import open_one_device

        return open_one_device(config)
    from engine.strategies.mirrored import open_mirrored

    return open_mirrored(config)
