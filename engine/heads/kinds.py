"""The menu of heads: their recipe blocks, and one function that opens the chosen kind. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from engine.config import Config

if TYPE_CHECKING:
    import keras

    from engine.heads.base import Head


class LinearHeadConfig(Config):
    """One matrix and one bias: multinomial logistic regression on the embeddings."""

    kind: Literal["linear"] = "linear"
    """The kind of head: `linear`."""


# A second kind makes this a union with Field(discriminator="kind"); pydantic wants no discriminator for one.
HeadConfig = LinearHeadConfig


def open_head(config: HeadConfig) -> Head:
    """The head kind that a recipe names; importing it does not import Keras."""
    from engine.heads.linear import LinearHead

    return LinearHead(config)


def build_head(config: HeadConfig, width: int, num_classes: int, seed: int) -> keras.Model:
    """A fresh, untrained network of the chosen kind: (B, D) float32 embeddings to (B, K) logits."""
    return open_head(config).build(width, num_classes, seed)
