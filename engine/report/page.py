"""One HTML page about a bundle: a pure function of its JSON documents. Not for: where the page is written.

The page asks for nothing: no network, no fonts, no files, which its own content security policy holds it to. What it
shows (labels, keys, paths) came from strangers: Jinja2 escapes all of it, and no plot has any of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from engine.report import classes, confidence, embedding_map, figures, pictures, plots, rows, training
from engine.report.template import render_page

DOCUMENT_SHOWN = 50_000  # characters of a recipe or record; they are in the bundle as a whole


def render_report(documents: Mapping[str, Any]) -> str:
    """The page about a bundle; the same documents give the same text.

    Args:
        documents: as `Bundle.documents()` gives them: id, uri, manifest, metrics, embeddings_table, recipe, and
            suspects, gallery, embedding_map, rejects and pictures where there are any. Of metrics every part may be
            missing: then it is not shown.
    """
    manifest, metrics = documents["manifest"], documents["metrics"]
    split = figures.judged_split(metrics)
    judged = metrics.get(split) or {}
    phases = training.training_phases(metrics.get("training") or {})
    comparison = metrics.get("comparison")
    gallery, shown = documents.get("gallery"), pictures.pictures_of(documents.get("pictures"))
    pictured = pictures.shown_cells(gallery, manifest["classes"])
    return render_page(
        "page.html",
        ["page.css"],
        name=documents["uri"].rstrip("/").rpartition("/")[2] or documents["uri"],
        bundle_id=documents["id"],
        uri=documents["uri"],
        created=manifest["created"],
        split=split,
        headline=figures.headline(judged),
        facts=figures.facts(manifest, documents["embeddings_table"]),
        splits=figures.splits_table(metrics),
        comparison=comparison and training.comparison_words(comparison, manifest["task"]),
        comparison_plot=comparison and Markup(plots.draw_comparison(comparison)),
        phases=phases,
        epochs=training.epochs_table(phases),
        curves_plot=_learning_curves(phases),
        thresholds=confidence.thresholds(judged, metrics.get("calibration") or {}),
        suggestions=confidence.suggestions_table(metrics.get("calibration") or {}),
        coverage_plot=_drawn(plots.draw_coverage, judged.get("by_min_confidence")),
        reliability_plot=_drawn(plots.draw_reliability, judged.get("reliability")),
        reliability=confidence.reliability_table(judged.get("reliability") or []),
        calibration_error=confidence.calibration_words(judged, metrics.get("calibration") or {}, split),
        classes=classes.classes_table(judged),
        confusion=classes.confusion_matrix(judged, manifest["classes"], pictured),
        confusions=classes.confusions_table(judged, manifest["classes"], pictured),
        grid=training.grid_table(metrics.get("grid") or []),
        gallery=pictures.gallery_groups(gallery, shown, manifest["classes"]),
        missing_pictures=pictures.missing_words(documents.get("pictures")),
        map=embedding_map.embedding_map(documents.get("embedding_map"), manifest["classes"]),
        mistakes=rows.mistakes_table(metrics.get("most_confident_mistakes") or [], shown),
        suspects=rows.suspects_table(documents.get("suspects"), shown),
        left_out=rows.left_out_table(metrics.get("labels") or {}),
        rejects=rows.rejects_table(metrics, documents.get("rejects")),
        reject_cards=pictures.reject_cards(documents.get("rejects"), shown),
        lineage=[
            (title, _document_text(documents[role]))
            for title, role in (("Recipe", "recipe"), ("Record of the embeddings", "embeddings_table"))
        ],
    )


def _learning_curves(phases: list[training.Phase]) -> Markup | None:
    """Nothing where there is no curve: heads that are not trained have one point."""
    return Markup(plots.draw_learning_curves(phases)) if training.has_curves(phases) else None


def _drawn(draw: Any, points: list[dict[str, Any]] | None) -> Markup | None:
    return Markup(draw(points)) if points else None


def _document_text(document: Mapping[str, Any]) -> str:
    """Without the canary, which is numbers for a machine."""
    told = {name: value for name, value in document.items() if name != "canary"}
    text = json.dumps(told, indent=2, ensure_ascii=False)
    return text if len(text) <= DOCUMENT_SHOWN else text[:DOCUMENT_SHOWN] + "\n..."
