"""The menu of heads: their recipe blocks, and one function that opens the chosen kind. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from engine.config import Config

if TYPE_CHECKING:
    import keras

    from engine.heads.base import Head


class LinearHeadConfig(Config):
    """One matrix and one bias: multinomial logistic regression on the embeddings."""

    kind: Literal["linear"] = "linear"
    """The kind of head: `linear`."""


class MlpHeadConfig(Config):
    """Dense layers with dropout between the embedding and the classes: the classic head of transfer learning."""

    kind: Literal["mlp"]
    """The kind of head: `mlp`."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(512,), min_length=1, max_length=8)
    """Width of each hidden layer, from the embedding on."""
    dropout: float = Field(default=0.5, ge=0, lt=1)
    """Share of each hidden layer's numbers that a training step leaves out. Predictions use all of them."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """What follows each hidden layer."""


class KnnHeadConfig(Config):
    """No training: the nearest training rows vote, by cosine similarity. The bundle holds all of them."""

    kind: Literal["knn"]
    """The kind of head: `knn`."""
    k: int = Field(default=20, ge=1, le=1000)
    """Neighbours that vote."""
    temperature: float = Field(default=0.07, gt=0)
    """A neighbour's vote counts exp(similarity / temperature): small numbers let the nearest decide."""
    max_rows: int = Field(default=100_000, ge=1)
    """More training rows are refused: each takes 4 bytes for each number of its embedding, in the bundle and in the
    memory of all that use it."""


class CustomHeadConfig(Config):
    """A network of your own. Its code is imported where it runs, and never stored: a bundle has its path, a digest of
    its source and its weights."""

    kind: Literal["custom"]
    """The kind of head: `custom`."""
    build: str = Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")
    """Dotted path of a function (D, K) -> keras.Model, from embeddings (None, D) to logits (None, K) without softmax.
    Its module must be found (installed, or on PYTHONPATH) wherever the head is fitted or used."""
    source_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Wanted sha-256 of the module's file; another is refused. null: whatever is there. A bundle states it."""


AnyHeadConfig = LinearHeadConfig | MlpHeadConfig | KnnHeadConfig | CustomHeadConfig
HeadConfig = Annotated[
    AnyHeadConfig,
    Field(discriminator="kind"),
    BeforeValidator(lambda found: {"kind": "linear"} | found if isinstance(found, dict) else found),
]


class SideFeatureConfig(Config):
    """A column of the embedding table that a head takes beside the embedding."""

    column: str = Field(min_length=1)
    """Its name; `source.metadata` of an extract recipe adds columns."""
    kind: Literal["categorical", "numeric", "hashed"]
    """`categorical`: one number for each text that training rows have, and one for all others. `numeric`: the number,
    less its mean and over its deviation in the training rows; missing is the mean. `hashed`: one number for each of
    `bins`, which texts fall into by their hash: for columns of very many texts."""
    bins: int = Field(default=64, ge=2, le=65536)
    """Of `hashed`."""


def open_head(config: AnyHeadConfig) -> Head:
    """The head kind that a recipe names; importing it does not import Keras."""
    if isinstance(config, CustomHeadConfig):
        from engine.heads.custom import CustomHead

        return CustomHead(config)
    if isinstance(config, KnnHeadConfig):
        from engine.heads.knn import KnnHead

        return KnnHead(config)
    if isinstance(config, MlpHeadConfig):
        from engine.heads.mlp import MlpHead

        return MlpHead(config)
    from engine.heads.linear import LinearHead

    return LinearHead(config)


def build_head(config: AnyHeadConfig, width: int, num_classes: int, seed: int) -> keras.Model:
    """A fresh, untrained network of the chosen kind: (B, D) float32 embeddings to (B, K) logits."""
    return open_head(config).build(width, num_classes, seed)
