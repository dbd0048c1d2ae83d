"""The plain stage of scoring: an embedding part and a bundle give a prediction part. No Ray here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from engine.errors import TableDamaged
from engine.heads.bundle import open_bundle
from engine.parts import PartName, parse_part_name, prediction_name
from engine.predictor import Predictor
from engine.storage import ObjectInfo, StorageConfig, open_store
from engine.tables import PredictionPartFacts, read_part, write_prediction_part

PARTS_PER_ITEM_MAX = 32  # a task costs about 10 ms, a part of 1,024 rows a few


@dataclass(frozen=True)
class ScoreJob:
    """What every scorer needs to know; small and picklable.

    Attributes:
        bundle_id: the bundle this run began with; one published meanwhile is refused.
        fingerprint: of the embeddings.
        top_k, min_confidence: as in the recipe.
    """

    embeddings_uri: str
    bundle_uri: str
    bundle_id: str
    table_uri: str
    storage: StorageConfig
    fingerprint: str
    top_k: int
    min_confidence: float


@dataclass(frozen=True)
class ScoreReceipt:
    """What the driver hears of one item: counts over its parts."""

    parts: int = 0
    rows: int = 0
    abstained: int = 0
    label_counts: dict[str, int] = field(default_factory=dict)


def pending_parts(
    parts: Iterable[tuple[PartName, ObjectInfo]], predictions: set[PartName]
) -> list[tuple[PartName, ObjectInfo]]:
    """Embedding parts without a prediction part made from the version they have now."""
    return [(name, info) for name, info in parts if prediction_name(name, info.identity) not in predictions]


def score_items(pending: list[tuple[PartName, ObjectInfo]], num_scorers: int) -> list[str]:
    """Cut the pending parts into items (JSON) of about equal numbers of parts, several for each scorer."""
    size = max(1, min(PARTS_PER_ITEM_MAX, len(pending) // (4 * num_scorers)))
    infos = [(info.path, info.size, info.identity) for _, info in pending]
    return [json.dumps(infos[first : first + size]) for first in range(0, len(infos), size)]


class PartScorer:
    """Actor body: loads the bundle once, then scores items.

    Raises:
        BundleError: the bundle is damaged, or another one was published since the run began.
    """

    def __init__(self, job: ScoreJob) -> None:
        self._job = job
        self._embeddings = open_store(job.embeddings_uri, job.storage)
        self._table = open_store(job.table_uri, job.storage)
        bundle = open_bundle(open_store(job.bundle_uri, job.storage), job.bundle_id)
        self._predictor = Predictor(bundle, job.top_k, job.min_confidence)

    def __call__(self, item: str) -> str:
        counts: Counter[str] = Counter()
        rows = abstained = 0
        infos = [ObjectInfo(path, size, identity) for path, size, identity in json.loads(item)]
        for info in infos:
            labels = self._score_part(info)
            counts.update(label for of_row in labels for label in of_row)
            abstained += sum(not of_row for of_row in labels)
            rows += len(labels)
        return json.dumps(asdict(ScoreReceipt(len(infos), rows, abstained, dict(counts))))

    def _score_part(self, info: ObjectInfo) -> list[list[str]]:
        """Write one prediction part and return the labels of its rows."""
        name = parse_part_name(info.path)
        if name is None:
            raise TableDamaged(f"{info.path}: not the name of a part")
        embeddings = read_part(self._embeddings, info, self._predictor.columns)
        predictions = self._predictor.predict_table(embeddings)
        facts = PredictionPartFacts(
            bundle=self._job.bundle_id,
            fingerprint=self._job.fingerprint,
            embedding_part=str(name),
            embedding_identity=info.identity,
            rows=predictions.num_rows,
        )
        write_prediction_part(self._table, prediction_name(name, info.identity), predictions, facts)
        if "labels" in predictions.column_names:
            several: list[list[str]] = predictions["labels"].to_pylist()
            return several
        return [[] if label is None else [label] for label in predictions["label"].to_pylist()]
