"""The menu of runtimes: their recipe fields, which of them `auto` may mean, and the function that opens one.

To add a kind: a config here with its `kind`, a file beside this one with a `Runtime`, a branch in `open_runtime`, a
line in `candidates`; `tests/contracts/test_runtime_contract.py` then runs over it. No TensorFlow at first.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, TypeAdapter

from engine.config import Config

if TYPE_CHECKING:
    from engine.runtimes.base import FrozenGraph, Runtime, Scaling

# In the order of trust: what `precision: auto` may mean on any hardware; each runtime knows some of them.
REDUCED = ("tf32", "bfloat16", "float16")


class TensorFlowRuntimeConfig(Config):
    """The network as a constant-folded TensorFlow graph, on a GPU where the process sees one, else on the CPU."""

    kind: Literal["tensorflow"] = "tensorflow"
    precision: Literal["float32", "tf32", "bfloat16", "float16", "auto"] = "float32"
    """Of the arithmetic, and part of the fingerprint; float32 means float32 on a GPU too, tf32 its products of 10 bits.
    Less than float32 must keep the accuracy contract on images of the archive, or is refused; auto: the fastest that
    does."""
    batch_size: int | None = Field(default=None, ge=1)
    """Images per call of the graph: more need more memory and change no result beyond rounding. null: 64 on a GPU, 8 on
    each core of a CPU."""


class OpenVINORuntimeConfig(Config):
    """The network compiled by OpenVINO for a CPU; needs the package extra `openvino`."""

    kind: Literal["openvino"]
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """As with tensorflow. bfloat16 is fast where the processor has it (AVX512_BF16, AMX); OpenVINO computes in float32
    elsewhere."""
    batch_size: int = Field(default=4, ge=1)
    """Images per call of the network, on each thread. Few stay in its caches: MobileNetV2 ran at 338 images/s with 4,
    at 310 with 8 and at 250 with 256 (two AVX2 cores, 2026-11-22)."""


class AutoRuntimeConfig(Config):
    """Whichever is fastest here: measured when the table is made, and kept in its record."""

    kind: Literal["auto"]
    precision: Literal["float32", "tf32", "bfloat16", "float16", "auto"] = "float32"
    """As with tensorflow."""


ResolvedRuntime = TensorFlowRuntimeConfig | OpenVINORuntimeConfig
_Resolved = Annotated[ResolvedRuntime, Field(discriminator="kind")]
RuntimeConfig = Annotated[
    TensorFlowRuntimeConfig | OpenVINORuntimeConfig | AutoRuntimeConfig,
    Field(discriminator="kind"),
    BeforeValidator(lambda found: {"kind": "tensorflow"} | found if isinstance(found, dict) else found),
]


def candidates(config: RuntimeConfig, has_gpu: bool) -> list[ResolvedRuntime]:
    """What the recipe's choice may mean on this machine; one, if it leaves nothing open. The first is the safest."""
    kinds: list[type[TensorFlowRuntimeConfig] | type[OpenVINORuntimeConfig]] = []
    if config.kind in ("tensorflow", "auto"):
        kinds.append(TensorFlowRuntimeConfig)
    if config.kind == "openvino" or (
        config.kind == "auto" and not has_gpu and importlib.util.find_spec("openvino") is not None
    ):
        kinds.append(OpenVINORuntimeConfig)
    wanted = _precisions(has_gpu) if config.precision == "auto" else (config.precision,)
    fields = config.model_dump(exclude={"kind", "precision"})
    return [
        kind.model_validate({**fields, "kind": _words(kind, "kind")[0], "precision": precision})
        for precision in wanted
        for kind in kinds
        if precision in _words(kind, "precision")
    ]


def _words(kind: type[Config], field: str) -> tuple[str, ...]:
    """What a field of the kind may be."""
    return get_args(kind.model_fields[field].annotation)


def settled_runtime(config: RuntimeConfig, settled: Mapping[str, Any]) -> ResolvedRuntime:
    """What the recipe's choice means for a table whose record says `settled`: its `auto` is that one's answer."""
    if config.kind != "auto" and config.precision != "auto":
        return config
    if config.kind == "auto":
        return TypeAdapter(_Resolved).validate_python(settled)
    return TypeAdapter(_Resolved).validate_python(config.model_dump() | {"precision": settled["precision"]})


def _precisions(has_gpu: bool) -> tuple[str, ...]:
    return ("float32", *REDUCED) if has_gpu else ("float32", "bfloat16")


def prepare_to_freeze(num_threads: int | None, use_gpu: bool) -> bool:
    """Set what must be set before the process computes anything: call it before the network is built.

    Args:
        num_threads: CPU threads this process may use; None: as many as there are cores.
        use_gpu: whether a GPU that this process sees is for it.

    Returns:
        Whether there is such a GPU.
    """
    from engine.runtimes.tensorflow import gpus_in_use, prepare_process

    prepare_process(num_threads, use_gpu)
    return gpus_in_use() > 0


def freeze_network(network: Any, scaling: Scaling, input_size: int) -> FrozenGraph:
    """A frozen keras.Model as data that every runtime runs; afterwards the network itself is no longer needed.

    Args:
        network: keras.Model, scaled pixels (B, S, S, 3) float32 -> (B, D).
        scaling: of its pixels; becomes part of the graph.
        input_size: S, pixels.
    """
    from engine.runtimes.freeze import freeze

    return freeze(network, scaling, input_size)


def import_runtime(config: RuntimeConfig) -> None:
    """Import what `open_runtime` will need: seconds that can pass while the graph is still being made."""
    if config.kind == "tensorflow":
        import engine.runtimes.tensorflow  # noqa: F401
    elif importlib.util.find_spec("openvino") is not None:
        import openvino  # noqa: F401


def open_runtime(
    config: ResolvedRuntime, graph: FrozenGraph, num_threads: int | None, use_gpu: bool = False
) -> Runtime:
    """Make a frozen graph ready to run.

    Args:
        config: which runtime, with nothing left open.
        graph: of the network.
        num_threads: CPU threads; None: as many as there are cores. TensorFlow takes it in a fresh process only.
        use_gpu: compute on the GPU that this process sees, if it sees one.

    Raises:
        RecipeError: the runtime is not installed, or cannot run here.
    """
    if isinstance(config, OpenVINORuntimeConfig):
        from engine.runtimes.openvino import OpenVINORuntime

        return OpenVINORuntime(config, graph, num_threads)
    from engine.runtimes.tensorflow import TensorFlowRuntime

    return TensorFlowRuntime(config, graph, num_threads, use_gpu)
