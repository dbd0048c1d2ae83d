"""The recipe blocks of a fit and what each field means. Imports nothing heavy; not for: doing any of it."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from engine.config import Config
from engine.heads.kinds import HeadConfig, LinearHeadConfig
from engine.storage import Uri
from engine.strategies.kinds import Mirrored, StrategyConfig

Task = Literal["single_label"]
SplitName = Literal["train", "validation", "test"]
SPLIT_NAMES: tuple[SplitName, ...] = ("train", "validation", "test")


class LabelsConfig(Config):
    """Where the labels are. They join on the key; where keys repeat across shards, on shard and key."""

    uri: Uri | None = None
    """A .csv (UTF-8, header line, comma) or .parquet file of labels, on any storage. null: a column of the
    embedding table itself."""
    key: str = Field(default="key", min_length=1)
    """Column of the label file that holds the sample's key. Beside it a column `shard` (path relative to the
    source) is used where keys repeat."""
    label: str = Field(default="label", min_length=1)
    """Column (of the label file, or of the table where uri is null) that holds the label. Empty: no label."""


class SplitConfig(Config):
    """Which rows train, which choose when to stop, and which only judge. Fractions must sum to 1."""

    column: str | None = None
    """Column of the label file (or of the table) that says train, validation or test for each row. null: a
    hash of seed and key decides."""
    train: float = Field(default=0.8, gt=0, le=1)
    """Fraction of the rows that the head is fitted on."""
    validation: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the rows that early stopping looks at. 0: none; all epochs are run and the last one is kept.
    With `column`: where no row says validation, validation / (train + validation) of the train rows are taken."""
    test: float = Field(default=0.1, ge=0, lt=1)
    """Fraction of the rows that nothing but the final metrics sees."""
    seed: int = 0
    """Part of the hash: another seed is another split."""

    @model_validator(mode="after")
    def _fractions_sum_to_one(self) -> Self:
        total = self.train + self.validation + self.test
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            raise ValueError(f"train + validation + test must be 1, not {total:.6g}")
        return self


class AdamConfig(Config):
    """Adam with Keras' moments (0.9, 0.999) and epsilon (1e-7)."""

    kind: Literal["adam"] = "adam"
    """The kind of optimizer: `adam`."""
    learning_rate: float = Field(default=0.001, gt=0)
    """Step size, constant over the run."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay (as in AdamW): every step multiplies the weights, but not the biases, by
    1 - learning_rate * weight_decay. It is not an L2 term of the loss."""


OptimizerConfig = AdamConfig  # a second kind makes this a union with Field(discriminator="kind")


class TrainingConfig(Config):
    """How long and in what portions a head is trained."""

    epochs: int = Field(default=100, ge=1)
    """Most passes over the training rows."""
    batch_size: int = Field(default=256, ge=1)
    """Rows per optimizer step, over all devices together. More than there are rows means all of them."""
    patience: int = Field(default=3, ge=1)
    """Epochs in a row without a lower validation loss after which training stops. The weights of the epoch
    with the lowest validation loss are kept, however training ended."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced`: each training row weighs rows / (classes * rows of its class), so that every class weighs the
    same. Validation and test stay unweighted."""
    seed: int = Field(default=0, ge=0)
    """Of the initial weights and of the order of the rows in each epoch."""


class CalibrationConfig(Config):
    """How logits become probabilities that hold what they promise; without validation rows they stay as trained."""

    kind: Literal["temperature", "none"] = "temperature"
    """`temperature`: all logits are divided by one number, for which the validation rows have the lowest cross-entropy;
    answers stay the same, confidences become honest. `none`: as trained."""
    precisions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.9, 0.95, 0.99)
    """Shares of right answers for which the report suggests a `min_confidence`."""


class FitSettings(Config):
    """Everything of a fit but where it reads and writes. A run on one device repeats exactly for equal settings."""

    task: Task = "single_label"
    """`single_label`: each row has exactly one class."""
    labels: LabelsConfig = LabelsConfig()
    """Where the labels are."""
    split: SplitConfig = SplitConfig()
    """Which rows train, which choose when to stop, and which only judge."""
    head: HeadConfig = LinearHeadConfig()
    """The classifier to fit."""
    optimizer: OptimizerConfig = AdamConfig()
    """How weights follow gradients."""
    training: TrainingConfig = TrainingConfig()
    """How long and in what portions."""
    calibration: CalibrationConfig = CalibrationConfig()
    """How confidences are made honest."""
    strategy: StrategyConfig = Mirrored()
    """How the work is laid on devices."""


class FitOutput(Config):
    """Where the bundle is published."""

    uri: Uri
    """Folder of the bundle, on any storage. A bundle that is there already is replaced when the new one is whole."""
