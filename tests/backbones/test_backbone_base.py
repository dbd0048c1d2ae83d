from __future__ import annotations

import keras
import numpy as np
import pytest

from engine.backbones.base import PixelScaling, require_keras
from engine.errors import BackboneError


@pytest.mark.parametrize("version", ["2.15.0", "3.13.0", "4.0.0"])
def test_another_keras_is_refused_with_its_version_and_the_range(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keras, "__version__", version)
    with pytest.raises(BackboneError) as caught:
        require_keras()
    assert f"found:   {version}" in str(caught.value)
    assert "wanted:  >= 3.13.1, < 4" in str(caught.value)


@pytest.mark.parametrize("version", ["3.13.1", "3.15.1", "3.16.0rc1"])
def test_keras_3_is_accepted(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras, "__version__", version)
    assert require_keras() is keras


def test_settings_that_change_results_are_refused() -> None:
    keras.config.set_image_data_format("channels_first")
    try:
        with pytest.raises(BackboneError, match="the setting 'image_data_format' of Keras"):
            require_keras()
    finally:
        keras.config.set_image_data_format("channels_last")


def test_scaling_swaps_before_it_scales() -> None:
    scaling = PixelScaling("own", multiply=(2.0, 3.0, 5.0), add=(0.5, 0.25, 0.125), bgr=True)
    pixel = np.array([7, 11, 13], np.float32).reshape(1, 1, 1, 3)
    assert scaling.apply(pixel).ravel().tolist() == [26.5, 33.25, 35.125]
