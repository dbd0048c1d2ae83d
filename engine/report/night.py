"""One HTML page about a night: a pure function of JSON documents. Not for: where the page is written.

As the page about a bundle it asks for nothing, runs no script but its own, and escapes what came from strangers. Its
only links lead to the pages of earlier nights beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from engine.report import night_counts, night_verdict, pictures, plots
from engine.report.template import render_page

RECIPE_SHOWN = 50_000  # characters


def render_night(documents: Mapping[str, Any]) -> str:
    """The page about a night; the same documents give the same text.

    Args:
        documents: `night`: the summary that is kept of it, as `jobs.nightly` writes it; all but run_id may be missing:
            then it is not shown. `earlier`: those of earlier nights, the latest first, with `has_page`. `pictures`: of
            its rows, as in pictures.json, if there are any.
    """
    night = documents["night"]
    extract, cosines = night.get("extract") or {}, night_counts.cosines_of(night)
    shown = pictures.pictures_of(documents.get("pictures"))
    return render_page(
        "night.html",
        ["page.css", "night.css"],
        run_id=night["run_id"],
        moment=night_verdict.moment_of(night["run_id"]),
        table_uri=night.get("table") or "an unnamed table",
        verdict=night_verdict.verdict_of(night),
        criteria=night_verdict.criteria(night),
        steps=night_verdict.next_steps(night),
        headline=night_counts.headline(night),
        shards=night_counts.shards_table(night),
        failed_shards=night_counts.failed_shards_table(night),
        phases=night_counts.phases_table(night),
        longest=night_counts.longest_phase(night),
        stages=night_counts.stages_table(night),
        bottleneck=extract.get("bottleneck"),
        images_per_second=extract.get("images_per_second"),
        advice=extract.get("advice") or [],
        seconds_at_most=night.get("seconds_at_most"),
        labels=night_counts.labels_table(night),
        several=night.get("task") == "multi_label",
        drift=night_counts.drift_words(night),
        cosines=cosines and night_counts.cosines_table(cosines),
        cosines_plot=cosines and Markup(plots.draw_cosines(cosines.edges, cosines.below)),
        reasons=night_counts.reasons_table(night),
        rejects=night_counts.rejects_table(night, shown),
        embeddings=night.get("embeddings"),
        agreement=night_counts.agreement_words(night),
        doubtful=night_counts.doubtful_table(night, shown),
        missing_pictures=pictures.missing_words(documents.get("pictures")),
        nights=night_counts.nights_listed(documents["earlier"]),
        night_columns=night_counts.NIGHT_COLUMNS,
        lineage=night_counts.lineage(night),
        recipe=_recipe_text(night.get("recipe")),
    )


def _recipe_text(recipe: Mapping[str, Any] | None) -> str:
    text = json.dumps(recipe, indent=2, ensure_ascii=False) if recipe else ""
    return text if len(text) <= RECIPE_SHOWN else text[:RECIPE_SHOWN] + "\n..."
