"""Documents of bundles, made by hand: figures that no two of which are alike."""

from __future__ import annotations

import base64
import copy
import io
from typing import Any

from PIL import Image

CLASSES = ("ant", "bee", "cat")
FINGERPRINT = "0123456789abcdef" * 4


def manifest(classes: tuple[str, ...] = CLASSES, **changes: Any) -> dict[str, Any]:
    """What `bundle.json` says, without files."""
    return {
        "schema_version": 1,
        "task": "single_label",
        "classes": list(classes),
        "fingerprint": FINGERPRINT,
        "width": 1280,
        "head": {"kind": "mlp", "hidden": [16], "dropout": 0.5, "activation": "relu"},
        "calibration": {"temperature": 1.5, "entropy_exponent": 0.0},
        "thresholds": [],
        "side_features": [],
        "side_sha256": None,
        "tensors_sha256": "f" * 64,
        "files": {},
        "versions": {"python": "3.11.7", "keras": "3.15.1"},
        "created": "2026-11-23T01:02:03+00:00",
        **changes,
    }


def split_figures(classes: tuple[str, ...] = CLASSES) -> dict[str, Any]:
    """48 rows, of which 45 are right."""
    count = len(classes)
    matrix = [[0] * count for _ in classes]
    for number in range(count):
        matrix[number][number] = 15
    matrix[0][1], matrix[2][0] = 2, 1
    return {
        "rows": 48,
        "accuracy": 0.9375,
        "top_3_accuracy": 0.9791,
        "loss": 0.2513,
        "roc_auc": 0.9811,
        "calibration_error": 0.0377,
        "reliability": [
            {"above": 0.4, "up_to": 0.4667, "rows": 7, "confidence": 0.44, "accuracy": 0.571},
            {"above": 0.9333, "up_to": 1.0, "rows": 41, "confidence": 0.97, "accuracy": 0.995},
        ],
        "coverage": [{"coverage": 1.0, "accuracy": 0.9375, "min_confidence": 0.41}],
        "by_min_confidence": [
            {
                "min_confidence": step / 200,
                "coverage": 1 - step / 211,
                "accuracy": 0.9375 + step / 4000 if step < 199 else None,
            }
            for step in range(201)
        ],
        "per_class": [
            {
                "label": name,
                "precision": round(0.61 + number / 10_000, 4),
                "recall": round(0.71 + number / 10_000, 4),
                "f1": round(0.81 + number / 10_000, 4),
                "support": 11 + number,
                "roc_auc": None if number == 1 else 0.913,
            }
            for number, name in enumerate(classes)
        ],
        "macro_average": {"precision": 0.62, "recall": 0.72, "f1": 0.82},
        "weighted_average": {"precision": 0.63, "recall": 0.73, "f1": 0.83},
        "confusion_matrix": matrix,
    }


def epochs(first: int, count: int) -> list[dict[str, Any]]:
    """Losses that fall from epoch to epoch."""
    return [
        {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "validation_loss": 1.1 / epoch,
            "validation_accuracy": 1 - 0.4 / epoch,
        }
        for epoch in range(first, first + count)
    ]


TRAINING = {
    "epochs": 5,
    "best_epoch": 4,
    "stopped": "validation loss had not fallen for 1 epochs",
    "history": epochs(1, 5),
    "num_replicas": 1,
}
TWO_PHASES = {
    "num_replicas": 1,
    "unfrozen": {"first": 3, "layers": 9, "trainable": 2560, "frozen": 100},
    "head": TRAINING,
    "backbone": {
        "initial_epoch": 5,
        "history": epochs(6, 3),
        "best_epoch": 7,
        "stopped": "all epochs were run",
        "waiting_for_images": 0.1,
    },
}
COMPARISON = {
    "split": "test",
    "rows": 48,
    "before": 0.875,
    "after": 0.9375,
    "low": 0.0208,
    "high": 0.1146,
    "difference": 0.0625,
}


def documents(classes: tuple[str, ...] = CLASSES, **metrics: Any) -> dict[str, Any]:
    """Of a fit; some of its metrics changed."""
    of_split = {name: {"rows": rows} for name, rows in (("train", 301), ("validation", 53), ("test", 48))}
    told = {
        "id": "00112233445566aa",
        "uri": "file:///models/animals",
        "manifest": manifest(classes),
        "metrics": {
            "validation": {"rows": 53, "accuracy": 0.9057, "loss": 0.3331},
            "test": split_figures(classes),
            "calibration": {
                "kind": "temperature",
                "temperature": 1.5,
                "calibration_error_before": {"validation": 0.07, "test": 0.0877},
                "suggested_min_confidence": [
                    {
                        "precision": 0.95,
                        "min_confidence": 0.25,
                        "coverage": 0.83,
                        "test": {"precision": 0.961, "coverage": 0.8125},
                    },
                    {"precision": 0.99, "min_confidence": None, "coverage": 0.0, "test": None},
                ],
            },
            "most_confident_mistakes": [
                {
                    "key": "img7",
                    "shard": "a.tar",
                    "index": 7,
                    "split": "test",
                    "label": classes[0],
                    "answer": classes[1],
                    "confidence": 0.9871,
                }
            ],
            "labels": {"unlabelled": 23, "unknown_keys": 0, "classes_without_training_rows": {"dog": 2}},
            "split": of_split,
            "training": TRAINING,
            "grid": [],
            **metrics,
        },
        "embeddings_table": {
            "kind": "embeddings",
            "fingerprint": FINGERPRINT,
            "width": 1280,
            "canary": [[0.123456789]],
            "backbone": {"kind": "keras_application", "name": "MobileNetV2", "input_size": 160},
        },
        "recipe": {"head": {"kind": "mlp"}, "output": {"uri": "s3://models/animals"}},
        "suspects": {
            "suspects": [
                {
                    "key": "img9",
                    "shard": "b.tar",
                    "index": 9,
                    "label": classes[1],
                    "suggested": classes[2],
                    "margin": 0.4321,
                }
            ]
        },
    }
    return copy.deepcopy(told)


def gallery_row(
    key: str, shard: str, index: int, group: str, label: str, answer: str, share: float
) -> dict[str, Any]:
    """One row of gallery.json."""
    return {
        "key": key,
        "shard": shard,
        "index": index,
        "group": group,
        "labels": [label],
        "answers": [answer],
        "right": label == answer,
        "top": [
            {"label": answer, "confidence": share},
            {"label": label if label != answer else "cat", "confidence": round(1 - share, 4)},
        ],
    }


def picture(shard: str, index: int, width: int = 96, height: int = 72) -> dict[str, Any]:
    """One of pictures.json: a plain colour that hangs on the index."""
    buffer = io.BytesIO()
    colour = (37 * index % 256, 91, 160)
    Image.new("RGB", (width, height), colour).save(buffer, "WEBP")
    webp = base64.b64encode(buffer.getvalue()).decode()
    return {"shard": shard, "index": index, "width": width, "height": height, "webp": webp}


def pictured(classes: tuple[str, ...] = CLASSES, **metrics: Any) -> dict[str, Any]:
    """Of a fit whose archive was there: with a gallery, a map, rejects and pictures."""
    ant, bee, cat = classes[:3]
    told = documents(classes, **metrics)
    told["gallery"] = {
        "split": "test",
        "rows": [
            gallery_row("img7", "a.tar", 7, "wrong", ant, bee, 0.9871),
            gallery_row("img8", "a.tar", 8, "wrong", ant, bee, 0.7123),
            gallery_row("img2", "a.tar", 2, "wrong", cat, ant, 0.6011),
            gallery_row("img3", "a.tar", 3, "unsure", bee, bee, 0.4011),
            gallery_row("img4", "a.tar", 4, "right", cat, cat, 0.9911),
        ],
    }
    told["embedding_map"] = {
        "of_rows": 402,
        "explained": [0.31, 0.1234],
        "x": [-2.0, 0.0, 2.0, 1.5, 1.25],
        "y": [-1.0, 1.0, 0.5, 0.0, 0.25],
        "class": [0, 0, 1, 2, 2],
    }
    told["rejects"] = {
        "reasons": {"bad_label": 2, "truncated_image": 3},
        "files_read": 200,
        "has_more": True,
        "examples": [
            {
                "key": "odd",
                "shard": "a.tar",
                "index": 11,
                "error": "bad_label",
                "message": "label member .cls: no UTF-8",
            }
            | {"sha256": "00" * 32},
            {
                "key": "cut",
                "shard": "a.tar",
                "index": 12,
                "error": "truncated_image",
                "message": "JPEG: it ends early",
            }
            | {"sha256": "01" * 32},
        ],
    }
    wanted = (("a.tar", 7), ("b.tar", 9), ("a.tar", 2), ("a.tar", 3), ("a.tar", 4), ("a.tar", 11))
    told["pictures"] = {
        "wanted": 7,
        "pictures": [picture(*sample) for sample in wanted],
        "missing": [{"why": "the archive has another image there now, or none", "samples": 1}],
    }
    return told


def finetuned(**metrics: Any) -> dict[str, Any]:
    """Of a fine-tuning."""
    return documents(
        training=TWO_PHASES,
        comparison=COMPARISON,
        rejects={"truncated_image": 3, "no_image": 17},
        **metrics,
    )
