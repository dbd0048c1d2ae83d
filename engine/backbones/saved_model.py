"""A network that TensorFlow saved, as TensorFlow Hub publishes them: one of its functions, as a frozen Keras network.

TensorFlow's own loader runs what the file wants run: initialisers, functions that restore. Here only two things of a
file are ever run, each after a look at every operation in it: the function that is asked for, and what brings variables
into it from the checkpoint beside it, as TensorFlow Serving does.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.backbones.base import Backbone, require_keras
from engine.backbones.cut import cut_and_freeze
from engine.backbones.fetch import SAVED_MODEL_GRAPH, fetch_saved_model
from engine.backbones.graph_operations import (
    COMPUTING,
    RESTORING,
    operations,
    restore_only_from,
    with_own_function_names,
    without_strangers,
)
from engine.backbones.kinds import unknown_name
from engine.backbones.scaling import stated_scaling
from engine.errors import RecipeError, WeightsError

if TYPE_CHECKING:
    from engine.backbones.kinds import SavedModelConfig
    from engine.storage import StorageConfig

HUB_OUTPUT = "default"  # tensorflow.org/hub/common_signatures
VARIABLES = ("VarHandleOp", "Variable", "VariableV2")


def build(config: SavedModelConfig, storage: StorageConfig) -> Backbone:
    """The backbone that the recipe describes; errors as `engine.backbones.kinds.build_backbone`."""
    import tensorflow as tf

    tf.get_logger().setLevel(logging.ERROR)  # what is of TensorFlow 1 says so at each call
    folder = fetch_saved_model(config.weights, config.weights_are_a_file, config.weights_sha256, storage)
    meta_graph = _meta_graph(folder, config.weights)
    pixels, embedding = _ends(meta_graph, config)
    forward = _part_of(meta_graph.graph_def, _node(embedding))
    _refuse_other_operations(forward, COMPUTING, config.weights)
    digest = hashlib.sha256(
        f"{pixels} {embedding}\n".encode() + forward.SerializeToString(deterministic=True)
    )
    constant, names = _with_constants(meta_graph, forward, _node(embedding), folder, config.weights)
    network = _network(constant, names, (pixels, embedding), config)
    architecture = f"{config.kind}:{digest.hexdigest()}"
    return Backbone(config, cut_and_freeze(network, config), stated_scaling(config.scaling), architecture)


def _meta_graph(folder: Path, uri: str) -> Any:
    """The one for serving; of those without tags, as TensorFlow Hub had them once, the first."""
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel()
    try:
        saved.ParseFromString((folder / SAVED_MODEL_GRAPH).read_bytes())
    except DecodeError as error:
        raise _unreadable(uri, str(error)) from None
    tagged = {
        frozenset(meta_graph.meta_info_def.tags): meta_graph for meta_graph in reversed(saved.meta_graphs)
    }
    found = next((tagged[tags] for tags in (frozenset({"serve"}), frozenset()) if tags in tagged), None)
    if found is None:
        shown = "; ".join(", ".join(sorted(tags)) for tags in tagged)
        raise _unreadable(uri, f"graphs tagged {shown or 'nothing, for there is none'}")
    return found


def _ends(meta_graph: Any, config: SavedModelConfig) -> tuple[str, str]:
    """Names of the tensors that go into the function and come out of it."""
    signatures = {name: one for name, one in meta_graph.signature_def.items() if one.inputs}
    if config.signature not in signatures:
        raise unknown_name(
            f"backbone.signature: {config.weights} has no such function", config.signature, sorted(signatures)
        )
    signature = signatures[config.signature]
    if len(signature.inputs) != 1:
        raise RecipeError(
            f"backbone.signature: {config.signature} of {config.weights} does not take images alone",
            found=f"inputs {', '.join(sorted(signature.inputs))}",
            wanted="one input",
        )
    (images,) = signature.inputs.values()
    _require_images(images, config)
    outputs = {name: tensor.name for name, tensor in signature.outputs.items()}
    name = config.output
    if name is None:
        name = next(iter(outputs)) if len(outputs) == 1 else HUB_OUTPUT
    if name not in outputs:
        raise unknown_name(f"backbone.output: {config.signature} of {config.weights}", name, sorted(outputs))
    return images.name, outputs[name]


def _require_images(images: Any, config: SavedModelConfig) -> None:
    side = config.input_size
    if images.tensor_shape.unknown_rank:
        return
    sizes = [dimension.size for dimension in images.tensor_shape.dim]
    if len(sizes) != 4 or sizes[0] != -1 or sizes[3] not in (-1, 3):
        raise WeightsError(
            f"backbone.weights: {config.weights} does not take any number of images",
            found=f"an input of shape {sizes}",
            wanted="(batch, height, width, 3), with a batch of any size",
        )
    if any(size not in (-1, side) for size in sizes[1:3]):
        raise RecipeError(
            f"backbone.input_size: {config.weights} takes images of {sizes[1]} x {sizes[2]} pixels",
            found=f"{side}",
            wanted=f"{sizes[1]}" if sizes[1] == sizes[2] else "a network of square images",
        )


def _part_of(graph_def: Any, *nodes: str) -> Any:
    """The nodes that these need, and the functions that those call; nothing that could take their place."""
    import tensorflow as tf

    return without_strangers(tf.compat.v1.graph_util.extract_sub_graph(graph_def, list(nodes)))


def _refuse_other_operations(part: Any, allowed: frozenset[str], uri: str) -> None:
    other = sorted(set(operations(part)) - allowed)
    if other:
        raise WeightsError(
            f"backbone.weights: {uri} holds operations that are not run",
            found=", ".join(other[:8]) + (f", ... ({len(other)})" if len(other) > 8 else ""),
            wanted="operations that compute on images and weights alone (engine/backbones/graph_operations.py)",
            way_out="do not use a network whose source you do not trust; one that is harmless may go onto that list",
        )


def _with_constants(
    meta_graph: Any, forward: Any, embedding: str, folder: Path, uri: str
) -> tuple[Any, list[str]]:
    """The function as a graph whose variables are constants, and the names of those, in the order of the graph."""
    import tensorflow as tf

    # The only path it has; not in the public API as of TensorFlow 2.21.
    from tensorflow.python.framework import convert_to_constants

    names = [node.name for node in forward.node if node.op in VARIABLES]
    if not names:
        return forward, []
    saver = meta_graph.saver_def
    restore, file_name = _node(saver.restore_op_name), saver.filename_tensor_name
    _refuse_other_operations(_part_of(meta_graph.graph_def, restore), RESTORING, uri)
    both = _part_of(meta_graph.graph_def, embedding, restore)
    checkpoint = str(folder / "variables/variables")
    restore_only_from(both, checkpoint)
    options = tf.compat.v1.ConfigProto(device_count={"GPU": 0})
    options.graph_options.rewrite_options.disable_meta_optimizer = True  # what was looked at is what is run
    graph = tf.Graph()
    try:
        with graph.as_default(), tf.compat.v1.Session(graph=graph, config=options) as session:
            tf.graph_util.import_graph_def(both, name="")
            for node in forward.node:
                if node.op == "VarHandleOp":  # the conversion reads each under this name
                    tf.raw_ops.ReadVariableOp(
                        resource=graph.get_tensor_by_name(f"{node.name}:0"),
                        dtype=tf.as_dtype(node.attr["dtype"].type),
                        name=f"{node.name}/Read/ReadVariableOp",
                    )
            session.run(graph.get_operation_by_name(restore), {file_name: checkpoint})
            constant = convert_to_constants.convert_variables_to_constants_from_session_graph(
                session, graph.as_graph_def(), [embedding]
            )
    except (tf.errors.OpError, ValueError, KeyError) as error:
        raise _unreadable(uri, " ".join(str(error).split())[:400]) from None
    return constant, names


def _network(constant: Any, names: list[str], ends: tuple[str, str], config: SavedModelConfig) -> Any:
    """A keras.Model of one layer, which has the variables as its weights and computes the graph."""
    import tensorflow as tf

    keras = require_keras()
    values = {
        node.name: tf.make_ndarray(node.attr["value"].tensor)
        for node in constant.node
        if node.name in set(names)
    }
    broken = sum(not np.isfinite(value).all() for value in values.values())
    if broken:
        raise _unreadable(config.weights, f"{broken} tensors are not finite")
    pixels, embedding = ends
    library = hashlib.sha256(constant.library.SerializeToString(deterministic=True)).hexdigest()
    graph_def = with_own_function_names(constant, f"saved_{library[:16]}_")
    imported = tf.compat.v1.wrap_function(lambda: tf.graph_util.import_graph_def(graph_def, name=""), [])
    inside = imported.graph.as_graph_element
    wanted = inside(pixels).dtype
    function = imported.prune([inside(pixels), *(inside(f"{name}:0") for name in names)], inside(embedding))

    class SavedFunction(keras.layers.Layer):  # type: ignore[misc, name-defined]  # Keras has no types
        """The function of the file."""

        def __init__(self) -> None:
            super().__init__(name="saved_function", trainable=False)
            self._tensors = [
                self.add_weight(
                    shape=values[name].shape,
                    dtype=values[name].dtype.name,
                    initializer=lambda shape, dtype, value=values[name]: tf.constant(value),
                    trainable=False,
                    name=f"tensor_{place}",
                    autocast=False,
                )
                for place, name in enumerate(names)
            ]

        def call(self, pixels_BSS3: Any) -> Any:
            tensors = [tf.convert_to_tensor(tensor) for tensor in self._tensors]
            return tf.cast(function(tf.cast(pixels_BSS3, wanted), *tensors), tf.float32)

    images = keras.Input((config.input_size, config.input_size, 3), name="images")
    try:
        found = SavedFunction()(images)
    except (tf.errors.OpError, ValueError, TypeError) as error:
        raise _unreadable(config.weights, " ".join(str(error).split())[:400]) from None
    if len(found.shape) not in (2, 4) or found.shape[-1] is None:
        raise RecipeError(
            f"backbone.output: {embedding} of {config.weights} is no embedding",
            found=f"an output of shape {tuple(found.shape)}",
            wanted="a feature map (batch, height, width, channels) or vectors (batch, width)",
        )
    return keras.Model(images, found, name="saved_model")


def _node(tensor: str) -> str:
    """`node` of `node:0`."""
    return tensor.partition(":")[0]


def _unreadable(uri: str, found: str) -> WeightsError:
    return WeightsError(
        f"backbone.weights: {uri} is not a network that can be read",
        found=found,
        wanted="a SavedModel whose variables can be restored as TensorFlow Serving does",
    )
