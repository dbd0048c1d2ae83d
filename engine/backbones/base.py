"""What every backbone is: a frozen network, the pixel scaling it was trained with, its width; not how it is run.

Shape letters: B batch, S image side in pixels, D embedding width. Importing this module imports no Keras.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import BackboneError
from engine.import_without import import_without

if TYPE_CHECKING:
    from engine.backbones.kinds import BackboneConfig

# DESIGN section 5: unsafe model loading before 3.13.1.
MIN_KERAS = (3, 13, 1)


@dataclass(frozen=True, slots=True)
class PixelScaling:
    """How byte pixels become the numbers a network was trained on: perhaps RGB -> BGR, then one line per channel."""

    name: str
    """Of the convention, for people: tf, caffe, torch, unit, none (the network scales inside), lite0, own."""
    multiply: tuple[float, float, float]
    """Factor of each channel, in the order after the swap."""
    add: tuple[float, float, float]
    """Offset of each channel, after the factor."""
    bgr: bool = False
    """Channels are swapped to blue, green, red first."""

    def apply(self, pixels_BSS3: Any) -> Any:
        """Scale float32 pixels 0..255, shape (B, S, S, 3), RGB; a new tensor of the same shape.

        Written with operators only, so that it works inside any graph: TensorFlow and Keras tensors keep
        float32, a NumPy array becomes float64.
        """
        swapped = pixels_BSS3[..., ::-1] if self.bgr else pixels_BSS3
        if self.multiply == (1.0, 1.0, 1.0) and self.add == (0.0, 0.0, 0.0):
            return swapped
        return swapped * self.multiply + self.add


@dataclass(frozen=True, slots=True)
class Backbone:
    """A built network, cut, pooled and frozen, together with what must be known to run it."""

    config: BackboneConfig
    network: Any
    """keras.Model: scaled pixels (B, S, S, 3) float32 -> embeddings (B, D) float32; nothing in it is trainable."""
    scaling: PixelScaling
    architecture: str
    """Which network it is, before its tensors; of one from a file a digest of what the file says of it."""

    @property
    def input_size(self) -> int:
        """S, pixels."""
        return self.config.input_size

    @property
    def width(self) -> int:
        """D, numbers in one embedding."""
        return int(self.network.output_shape[-1])


def require_keras() -> Any:
    """The `keras` module, after checking that it is the Keras this engine can use.

    Raises:
        BackboneError: not Keras 3, too old, another backend than TensorFlow, or settings that change results.
    """
    with import_without("sklearn"):  # Keras would load it for wrappers that nobody here uses: 1.3 of 5.6 s
        import keras  # never tf.keras: Ray Train sets TF_USE_LEGACY_KERAS=1 in its workers

    version = tuple(int(number) for number in keras.__version__.split(".")[:3] if number.isdecimal())
    _require(
        "Keras",
        keras.__version__,
        f">= {'.'.join(map(str, MIN_KERAS))}, < 4",
        MIN_KERAS <= version < (4,),
    )
    _require_setting("backend", keras.config.backend(), "tensorflow")
    _require_setting("image_data_format", keras.config.image_data_format(), "channels_last")
    _require_setting("floatx", keras.config.floatx(), "float32")
    return keras


def _require_setting(name: str, found: str, wanted: str) -> None:
    _require(f"the setting {name!r} of Keras", found, wanted, found == wanted)


def _require(thing: str, found: str, wanted: str, holds: bool) -> None:
    if not holds:
        raise BackboneError(
            f"{thing} does not fit this engine",
            found=found,
            wanted=wanted,
            way_out="install the locked versions (`make`); settings come from ~/.keras/keras.json or KERAS_BACKEND",
        )
