from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from engine.backbones.base import Backbone
from engine.backbones.kinds import KerasFileConfig, build_backbone, built_without_weights, describe_backbone
from engine.config import check_recipe
from engine.errors import RecipeError, WeightsError
from engine.runtimes.freeze import freeze
from engine.storage import StorageConfig
from tests.backbones.small_networks import uneven_network

SIDE = 64
# Keras 3.15 saves with NumPy 2.4 through an __array__ that does not know `copy` yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def config_of(path: Path, **fields: Any) -> KerasFileConfig:
    stated = {"kind": "keras_file", "weights": str(path), "input_size": SIDE, "scaling": "none"}
    return check_recipe(KerasFileConfig, stated | fields)


def opened(path: Path, **fields: Any) -> Backbone:
    return build_backbone(config_of(path, **fields), StorageConfig())


def saved(network: Any, path: Path) -> Path:
    network.save(path)
    return path


def sequential(*middle: Any) -> Any:
    return keras.Sequential(
        [keras.Input((SIDE, SIDE, 3)), layers.Conv2D(4, 3, 2), *middle, layers.GlobalAveragePooling2D()]
    )


def rewritten(path: Path, old: str, new: str) -> Path:
    """The file with another config."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    assert old.encode() in entries["config.json"]
    entries["config.json"] = entries["config.json"].replace(old.encode(), new.encode())
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def test_network_of_a_file_gives_what_keras_gives_pooled(tmp_path: Path) -> None:
    network = uneven_network(SIDE)
    pixels = np.random.default_rng(5).integers(0, 256, (3, SIDE, SIDE, 3)).astype(np.float32)
    found = opened(saved(network, tmp_path / "x.keras"), pooling="max")
    np.testing.assert_array_equal(
        np.asarray(found.network(pixels)), np.asarray(network(pixels)).max(axis=(1, 2))
    )
    assert (found.width, found.network.trainable_variables, found.scaling.name) == (24, [], "none")


def test_classifier_is_left_out_by_cutting_before_it(tmp_path: Path) -> None:
    network = sequential(layers.BatchNormalization())
    classes = layers.Dense(5)(network.outputs[0])
    with_top = saved(keras.Model(network.inputs, classes), tmp_path / "top.keras")
    assert opened(with_top).width == 5
    assert opened(with_top, layer="batch_normalization").width == 4
    with pytest.raises(RecipeError, match=r"has no such layer"):
        opened(with_top, layer="nonsense")


def test_dropout_and_augmentation_inside_leave_nothing_random_in_the_graph(tmp_path: Path) -> None:
    network = sequential(layers.RandomFlip(), layers.RandomRotation(0.2), layers.Dropout(0.5))
    backbone = opened(saved(network, tmp_path / "x.keras"))
    graph = tf.compat.v1.GraphDef.FromString(freeze(backbone.network, backbone.scaling, SIDE).graph_def)
    assert {node.op for node in graph.node} == {
        "Placeholder", "Cast", "Const", "Conv2D", "BiasAdd", "Mean", "Identity",
    } - ({"BiasAdd"} if not any(node.op == "BiasAdd" for node in graph.node) else set())  # fmt: skip


@pytest.mark.parametrize(
    ("word", "black", "white"),
    [
        ("none", [0.0, 0.0, 0.0], [255.0, 255.0, 255.0]),
        ("unit", [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),
        ("tf", [-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]),
        ("torch", [-2.117904, -2.035714, -1.804444], [2.248908, 2.428571, 2.64]),
        ("caffe", [-103.939, -116.779, -123.68], [151.061, 138.221, 131.32]),
        ({"multiply": [1, 2, 3], "add": [4, 5, 6]}, [4.0, 5.0, 6.0], [259.0, 515.0, 771.0]),
    ],
)
def test_scaling_is_what_the_recipe_says(
    word: object, black: list[float], white: list[float], tmp_path: Path
) -> None:
    scaling = opened(saved(sequential(), tmp_path / "x.keras"), scaling=word).scaling
    pixels = np.array([[[[0.0] * 3, [255.0] * 3]]], np.float32)
    np.testing.assert_allclose(np.asarray(scaling.apply(pixels))[0, 0], [black, white], rtol=0, atol=1e-5)


def test_scaling_must_be_said(tmp_path: Path) -> None:
    fields = {"kind": "keras_file", "weights": f"{tmp_path}/x.keras", "input_size": SIDE}
    with pytest.raises(RecipeError, match="scaling"):
        check_recipe(KerasFileConfig, fields)


def test_same_network_saved_twice_is_the_same_and_another_activation_is_not(tmp_path: Path) -> None:
    network = uneven_network(SIDE)
    first, second = saved(network, tmp_path / "a.keras"), saved(network, tmp_path / "b.keras")
    network.trainable = False
    frozen = saved(network, tmp_path / "c.keras")
    names = [opened(path).architecture for path in (first, second, frozen)]
    assert len(set(names)) == 1
    assert names[0].startswith("keras_file:")
    assert opened(rewritten(second, '"silu"', '"tanh"')).architecture != names[0]


def test_precision_of_training_is_taken_over_by_the_layers(tmp_path: Path) -> None:
    path = saved(uneven_network(SIDE), tmp_path / "x.keras")
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        network = opened(path).network
    finally:
        keras.config.set_dtype_policy("float32")
    assert {layer.compute_dtype for layer in network.layers if layer.weights} == {"bfloat16"}
    assert {weight.dtype for weight in network.weights} == {"float32"}
    assert network(np.zeros((2, SIDE, SIDE, 3), np.float32)).dtype == tf.bfloat16


def test_lambda_is_refused_and_never_run(tmp_path: Path) -> None:
    witness = tmp_path / "it ran"
    code = f"__import__('pathlib').Path({str(witness)!r}).touch() or x"
    network = sequential(layers.Lambda(eval(f"lambda x: {code}")))
    witness.unlink(missing_ok=True)
    path = saved(network, tmp_path / "x.keras")
    with pytest.raises(WeightsError, match="Lambda"):
        opened(path)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("keras.utils", "get_file"),
        ("keras.src.utils.file_utils", "get_file"),
        ("keras.layers", "TFSMLayer"),
        ("keras", "layers.TFSMLayer"),
        ("keras", "utils.get_file"),
        ("keras.layers", "StringLookup"),
        ("keras_extension", "Layer"),
        ("my.own", "Attention"),
    ],
)
def test_what_is_not_a_computing_layer_of_keras_is_refused_by_name(
    module: str, name: str, tmp_path: Path
) -> None:
    path = saved(sequential(layers.ReLU()), tmp_path / "x.keras")
    described = json.loads(zipfile.ZipFile(path).read("config.json"))
    (relu,) = [one for one in described["config"]["layers"] if one["class_name"] == "ReLU"]
    old = json.dumps({"module": relu["module"], "class_name": "ReLU"})[1:-1]
    rewritten(path, old, json.dumps({"module": module, "class_name": name})[1:-1])
    with pytest.raises(WeightsError) as caught:
        opened(path)
    assert caught.value.found == f"{module}.{name}"


def test_class_of_ones_own_is_refused_with_a_way_out(tmp_path: Path) -> None:
    @keras.saving.register_keras_serializable("own_package")
    class OwnLayer(layers.Layer):  # type: ignore[misc, name-defined]
        def call(self, x: Any) -> Any:
            return 2 * x

    path = saved(sequential(OwnLayer()), tmp_path / "x.keras")
    with pytest.raises(WeightsError, match=r"OwnLayer[\s\S]*kind: saved_model"):
        opened(path)


def test_function_that_is_named_by_a_path_is_refused(tmp_path: Path) -> None:
    network = sequential(layers.Conv2D(3, 1, activation=keras.activations.relu6))
    path = saved(network, tmp_path / "x.keras")
    assert opened(path).width == 3
    rewritten(path, '"relu6"', '"layers.TFSMLayer"')
    described = zipfile.ZipFile(path).read("config.json").decode()
    assert "layers.TFSMLayer" in described
    with pytest.raises(WeightsError):
        opened(path)


def test_flipped_byte_among_the_weights_is_named_without_a_traceback(tmp_path: Path) -> None:
    path = saved(sequential(), tmp_path / "x.keras")
    content = bytearray(path.read_bytes())
    content[content.index(b"model.weights.h5") + 3000] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="is not a network that can be read"):
        opened(path)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut off"])
def test_damaged_file_is_named_without_a_traceback(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.keras").write_bytes(content)
    with pytest.raises(WeightsError, match=r"x\.keras is not a network that can be read"):
        opened(tmp_path / "x.keras")


def test_tensor_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    network = sequential()
    network.layers[0].bias.assign([1.0, np.nan, 1.0, 1.0])
    with pytest.raises(WeightsError, match="1 tensors are not finite"):
        opened(saved(network, tmp_path / "x.keras"))


def test_network_that_takes_no_colour_images_of_this_size_is_refused(tmp_path: Path) -> None:
    of_vectors = keras.Sequential([keras.Input((9,)), layers.Dense(2)])
    with pytest.raises(WeightsError, match="does not take images"):
        opened(saved(of_vectors, tmp_path / "x.keras"))
    with pytest.raises(RecipeError, match="takes images of 64 x 64 pixels"):
        opened(saved(sequential(), tmp_path / "y.keras"), input_size=96)


def test_layers_are_listed_from_the_file(tmp_path: Path) -> None:
    path = saved(uneven_network(SIDE), tmp_path / "x.keras")
    described = describe_backbone(str(path), input_size=SIDE, with_layers=True)
    assert (described["kind"], described["parameters"], described["width"]) == ("keras_file", 576, 24)
    assert [row["name"] for row in described["layer_table"]][2:4] == ["stem", "stem_bn"]
    assert built_without_weights(config_of(path), StorageConfig()).count_params() == 576
