"""Makes a frozen graph of a Keras network: variables become constants, BatchNorm becomes part of the convolutions.

Keras is given the values of its variables as it is traced, so that there are none in the graph to begin with: half of
the time of TensorFlow's own conversion afterwards, and its embeddings to the last bit (nine networks, 2026-11-22).

TensorFlow's own optimiser folds constants, but leaves the two halves of a BatchNorm (Keras 3 writes it as a factor and
a summand) behind depthwise convolutions. Nothing is approximated: weights are multiplied in float64 and rounded once.

Shape letters: B images, S side in pixels, D embedding width, C channels of a convolution's output.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2

# The only path it has; not in the public API as of TensorFlow 2.21.
from tensorflow.python.grappler import tf_optimizer

from engine.runtimes.base import EMBEDDINGS, PIXELS, FrozenGraph, Scaling

_BATCH_NORMS = ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
_CONVOLUTIONS = ("Conv2D", "DepthwiseConv2dNative")
_WITHOUT_STATE = {
    "StatefulPartitionedCall": "PartitionedCall",
    "If": "StatelessIf",
    "While": "StatelessWhile",
}
_FACTORS, _SUMMANDS = ("Mul",), ("Add", "AddV2", "BiasAdd")


def freeze(network: Any, scaling: Scaling, input_size: int) -> FrozenGraph:
    """The network as a graph that takes bytes.

    Args:
        network: keras.Model, scaled pixels (B, S, S, 3) float32 -> (B, D).
        scaling: of its pixels; put in front of it.
        input_size: S, pixels.
    """

    trainable, other = (
        [variable.numpy() for variable in variables]
        for variables in (network.trainable_variables, network.non_trainable_variables)
    )

    def forward(pixels_BSS3: tf.Tensor) -> tf.Tensor:
        scaled_BSS3 = scaling.apply(tf.cast(pixels_BSS3, tf.float32))
        embeddings_BD, _ = network.stateless_call(trainable, other, scaled_BSS3, training=False)
        return tf.cast(embeddings_BD, tf.float32)

    pixels = tf.TensorSpec((None, input_size, input_size, 3), tf.uint8)
    graph_def = _constant_graph(tf.function(forward, autograph=False).get_concrete_function(pixels))
    _leave_compiling_to_the_runtime(graph_def)
    graph_def = _optimised(graph_def, ["function", "constfold", "dependency"])
    _name_depthwise_convolutions(graph_def)
    _spell_out_batch_norms(graph_def)
    _fold_into_convolutions(graph_def)
    graph_def = tf.compat.v1.graph_util.extract_sub_graph(graph_def, [EMBEDDINGS])
    return FrozenGraph(graph_def.SerializeToString(), input_size, int(network.output_shape[-1]))


def _constant_graph(function: Any) -> Any:
    """The function's GraphDef; its input and output under their own names, and as constants the tensors that it took
    from outside (Keras' Normalization holds its mean so)."""
    graph = tf.Graph()
    with graph.as_default():
        pixels = tf.compat.v1.placeholder(tf.uint8, function.inputs[0].shape, name=PIXELS)
        captured = [tf.constant(tensor.numpy()) for tensor in function.captured_inputs]
        (embeddings,) = tf.graph_util.import_graph_def(
            function.graph.as_graph_def(),
            input_map={
                inside.name: outside
                for inside, outside in zip(function.inputs, [pixels, *captured], strict=True)
            },
            return_elements=[function.outputs[0].name],
            name="network",
        )
        tf.identity(embeddings, name=EMBEDDINGS)
    return graph.as_graph_def()


def _leave_compiling_to_the_runtime(graph_def: Any) -> None:
    """Keras has XLA compile grouped convolutions; on a CPU that is 20 times slower, and hides them from all others."""
    nodes = list(graph_def.node)
    for function in graph_def.library.function:
        function.attr.clear()
        function.signature.is_stateful = False  # there are no variables in it, whatever Keras' layers say
        nodes.extend(function.node_def)
    for node in nodes:
        node.op = _WITHOUT_STATE.get(node.op, node.op)
        node.attr.pop("_XlaMustCompile", None)


def _name_depthwise_convolutions(graph_def: Any) -> None:
    """A convolution with as many groups as channels (ConvNeXt's) is what TensorFlow has a faster operation for."""
    graph = tf.Graph()
    with graph.as_default():
        tf.graph_util.import_graph_def(graph_def, name="")
    nodes = {node.name: node for node in graph_def.node}
    for node in [node for node in graph_def.node if node.op == "Conv2D"]:
        weights = _constant(nodes, node.input[1])
        channels = graph.get_operation_by_name(node.name).inputs[0].shape[-1]
        if weights is None or channels == 1 or weights.shape[2:] != (1, channels):
            continue
        node.op = "DepthwiseConv2dNative"
        del node.attr["use_cudnn_on_gpu"]
        node.input[1] = _add_constant(graph_def, f"{node.name}/by_channel", weights.transpose(0, 1, 3, 2))


def _spell_out_batch_norms(graph_def: Any) -> None:
    """A BatchNorm that is one operation (Keras 2 wrote it so) becomes a factor and a summand, as Keras 3 writes it."""
    nodes = {node.name: node for node in graph_def.node}
    for node in [node for node in graph_def.node if node.op in _BATCH_NORMS]:
        values = [_constant(nodes, name) for name in node.input[1:5]]
        if node.attr["is_training"].b or node.attr["data_format"].s != b"NHWC":
            continue
        if any(value is None for value in values):
            continue
        scale_C, offset_C, mean_C, variance_C = (np.asarray(value, np.float64) for value in values)
        factor_C = scale_C / np.sqrt(variance_C + node.attr["epsilon"].f)
        scaled = graph_def.node.add()
        scaled.op, scaled.name = "Mul", f"{node.name}/scaled"
        scaled.input.extend([node.input[0], _add_constant(graph_def, f"{node.name}/factor", factor_C)])
        summand = _add_constant(graph_def, f"{node.name}/summand", offset_C - mean_C * factor_C)
        del node.input[:]
        node.input.extend([scaled.name, summand])
        node.op = "AddV2"
        node.attr.clear()
        for one in (scaled, node):
            one.attr["T"].type = tf.float32.as_datatype_enum


def _optimised(graph_def: Any, optimizers: list[str]) -> Any:
    graph = tf.Graph()
    with graph.as_default():
        tf.graph_util.import_graph_def(graph_def, name="")
    meta_graph = tf.compat.v1.train.export_meta_graph(graph_def=graph.as_graph_def(), graph=graph)
    meta_graph.collection_def["train_op"].node_list.value.append(
        EMBEDDINGS
    )  # how Grappler is told what to keep
    config = config_pb2.ConfigProto()
    rewriting = config.graph_options.rewrite_options
    rewriting.optimizers.extend(optimizers)
    rewriting.min_graph_nodes = -1
    rewriting.meta_optimizer_iterations = 2
    return tf_optimizer.OptimizeGraph(config, meta_graph)


def _fold_into_convolutions(graph_def: Any) -> None:
    """Constant factors and summands behind a convolution go into its weights and one BiasAdd, in place."""
    nodes = {node.name: node for node in graph_def.node}
    users: dict[str, list[Any]] = defaultdict(list)
    for node in graph_def.node:
        for name in node.input:
            users[_node_name(name)].append(node)
    for convolution in [node for node in graph_def.node if node.op in _CONVOLUTIONS]:
        weights = _constant(nodes, convolution.input[1])
        if weights is None:
            continue
        factor_C, summand_C, last = _behind(convolution, weights, nodes, users)
        if last is convolution:
            continue
        name = convolution.name
        per_channel = factor_C if convolution.op == "Conv2D" else factor_C.reshape(weights.shape[2:])
        convolution.input[1] = _add_constant(graph_def, f"{name}/folded_weights", weights * per_channel)
        bias = _add_constant(graph_def, f"{name}/folded_bias", summand_C)
        last.op = "BiasAdd"
        last.attr.clear()
        last.attr["T"].type = tf.float32.as_datatype_enum
        last.attr["data_format"].s = b"NHWC"
        del last.input[:]
        last.input.extend([name, bias])


def _behind(
    convolution: Any, weights: np.ndarray, nodes: dict[str, Any], users: dict[str, list[Any]]
) -> tuple[np.ndarray, np.ndarray, Any]:
    """Factor and summand of each output channel, float64, that follow the convolution, and the last node of them."""
    channels = int(np.prod(weights.shape[2:] if convolution.op != "Conv2D" else weights.shape[3:]))
    factor_C, summand_C, last = np.ones(channels), np.zeros(channels), convolution
    if convolution.attr["data_format"].s != b"NHWC":
        return factor_C, summand_C, last
    while len(users[last.name]) == 1:
        (node,) = users[last.name]
        if node.op not in _FACTORS + _SUMMANDS:
            break
        others = [name for name in node.input if _node_name(name) != last.name]
        values = _constant(nodes, others[0]) if len(others) == 1 else None
        if values is None or not _is_per_channel(values, channels):
            break
        values_C = np.broadcast_to(values.reshape(-1).astype(np.float64), (channels,))
        if node.op in _FACTORS:
            factor_C, summand_C = factor_C * values_C, summand_C * values_C
        else:
            summand_C = summand_C + values_C
        last = node
    return factor_C, summand_C, last


def _is_per_channel(values: np.ndarray, channels: int) -> bool:
    return values.ndim <= 4 and (values.size == 1 or (values.size == channels == values.shape[-1]))


def _constant(nodes: dict[str, Any], name: str) -> np.ndarray | None:
    """The value of a float32 constant; None for any other node."""
    node = nodes[_node_name(name)]
    while node.op == "Identity":
        node = nodes[_node_name(node.input[0])]
    if node.op != "Const" or node.attr["dtype"].type != tf.float32.as_datatype_enum:
        return None
    values: np.ndarray = tf.make_ndarray(node.attr["value"].tensor)
    return values


def _add_constant(graph_def: Any, name: str, values: np.ndarray) -> str:
    node = graph_def.node.add()
    node.op, node.name = "Const", name
    node.attr["dtype"].type = tf.float32.as_datatype_enum
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(np.asarray(values, np.float32)))
    return name


def _node_name(name: str) -> str:
    """Of an input as a GraphDef writes it: `node`, `node:1`, `^node`."""
    return name.lstrip("^").partition(":")[0]


tf.get_logger().setLevel(logging.ERROR)  # extract_sub_graph says at each call that it is of TensorFlow 1
