"""A bundle and the backbone it belongs to as one SavedModel: images in, labels and probabilities out, no engine needed.

Two signatures: `serving_default` takes pixels, uint8 (B, S, S, 3), RGB, at the input size; `encoded` takes whole JPEG,
PNG, GIF or BMP files, string (B,). Shape letters: B images, S side in pixels, D embedding width, K classes.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from pydantic import TypeAdapter

from engine.backbones.kinds import BackboneConfig
from engine.embedder import Embedder, canary_pixels
from engine.errors import BundleError, RecipeError
from engine.heads.bundle import Bundle
from engine.heads.confidence import LEAST_ENTROPY, LEAST_TEMPERATURE, MOST_TEMPERATURE, Calibration
from engine.predictor import Predictor
from engine.resolve import Network, Resolution, resolve
from engine.runtimes.kinds import TensorFlowRuntimeConfig
from engine.runtimes.tensorflow import imported
from engine.storage import StorageConfig, Store

SAVED_MODEL = "saved_model.pb"  # written last: without it there is no model
FACTS = "engine.json"
# What a probability may differ from the pipeline's: both are float32, in another order of sums.
MOST_DIFFERENCE = 1e-4


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        uri: folder of the SavedModel.
        bytes_written: of all files.
        largest_difference: of any probability to the pipeline's, on the canary images.
    """

    uri: str
    bytes_written: int
    largest_difference: float


def export_bundle(bundle: Bundle, target: Store, storage: StorageConfig) -> Exported:
    """Load the backbone as the bundle's embeddings were made with, put the head behind it, compare, write.

    Args:
        bundle: opened.
        target: an empty folder.
        storage: how weights are reached.

    Raises:
        BundleError: the model answers something else than the pipeline.
        CanaryMismatch: the backbone's weights are not those of the embeddings any more.
        RecipeError: the target is not empty, the embeddings were made in a reduced precision, or the head takes side
            features.
        WeightsError, StorageError: something cannot be read or written.
    """
    if next(iter(target.names()), None) is not None:
        raise RecipeError(
            f"{target.uri}: not empty",
            wanted="an empty folder",
            way_out="remove what is there, or name another",
        )
    if bundle.manifest.side_features:
        raise RecipeError(
            f"export of {bundle.store.uri}: its head takes columns of a table, which an image does not have",
            found=", ".join(one.column for one in bundle.manifest.side_features),
            way_out="fit without side_features",
        )
    record = bundle.document("embeddings_table")
    resolution = _backbone(record, storage)
    with tempfile.TemporaryDirectory(prefix="engine-export-") as folder:
        module, signatures = _module(bundle, resolution, record["backbone"]["resize"])
        tf.saved_model.save(module, folder, signatures)
        Path(folder, FACTS).write_text(json.dumps(_facts(bundle, record), indent=1) + "\n")
        difference = _largest_difference(Path(folder), bundle, resolution)
        return Exported(target.uri, _upload(Path(folder), target), difference)


def _backbone(record: Mapping[str, Any], storage: StorageConfig) -> Resolution:
    precision = record["runtime"]["precision"]
    if precision not in ("float32", "tf32"):
        raise RecipeError(
            "export: the embeddings were made in a reduced precision, which the exported model would not have",
            found=precision,
            wanted="float32",
            way_out="extract with runtime.precision float32, and fit on that table",
        )
    backbone = TypeAdapter(BackboneConfig).validate_python(record["backbone"])
    return resolve(Network(backbone, TensorFlowRuntimeConfig(), storage), None, record)


def _module(bundle: Bundle, resolution: Resolution, resize: str) -> tuple[tf.Module, dict[str, Any]]:
    """The module, and its signatures, as `tf.saved_model.save` takes them."""
    side = resolution.graph.input_size
    embed = imported(tf.compat.v1.GraphDef.FromString(resolution.graph.graph_def), side)
    manifest = bundle.manifest
    module = tf.Module(name="image_classifier")
    module.embed = embed
    logits_of = _head(bundle, module)
    names = tf.constant(manifest.classes)
    several = manifest.task == "multi_label"
    thresholds_K = tf.constant(manifest.thresholds, tf.float32)

    def answer(pixels_BSS3: tf.Tensor) -> dict[str, tf.Tensor]:
        logits_BK = _calibrated(logits_of(embed(pixels_BSS3)), manifest.calibration)
        probabilities_BK = tf.sigmoid(logits_BK) if several else tf.nn.softmax(logits_BK)
        best_B = tf.argmax(probabilities_BK, axis=1)
        found = {
            "label": tf.gather(names, best_B),
            "confidence": tf.reduce_max(probabilities_BK, axis=1),
            "probabilities": probabilities_BK,
            "classes": names,
        }
        return found | {"given": probabilities_BK >= thresholds_K} if several else found

    def answer_encoded(encoded_B: tf.Tensor) -> dict[str, tf.Tensor]:
        square = tf.TensorSpec((side, side, 3), tf.uint8)
        return answer(
            tf.map_fn(lambda one: _decoded(one, side, resize), encoded_B, fn_output_signature=square)
        )

    pixels = tf.TensorSpec((None, side, side, 3), tf.uint8, name="pixels")
    module.of_pixels = tf.function(answer, input_signature=[pixels])
    module.of_encoded = tf.function(
        answer_encoded, input_signature=[tf.TensorSpec((None,), tf.string, name="encoded")]
    )
    return module, {"serving_default": module.of_pixels, "encoded": module.of_encoded}


def _head(bundle: Bundle, module: tf.Module) -> Any:
    """(B, D) float32 to (B, K) logits, as the predictor computes them; variables are the module's."""
    matrix = bundle.matrix()
    if matrix is not None:
        kernel_DK, bias_K = tf.constant(matrix.kernel_DK), tf.constant(matrix.bias_K)
        return lambda embeddings_BD: embeddings_BD @ kernel_DK + bias_K
    network = bundle.network()
    module.head_variables = [variable.value for variable in network.variables]  # else they would not be saved
    return lambda embeddings_BD: network(embeddings_BD, training=False)


def _calibrated(logits_BK: tf.Tensor, calibration: Calibration) -> tf.Tensor:
    """`Calibration.apply`, in TensorFlow."""
    if not calibration.entropy_exponent:
        return logits_BK / calibration.temperature
    shifted_BK = logits_BK - tf.reduce_max(logits_BK, axis=1, keepdims=True)
    count = logits_BK.shape[1]
    is_first_BK = tf.one_hot(tf.argmax(logits_BK, axis=1), count, on_value=True, off_value=False)
    raised_BK = tf.where(is_first_BK, 0.0, tf.exp(shifted_BK))
    others_B = tf.reduce_sum(raised_BK, axis=1)
    entropy_B = tf.math.log1p(others_B) - tf.reduce_sum(raised_BK * shifted_BK, axis=1) / (1 + others_B)
    share_B = tf.clip_by_value(entropy_B / math.log(count), LEAST_ENTROPY, 1.0)
    temperatures_B = calibration.temperature * tf.exp(calibration.entropy_exponent * tf.math.log(share_B))
    temperatures_B = tf.clip_by_value(temperatures_B, LEAST_TEMPERATURE, MOST_TEMPERATURE)
    return logits_BK / temperatures_B[:, None]


def _decoded(encoded: tf.Tensor, side: int, resize: str) -> tf.Tensor:
    """One image, uint8 (S, S, 3), as `engine.images` decodes it but for what its module page says of other decoders.

    Where an axis shrinks, means over areas; where it grows, between the two nearest pixels.
    """
    pixels = tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE"),
        lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
    )
    height, width = tf.shape(pixels)[0], tf.shape(pixels)[1]
    target_height = target_width = tf.constant(side)
    if resize == "center_crop":
        edge = tf.minimum(height, width)
        upper, left = (height - edge) // 2, (width - edge) // 2
        pixels = pixels[upper : upper + edge, left : left + edge]
    elif resize == "letterbox":
        longer = tf.maximum(height, width)
        target_height = tf.maximum(1, (2 * height * side + longer) // (2 * longer))
        target_width = tf.maximum(1, (2 * width * side + longer) // (2 * longer))
    fitted = _along(_along(pixels, 0, target_height), 1, target_width)
    rounded = tf.cast(tf.clip_by_value(tf.round(fitted), 0, 255), tf.uint8)
    upper, left = (side - target_height) // 2, (side - target_width) // 2
    padded = tf.image.pad_to_bounding_box(rounded, upper, left, side, side)
    return tf.ensure_shape(padded, (side, side, 3))


def _along(pixels: tf.Tensor, axis: int, target: tf.Tensor) -> tf.Tensor:
    """Bring one axis to a size; float32."""
    shape = tf.shape(pixels)
    size = tf.tensor_scatter_nd_update(shape[:2], [[axis]], [target])
    batch = tf.cast(pixels, tf.float32)[None]
    shrunk = tf.cond(
        shape[axis] >= target,
        lambda: tf.compat.v1.image.resize_area(batch, size),
        lambda: tf.image.resize(batch, size),
    )
    return shrunk[0]


def _largest_difference(folder: Path, bundle: Bundle, resolution: Resolution) -> float:
    """Of any probability, between the saved model read again and the pipeline.

    Raises:
        BundleError: it is more than rounding.
    """
    pixels_CSS3 = canary_pixels(resolution.graph.input_size)
    wanted = Predictor(bundle, top_k=1).probabilities(
        Embedder(resolution.graph, resolution.runtime).embed(pixels_CSS3)
    )
    loaded = tf.saved_model.load(str(folder))
    found = loaded.signatures["serving_default"](pixels=tf.constant(pixels_CSS3))["probabilities"].numpy()
    difference = float(np.abs(found - wanted).max())
    if not difference <= MOST_DIFFERENCE:
        raise BundleError(
            f"export of {bundle.store.uri}: the saved model answers something else than the pipeline",
            found=f"a probability that differs by {difference:.6f}",
            wanted=f"at most {MOST_DIFFERENCE}",
        )
    return difference


def _facts(bundle: Bundle, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the SavedModel was made of, beside it."""
    manifest = bundle.manifest
    return {
        "bundle": bundle.id,
        "bundle_uri": bundle.store.uri,
        "task": manifest.task,
        "classes": manifest.classes,
        "class_ids": manifest.class_ids,
        "thresholds": manifest.thresholds,
        "fingerprint": manifest.fingerprint,
        "backbone": record["backbone"],
        "versions": manifest.versions,
    }


def _upload(folder: Path, target: Store) -> int:
    """Every file, the one that makes it a model last; bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    written = 0
    for path in sorted(files, key=lambda path: path.name == SAVED_MODEL):
        content = path.read_bytes()
        target.write(path.relative_to(folder).as_posix(), content)
        written += len(content)
    return written
