"""Which operations a graph from a file may hold: those that compute on what they are given, and nothing else.

Whatever is not on the list is refused: operations that read or write files, call Python or a process, ask a clock or a
random number, or keep tables. Names are those of TensorFlow's op registry.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

DT_STRING = 7  # tensorflow/core/framework/types.proto
_PASSED_ON = """
    Cast CheckNumerics Const EnsureShape Fill Identity IdentityN NoOp OnesLike Placeholder PlaceholderWithDefault
    PreventGradient Rank Shape ShapeN Size Snapshot StopGradient ZerosLike
"""
_VARIABLES = """
    ReadVariableOp ResourceGather VarHandleOp Variable VariableV2
"""
_CONTROL = """
    Assert Enter Exit If LoopCond Merge NextIteration PartitionedCall RefIdentity Select SelectV2
    StatefulPartitionedCall StatelessIf StatelessWhile Switch While
"""
_ARRAYS = """
    BatchToSpaceND BroadcastArgs BroadcastTo Concat ConcatV2 DepthToSpace DynamicStitch ExpandDims
    ExtractImagePatches Gather GatherNd GatherV2 InvertPermutation LinSpace MirrorPad OneHot Pack Pad PadV2 Range
    Reshape Reverse ReverseV2 Roll ScatterNd Slice SpaceToBatchND SpaceToDepth Split SplitV Squeeze StridedSlice
    TensorScatterUpdate Tile Transpose Unpack Where
"""
_NUMBERS = """
    Abs Add AddN AddV2 All Any ArgMax ArgMin BatchMatMul BatchMatMulV2 BatchMatMulV3 Ceil ClipByValue Cos Cumsum
    Div DivNoNan Einsum Equal Erf Erfc Exp Expm1 Floor FloorDiv FloorMod Greater GreaterEqual IsFinite IsInf IsNan
    L2Loss Less LessEqual Log Log1p LogicalAnd LogicalNot LogicalOr MatMul Max Maximum Mean Min Minimum Mod Mul
    MulNoNan Neg NotEqual Pow Prod RealDiv Reciprocal Rint Round Rsqrt Sigmoid Sign Sin Sqrt Square
    SquaredDifference Sub Sum Tan Tanh TruncateDiv TruncateMod
"""
_LAYERS = """
    AvgPool BiasAdd BiasAddV1 Conv2D Conv3D DepthwiseConv2dNative Elu FusedBatchNorm FusedBatchNormV2
    FusedBatchNormV3 LeakyRelu LogSoftmax LRN MaxPool MaxPoolV2 Relu Relu6 Selu Softmax Softplus Softsign TopKV2
"""
_IMAGES = """
    AdjustContrastv2 CropAndResize HSVToRGB ResizeArea ResizeBicubic ResizeBilinear ResizeNearestNeighbor RGBToHSV
"""
# What brings variables from a checkpoint into them; reads a checkpoint, and nothing else.
_RESTORING = """
    Assign AssignVariableOp Const Identity NoOp Pack PartitionedCall Placeholder PlaceholderWithDefault Reshape
    RestoreV2 ShardedFilename StatefulPartitionedCall StringJoin VarHandleOp Variable VariableV2
"""

COMPUTING = frozenset(
    "".join((_PASSED_ON, _VARIABLES, _CONTROL, _ARRAYS, _NUMBERS, _LAYERS, _IMAGES)).split()
)
RESTORING = frozenset(_RESTORING.split())


def operations(graph_def: Any) -> Counter[str]:
    """How often each operation occurs in a graph and in its functions; calls of these are none."""
    functions = {function.signature.name: function for function in graph_def.library.function}
    inside = [node for function in functions.values() for node in function.node_def]
    return Counter(node.op for node in [*graph_def.node, *inside] if node.op not in functions)


def without_strangers(graph_def: Any) -> Any:
    """A copy with the functions alone that its nodes call, and those that these call.

    TensorFlow's optimizer puts one function in the place of another where both say that they implement the same, and
    gradients in the place of functions: what nobody calls must not be there to be taken, nor say so.
    """
    kept = copy.deepcopy(graph_def)
    functions = {function.signature.name: function for function in kept.library.function}
    called: set[str] = set()
    todo = list(kept.node)
    while todo:
        for name in set(_functions_of(todo.pop())) & functions.keys() - called:
            called.add(name)
            todo.extend(functions[name].node_def)
    chosen = [function for name, function in functions.items() if name in called]
    for function in chosen:
        for name in [name for name in function.attr if name.startswith("api_")]:
            del function.attr[name]
    kept.ClearField("library")
    kept.library.function.extend(chosen)
    return kept


def restore_only_from(graph_def: Any, checkpoint: str) -> None:
    """Have every RestoreV2 read this checkpoint, whatever the file says; in place."""
    for function in graph_def.library.function:
        _restore_from(function.node_def, checkpoint, ":output:0")
    _restore_from(graph_def.node, checkpoint, "")


def _restore_from(nodes: Any, checkpoint: str, output: str) -> None:
    for place, node in enumerate([node for node in nodes if node.op == "RestoreV2"]):
        prefix = nodes.add()
        prefix.op, prefix.name = "Const", f"checkpoint_beside_it_{place}"
        prefix.attr["dtype"].type = DT_STRING
        prefix.attr["value"].tensor.dtype = DT_STRING
        prefix.attr["value"].tensor.tensor_shape.SetInParent()
        prefix.attr["value"].tensor.string_val.append(checkpoint.encode())
        node.input[0] = prefix.name + output


def with_own_function_names(graph_def: Any, prefix: str) -> Any:
    """A copy whose functions have other names: a process knows each name once, whatever graph it comes from."""
    renamed = copy.deepcopy(graph_def)
    names = {
        function.signature.name: prefix + function.signature.name for function in renamed.library.function
    }
    nodes = list(renamed.node)
    for function in renamed.library.function:
        function.signature.name = names[function.signature.name]
        nodes.extend(function.node_def)
    for gradient in renamed.library.gradient:
        gradient.function_name = names.get(gradient.function_name, gradient.function_name)
        gradient.gradient_func = names.get(gradient.gradient_func, gradient.gradient_func)
    for node in nodes:
        node.op = names.get(node.op, node.op)
        for value in node.attr.values():
            for called in ([value.func] if value.HasField("func") else []) + list(value.list.func):
                called.name = names.get(called.name, called.name)
    return renamed


def _functions_of(node: Any) -> Iterator[str]:
    yield node.op
    for value in node.attr.values():
        if value.HasField("func"):
            yield value.func.name
        yield from (function.name for function in value.list.func)
