"""Plots as inline SVG that take their colours and their font from the page. Not for: what is plotted, or words.

No text that comes from outside is drawn here: labels and keys are in tables, and Matplotlib would read a `$` in them.
Matplotlib is imported when something is drawn (0.8 s), and its global state is left as it was.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from engine.report.training import Phase

WIDTH_PX = 440  # a phone's width is nearly that, so that text is scaled little
MARKED_EPOCHS = 60  # of a phase; with more of them the line is enough
POINTS_PER_INCH = 72  # of Matplotlib's SVG, whatever the figure's dpi
# Matplotlib wants real colours: these stand for those of the page, which knows light from dark.
INK, RULE, FIRST, SECOND, THIRD, PAGE = (f"#00000{number}" for number in range(1, 7))
COLOURS = {
    INK: "currentColor",
    RULE: "var(--rule)",
    FIRST: "var(--series-1)",
    SECOND: "var(--series-2)",
    THIRD: "var(--series-3)",
    PAGE: "var(--page)",
}
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "report",  # the same plot has the same ids
    "text.parse_math": False,
    "font.size": 11.5,
    "legend.fontsize": 11.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}

ABOVE: dict[str, Any] = {
    "ncols": 3,
    "loc": "lower left",
    "bbox_to_anchor": (-0.02, 1.06),
    "borderpad": 0,
}  # the frame


def draw_learning_curves(phases: Sequence[Phase]) -> str:
    """Losses above, accuracy below, over the epochs of all phases: a line between two, a star at the weights kept."""
    with _figure(300) as figure:
        losses, accuracies = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for phase in phases:
            _draw_epochs(losses, phase, "train_loss", "train", (FIRST, "--", "."))
            for axes, name in ((losses, "validation_loss"), (accuracies, "validation_accuracy")):
                _draw_epochs(axes, phase, name, "validation", (SECOND, "-", "o"))
                _mark_kept(axes, phase, name)
        for phase in phases[1:]:
            for axes, place in ((losses, ""), (accuracies, "-below")):
                line = axes.axvline(phase.after + 0.5, color=INK, linewidth=1.2, linestyle=":")
                line.set_gid(f"{phase.name}-begins{place}")
            losses.annotate(
                f"{phase.name} →",
                (phase.after + 0.5, 1),
                xycoords=("data", "axes fraction"),
                xytext=(5, -11),  # within the frame, where losses have fallen
                textcoords="offset points",
            )
        losses.set_ylabel("loss")
        accuracies.set_ylabel("accuracy")
        accuracies.set_xlabel("epoch")
        accuracies.xaxis.get_major_locator().set_params(integer=True)
        handles, labels = losses.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))  # both phases have each
        losses.legend(once.values(), once.keys(), **ABOVE)
        if not any(epoch["validation_loss"] is not None for phase in phases for epoch in phase.history):
            accuracies.annotate("no validation rows", (0.5, 0.5), xycoords="axes fraction", ha="center")
            accuracies.set_yticks([])
        told = " ".join(phase.in_words() for phase in phases)
        return _svg(figure, "learning", "Learning curves", f"{told} The table below has the epochs.")


def _draw_epochs(axes: Axes, phase: Phase, name: str, label: str, look: tuple[str, str, str]) -> None:
    colour, dashes, marker = look
    drawn = [epoch for epoch in phase.history if epoch[name] is not None]
    if not drawn:
        return
    (line,) = axes.plot(
        [epoch["epoch"] for epoch in drawn],
        [epoch[name] for epoch in drawn],
        label=label,
        color=colour,
        linestyle=dashes,
        marker=marker if len(drawn) <= MARKED_EPOCHS else None,
    )
    line.set_gid(f"{phase.name}-{name}")


def _mark_kept(axes: Axes, phase: Phase, name: str) -> None:
    """Nowhere, where the weights from before the phase were best."""
    for epoch in phase.history:
        if epoch["epoch"] == phase.best_epoch and epoch[name] is not None:
            (star,) = axes.plot(
                epoch["epoch"], epoch[name], "*", color=INK, markersize=11, label="weights kept"
            )
            star.set_gid(f"{phase.name}-{name}-kept")


def draw_comparison(comparison: Mapping[str, Any]) -> str:
    """Accuracy before and after, and the interval of the difference beside the line of no difference."""
    before, after = (100 * comparison[name] for name in ("before", "after"))
    low, high, difference = (100 * comparison[name] for name in ("low", "high", "difference"))
    with _figure(190) as figure:
        shares, change = figure.subplots(2, 1, height_ratios=(2, 1))
        bars = shares.barh(
            ["after", "before"],
            [after, before],
            color=[SECOND, FIRST],
            height=0.55,
            hatch=["//", ""],
            edgecolor=PAGE,
        )
        shares.bar_label(bars, fmt="%.2f %%", padding=4)
        shares.set_xlim(0, 118)
        shares.set_xticks(range(0, 101, 20))
        shares.set_xlabel("accuracy, %")
        shares.grid(visible=False, axis="y")
        change.axvline(0, color=INK, linewidth=1.2, linestyle=":")
        (line,) = change.plot([low, high], [0, 0], color=SECOND, marker="|", markersize=11)
        line.set_gid("interval")
        change.plot(difference, 0, "o", color=SECOND, markersize=6)
        change.set_yticks([0], ["difference"])
        change.set_ylim(-1, 1)
        change.margins(x=0.15)
        change.grid(visible=False, axis="y")
        change.set_xlabel("points, with the 95 % interval")
        words = (
            f"{before:.2f} % before, {after:.2f} % after; the difference is {difference:+.2f} points, "
            f"the interval {low:+.2f} to {high:+.2f}."
        )
        return _svg(figure, "comparison", "Before and after", words)


def draw_coverage(curve: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy of the answers that are given, over the share of rows that are given one."""
    points = [point for point in curve if point["accuracy"] is not None]
    with _figure(230) as figure:
        axes = figure.subplots()
        (line,) = axes.plot(
            [100 * point["coverage"] for point in points],
            [100 * point["accuracy"] for point in points],
            color=FIRST,
        )
        line.set_gid("curve")
        axes.set_xlim(0, 102)
        axes.set_xlabel("rows that are labelled, %")
        axes.set_ylabel("accuracy of those, %")
        words = (
            f"All rows: {100 * points[0]['accuracy']:.2f} % right. The most confident "
            f"{100 * points[-1]['coverage']:.2f} %: {100 * points[-1]['accuracy']:.2f} % right."
        )
        return _svg(figure, "coverage", "Accuracy and share labelled", words)


def draw_reliability(bins: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy over confidence beside the diagonal that they should keep to; below, how many answers there are."""
    with _figure(300) as figure:
        kept, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        kept.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1.2, label="as promised")
        (line,) = kept.plot(
            [one["confidence"] for one in bins],
            [one["accuracy"] for one in bins],
            color=FIRST,
            marker="o",
            label="found",
        )
        line.set_gid("found")
        kept.legend(**ABOVE)
        kept.set_ylim(-0.02, 1.04)
        kept.set_ylabel("share right")
        edges = [one["above"] for one in bins]
        counts.bar(
            edges,
            [one["rows"] for one in bins],
            width=[one["up_to"] - one["above"] for one in bins],
            align="edge",
            color=FIRST,
            edgecolor=PAGE,
        )
        counts.set_xlim(0, 1.01)
        counts.set_ylabel("answers")
        counts.set_xlabel("confidence")
        words = f"{len(bins)} ranges of confidence; the table below has each."
        return _svg(figure, "reliability", "Confidence and accuracy", words)


def draw_cosines(edges: Sequence[float], below: Mapping[str, Sequence[float]]) -> str:
    """Of each set of rows the share below a cosine, over the cosine.

    Args:
        edges: (E) cosines, ascending.
        below: the name of a set, one of ours -> (E) shares; the first is what the others are held against.
    """
    looks = ((INK, ":"), (SECOND, "--"), (FIRST, "-"))
    with _figure(260) as figure:
        axes = figure.subplots()
        drawn = [looks[0], *looks[3 - len(below) + 1 :]]  # tonight's is always the last
        for number, ((name, shares), (colour, dashes)) in enumerate(zip(below.items(), drawn, strict=True)):
            (line,) = axes.plot(
                edges, [100 * share for share in shares], label=name, color=colour, linestyle=dashes
            )
            line.set_gid(f"set-{number}")
        axes.set_ylim(-2, 104)
        axes.set_xlabel("cosine to the nearest class")
        axes.set_ylabel("rows below it, %")
        axes.legend(**{**ABOVE, "ncols": 2})
        middle = min(range(len(edges)), key=lambda place: abs(next(iter(below.values()))[place] - 0.5))
        shares_there = ", ".join(f"{name} {100 * shares[middle]:.1f} %" for name, shares in below.items())
        words = f"Below a cosine of {edges[middle]:.3f} lie: {shares_there}. The table below has more."
        return _svg(figure, "cosines", "Nearness to what the bundle was fitted on", words)


@contextmanager
def _figure(height_px: int) -> Iterator[Figure]:
    """A figure in our settings, whatever those of the user are."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(SETTINGS)
        yield Figure(
            figsize=(WIDTH_PX / POINTS_PER_INCH, height_px / POINTS_PER_INCH),
            dpi=POINTS_PER_INCH,
            layout="constrained",
        )


def _svg(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an element for the page.

    Args:
        name: begins all its ids, so that those of several plots differ.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    _, _, inner = buffer.getvalue().partition("<svg")
    _, _, inner = inner.partition(">")
    inner = re.sub(r"<(metadata|style)\b.*?</\1>", "", inner, flags=re.DOTALL)
    inner = re.sub(r"""\bid="([^"]+)""", rf'id="{name}-\1', inner)
    inner = inner.replace("xlink:href", "href").replace('href="#', f'href="#{name}-')
    inner = inner.replace("url(#", f"url(#{name}-")
    # Matplotlib names its font in either of two ways (3.11); the page has one.
    inner = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", inner)
    inner = re.sub(r"font-family: [^;\"]*;? ?", "", inner)
    for stand_in, colour in COLOURS.items():
        inner = inner.replace(stand_in, colour)
    inner = re.sub(r"\s*\n\s*", "\n", inner)
    width, height = (round(inches * POINTS_PER_INCH) for inches in figure.get_size_inches())
    named = f'aria-labelledby="{name}-title {name}-desc"'
    return (
        f'<svg class="plot" role="img" {named} viewBox="0 0 {width} {height}">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>{inner}'
    ).strip()
