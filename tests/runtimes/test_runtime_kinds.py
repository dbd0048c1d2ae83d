from __future__ import annotations

import pytest

from engine.config import Config, check_recipe
from engine.errors import RecipeError
from engine.runtimes.kinds import RuntimeConfig, TensorFlowRuntimeConfig


class Recipe(Config):
    runtime: RuntimeConfig = TensorFlowRuntimeConfig()


def test_runtime_may_be_left_out() -> None:
    assert check_recipe(Recipe, {}).runtime.model_dump() == {
        "kind": "tensorflow",
        "precision": "float32",
        "batch_size": 64,
    }


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ({"precision": "int4"}, "runtime.precision: found 'int4'; input should be 'float32'"),
        ({"kind": "onnx"}, "runtime.kind: found 'onnx'; input should be 'tensorflow'"),
        ({"batch_size": 0}, "runtime.batch_size: found 0"),
    ],
)
def test_wrong_choice_is_refused_with_what_is_allowed(runtime: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_recipe(Recipe, {"runtime": runtime})
    assert message in str(caught.value)
