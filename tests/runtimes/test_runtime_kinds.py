from __future__ import annotations

import pytest

from engine.config import Config, check_recipe
from engine.errors import RecipeError
from engine.runtimes.kinds import RuntimeConfig, TensorFlowRuntimeConfig, candidates, settled_runtime


class Recipe(Config):
    runtime: RuntimeConfig = TensorFlowRuntimeConfig()


def test_runtime_may_be_left_out() -> None:
    assert check_recipe(Recipe, {}).runtime.model_dump() == {
        "kind": "tensorflow",
        "precision": "float32",
        "batch_size": None,
    }


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        (
            {"precision": "int4"},
            "runtime.tensorflow.precision: found 'int4'; input should be 'float32', 'tf32'",
        ),
        ({"kind": "onnx"}, "expected tags: 'tensorflow', 'openvino', 'auto'"),
        ({"batch_size": 0}, "runtime.tensorflow.batch_size: found 0"),
        (
            {"kind": "openvino", "precision": "float16"},
            "precision: found 'float16'; input should be 'float32', 'bf",
        ),
        ({"kind": "auto", "batch_size": 8}, "runtime.auto.batch_size: unknown field"),
    ],
)
def test_wrong_choice_is_refused_with_what_is_allowed(runtime: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_recipe(Recipe, {"runtime": runtime})
    assert message in str(caught.value)


def choices(has_gpu: bool, **runtime: object) -> list[str]:
    found = candidates(check_recipe(Recipe, {"runtime": runtime}).runtime, has_gpu)
    return [f"{config.kind} {config.precision} {config.batch_size}" for config in found]


def test_a_recipe_that_leaves_nothing_open_means_one_runtime() -> None:
    assert choices(False) == ["tensorflow float32 None"]
    assert choices(False, kind="openvino", precision="bfloat16", batch_size=3) == ["openvino bfloat16 3"]


def test_auto_means_what_runs_here_the_safest_first() -> None:
    assert choices(False, kind="auto") == ["tensorflow float32 None", "openvino float32 4"]
    assert choices(True, kind="auto") == ["tensorflow float32 None"]  # OpenVINO would leave the GPU idle
    assert choices(False, kind="auto", precision="auto") == [
        "tensorflow float32 None",
        "openvino float32 4",
        "tensorflow bfloat16 None",
        "openvino bfloat16 4",
    ]
    assert choices(True, precision="auto", batch_size=256) == [
        f"tensorflow {precision} 256" for precision in ("float32", "tf32", "bfloat16", "float16")
    ]


def test_what_a_recipe_leaves_open_is_as_the_table_has_it() -> None:
    table = {"kind": "openvino", "precision": "bfloat16", "batch_size": 8}

    def settled(**runtime: object) -> dict[str, object]:
        config = check_recipe(Recipe, {"runtime": runtime}).runtime
        return settled_runtime(config, table).model_dump()

    assert settled(kind="auto", precision="auto") == table
    assert settled(kind="auto", precision="float32") == table  # another precision: the contract refuses it
    assert settled(kind="openvino", precision="auto", batch_size=2) == table | {"batch_size": 2}
    assert settled(precision="auto") == {"kind": "tensorflow", "precision": "bfloat16", "batch_size": None}
    assert settled() == {"kind": "tensorflow", "precision": "float32", "batch_size": None}
