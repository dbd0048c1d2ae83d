"""The plain stage of scoring: embedding parts and some bundles give prediction parts of each. No Ray here."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc

from engine import __version__
from engine.decisions import Decisions
from engine.errors import TableDamaged
from engine.heads.bundle import open_bundle
from engine.heads.reference import Reference
from engine.parts import PartName, parse_part_name, prediction_name
from engine.predictor import BundleCounts, Predictor, counted, value_counts
from engine.storage import ObjectInfo, StorageConfig, open_store
from engine.tables import PredictionPartFacts, embeddings_matrix, read_part, write_prediction_part

PARTS_PER_ITEM_MAX = 32  # a task costs about 10 ms, a part of 1,024 rows a few
# What a scorer reads ahead of the part it computes: object stores answer in 50 to 100 ms, a part takes 8 of a core.
READ_AHEAD_PARTS = 8
READ_AHEAD_BYTES = 128 << 20
WRITES_AT_ONCE = 4  # a store that is slower than that holds the scorer up, or its memory would fill


@dataclass(frozen=True)
class BundleJob:
    """One bundle, and the table that its predictions go to.

    Attributes:
        bundle_id: the bundle this run began with; one published meanwhile is refused.
        decisions: what the table says.
        recipe_sha256: of the table's contract; None: parts do not say it.
        counts_in_footers: each part says what is in it, for whoever judges it before it is published.
    """

    bundle_uri: str
    bundle_id: str
    table_uri: str
    decisions: Decisions
    counts_in_footers: bool = False
    recipe_sha256: str | None = None


@dataclass(frozen=True)
class ScoreJob:
    """What every scorer needs to know; small and picklable.

    Attributes:
        fingerprint: of the embeddings.
        bundles: by their place in the recipe, those that have something to score; others are not even loaded.
    """

    embeddings_uri: str
    storage: StorageConfig
    fingerprint: str
    bundles: Mapping[int, BundleJob]


@dataclass(frozen=True)
class PendingPart:
    """An embedding part, and the places of the bundles that have not scored the version it has now."""

    info: ObjectInfo
    bundles: tuple[int, ...]


@dataclass(frozen=True)
class ScoreReceipt:
    """What the driver hears of one item: embedding parts read, and what was written for each bundle.

    Attributes:
        bytes_read: sizes of the embedding parts; of one with columns that nobody wants less is read.
        stage_s: seconds of the clock that read, score and write took; reading and writing of several parts overlap.
    """

    parts_read: int
    bundles: Mapping[int, BundleCounts]
    bytes_read: int = 0
    stage_s: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> ScoreReceipt:
        fields = json.loads(text)
        bundles = {int(place): BundleCounts(**counts) for place, counts in fields["bundles"].items()}
        return ScoreReceipt(**{**fields, "bundles": bundles})


def pending_parts(
    parts: Iterable[tuple[PartName, ObjectInfo]], predictions: Sequence[Collection[PartName]]
) -> list[PendingPart]:
    """Embedding parts without a prediction part made from the version they have now.

    Args:
        predictions: of each bundle, by its place in the recipe, the prediction parts that there are.
    """
    pending = []
    for name, info in parts:
        wanted = prediction_name(name, info.identity)
        missing = tuple(place for place, there in enumerate(predictions) if wanted not in there)
        if missing:
            pending.append(PendingPart(info, missing))
    return pending


def score_items(pending: Sequence[PendingPart], num_scorers: int) -> list[str]:
    """Cut the pending parts into items (JSON) of about equal numbers of parts, several for each scorer."""
    size = max(1, min(PARTS_PER_ITEM_MAX, len(pending) // (4 * num_scorers)))
    parts = [(part.info.path, part.info.size, part.info.identity, part.bundles) for part in pending]
    return [json.dumps(parts[first : first + size]) for first in range(0, len(parts), size)]


class PartScorer:
    """Actor body: loads the bundles once, then scores items. It computes one part while others are read and written.

    Raises:
        BundleError: a bundle is damaged, or another one was published since the run began.
    """

    def __init__(self, job: ScoreJob) -> None:
        self._job = job
        self._embeddings = open_store(job.embeddings_uri, job.storage)
        self._tables = {place: open_store(one.table_uri, job.storage) for place, one in job.bundles.items()}
        self._predictors = {place: open_predictor(one, job.storage) for place, one in job.bundles.items()}
        self._references = {
            place: _reference(one, job.storage) for place, one in job.bundles.items() if one.counts_in_footers
        }
        self._readers = ThreadPoolExecutor(READ_AHEAD_PARTS, thread_name_prefix="read")
        self._writers = ThreadPoolExecutor(WRITES_AT_ONCE, thread_name_prefix="write")

    def __call__(self, item: str) -> str:
        """Score the parts of an item, each read once; answers with a ScoreReceipt."""
        pending = [
            PendingPart(ObjectInfo(path, size, identity), tuple(bundles))
            for path, size, identity, bundles in json.loads(item)
        ]
        counts = {place: BundleCounts() for place in self._job.bundles}
        clock = _StageClock()
        writes: deque[Future[int]] = deque()
        try:
            for part, embeddings in self._read_ahead(pending, clock):
                for place in part.bundles:
                    with clock.busy("score"):
                        predictions = self._predictors[place].predict_table(embeddings)
                    if len(writes) >= WRITES_AT_ONCE:
                        writes.popleft().result()
                    with clock.busy("score"):
                        found = counted(predictions)
                        facts = self._facts(part.info, place, predictions, embeddings)
                    writes.append(self._writers.submit(self._write, place, predictions, facts, clock))
                    counts[place].add(found)
            for write in writes:
                write.result()
        finally:
            wait(writes)  # nothing of an item that failed is written behind its back
        size = sum(part.info.size for part in pending)
        return ScoreReceipt(len(pending), counts, size, clock.seconds()).to_json()

    def _read_ahead(
        self, pending: Sequence[PendingPart], clock: _StageClock
    ) -> Iterator[tuple[PendingPart, pa.Table]]:
        """Each part with the columns that its bundles take, in order, while those behind it are read."""
        reads: deque[tuple[PendingPart, Future[pa.Table]]] = deque()
        held = first_unread = 0
        try:
            while reads or first_unread < len(pending):
                while first_unread < len(pending) and len(reads) < READ_AHEAD_PARTS:
                    part = pending[first_unread]
                    if reads and held + part.info.size > READ_AHEAD_BYTES:
                        break
                    reads.append((part, self._readers.submit(self._read, part, clock)))
                    held, first_unread = held + part.info.size, first_unread + 1
                part, read = reads.popleft()
                yield part, read.result()
                held -= part.info.size
        finally:
            for _, read in reads:
                read.cancel()

    def _read(self, part: PendingPart, clock: _StageClock) -> pa.Table:
        columns = {column: None for place in part.bundles for column in self._predictors[place].columns}
        with clock.busy("read"):
            return read_part(self._embeddings, part.info, list(columns))

    def _facts(
        self, info: ObjectInfo, place: int, predictions: pa.Table, embeddings: pa.Table
    ) -> PredictionPartFacts:
        name = parse_part_name(info.path)
        if name is None:
            raise TableDamaged(f"{info.path}: not the name of a part")
        facts = prediction_facts(
            self._job.bundles[place], self._job.fingerprint, name, info.identity, predictions.num_rows
        )
        if place not in self._references:
            return facts
        (reference, sha256), cosine_counts = self._references[place], None
        if reference is not None:
            cosines_N = reference.cosines(embeddings_matrix(embeddings["embedding"]))
            cosine_counts = tuple(reference.histogram(cosines_N).tolist())
        found = counted(predictions)
        answers = found.label_counts
        if "label" in predictions.column_names:
            answers = value_counts(pc.list_element(predictions["top_labels"], 0))
        return replace(
            facts,
            answer_counts=answers,
            abstained=found.abstained,
            cosine_counts=cosine_counts,
            reference_sha256=sha256,
        )

    def _write(
        self, place: int, predictions: pa.Table, facts: PredictionPartFacts, clock: _StageClock
    ) -> int:
        """Write one prediction part; returns its bytes."""
        name = parse_part_name(facts.embedding_part)
        assert name is not None
        target = prediction_name(name, facts.embedding_identity)
        also = self._job.bundles[place].decisions.also
        with clock.busy("write"):
            return write_prediction_part(self._tables[place], target, predictions, facts, also)


class _StageClock:
    """Seconds that stages were busy, from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def busy(self, stage: str) -> Iterator[None]:
        """A stage is, inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - began

    def seconds(self) -> dict[str, float]:
        """Until now, by stage."""
        with self._lock:
            return dict(self._seconds)


def _reference(job: BundleJob, storage: StorageConfig) -> tuple[Reference | None, str | None]:
    bundle = open_bundle(open_store(job.bundle_uri, storage), job.bundle_id)
    return bundle.reference(), bundle.reference_sha256


def open_predictor(job: BundleJob, storage: StorageConfig) -> Predictor:
    """The bundle that the run began with, ready to answer as its table says.

    Raises:
        BundleError: it is damaged, or another one was published since the run began.
    """
    bundle = open_bundle(open_store(job.bundle_uri, storage), job.bundle_id)
    decisions = job.decisions
    return Predictor(bundle, decisions.top_k, decisions.min_confidences, decisions.labels)


def prediction_facts(
    job: BundleJob, fingerprint: str, part: PartName, identity: str, rows: int
) -> PredictionPartFacts:
    """The footer of predictions for a version of an embedding part."""
    return PredictionPartFacts(
        bundle=job.bundle_id,
        fingerprint=fingerprint,
        embedding_part=str(part),
        embedding_identity=identity,
        rows=rows,
        recipe_sha256=job.recipe_sha256,
        engine_version=__version__,
    )
