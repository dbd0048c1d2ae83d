"""A SavedModel answers what the pipeline answers, without the engine, for every kind of head."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter

from engine import export
from engine.backbones.kinds import BackboneConfig
from engine.embedder import Embedder
from engine.errors import BundleError, CanaryMismatch, RecipeError
from engine.export import export_bundle
from engine.heads.bundle import Bundle, TrainedHead, open_bundle, publish_bundle
from engine.heads.confidence import Calibration
from engine.heads.kinds import HeadConfig, open_head
from engine.images import decode_image
from engine.predictor import Predictor
from engine.resolve import Network, resolve
from engine.runtimes.kinds import TensorFlowRuntimeConfig
from engine.storage import StorageConfig, open_store
from tests.flows.archives import crop_jpeg

SIDE = 32
BACKBONE = {
    "kind": "keras_application",
    "name": "MobileNetV2",
    "weights": "random",
    "seed": 3,
    "input_size": SIDE,
    "layer": "block_2_add",
}
NAMES = ("ant", "bee", "cat")
HEADS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear"},
    "mlp": {"kind": "mlp", "hidden": [5]},
    "knn": {"kind": "knn", "k": 3},
}


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return record_of_backbone()


def record_of_backbone() -> dict[str, Any]:
    """Of an embedding table that this backbone has made."""
    backbone = TypeAdapter(BackboneConfig).validate_python(BACKBONE)
    found = resolve(Network(backbone, TensorFlowRuntimeConfig(), StorageConfig()), None)
    return {
        "backbone": backbone.model_dump(mode="json"),
        "runtime": found.runtime.model_dump(mode="json"),
        "fingerprint": found.fingerprint,
        "width": found.graph.width,
        "canary": found.canary,
        "contract": {f"fingerprint.{name}": value for name, value in found.fingerprint_fields.items()},
    }


def embedder_of(record: dict[str, Any]) -> Embedder:
    backbone = TypeAdapter(BackboneConfig).validate_python(record["backbone"])
    resolution = resolve(Network(backbone, TensorFlowRuntimeConfig(), StorageConfig()), None, record)
    return Embedder(resolution.graph, resolution.runtime)


def photos(count: int = 12) -> list[bytes]:
    return [crop_jpeg(number, side_px=40)[0] for number in range(count)]


def pixels_of(encoded: list[bytes]) -> NDArray[np.uint8]:
    return np.stack([decode_image(one, SIDE, "stretch", 10**6).pixels_SS3 for one in encoded])


def publish(folder: Path, record: dict[str, Any], head: dict[str, Any], several: bool = False) -> Bundle:
    config = TypeAdapter(HeadConfig).validate_python(head)
    rng = np.random.default_rng(0)
    if head["kind"] == "knn":
        seen_ND, classes_N = embedder_of(record).embed(pixels_of(photos())), np.arange(12) % 3
        targets_N = np.eye(3, dtype=np.uint8)[classes_N] if several else classes_N
        network = open_head(config).remember(seen_ND, targets_N, 3)
    else:
        network = open_head(config).build(record["width"], 3, seed=0)
        network.set_weights([rng.normal(size=weights.shape) for weights in network.get_weights()])
    trained = TrainedHead(
        config,
        network,
        NAMES,
        "multi_label" if several else "single_label",
        Calibration(temperature=1.7, entropy_exponent=0.0 if several else -0.2),
        (0.5, 0.3, 0.7) if several else (),
    )
    publish_bundle(open_store(str(folder)), trained, table_record=record, metrics={}, recipe={})
    return open_bundle(open_store(str(folder)))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_the_model_answers_what_the_pipeline_answers(
    head: str, several: bool, record: dict[str, Any], tmp_path: Path
) -> None:
    bundle = publish(tmp_path / "bundle", record, HEADS[head], several)
    exported = export_bundle(bundle, open_store(str(tmp_path / "model")), StorageConfig())
    assert exported.largest_difference < 1e-5
    assert exported.bytes_written == sum(
        path.stat().st_size for path in (tmp_path / "model").rglob("*") if path.is_file()
    )
    pixels_BSS3 = pixels_of(photos())
    wanted = Predictor(bundle, top_k=3).probabilities(embedder_of(record).embed(pixels_BSS3))
    model = tf.saved_model.load(str(tmp_path / "model"))
    found = model.signatures["serving_default"](pixels=tf.constant(pixels_BSS3))
    np.testing.assert_allclose(found["probabilities"], wanted, atol=1e-5)
    assert [label.decode() for label in found["label"].numpy()] == [
        NAMES[row] for row in wanted.argmax(axis=1)
    ]
    np.testing.assert_allclose(found["confidence"], wanted.max(axis=1), atol=1e-5)
    assert [name.decode() for name in found["classes"].numpy()] == list(NAMES)
    if several:
        np.testing.assert_array_equal(found["given"], wanted >= np.float32([0.5, 0.3, 0.7]))
    decoded = model.signatures["encoded"](encoded=tf.constant(photos()))
    np.testing.assert_allclose(decoded["probabilities"], wanted, atol=0.15)  # two decoders, a random network
    assert np.abs(decoded["probabilities"] - wanted).mean() < 0.02
    facts = json.loads((tmp_path / "model" / "engine.json").read_text())
    assert (facts["bundle"], facts["fingerprint"]) == (bundle.id, record["fingerprint"])


@pytest.mark.parametrize("resize", ["stretch", "center_crop", "letterbox"])
@pytest.mark.parametrize("size", [(32, 32), (20, 27), (100, 61), (31, 90), (64, 16), (7, 300)])
def test_images_are_brought_to_size_as_the_pipeline_does(resize: Any, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert("RGB")
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    ours = decode_image(buffer.getvalue(), SIDE, resize, 10**6).pixels_SS3.astype(int)
    theirs = export._decoded(tf.constant(buffer.getvalue()), SIDE, resize).numpy().astype(int)
    assert np.abs(ours - theirs).max() <= 2


def test_what_cannot_be_exported_is_refused(record: dict[str, Any], tmp_path: Path) -> None:
    bundle = publish(tmp_path / "bundle", record, HEADS["linear"])
    full = open_store(str(tmp_path / "bundle"))
    with pytest.raises(RecipeError, match="not empty"):
        export_bundle(bundle, full, StorageConfig())
    target = open_store(str(tmp_path / "model"))
    reduced = {**record, "runtime": {**record["runtime"], "precision": "bfloat16"}}
    other = publish(tmp_path / "reduced", reduced, HEADS["linear"])
    with pytest.raises(RecipeError, match=r"(?s)reduced precision.*bfloat16"):
        export_bundle(other, target, StorageConfig())
    seed = {**record, "backbone": {**record["backbone"], "seed": 4}}
    with pytest.raises(CanaryMismatch, match="another backbone"):
        export_bundle(publish(tmp_path / "seed", seed, HEADS["linear"]), target, StorageConfig())
    assert not list(target.names())


def test_a_model_that_answers_something_else_is_not_written(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = publish(tmp_path / "bundle", record, HEADS["linear"])
    monkeypatch.setattr(export, "_calibrated", lambda logits, calibration: logits)
    with pytest.raises(BundleError, match="answers something else than the pipeline"):
        export_bundle(bundle, open_store(str(tmp_path / "model")), StorageConfig())
    assert not list(open_store(str(tmp_path / "model")).names())
