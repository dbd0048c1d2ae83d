"""Log-log plots with fitted straight lines, as inline SVG on one page that needs no script and no network.

Knows nothing of what is plotted. Pixels are those of the drawing; a value x is drawn at a place `across`, y at `up`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH_PX, HEIGHT_PX = 680, 400
LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 78, 18, 16, 52  # margins, where ticks and labels stand
LEGEND_LINE_PX = 20
MARGIN_DECADES = 0.12  # between the outermost points and the frame
FEW_DECADES, MANY_DECADES = (
    1.0,
    2.5,
)  # below and above which there are more, and fewer, ticks than at 1, 2 and 5
COLOURS = ("#1f5fa8", "#c2500a", "#1b7a43", "#7a3d99")
STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #222;
  background: #fff }
svg { width: 100%; height: auto; font: 13px system-ui, sans-serif }
svg text { fill: #333 }
table { border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto }
td, th { padding: 0.1rem 0.8rem 0.1rem 0; text-align: right }
td:first-child, th:first-child { text-align: left }
"""


@dataclass(frozen=True)
class Line:
    """y = factor * x ** slope, which is straight where both axes are logarithmic."""

    slope: float
    factor: float

    def at(self, x: float) -> float:
        return float(self.factor * x**self.slope)


@dataclass(frozen=True)
class Series:
    """Points (x, y), both above zero, in the order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """One drawing.

    Attributes:
        words: what the fitted slopes say, a sentence each.
        table: a head and its rows: the figures behind the drawing.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    words: Sequence[str]
    table: Sequence[Sequence[str]]


def fit(points: Sequence[tuple[float, float]]) -> Line | None:
    """Least squares in log-log; None: there are not two different x."""
    if len({x for x, _ in points}) < 2:
        return None
    xs, ys = np.log10(np.asarray(points)).T
    slope, intercept = np.polyfit(xs, ys, 1)
    return Line(float(slope), float(10**intercept))


def page(title: str, facts: str, plots: Sequence[Plot]) -> str:
    """HTML that stands alone.

    Args:
        facts: one sentence on what was measured, and where.
    """
    body = "\n".join(_section(plot) for plot in plots)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>\n<p>{html.escape(facts)}</p>\n{body}\n</html>\n"
    )


def svg(plot: Plot) -> str:
    """The drawing alone: a frame with ticks, every series' points, and its fitted line, dashed."""
    x_axis = _Axis.around([x for one in plot.series for x, _ in one.points], LEFT_PX, WIDTH_PX - RIGHT_PX)
    y_axis = _Axis.around([y for one in plot.series for _, y in one.points], HEIGHT_PX - BOTTOM_PX, TOP_PX)
    parts = [*_grid(x_axis, y_axis), *_labels(plot)]
    for number, series in enumerate(plot.series):
        parts += _drawn(series, COLOURS[number % len(COLOURS)], x_axis, y_axis)
    parts += _legend(plot.series)
    legend_px = LEGEND_LINE_PX * len(plot.series)
    label = html.escape(f"{plot.title}: {plot.y_label} against {plot.x_label}", quote=True)
    return (
        f'<svg viewBox="0 {-legend_px} {WIDTH_PX} {HEIGHT_PX + legend_px}" role="img" aria-label="{label}">\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


@dataclass(frozen=True)
class _Axis:
    """A logarithmic scale from `low` to `high`, drawn from pixel `begin` to pixel `end`."""

    low: float
    high: float
    begin: float
    end: float

    @staticmethod
    def around(values: Sequence[float], begin: float, end: float) -> _Axis:
        """An axis with some room on both sides of all values; half a decade where they are all the same."""
        low, high = math.log10(min(values)), math.log10(max(values))
        spread = max(0.0, 0.5 - (high - low)) / 2 + MARGIN_DECADES
        return _Axis(10 ** (low - spread), 10 ** (high + spread), begin, end)

    def place(self, value: float) -> float:
        """Pixels; a value beyond the axis is beyond the frame."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return round(self.begin + share * (self.end - self.begin), 1)

    def ticks(self) -> Iterator[float]:
        decades = math.log10(self.high / self.low)
        mantissas = range(1, 10) if decades < FEW_DECADES else (1, 2, 5) if decades < MANY_DECADES else (1,)
        for exponent in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1):
            yield from (
                tick for mantissa in mantissas if self.low <= (tick := mantissa * 10.0**exponent) <= self.high
            )


def _section(plot: Plot) -> str:
    words = "\n".join(f"<p>{html.escape(sentence)}</p>" for sentence in plot.words)
    head, *rows = plot.table
    table = "\n".join([_row(head, "th"), *(_row(row, "td") for row in rows)])
    return f"<h2>{html.escape(plot.title)}</h2>\n{svg(plot)}\n{words}\n<table>\n{table}\n</table>"


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _grid(x_axis: _Axis, y_axis: _Axis) -> Iterator[str]:
    left, right, top, bottom = LEFT_PX, WIDTH_PX - RIGHT_PX, TOP_PX, HEIGHT_PX - BOTTOM_PX
    for tick in x_axis.ticks():
        across = x_axis.place(tick)
        yield _stroke((across, bottom), (across, top), "#ddd")
        yield _text(across, bottom + 18, short(tick), "middle")
    for tick in y_axis.ticks():
        up = y_axis.place(tick)
        yield _stroke((left, up), (right, up), "#ddd")
        yield _text(left - 7, up + 4, short(tick), "end")
    yield (
        f'<rect x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" fill="none" stroke="#888"/>'
    )


def _labels(plot: Plot) -> Iterator[str]:
    yield _text((LEFT_PX + WIDTH_PX - RIGHT_PX) / 2, HEIGHT_PX - 12, plot.x_label, "middle")
    middle = (TOP_PX + HEIGHT_PX - BOTTOM_PX) / 2
    yield _text(18, middle, plot.y_label, "middle", f' transform="rotate(-90 18 {middle})"')


def _drawn(series: Series, colour: str, x_axis: _Axis, y_axis: _Axis) -> Iterator[str]:
    if line := fit(series.points):
        xs = [x for x, _ in series.points]
        ends = [(x_axis.place(x), y_axis.place(line.at(x))) for x in (min(xs), max(xs))]
        yield _stroke(ends[0], ends[1], colour, ' stroke-width="1.5" stroke-dasharray="6 4"')
    for x, y in series.points:
        hint = html.escape(f"{series.name}: {short(x)}, {short(y)}")
        yield (
            f'<circle cx="{x_axis.place(x)}" cy="{y_axis.place(y)}" r="4.5" fill="{colour}">'
            f"<title>{hint}</title></circle>"
        )


def _legend(series: Sequence[Series]) -> Iterator[str]:
    """Above the frame, where places are negative: a line for each series."""
    for number, one in enumerate(series):
        up, line = LEGEND_LINE_PX * (number - len(series)) + 14, fit(one.points)
        slope = f", slope {line.slope:.2f}" if line else ""
        yield f'<circle cx="{LEFT_PX + 14}" cy="{up - 4}" r="4.5" fill="{COLOURS[number % len(COLOURS)]}"/>'
        yield _text(LEFT_PX + 25, up, one.name + slope, "start")


def _stroke(begin: tuple[float, float], end: tuple[float, float], colour: str, more: str = "") -> str:
    return f'<line x1="{begin[0]}" y1="{begin[1]}" x2="{end[0]}" y2="{end[1]}" stroke="{colour}"{more}/>'


def _text(across: float, up: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{across}" y="{up}" text-anchor="{anchor}"{more}>{html.escape(text)}</text>'


def short(value: float) -> str:
    """For a tick or a cell: 1,000,000 and 0.05 in full, at most three digits that count below 1,000."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
