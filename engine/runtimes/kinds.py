"""The menu of runtimes: their recipe fields, and the functions that prepare a process for one and open it.

To add a kind: a config here with its `kind`, a file beside this one with a `Runtime`, a branch in both functions;
`tests/contracts/test_runtime_contract.py` then runs over it. No TensorFlow is imported until asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from engine.config import Config

if TYPE_CHECKING:
    from engine.runtimes.base import Runtime, Scaling


class TensorFlowRuntimeConfig(Config):
    """The network as a constant-folded TensorFlow graph, on a GPU where the process sees one, else on the CPU."""

    kind: Literal["tensorflow"] = "tensorflow"
    precision: Literal["float32"] = "float32"
    """Of the arithmetic; float32 means float32 on a GPU too (TF32 off). Part of the fingerprint."""
    batch_size: int = Field(default=64, ge=1)
    """Images per call of the graph: more need more memory and change no result beyond rounding."""


RuntimeConfig = TensorFlowRuntimeConfig


def prepare_runtime(config: RuntimeConfig, num_threads: int | None) -> None:
    """Set what must be set before the process computes anything: call it before the network is built.

    Args:
        config: of the runtime that will be opened.
        num_threads: CPU threads this process may use; None: as many as there are cores.
    """
    from engine.runtimes.tensorflow import prepare_process

    prepare_process(num_threads)


def open_runtime(
    config: RuntimeConfig,
    network: Any,
    scaling: Scaling,
    input_size: int,
    num_threads: int | None,
) -> Runtime:
    """Make a frozen network ready to run; afterwards the network itself is no longer needed.

    Args:
        config: the recipe's choice.
        network: keras.Model, scaled pixels (B, S, S, 3) float32 -> (B, D).
        scaling: of its pixels; becomes part of the graph.
        input_size: S, pixels.
        num_threads: CPU threads; None: as many as there are cores.
    """
    from engine.runtimes.tensorflow import TensorFlowRuntime

    return TensorFlowRuntime(config, network, scaling, input_size, num_threads)
