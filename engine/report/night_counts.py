"""What a night came to, in counts: shards, seconds, labels, drift, rejects, rows, and the nights before it.

From the night's JSON summary and pictures of its rows alone; what is not there is not shown. Not for: its verdict
(`night_verdict.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from engine.report.night_verdict import is_run_id, moment_of, title_of
from engine.report.pictures import Pictures
from engine.report.tables import NOTHING, Cell, Table, count_cell, number_cell, percent, ratio_cell, shortened

LABELS_SHOWN = 40
SHARDS_SHOWN = 20
REASON_SHOWN = 200  # characters of what is wrong with a sample or a shard
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
SHARDS = {
    "shards_total": "In the source",
    "shards_skipped": "Done before",
    "shards_done": "Done tonight",
    "shards_replaced": "Replaced in the source since they were done",
    "shards_removed": "Gone from the source, still in the table unless pruned",
    "shards_failed": "Not readable to their end",
    "shards_left": "Left for the next night",
    "shards_older": "Left alone as too old (--since)",
}


@dataclass(frozen=True, slots=True)
class Cosines:
    """How near to what the bundle was fitted on the rows are.

    Attributes:
        edges: (E) cosines between bins, ascending.
        below: of whose rows -> (E) the share of them that lie below each edge.
    """

    edges: Sequence[float]
    below: Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Listed:
    """An earlier night in the list.

    Attributes:
        page: of its page, relative to this one; "": it has none.
        cells: counts, as texts.
    """

    moment: str
    page: str
    verdict: str
    cells: Sequence[str]


NIGHT_COLUMNS = ("Parts published", "Parts held", "Rows", "Rejects", "Without a label", "Seconds")


def headline(night: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Title and text of the counts that are looked at first; those that are not known are left out."""
    rows, abstained = night.get("rows"), night.get("abstained")
    labelled = rows - abstained if isinstance(rows, int) and isinstance(abstained, int) else None
    told = {
        "Shards done": (night.get("extract") or {}).get("shards_done"),
        "Images judged": night.get("samples"),
        "Rejects": night.get("rejects"),
        "Rows with a label": labelled,
        "Rows without": abstained,
        "Parts published": night.get("published_parts"),
        "Parts held back": night.get("held_parts"),
    }
    return [(title, f"{count:,}") for title, count in told.items() if isinstance(count, int)]


def shards_table(night: Mapping[str, Any]) -> Table | None:
    """What became of the source's shards; None where extraction did not come to its end."""
    extract = night.get("extract")
    if not extract:
        return None
    rows = [[Cell(title), count_cell(extract.get(name))] for name, title in SHARDS.items()]
    if extract.get("parts_pruned"):
        rows.append([Cell("Embedding parts pruned"), count_cell(extract["parts_pruned"])])
    if night.get("predictions_pruned"):
        rows.append([Cell("Prediction parts pruned"), count_cell(night["predictions_pruned"])])
    return Table("shards", "Shards", ("What", "How many"), rows)


def failed_shards_table(night: Mapping[str, Any]) -> Table | None:
    """Shards that cannot be read to their end, and why."""
    failed = (night.get("extract") or {}).get("failed_shards") or {}
    if not failed:
        return None
    rows = [
        [Cell(shortened(shard)), Cell(shortened(why, REASON_SHOWN))]
        for shard, why in sorted(failed.items())[:SHARDS_SHOWN]
    ]
    total = max(len(failed), (night["extract"].get("shards_failed") or 0))
    return Table("failed-shards", "Shards that failed", ("Shard", "Why"), rows, _first_of(len(rows), total))


def phases_table(night: Mapping[str, Any]) -> Table | None:
    """Seconds of each phase of the night."""
    phases = dict(night.get("phase_seconds") or {})
    total = night.get("seconds")
    if not phases or not total:
        return None
    phases["everything else"] = max(0.0, total - sum(phases.values()))
    rows = [[Cell(name), _seconds(spent), _share(spent / total)] for name, spent in phases.items()]
    return Table("phases", f"{total:,.1f} seconds", ("Phase", "Seconds", "Share of the night"), rows)


def longest_phase(night: Mapping[str, Any]) -> str:
    """Where most of its time went; "" where that is not known."""
    phases = night.get("phase_seconds") or {}
    return max(phases, key=lambda name: phases[name], default="")


def stages_table(night: Mapping[str, Any]) -> Table | None:
    """How busy the stages of extraction were; None where too little was done to say."""
    extract = night.get("extract") or {}
    busy = extract.get("utilisation") or {}
    spent = extract.get("stage_seconds") or {}
    rows = [
        [Cell(stage), _seconds(spent.get(stage)), _share(share)]
        for stage, share in busy.items()
        if isinstance(share, int | float)
    ]
    columns = ("Stage", "Busy seconds, all workers", "Share of its workers' time")
    return Table("stages", "Stages of extraction", columns, rows) if rows else None


def labels_table(night: Mapping[str, Any]) -> Table | None:
    """Shares of the first answers: tonight, in the night that was published last, and in the bundle's held-out rows."""
    tonight, rows = night.get("answer_counts"), night.get("rows")
    if not tonight or not rows:
        return None
    sets = {"Tonight": (tonight, rows)}
    last, reference = night.get("last_night") or {}, night.get("reference") or {}
    if last.get("rows"):
        sets["Published last"] = (last["answer_counts"], last["rows"])
    if reference.get("rows") and reference.get("labels"):
        sets["Bundle's held-out rows"] = (reference["labels"], reference["rows"])
    names = list(dict.fromkeys(name for counts, _ in sets.values() for name in counts))
    names.sort(key=lambda name: (-tonight.get(name, 0), name))
    shown = [
        [Cell(shortened(name)), count_cell(tonight.get(name, 0)), *_shares(sets, [name])] for name in names
    ]
    if len(names) > LABELS_SHOWN:
        others = names[LABELS_SHOWN:]
        total = sum(tonight.get(name, 0) for name in others)
        rest = [Cell(f"({len(others):,} other labels)"), count_cell(total), *_shares(sets, others)]
        shown = [*shown[:LABELS_SHOWN], rest]
    columns = ("Label", "Rows tonight", *(f"{title}, share" for title in sets))
    return Table("label-mix", "Rows by label", columns, shown)


def cosines_of(night: Mapping[str, Any]) -> Cosines | None:
    """Nearness of tonight's rows and of those that they are held against; None where it was not counted."""
    reference = night.get("reference") or {}
    edges = reference.get("edges")
    if not edges:
        return None
    counted = {
        "bundle's held-out rows": reference.get("cosine_counts"),
        "published last": (night.get("last_night") or {}).get("cosine_counts"),
        "tonight": night.get("cosine_counts"),
    }
    below = {whose: _below(counts) for whose, counts in counted.items() if counts and sum(counts)}
    return Cosines(edges, below) if "tonight" in below else None


def cosines_table(cosines: Cosines) -> Table:
    """What is drawn, at some places."""
    reference = next(iter(cosines.below.values()))
    places = dict.fromkeys(
        min(range(len(reference)), key=lambda place: abs(reference[place] - share)) for share in QUANTILES
    )
    rows = [
        [ratio_cell(cosines.edges[place]), *(_share(shares[place]) for shares in cosines.below.values())]
        for place in places
    ]
    columns = ("Cosine to the nearest class below", *(whose.capitalize() for whose in cosines.below))
    return Table("cosines", "Share of rows below a cosine", columns, rows)


def drift_words(night: Mapping[str, Any]) -> list[str]:
    """How far tonight's embeddings are from the bundle's, and from those of the last night."""
    rules = {rule["name"]: rule for rule in (night.get("gate") or {}).get("rules") or []}
    said = [rules[name]["sentence"] for name in ("max_drift_psi", "max_outlier_fraction") if name in rules]
    last = night.get("last_night") or {}
    if drift := last.get("drift"):
        more = "more" if drift["psi"] > drift["by_chance"] else "no more"
        said.append(
            f"drift from the night that was published last ({moment_of(str(last['run_id']))}): {drift['psi']:.3f}, "
            f"{more} than chance explains ({drift['by_chance']:.3f})"
        )
    elif last:
        said.append(
            "the night that was published last kept no cosines to this bundle's classes to compare with"
        )
    return [f"{one[:1].upper()}{one[1:]}." for one in said]


def agreement_words(night: Mapping[str, Any]) -> str:
    """Whether unchanged keys of replaced shards keep their labels."""
    compared, agreeing = night.get("compared"), night.get("agreeing")
    if not compared or agreeing is None:
        return "No shard was replaced whose keys had predictions before, so there is nothing to compare."
    return (
        f"Of {compared:,} keys of replaced shards that had a prediction before, {agreeing:,} "
        f"({percent(agreeing / compared)}) keep their label, or lack of one."
    )


def reasons_table(night: Mapping[str, Any]) -> Table | None:
    """Rejects of the night by reason."""
    found = night.get("rejects_found") or {}
    by_reason = found.get("by_reason") or {}
    if not by_reason:
        return None
    total = sum(by_reason.values())
    rows = [
        [Cell(shortened(why)), count_cell(count), _share(count / total)] for why, count in by_reason.items()
    ]
    parts, read = found.get("parts", 0), found.get("parts_read", 0)
    note = f"In the first {read:,} of {parts:,} parts that have any." if parts > read else ""
    return Table("reasons", "Rejects by reason", ("Reason", "Samples", "Share of the rejects"), rows, note)


def rejects_table(night: Mapping[str, Any], pictures: Pictures) -> Table | None:
    """Some rejects of the night, of each reason by turns, with the pictures that there are."""
    found = night.get("rejects_found") or {}
    named, total = found.get("named") or [], sum((found.get("by_reason") or {}).values())
    rows = [
        [
            _key_cell(one, pictures),
            *(Cell(shortened(one[name])) for name in ("shard", "error")),
            Cell(shortened(one["message"], REASON_SHOWN)),
            count_cell(one["size_bytes"]),
        ]
        for one in named
    ]
    columns = ("Key", "Shard", "Reason", "What is wrong", "Bytes")
    return Table("rejects", "Some rejects", columns, rows, _first_of(len(rows), total)) if rows else None


def doubtful_table(night: Mapping[str, Any], pictures: Pictures) -> Table | None:
    """Rows with the least between their first two candidates, with the pictures that there are."""
    found = night.get("doubtful") or {}
    rows = [
        [
            _key_cell(one, pictures),
            *(Cell(shortened(one[name])) for name in ("shard", "candidate")),
            Cell("no label" if one["label"] is None else shortened(one["label"])),
            ratio_cell(one["confidence"]),
            ratio_cell(one["margin"]),
        ]
        for one in found.get("rows") or []
    ]
    columns = ("Key", "Shard", "First answer", "Label", "Confidence", "Margin")
    note = f"Of {found.get('rows_read', 0):,} rows that were looked at."
    return Table("doubtful", "Rows of least certainty", columns, rows, note) if rows else None


def nights_listed(earlier: Sequence[Mapping[str, Any]]) -> list[Listed]:
    """Earlier nights, the latest first."""
    return [
        Listed(
            moment_of(run_id),
            f"{run_id}.html" if one.get("has_page") and is_run_id(run_id) else "",
            title_of(one),
            [
                _number(one.get(name))
                for name in ("published_parts", "held_parts", "rows", "rejects", "abstained", "seconds")
            ],
        )
        for one in earlier
        if (run_id := str(one.get("run_id")))
    ]


def lineage(night: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where the night's predictions come from: title and text."""
    told = {
        "Run": night.get("run_id"),
        "Began": night.get("began"),
        "Command": night.get("command"),
        "Engine": night.get("engine_version"),
        "Predictions": night.get("table"),
        "Bundle": " in ".join(str(night[name]) for name in ("bundle", "bundle_uri") if night.get(name)),
        "Embeddings": night.get("embeddings"),
        "Fingerprint": night.get("fingerprint"),
        "Recipe of the night, sha-256": night.get("recipe_sha256"),
        "What decides a prediction, sha-256": night.get("predictions_sha256"),
    }
    return [(title, shortened(text, 400)) for title, text in told.items() if text]


def _key_cell(row: Mapping[str, Any], pictures: Pictures) -> Cell:
    """Older summaries do not say which sample of its shard a row is."""
    return Cell(shortened(row["key"]), picture=pictures.get((row["shard"], row.get("index", -1))))


def _shares(sets: Mapping[str, tuple[Mapping[str, int], int]], names: Sequence[str]) -> list[Cell]:
    return [_share(sum(counts.get(name, 0) for name in names) / rows) for counts, rows in sets.values()]


def _below(counts: Sequence[int]) -> list[float]:
    return [before / sum(counts) for before in accumulate(counts)][:-1]


def _share(share: float | None) -> Cell:
    return number_cell(percent(share), share)


def _seconds(spent: float | None) -> Cell:
    return Cell(NOTHING) if spent is None else number_cell(f"{spent:,.1f}", spent)


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NOTHING
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}"


def _first_of(shown: int, total: int) -> str:
    return f"The first {shown:,} of {total:,}." if total > shown else ""
