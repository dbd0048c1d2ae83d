"""The recipe blocks of a fit and what each field means. Imports nothing heavy; not for: doing any of it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from engine.config import Config
from engine.heads.kinds import HeadConfig, LinearHeadConfig, SideFeatureConfig
from engine.recipes import ReportConfig
from engine.storage import Uri
from engine.strategies.kinds import Mirrored, StrategyConfig

Task = Literal["single_label", "multi_label"]
SplitName = Literal["train", "validation", "test"]
SPLIT_NAMES: tuple[SplitName, ...] = ("train", "validation", "test")


class LabelsConfig(Config):
    """Where the labels are. They join on the key; where keys repeat across shards, on shard and key (and index)."""

    uri: Uri | None = None
    """A .csv (UTF-8, header line, comma) or .parquet file of labels, on any storage. null: a column of the
    embedding table itself."""
    key: str = Field(default="key", min_length=1)
    """Column of the label file that holds the sample's key. Beside it a column `shard` (path relative to the
    source) is used where keys repeat, and `index` (position in the shard) where they repeat within one."""
    label: str = Field(default="label", min_length=1)
    """Column (of the label file, or of the table where uri is null) that holds the label. Empty: no label. With several
    labels for a row: a list of texts (an empty one says that there are none), or texts; lines of one key add up."""
    otherwise: str | None = Field(default=None, min_length=1)
    """Column of the embedding table (of the images, when a backbone is trained) with the labels of rows to which the
    file gives none: so answers to a review are added to the labels that there are. null: such rows have no label."""
    conflicts: Literal["refuse", "leave_out"] = "refuse"
    """What becomes of keys to which lines of the label file give different labels; left out, they are counted and
    listed in metrics.json, like labels of unknown keys and rows without a label."""
    separator: str | None = Field(default=None, min_length=1)
    """What stands between the labels of a row where they are one text, e.g. "|"; only with several labels for a row."""

    @model_validator(mode="after")
    def _otherwise_than_a_file(self) -> Self:
        if self.otherwise is not None and self.uri is None:
            raise ValueError("otherwise: there is no label file; `label` names the column of the table")
        return self


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of one value of the split column, from one share of them to another.

    Attributes:
        name: the value; `all` without a column.
        begin, end: in the order of the rows' hashes, from 0 to 1.
    """

    name: str
    begin: float = 0.0
    end: float = 1.0

    @staticmethod
    def parsed(text: str) -> Slice:
        """`train`, `train[:80%]`, `train[80%:]` or `train[10%:20%]`.

        Raises:
            ValueError: another text, or no rows by its own words.
        """
        found = _SLICE.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no slice such as 'train', 'train[:80%]' or 'train[80%:]'")
        begin, end = float(found[2] or 0) / 100, float(found[3] or 100) / 100
        if not begin < end <= 1:
            raise ValueError(f"{text!r} holds no rows: from {begin:.0%} to {end:.0%}")
        return Slice(found[1], begin, end)

    def overlaps(self, other: Slice) -> bool:
        """Whether a row can be in both."""
        return self.name == other.name and self.begin < other.end and other.begin < self.end


_SLICE = re.compile(r"([^\[\]]+?)(?:\[(?:(\d+(?:\.\d+)?)%)?:(?:(\d+(?:\.\d+)?)%)?\])?")
Share = Annotated[float, Field(ge=0, le=1)] | Annotated[str, Field(min_length=1)]


class SplitConfig(Config):
    """Which rows train, which choose when to stop, and which only judge. Fractions must sum to 1.

    In place of fractions there may be slices in the manner of TensorFlow Datasets, `train: "train[:80%]"`, `validation:
    "train[80%:]"`, `test: test`: values of `column` (`all` without one) and shares of their rows, by the same hash.
    """

    column: str | None = None
    """Column of the label file (or of the table) that says train, validation or test for each row, or with slices
    anything. null: a hash of seed and key decides."""
    group: str | None = None
    """Column (of the label file, or of the table) whose rows of one value stay together: frames of a scene, photos of a
    patient. The hash is then of that value; with `column`, validation is taken by it. Empty: the key stands for it."""
    train: Share = 0.8
    """Fraction of the rows that the head is fitted on, or a slice."""
    validation: Share = 0.1
    """Fraction of the rows that early stopping looks at. 0: none; all epochs are run and the last one is kept.
    With `column`: where no row says validation, validation / (train + validation) of the train rows are taken."""
    test: Share = 0.1
    """Fraction of the rows that nothing but the final metrics sees."""
    seed: int = 0
    """Part of the hash: another seed is another split."""

    @property
    def slices(self) -> dict[SplitName, Slice]:
        """Those that the recipe has; none where it has fractions."""
        given: dict[SplitName, float | str] = {
            "train": self.train,
            "validation": self.validation,
            "test": self.test,
        }
        return {name: Slice.parsed(share) for name, share in given.items() if isinstance(share, str)}

    @property
    def fractions(self) -> dict[SplitName, float]:
        """Of a recipe without slices."""
        return {"train": float(self.train), "validation": float(self.validation), "test": float(self.test)}

    @model_validator(mode="after")
    def _shares_go_together(self) -> Self:
        slices = self.slices
        if not slices:
            total = sum(self.fractions.values())
            if not math.isclose(total, 1.0, abs_tol=1e-6):
                raise ValueError(f"train + validation + test must be 1, not {total:.6g}")
            if not self.train:
                raise ValueError("train: no rows to fit on")
            return self
        for name in SPLIT_NAMES:
            if name not in slices and getattr(self, name) != 0:
                raise ValueError(f"{name}: a fraction beside slices; give a slice, or 0 for no rows")
        if "train" not in slices:
            raise ValueError("train: no rows to fit on")
        if self.column is None and any(one.name != "all" for one in slices.values()):
            raise ValueError("without `column` there is only the slice all, as in all[:80%]")
        for one, other in combinations(slices, 2):
            if slices[one].overlaps(slices[other]):
                raise ValueError(f"{one} and {other} share rows")
        return self


class _OptimizerConfig(Config):
    """What every optimizer's recipe says."""

    learning_rate: float = Field(default=0.001, gt=0)
    """Step size: the largest, where `schedule` changes it."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay (as in AdamW): every step multiplies the weights, but not the biases, by
    1 - learning rate * weight_decay. It is not an L2 term of the loss."""
    schedule: Literal["constant", "cosine"] = "constant"
    """`cosine`: the learning rate falls to 0 over `training.epochs`, along half a cosine (Loshchilov and Hutter,
    2017); early stopping then ends before it is small, so give it fewer epochs and more patience."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Epochs in which the learning rate rises from 0, in a line; before the schedule, and counted in `epochs`."""


class AdamConfig(_OptimizerConfig):
    """Adam with Keras' moments (0.9, 0.999) and epsilon (1e-7)."""

    kind: Literal["adam"] = "adam"
    """The kind of optimizer: `adam`."""


class AdamWConfig(_OptimizerConfig):
    """Adam with decoupled decay on by default; otherwise the same."""

    kind: Literal["adamw"]
    """The kind of optimizer: `adamw`."""
    weight_decay: float = Field(default=0.01, ge=0)
    """As of `adam`."""


class SgdConfig(_OptimizerConfig):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"]
    """The kind of optimizer: `sgd`."""
    learning_rate: float = Field(default=0.1, gt=0)
    """Step size: the largest, where `schedule` changes it."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Share of the last step that the next one repeats."""
    nesterov: bool = True
    """Whether the gradient is taken where the momentum leads to."""


class LbfgsConfig(Config):
    """L-BFGS over all training rows at once (Liu and Nocedal, 1989), as scikit-learn's logistic regression goes: for
    heads without dropout, and for rows that a pass over takes seconds. `training.epochs` counts its iterations, and
    `training.batch_size` does not count."""

    kind: Literal["lbfgs"]
    """The kind of optimizer: `lbfgs`."""
    l2: float = Field(default=0.001, ge=0)
    """l2 / 2 times the squares of all weights but biases is added to the mean loss of the training rows. It is 1 / (C *
    rows) of scikit-learn's C."""
    history: int = Field(default=10, ge=1, le=100)
    """Steps that the estimate of the curvature remembers."""
    tolerance: float = Field(default=1e-4, gt=0)
    """Training ends when no number of the gradient is larger."""


GradientOptimizerConfig = AdamConfig | AdamWConfig | SgdConfig
AnyOptimizerConfig = GradientOptimizerConfig | LbfgsConfig
OptimizerConfig = Annotated[
    AnyOptimizerConfig,
    Field(discriminator="kind"),
    BeforeValidator(lambda found: {"kind": "adam"} | found if isinstance(found, dict) else found),
]


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
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each training row's weight that is spread evenly over all classes (Szegedy et al., 2016, section 7)."""
    standardise: bool = False
    """Train on embeddings whose every number has mean 0 and deviation 1 over the training rows. The published head
    takes embeddings as they are: what was done to them becomes part of its weights."""
    seed: int = Field(default=0, ge=0)
    """Of the initial weights, of the order of the rows in each epoch, and of dropout."""
    rows: Literal["auto", "memory", "disk"] = "auto"
    """Where embeddings are held: `memory`, once for each device; `disk`: in a file of the worker's temporary folder,
    from which each batch is read. `auto`: on disk where memory would take more than half of what is free."""
    checkpoint_seconds: float = Field(default=30.0, ge=0)
    """Least time between checkpoints; a fit that was interrupted goes on where the last one was made. They lie in the
    bundle's folder until it is published. 0: one after each epoch."""


class GridConfig(Config):
    """Values to try, each with each of the others; all heads are trained at once, and the embeddings are read once."""

    learning_rate: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """In place of `optimizer.learning_rate`. Here and below, an empty list leaves the recipe's own value."""
    weight_decay: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """In place of `optimizer.weight_decay`."""
    l2: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """In place of `optimizer.l2`, for `lbfgs`."""
    dropout: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = ()
    """In place of the head's `dropout`; heads without one are tried once."""
    head: tuple[HeadConfig, ...] = ()
    """In place of `head`."""


class CalibrationConfig(Config):
    """How logits become probabilities that hold what they promise; without validation rows they stay as trained."""

    kind: Literal["adaptive", "temperature", "none"] = "adaptive"
    """`temperature`: all logits are divided by one number, for which the validation rows have the lowest cross-entropy;
    answers stay the same, confidences become honest. `adaptive`: the number also depends on how undecided the head is
    about a row, where the validation rows show clearly that this is better (of multi_label it is `temperature`).
    `none`: as trained."""
    precisions: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.9, 0.95, 0.99)
    """Shares of right answers for which the report suggests a `min_confidence`; not of multi_label."""


class SuspectsConfig(Config):
    """Looking for wrong labels: each row is judged by a head that was fitted without it."""

    folds: int = Field(default=5, ge=0, le=20)
    """Heads that are fitted for it, all at once, each without its own part of the rows. 0: no search."""

    @field_validator("folds")
    @classmethod
    def _one_fold_leaves_no_rows(cls, value: int) -> int:
        if value == 1:
            raise ValueError("1 leaves no rows to fit on: 0 for no search, or at least 2")
        return value


class FitSettings(Config):
    """Everything of a fit but where it reads and writes. A run on one device repeats exactly for equal settings."""

    task: Task = "single_label"
    """`single_label`: each row has exactly one class. `multi_label`: any number of them; each class is a question of
    its own, with a threshold chosen on the validation rows."""
    labels: LabelsConfig = LabelsConfig()
    """Where the labels are."""
    split: SplitConfig = SplitConfig()
    """Which rows train, which choose when to stop, and which only judge."""
    head: HeadConfig = LinearHeadConfig()
    """The classifier to fit."""
    side_features: tuple[SideFeatureConfig, ...] = ()
    """Columns of the embedding table that the head takes beside the embedding, or of the label file where the table has
    none of that name; tables that are scored need them."""
    optimizer: OptimizerConfig = AdamConfig()
    """How weights follow gradients."""
    training: TrainingConfig = TrainingConfig()
    """How long and in what portions."""
    grid: GridConfig = GridConfig()
    """Heads to choose from: the one with the lowest validation loss is published, the others are in the report."""
    calibration: CalibrationConfig = CalibrationConfig()
    """How confidences are made honest."""
    suspects: SuspectsConfig = SuspectsConfig()
    """How wrong labels are looked for."""
    report: ReportConfig = ReportConfig()
    """What the page about the bundle shows."""
    strategy: StrategyConfig = Mirrored()
    """How the work is laid on devices."""

    @model_validator(mode="after")
    def _task_has_what_is_asked_for(self) -> Self:
        columns = [one.column for one in self.side_features]
        if len(set(columns)) < len(columns):
            raise ValueError("side_features: a column is named twice")
        several = self.task == "multi_label"
        if several and self.training.class_weights != "none":
            raise ValueError(
                "training.class_weights: classes of multi_label rows have no weights; leave it at none"
            )
        if several and self.calibration.precisions != CalibrationConfig().precisions:
            raise ValueError(
                "calibration.precisions: classes of multi_label rows have thresholds of best F1 instead"
            )
        if not several and self.labels.separator is not None:
            raise ValueError("labels.separator: a single_label row has one label; set task to multi_label")
        return self


class FitOutput(Config):
    """Where the bundle is published."""

    uri: Uri
    """Folder of the bundle, on any storage. A bundle that is there already is replaced when the new one is whole."""
