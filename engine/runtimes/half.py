"""A frozen graph that computes in bfloat16 or float16: its convolutions and what lies between them.

Pixel scaling stays float32: in bfloat16, 127 / 127.5 - 1 would be wrong by half of its value. So does the pooling at
the end, which adds up many numbers. One rewriting for every device: Grappler's own mixed precision leaves out what XLA
compiles, and Keras' policy would keep each BatchNorm in float32.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from engine.runtimes.base import EMBEDDINGS

_FLOAT = tf.float32.as_datatype_enum
_PRODUCTS = ("Conv2D", "DepthwiseConv2dNative", "MatMul")
_ENDING = ("Identity", "Mean", "Max", "Reshape", "Squeeze", "Cast")  # what may follow the last layer


def in_half_precision(graph_def: Any, dtype: tf.DType) -> Any:
    """A copy of the graph in which all but its two ends computes in `dtype`; both ends keep their types.

    Args:
        graph_def: as `engine.runtimes.base.FrozenGraph` holds it, parsed.
        dtype: tf.bfloat16 or tf.float16.
    """
    half = dtype.as_datatype_enum
    nodes = {node.name: node for node in graph_def.node}
    kept = _scaling(graph_def) | _ending(nodes, EMBEDDINGS)
    lowered = tf.compat.v1.GraphDef(versions=graph_def.versions)
    casts: set[str] = set()
    for node in graph_def.node:
        copy = lowered.node.add()
        copy.CopyFrom(node)
        if node.name in kept or node.op == "Const":
            continue
        for attribute in copy.attr.values():
            if attribute.type == _FLOAT:
                attribute.type = half
    for node in list(lowered.node):
        if node.op == "Const":
            continue
        wants_half = node.name not in kept
        for place, name in enumerate(node.input):
            source = nodes[name.lstrip("^").partition(":")[0]]
            if name.startswith("^") or not _gives_float(source):
                continue
            gives_half = source.op != "Const" and source.name not in kept
            if gives_half != wants_half:
                types = (_FLOAT, half) if wants_half else (half, _FLOAT)
                node.input[place] = _cast(lowered, casts, name, *types)
    return lowered


def _gives_float(node: Any) -> bool:
    """Whether the node's output is float32: its own type says so (`DstT` of a cast, `dtype` of a constant)."""
    for attribute in ("DstT", "dtype", "T"):
        if attribute in node.attr:
            return bool(node.attr[attribute].type == _FLOAT) and node.op != "Shape"
    return False


def _scaling(graph_def: Any) -> set[str]:
    """Names of the nodes before the first product: none of their inputs comes from one."""
    behind: set[str] = set()
    found = -1
    while found != len(behind):  # a second time where the nodes are not in the order of computation
        found = len(behind)
        for node in graph_def.node:
            if node.op in _PRODUCTS or any(
                name.lstrip("^").partition(":")[0] in behind for name in node.input
            ):
                behind.add(node.name)
    return {node.name for node in graph_def.node if node.name not in behind and node.op != "Const"}


def _ending(nodes: dict[str, Any], name: str) -> set[str]:
    """Names of the nodes from the last layer's output to the end."""
    ending: set[str] = set()
    while nodes[name].op in _ENDING:
        ending.add(name)
        name = nodes[name].input[0].partition(":")[0]
    return ending


def _cast(graph_def: Any, casts: set[str], name: str, have: int, want: int) -> str:
    """The name of a node that gives the same in the other type; made once."""
    key = f"{name.replace(':', '_')}/as_{tf.dtypes.as_dtype(want).name}"
    if key not in casts:
        casts.add(key)
        node = graph_def.node.add()
        node.op, node.name = "Cast", key
        node.input.append(name)
        node.attr["SrcT"].type, node.attr["DstT"].type = have, want
    return key
