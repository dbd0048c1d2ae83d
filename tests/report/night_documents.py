"""JSON summaries of nights, made by hand: figures that no two of which are alike."""

from __future__ import annotations

import copy
from typing import Any

from tests.report.documents import picture

RUN_ID = "nightly-20260203T040506Z-0a1b"
LAST_RUN_ID = "nightly-20260202T030405Z-2c3d"
EDGES = [round(0.2 + step / 200, 4) for step in range(99)]


def rule(
    name: str, value: float | None, limit: float | None, holds: bool | None, sentence: str
) -> dict[str, Any]:
    """One rule, as `engine.gate.Verdict.to_json` spells it."""
    return {"name": name, "value": value, "limit": limit, "holds": holds, "sentence": sentence}


RULES = [
    rule("row_accounting", 1213, 1213, True, "1,213 rows are predicted, the embedding parts have 1,213"),
    rule("max_reject_fraction", 0.0114, 0.02, True, "1.14% of 1,227 samples are rejects"),
    rule("max_drift_psi", 0.071, 0.25, True, "drift from the bundle's held-out rows: 0.071"),
    rule("max_outlier_fraction", 0.013, 0.1, True, "1.30% of 1,213 rows lie farther"),
    rule("max_label_psi", 0.043, 0.25, True, "shift from the labels of the last night: 0.043"),
    rule("max_abstention_fraction", 0.0313, 0.5, True, "3.13% of 1,213 rows have no label"),
    rule("min_agreement", None, None, None, "17 keys of replaced shards, fewer than min_rows 200"),
]
NIGHT: dict[str, Any] = {
    "verb": "nightly",
    "run_id": RUN_ID,
    "table": "s3://labels/animals",
    "embeddings": "s3://features/lite0",
    "bundle": "00112233445566aa",
    "bundle_uri": "s3://models/animals",
    "fingerprint": "0123456789abcdef" * 4,
    "command": "engine nightly nightly.yaml --set budget.max_seconds=900",
    "engine_version": "0.1.0",
    "began": "2026-02-03T04:05:06+00:00",
    "recipe_sha256": "5" * 64,
    "predictions_sha256": "6" * 64,
    "recipe": {"gate": {"max_label_psi": 0.25}},
    "storage": {"endpoint_url": None, "region": None, "anonymous": False},
    "is_finished": True,
    "seconds": 400.0,
    "seconds_at_most": 900.0,
    "phase_seconds": {"extract": 300.0, "score": 60.0, "judge": 10.0, "publish": 5.0},
    "extract": {
        "shards_total": 47,
        "shards_skipped": 41,
        "shards_done": 5,
        "shards_failed": 0,
        "failed_shards": {},
        "shards_left": 0,
        "shards_older": 0,
        "shards_replaced": 2,
        "shards_removed": 3,
        "parts_pruned": 0,
        "rows": 1213,
        "bottleneck": "decode",
        "images_per_second": 4.1,
        "stage_seconds": {"decode": 260.5, "embed": 71.0},
        "utilisation": {"decode": 0.91, "embed": 0.25},
        "advice": ["more cores for decoding"],
    },
    "score": {"parts_written": 8, "parts_left": 0, "rows": 1213, "seconds": 59.0},
    "predictions_pruned": 0,
    "rows": 1213,
    "samples": 1227,
    "rejects": 14,
    "abstained": 38,
    "compared": 17,
    "agreeing": 16,
    "published_parts": 8,
    "published_rows": 1213,
    "held_parts": 0,
    "refused_parts": 0,
    "answer_counts": {"ant": 613, "bee": 500, "cat": 100},
    "gate": {"passes": True, "rules": RULES},
    "verdicts": [],
    "cosine_counts": [13, *([12] * 98), 24],
    "reference_sha256": "7" * 64,
    "reference": {
        "rows": 1000,
        "labels": {"ant": 510, "bee": 290, "cat": 200},
        "edges": EDGES,
        "cosine_counts": [10] * 100,
    },
    "last_night": {
        "run_id": LAST_RUN_ID,
        "rows": 800,
        "answer_counts": {"ant": 400, "bee": 300, "cat": 100},
        "cosine_counts": [8] * 100,
        "drift": {"psi": 0.0123, "by_chance": 0.0581},
    },
    "rejects_found": {
        "by_reason": {"truncated_image": 9, "no_image": 5},
        "named": [
            {
                "key": "img7",
                "shard": "a.tar",
                "index": 7,
                "sha256": "01" * 32,
                "error": "truncated_image",
                "message": "image file is truncated (3 bytes not processed)",
                "size_bytes": 4321,
            }
        ],
        "parts": 3,
        "parts_read": 3,
    },
    "doubtful": {
        "rows": [
            {
                "key": "img9",
                "shard": "b.tar",
                "index": 9,
                "label": None,
                "confidence": 0.4113,
                "candidate": "bee",
                "margin": 0.0131,
            }
        ],
        "rows_read": 1213,
    },
}


def published(**changes: Any) -> dict[str, Any]:
    """The summary of a night that was published; some of it changed."""
    return copy.deepcopy({**NIGHT, **changes})


def held(**changes: Any) -> dict[str, Any]:
    """One that drifted."""
    rules = copy.deepcopy(RULES)
    rules[2] |= {"value": 1.234, "holds": False, "sentence": "drift from the bundle's held-out rows: 1.234"}
    told = {
        "gate": {"passes": False, "rules": rules},
        "published_parts": 0,
        "published_rows": 0,
        "held_parts": 8,
        "refused_parts": 8,
        "refused_tonight": 8,
        "held_back": {"kind": "HeldBack", "way_out": "look at tonight's images"},
        "verdicts": [{"kind": "HeldBack", "thing": "s3://labels/animals: the night was held back"}],
    }
    return published(**{**told, **changes})


def failed(**changes: Any) -> dict[str, Any]:
    """One that lost its store while it scored: nothing was judged."""
    wanted = (
        "verb",
        "run_id",
        "table",
        "embeddings",
        "command",
        "engine_version",
        "recipe",
        "seconds",
        "extract",
    )
    error = {"kind": "StorageError", "thing": "s3://features/lite0: no answer", "found": "time-outs"}
    told = {name: NIGHT[name] for name in wanted} | {"held_parts": 4, "phase_seconds": {"extract": 300.0}}
    told |= {"error": {**error, "wanted": None, "way_out": "look after the store"}, "ended_in": "score"}
    return copy.deepcopy({**told, **changes})


def documents(
    night: dict[str, Any], *earlier: dict[str, Any], pictures: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Of its page."""
    return {"night": night, "earlier": list(earlier), "pictures": pictures}


def with_images(night: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The night with more rows, as long names as there are, and pictures of three of the four that could have one."""
    night = copy.deepcopy(night)
    reject, row = night["rejects_found"]["named"][0], night["doubtful"]["rows"][0]
    large = {**reject, "key": "photos/2026/" + "panorama-" * 9, "index": 11, "error": "too_many_pixels"}
    night["rejects_found"]["named"] += [large]
    night["doubtful"]["rows"] += [
        {**row, "key": "img10", "index": 10, "label": "ant"},
        {**row, "key": "img12", "index": 12},
    ]
    pictures = {
        "wanted": 4,
        "pictures": [picture("b.tar", 9), picture("b.tar", 10, 43, 96), picture("a.tar", 11, 96, 20)],
        "missing": [{"why": "the archive has another image there now, or none", "samples": 1}],
    }
    return night, pictures


def earlier_nights(count: int) -> list[dict[str, Any]]:
    """As many, the latest first, every third held back; the oldest is from before there were pages."""
    return [
        (held if number % 3 == 2 else published)(
            run_id=f"nightly-202601{28 - number % 28:02d}T040506Z-{number:04x}", has_page=number + 1 < count
        )
        for number in range(count)
    ]
