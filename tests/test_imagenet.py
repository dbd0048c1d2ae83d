"""ImageNet's classes, and networks' own classifiers as bundles: they answer what the whole network answers."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backbones.imagenet_top import imagenet_top
from engine.backbones.kinds import (
    EfficientNetLite0Config,
    KerasApplicationConfig,
    SavedModelConfig,
    build_backbone,
    named_backbone,
)
from engine.backbones.weights import randomise
from engine.decisions import PredictionOutput, decisions_of
from engine.embedder import canary_pixels
from engine.errors import RecipeError
from engine.imagenet import imagenet_classes, publish_imagenet_bundle
from engine.predictor import Predictor
from engine.runtimes.kinds import TensorFlowRuntimeConfig
from engine.storage import StorageConfig, open_store
from tests.embedding_tables import publish_linear

SIDE_PX = 64


def test_classes_are_those_of_decode_predictions_in_its_order() -> None:
    """Keras states the MD5 of the index that it downloads; ours, spelled alike, has the same."""
    from keras.applications import imagenet_utils

    index = {str(place): [one.wordnet_id, one.name] for place, one in enumerate(imagenet_classes())}
    digest = hashlib.md5(json.dumps(index).encode()).hexdigest()
    assert f'file_hash="{digest}"' in inspect.getsource(imagenet_utils.decode_predictions)


def test_labels_are_the_names_and_where_two_have_one_name_the_ids_tell_them_apart() -> None:
    classes = imagenet_classes()
    assert len({one.label for one in classes}) == 1000
    assert [one.label for one in classes if one.label != one.name] == [
        "crane_n02012849",  # the bird
        "crane_n03126707",  # the machine
        "maillot_n03710637",
        "maillot_n03710721",
    ]


def test_the_bundle_answers_what_the_whole_network_answers(tmp_path: Path) -> None:
    import keras

    config = KerasApplicationConfig(name="MobileNetV2", weights="random", seed=5, input_size=SIDE_PX)
    bundle = publish_imagenet_bundle(
        config, TensorFlowRuntimeConfig(), open_store(str(tmp_path)), StorageConfig()
    )
    backbone = build_backbone(config, StorageConfig())
    whole = keras.applications.MobileNetV2(include_top=True, weights=None, input_shape=(SIDE_PX, SIDE_PX, 3))
    randomise(whole, seed=5)
    scaled_CSS3 = np.asarray(backbone.scaling.apply(canary_pixels(SIDE_PX).astype(np.float32)), np.float32)
    wanted_CK = np.asarray(whole.predict(scaled_CSS3, verbose=0))
    found_CK = Predictor(bundle, top_k=1).probabilities(np.asarray(backbone.network(scaled_CSS3)))
    place_of = {label: place for place, label in enumerate(bundle.manifest.classes)}
    in_order_CK = found_CK[:, [place_of[one.label] for one in imagenet_classes()]]
    np.testing.assert_allclose(in_order_CK, wanted_CK, atol=1e-5)
    # Random weights give every class about 0.001, so that only logarithms tell whether it is the same class and image.
    np.testing.assert_allclose(np.log(in_order_CK), np.log(wanted_CK), atol=2e-6)
    assert all(np.log(wanted_CK).std(axis=axis).mean() > 1e-4 for axis in (0, 1))
    assert bundle.manifest.classes == tuple(sorted(bundle.manifest.classes))
    record = bundle.document("embeddings_table")
    assert record["backbone"] == config.model_dump(mode="json")
    assert (record["width"], len(record["canary"])) == (backbone.width, 4)


@pytest.mark.parametrize(
    ("name", "kinds"), [("MobileNetV3Small", "Conv2D, Flatten, Activation"), ("MobileNet", "Conv2D, Reshape")]
)
def test_a_network_with_another_classifier_is_refused_by_name(name: str, kinds: str) -> None:
    with pytest.raises(RecipeError, match=f"the classifier of {name} is not one dense layer") as caught:
        imagenet_top(named_backbone(name, {"input_size": 224}), StorageConfig())
    assert kinds in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (EfficientNetLite0Config(input_size=96, pooling="max"), "pooling max"),
        (EfficientNetLite0Config(input_size=96, layer="head_relu"), "layer head_relu"),
        (
            SavedModelConfig(kind="saved_model", weights="/m", input_size=96, scaling="unit"),
            "kind saved_model",
        ),
    ],
)
def test_a_network_that_is_cut_otherwise_or_comes_whole_from_a_file_is_refused(
    config: Any, said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        imagenet_top(config, StorageConfig())


def test_a_precision_that_is_left_open_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="runtime.precision"):
        publish_imagenet_bundle(
            EfficientNetLite0Config(input_size=96),
            TensorFlowRuntimeConfig(precision="auto"),
            open_store(str(tmp_path)),
            StorageConfig(),
        )


def test_a_label_map_of_class_ids_needs_a_bundle_that_has_them(tmp_path: Path) -> None:
    output = PredictionOutput(uri=str(tmp_path), label_map="class_ids")
    bundle = publish_linear(tmp_path / "bundle", np.ones((3, 2)), np.zeros(2), ("ant", "bee"))
    with pytest.raises(RecipeError, match="has no class_ids"):
        decisions_of(output, bundle.manifest.classes, StorageConfig(), bundle.store.uri)
    decided = decisions_of(output, ("ant", "bee"), StorageConfig(), "x", ("n1", "n2"))
    assert decided.labels == ("n1", "n2")
    assert decided.contract["label_map.bee"] == "n2"
