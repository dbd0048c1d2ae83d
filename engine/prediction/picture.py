"""Images beside bars of what a bundle says of them, as one picture. Not for: the report of a bundle (`engine.report`).

Matplotlib is imported when something is drawn, and its global state is left as it was.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.errors import RecipeError
from engine.prediction.classifier import ImagePrediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENDINGS = (".png", ".svg")
MAX_PICTURES = 24  # in one drawing; a page of them can still be read
BARS = 10  # of one image
_IN_A_ROW = 2
_ROW_INCHES, _COLUMN_INCHES = 2.4, 6.4
_CHARACTERS = 34  # of a label or a name
_BAR, _ABSTAINED = "#2b6cb0", "#a0aec0"
_SETTINGS: dict[Any, Any] = {
    "text.parse_math": False,  # a `$` in a label is a `$`
    "svg.fonttype": "none",  # text stays text
    "font.size": 10,
}


def require_picture_name(uri: str) -> None:
    """Refuse another kind of picture before anything is computed.

    Raises:
        RecipeError: with the kinds that there are.
    """
    if not uri.lower().endswith(ENDINGS):
        raise RecipeError(f"{uri}: not a picture that can be drawn", wanted=f"a name in {', '.join(ENDINGS)}")


def draw_predictions(predictions: Sequence[ImagePrediction], kind: str = "png") -> bytes:
    """The first MAX_PICTURES of them, two in a row: the image, and a bar for each of its candidates.

    Args:
        predictions: with their `picture_HW3`.
        kind: png or svg.

    Returns:
        The file.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    drawn = predictions[:MAX_PICTURES]
    columns = min(_IN_A_ROW, max(1, len(drawn)))
    rows = max(1, math.ceil(len(drawn) / columns))
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # it is drawn as a box
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        figure = Figure(figsize=(columns * _COLUMN_INCHES, rows * _ROW_INCHES), dpi=110, layout="constrained")
        grid = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=(2, 3) * columns)
        for axes in grid.flat:
            axes.set_axis_off()
        for number, prediction in enumerate(drawn):
            row, column = divmod(number, columns)
            _draw_image(grid[row, 2 * column], prediction)
            _draw_bars(grid[row, 2 * column + 1], prediction)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind)
        return buffer.getvalue()


def _draw_image(axes: Axes, prediction: ImagePrediction) -> None:
    if prediction.picture_HW3 is not None:
        axes.imshow(prediction.picture_HW3)
    axes.set_title(_shortened(prediction.image.rpartition("/")[2] or prediction.image), fontsize=9)


def _draw_bars(axes: Axes, prediction: ImagePrediction) -> None:
    """Each bar with its label above it: labels are of any length."""
    top = prediction.top[:BARS]
    places = range(len(top))
    axes.set_axis_on()
    bars = axes.barh(
        places,
        [confidence for _, confidence in top],
        height=0.38,
        color=_ABSTAINED if prediction.abstains else _BAR,
    )
    axes.bar_label(bars, [f"{confidence:.3f}" for _, confidence in top], padding=3, fontsize=8)
    for place, (label, _) in zip(places, top, strict=True):
        axes.text(0.0, place - 0.24, _shortened(label), fontsize=9, va="bottom")
    axes.set_xlim(0, 1.15)
    axes.set_ylim(len(top) - 0.6, -0.85)  # the best on top
    axes.set_yticks([])
    axes.set_xticks([0, 0.5, 1])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title("no label" if prediction.abstains else _shortened(_given(prediction)), fontsize=10)


def _given(prediction: ImagePrediction) -> str:
    return ", ".join(prediction.labels) if prediction.labels is not None else str(prediction.label)


def _shortened(text: str) -> str:
    """What can be drawn of a text from outside, and no more than fits."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text)
    return plain if len(plain) <= _CHARACTERS else plain[: _CHARACTERS - 1] + "…"
