from __future__ import annotations

from pathlib import Path

import pytest

from engine.backbones.kinds import BackboneConfig, KerasApplicationConfig, backbone_names, describe_backbone
from engine.config import Config, check_recipe
from engine.errors import RecipeError
from tests.backbones.small_networks import run_python


class Recipe(Config):
    backbone: BackboneConfig


def checked(**fields: object) -> BackboneConfig:
    document = {"kind": "keras_application", "name": "MobileNetV2", "input_size": 96} | fields
    return check_recipe(Recipe, {"backbone": document}).backbone


def test_config_of_design_document_is_read_with_its_defaults() -> None:
    assert checked().model_dump() == {
        "kind": "keras_application",
        "name": "MobileNetV2",
        "weights": "imagenet",
        "weights_sha256": None,
        "seed": 0,
        "input_size": 96,
        "pooling": "avg",
        "layer": None,
        "resize": "stretch",
    }


@pytest.mark.parametrize(
    ("uri", "in_full"),
    [
        ("s3://b/x.weights.h5", "s3://b/x.weights.h5"),
        ("x.h5", f"{Path.cwd()}/x.h5"),
        ("file:///a/x%20y.keras", "/a/x y.keras"),
    ],
)
def test_weights_by_uri_are_accepted_by_their_ending_and_spelled_in_full(uri: str, in_full: str) -> None:
    assert checked(weights=uri).weights == in_full


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "imagnet"}, "did you mean 'imagenet'?"),
        (
            {"weights": "s3://b/model.pb"},
            "found 's3://b/model.pb'; allowed are imagenet, random, or a URI that ends in",
        ),
        ({"weights_sha256": "0" * 64}, "weights_sha256 belongs to a weights file given by URI"),
        ({"weights": "x.h5", "weights_sha256": "abc"}, "weights_sha256"),
        ({"input_size": 0}, "input_size"),
        ({"pooling": "mean"}, "'avg' or 'max'"),
        ({"seed": -1}, "seed"),
        ({"resize": "crop"}, "'stretch', 'letterbox' or 'center_crop'"),
        (
            {"kind": "efficientnet_lite0", "weights": "imagenet"},
            "unknown field",
        ),  # name belongs to the other kind
    ],
)
def test_wrong_field_is_refused_with_what_is_allowed(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        checked(**fields)
    assert message in str(caught.value)


def test_lite0_does_not_know_imagenet_as_a_word() -> None:
    with pytest.raises(RecipeError, match="allowed are package, random"):
        check_recipe(
            Recipe, {"backbone": {"kind": "efficientnet_lite0", "weights": "imagenet", "input_size": 96}}
        )


def test_menus_import_no_tensorflow_and_no_keras() -> None:
    code = (
        "import sys, engine.backbones.kinds, engine.runtimes.kinds;"
        "menus = set(sys.modules);"
        "import engine.embedder;"
        "heavy = {'tensorflow', 'keras', 'ray', 'pyarrow', 's3fs', 'PIL', 'h5py'};"
        "print(sorted(heavy & set(sys.modules)), 'numpy' in menus)"
    )
    assert run_python(code).strip() == "[] False"


def test_catalogue_has_lite0_and_the_networks_of_keras() -> None:
    names = backbone_names()
    assert names[0] == "efficientnet_lite0"
    assert {"MobileNetV2", "EfficientNetB0", "NASNetLarge", "ConvNeXtXLarge"} < set(names)
    assert "preprocess_input" not in names


def test_description_of_mobilenet_v2_holds_the_known_values() -> None:
    assert describe_backbone("MobileNetV2", input_size=96) == {
        "name": "MobileNetV2",
        "kind": "keras_application",
        "parameters": 2_257_984,
        "trainable": 0,
        "frozen": 2_257_984,
        "layers": 155,
        "width": 1280,
        "input_size": 96,
        "layer": None,
        "pooling": "avg",
        "scaling": "tf",
    }


def test_description_of_lite0_holds_the_known_values() -> None:
    described = describe_backbone(
        "efficientnet_lite0", input_size=64, layer="block0_project_bn", pooling="max"
    )
    assert (described["width"], described["parameters"], described["scaling"]) == (16, 1_984, "lite0")


def test_description_at_an_impossible_size_is_refused_as_in_a_recipe() -> None:
    with pytest.raises(RecipeError, match="MobileNetV2: 1 wrong field\n  input_size: found 0"):
        describe_backbone("MobileNetV2", input_size=0)


def test_config_is_a_hashable_value_that_names_its_architecture() -> None:
    config = KerasApplicationConfig(name="MobileNet", input_size=64)
    assert config.architecture() == "keras_application:MobileNet"
    assert {config: 1}[KerasApplicationConfig(name="MobileNet", input_size=64)] == 1
