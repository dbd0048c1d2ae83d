"""What the stages of extraction need to know of a job, for tests that never load its network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.backbones.kinds import KerasApplicationConfig
from engine.extraction import ExtractJob
from engine.recipes import Limits
from engine.runtimes.kinds import TensorFlowRuntimeConfig
from engine.shards.kinds import WebDatasetSource
from engine.storage import StorageConfig


def job_without_network(folder: Path, input_size: int, **fields: Any) -> ExtractJob:
    """From the tars in `folder`/shards, labelled by `cls`, to `folder`/table; `fields` as ExtractJob has them."""
    return ExtractJob(
        **{
            "source": WebDatasetSource(uri=str(folder / "shards"), image=("jpg",), label="cls"),
            "storage": StorageConfig(),
            "backbone": KerasApplicationConfig(name="MobileNetV2", weights="random", input_size=input_size),
            "runtime": TensorFlowRuntimeConfig(),
            "limits": Limits(),
            "table_uri": str(folder / "table"),
            "dtype": "float32",
            **fields,
        }
    )
