"""The recipe blocks of fine-tuning and what each field means. Imports nothing heavy; not for: doing any of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from engine.backbones.kinds import BackboneConfig, KerasFileConfig, SavedModelConfig
from engine.config import Config
from engine.errors import RecipeError
from engine.heads.kinds import (
    CustomHeadConfig,
    HeadConfig,
    KnnHeadConfig,
    LinearHeadConfig,
    MlpHeadConfig,
)
from engine.recipes import Limits, ReportConfig
from engine.storage import Uri
from engine.strategies.kinds import Mirrored, StrategyConfig
from engine.training.kinds import (
    AdamConfig,
    CalibrationConfig,
    GradientOptimizerConfig,
    LabelsConfig,
    LbfgsConfig,
    OptimizerConfig,
    SplitConfig,
    Task,
    TrainingConfig,
)

if TYPE_CHECKING:
    from engine.heads.bundle import Bundle

# What a block of the recipe does not say; other defaults than `fit` has.
PHASE_OPTIMIZER = {"kind": "adam", "learning_rate": 0.003}
OPTIMIZER = {"kind": "adam", "learning_rate": 1e-5, "warmup_epochs": 1.0, "schedule": "cosine"}


class UnfreezeConfig(Config):
    """Which layers of the backbone learn; one of the first four fields. `engine backbones NAME --layers` lists layers.

    Whatever is unfrozen, the backbone computes as it does when it answers: BatchNorm by its stored statistics, which
    never change, and nothing is dropped.
    """

    from_layer: str | None = Field(default=None, min_length=1)
    """Name of the first layer that learns; all behind it do, too."""
    top_layers: int | None = Field(default=None, ge=1)
    """The last so many layers learn."""
    below: int | None = Field(default=None, ge=0)
    """The first so many layers stay frozen, and all others learn."""
    fraction: float | None = Field(default=None, gt=0, le=1)
    """Share of the layers that learns, from the end; at least one."""
    batch_norm: Literal["frozen", "scale_and_shift"] = "frozen"
    """Whether scale and shift of unfrozen BatchNorm layers learn. Their statistics never do."""

    @model_validator(mode="after")
    def _says_it_once(self) -> Self:
        fields = ("from_layer", "top_layers", "below", "fraction")
        given = [name for name in fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(fields)}; given: {', '.join(given) or 'none'}")
        return self


def _all_is_a_fraction(found: object) -> object:
    return {"fraction": 1.0} if found == "all" else found


Unfreeze = Annotated[
    UnfreezeConfig,
    BeforeValidator(_all_is_a_fraction, json_schema_input_type=UnfreezeConfig | Literal["all"]),
]


class AugmentConfig(Config):
    """How training images are changed, each in its own way in each epoch; validation and test images are not.

    What happens to an image hangs on the seed, the step and the image's place in it, not on the number of devices.
    """

    flip: bool = True
    """Left and right change places, of every other image."""
    crop: float = Field(default=0.0, ge=0, lt=1)
    """Largest share of an image's area that is cut away before it is brought to size again, with aspect ratios from 3:4
    to 4:3 as far as the area leaves room for them. 0: none."""
    rotation: float = Field(default=0.0, ge=0, le=180)
    """Degrees at most, to either side; what comes in from outside is the image, mirrored."""
    translation: float = Field(default=0.0, ge=0, lt=1)
    """Share of the side at most, along each axis and to either side; filled as with rotation."""
    brightness: float = Field(default=0.0, ge=0, le=1)
    """Share of the range of values that is added or taken away at most."""
    contrast: float = Field(default=0.0, ge=0, lt=1)
    """Contrast is multiplied by 1 - contrast to 1 + contrast."""
    saturation: float = Field(default=0.0, ge=0, lt=0.5)
    """Distance from 0.5 at most, where 0.5 leaves colours as they are, 0 makes them grey."""
    hue: float = Field(default=0.0, ge=0, le=1)
    """Largest turn of the colour circle, where 1 is half of it."""
    rand_augment: int = Field(default=0, ge=0)
    """Operations on each image after all of the above (RandAugment, Cubuk et al., 2020), drawn anew for each from
    fourteen: none, auto contrast, equalize, rotate, solarize, colour, posterize, contrast, brightness, sharpness, and
    shear and translate along either axis. Each costs 0.5 ms of a core for an image of 160 px, where a step with the
    last 12 layers of EfficientNet-Lite0 unfrozen costs 6 (one core of two, 2026-11-23). 0: none."""
    rand_magnitude: float = Field(default=0.5, ge=0, le=1)
    """How far each of those goes, to either side. 1: as far as torchvision's do: 30 degrees, a shear of 0.3, 0.45 of
    the side, inverted from level 0 on, 0.1 and 1.9 of colour, contrast, brightness and sharpness, 4 bits of a level.
    Auto contrast and equalize have no magnitude."""
    mixup: float = Field(default=0.0, ge=0)
    """Parameter of the Beta distribution that says how much of another image of the batch, and of its label, is mixed
    into each (Zhang et al., 2018). 0: none."""
    cutmix: float = Field(default=0.0, ge=0)
    """The same for a rectangle that is taken from another image (Yun et al., 2019). 0: none."""

    @model_validator(mode="after")
    def _mixes_one_way(self) -> Self:
        if self.mixup and self.cutmix:
            raise ValueError("mixup and cutmix: one of them")
        return self


class HeadPhaseTraining(Config):
    """As `training` of `fit`, of which it has these fields."""

    epochs: int = Field(default=100, ge=1)
    """As of `fit`."""
    batch_size: int = Field(default=256, ge=1)
    """As of `fit`."""
    patience: int = Field(default=3, ge=1)
    """As of `fit`."""
    class_weights: Literal["none", "balanced"] = "none"
    """As of `fit`."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """As of `fit`."""
    standardise: bool = False
    """As of `fit`."""
    seed: int = Field(default=0, ge=0)
    """As of `fit`."""

    def as_of_fit(self) -> TrainingConfig:
        """Embeddings are held in memory, and there are no checkpoints: it takes seconds."""
        return TrainingConfig(**self.model_dump(), rows="memory")


class HeadPhase(Config):
    """Fitting a new head on embeddings of the frozen backbone, before any of it is unfrozen."""

    optimizer: Annotated[
        OptimizerConfig, BeforeValidator(lambda found: _completed(found, PHASE_OPTIMIZER))
    ] = AdamConfig.model_validate(PHASE_OPTIMIZER)
    """As of `fit`, but with a learning rate of 0.003 where none is given for adam or adamw."""
    training: HeadPhaseTraining = HeadPhaseTraining()
    """How long and in what portions."""


def _completed(found: object, defaults: dict[str, object]) -> object:
    """A recipe's block, with what it does not say."""
    if not isinstance(found, dict):
        return found
    if defaults is PHASE_OPTIMIZER and found.get("kind", "adam") not in ("adam", "adamw"):
        return found
    return defaults | found


class FinetuneLimits(Config):
    """What makes a reject, and how many are too many. A shard that cannot be read to its end is one too many."""

    max_reject_fraction: float = Field(default=0.01, ge=0, le=1)
    """Rejects / samples above which nothing is trained, with exit code 3."""
    max_rejects: int | None = Field(default=None, ge=0)
    """Rejects above which nothing is trained, with exit code 3; null: no such limit."""
    max_pixels: int = Limits.model_fields["max_pixels"].default
    """As of `extract`."""
    max_sample_bytes: int = Limits.model_fields["max_sample_bytes"].default
    """As of `extract`."""

    def as_of_extract(self) -> Limits:
        """For its readers."""
        return Limits(**self.model_dump())


class FinetuneTrainingConfig(Config):
    """How long and in what portions backbone and head are trained together."""

    epochs: int = Field(default=10, ge=1)
    """Most passes over the training images."""
    batch_size: int = Field(default=32, ge=1)
    """Images per optimizer step, over all devices together."""
    images_at_once: int | None = Field(default=None, ge=1)
    """Images that a device computes on at once; a step sums the gradients of as many portions as it takes. null: its
    whole share of the batch."""
    patience: int = Field(default=3, ge=1)
    """Epochs in a row without a lower validation loss (with the label smoothing of training) after which training
    stops. The weights with the lowest one are kept, those from before the first epoch among them."""
    class_weights: Literal["none", "balanced"] = "none"
    """As of `fit`."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """As of `fit`."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest norm of a step's whole gradient; a longer one is shortened to it. null: as it is."""
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    """Of the arithmetic of the backbone while it learns and is watched; weights, head, and what is judged and published
    in the end are float32. mixed_float16 scales the loss: a step whose gradients do not fit is skipped, halves the
    scale, and does not count for the learning rate's schedule."""
    seed: int = Field(default=0, ge=0)
    """Of the order of the images in each epoch, of augmentation and of dropout."""
    images: Literal["everywhere", "split"] = "everywhere"
    """Which worker decodes an image and has it on its disk. `everywhere`: each of them; an epoch's order, and with it
    the losses, are the same for any number of workers. `split`: one of them, so that decoding and disks hold for more
    images the more workers there are. Each worker then shuffles its own, of which every batch has as large a share as
    the worker has of all, and mixup and cutmix mix images of one worker."""
    checkpoint_seconds: float = Field(default=300.0, ge=0)
    """Least time between checkpoints, which are made between steps; training that was interrupted goes on where the
    last one was made. 0: one after each step."""


class FinetuneSettings(Config):
    """Everything of fine-tuning but where it reads and writes. On one device it repeats exactly for equal settings."""

    backbone: BackboneConfig
    """The network to begin with."""
    task: Task = "single_label"
    """As of `fit`."""
    labels: LabelsConfig = LabelsConfig()
    """Where the labels are: `source.label` (null), or a file."""
    split: SplitConfig = SplitConfig()
    """Which images train, which choose when to stop, and which only judge. Columns are those of `source.metadata`, or
    of the label file."""
    head: HeadConfig = LinearHeadConfig()
    """The classifier to begin with, where no bundle is given."""
    head_phase: HeadPhase = HeadPhase()
    """How it is fitted before the backbone is unfrozen."""
    unfreeze: Unfreeze
    """Which layers of the backbone learn; `all` for each of them."""
    augment: AugmentConfig = AugmentConfig()
    """How training images are changed."""
    optimizer: Annotated[
        GradientOptimizerConfig,
        Field(discriminator="kind"),
        BeforeValidator(lambda found: _completed(found, OPTIMIZER)),
    ] = AdamConfig.model_validate(OPTIMIZER)
    """How weights follow gradients; where the recipe does not say otherwise adam, at a learning rate of 0.00001 that
    rises for an epoch and falls along a cosine. A rate that suits a head forgets what the backbone knows."""
    training: FinetuneTrainingConfig = FinetuneTrainingConfig()
    """How long and in what portions."""
    calibration: CalibrationConfig = CalibrationConfig()
    """How confidences are made honest."""
    report: ReportConfig = ReportConfig()
    """What the page about the bundle shows."""
    strategy: StrategyConfig = Mirrored()
    """How the work is laid on devices."""
    limits: FinetuneLimits = FinetuneLimits()
    """What makes a reject, and how many are too many."""
    publish: Literal["if_better", "always"] = "if_better"
    """`if_better`: the bundle that is there stays where fine-tuning did not raise the share of right answers on the
    test images, or on the validation images where there are none; exit code 3 then."""

    @model_validator(mode="after")
    def _head_can_learn(self) -> Self:
        if not isinstance(self.head, LinearHeadConfig | MlpHeadConfig | CustomHeadConfig):
            raise ValueError(f"head: {self.head.kind} does not learn by gradients; linear, mlp or custom do")
        weighted = [self.training.class_weights, self.head_phase.training.class_weights] != ["none", "none"]
        if self.task == "multi_label" and weighted:
            raise ValueError("class_weights: classes of multi_label rows have no weights")
        if self.task == "multi_label" and self.calibration.precisions != CalibrationConfig().precisions:
            raise ValueError("calibration.precisions: classes of multi_label rows have thresholds of best F1")
        if self.task == "single_label" and self.labels.separator is not None:
            raise ValueError("labels.separator: a single_label row has one label; set task to multi_label")
        drops = isinstance(self.head, MlpHeadConfig) and self.head.dropout > 0
        if drops and isinstance(self.head_phase.optimizer, LbfgsConfig):
            raise ValueError("head_phase.optimizer: lbfgs cannot train a head with dropout; set it to 0")
        return self


class FinetuneOutput(Config):
    """Where the new backbone and its bundle are published."""

    uri: Uri
    """Folder of the bundle, on any storage; weights of the backbone lie in it, named by their digest, and stay there
    when another is published: tables may name them."""


def require_learning_network(config: BackboneConfig) -> None:
    """Refuse a network that is only a graph, and one whose weights file would lack the layers behind a cut.

    Raises:
        RecipeError.
    """
    if isinstance(config, SavedModelConfig):
        raise RecipeError(
            "backbone.kind: a saved_model cannot be fine-tuned",
            found="a graph, which has no layers",
            wanted="keras_application, efficientnet_lite0 or keras_file",
            way_out="fit a head on its embeddings (`engine fit`), or save the network as .keras where it was made",
        )
    if config.layer is not None and not isinstance(config, KerasFileConfig):
        raise RecipeError(
            f"backbone.layer: {config.layer}: a network that is cut cannot be fine-tuned",
            wanted="layer: null",
            way_out="leave backbone.layer out",
        )


def require_trainable_head(bundle: Bundle, task: Task) -> None:
    """Refuse a bundle whose head cannot be trained further with images alone.

    Raises:
        RecipeError: with what its head is.
    """
    manifest, way_out = bundle.manifest, "leave `bundle` out: a new head is fitted"
    if isinstance(manifest.head, KnnHeadConfig) or manifest.side_features:
        raise RecipeError(
            f"bundle {bundle.store.uri}: its head cannot be trained further with images alone",
            found=manifest.head.kind + (", with side features" if manifest.side_features else ""),
            way_out=way_out,
        )
    if manifest.task != task:
        raise RecipeError(
            f"bundle {bundle.store.uri}: its head is of another task",
            found=manifest.task,
            wanted=task,
            way_out=way_out,
        )
