"""Writing what was labelled: each table gets what it lacks, and predictions travel to a writer as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from engine.decisions import PredictionOutput, decisions_of
from engine.errors import EngineError
from engine.extraction import ExtractJob, Part, PartHeader, Receipt, read_parts
from engine.labelling import LabelJob, write_labelled
from engine.parts import part_name, prediction_name
from engine.scoring import BundleJob, open_predictor
from engine.storage import StorageConfig, open_store
from engine.tables import (
    PredictionPartFacts,
    list_parts,
    part_names,
    read_part,
    read_prediction_facts,
    read_shard_prediction_facts,
)
from engine.worklist import ShardWork
from tests.embedding_tables import FINGERPRINT, publish_linear
from tests.extract_jobs import job_without_network
from tests.flows.archives import shard_bytes

WIDTH, ROWS, CLASSES = 5, 7, ("ant", "bee", "cat")


@pytest.fixture
def job(tmp_path: Path) -> ExtractJob:
    return job_without_network(tmp_path, 32, rows_per_part=ROWS)


def labels_for(folder: Path, keeps_embeddings: bool) -> LabelJob:
    """Two bundles, with tables `labels-one` and `labels-two`."""
    jobs = []
    for name, seed in (("one", 1), ("two", 2)):
        random = np.random.default_rng(seed)
        bundle = publish_linear(folder / name, random.normal(size=(WIDTH, 3)), random.normal(size=3), CLASSES)
        output = PredictionOutput(uri=str(folder / f"labels-{name}"), top_k=2, also=("csv",))
        decisions = decisions_of(output, CLASSES, StorageConfig(), bundle.store.uri)
        jobs.append(BundleJob(bundle.store.uri, bundle.id, output.uri, decisions, recipe_sha256="a" * 64))
    return LabelJob(tuple(jobs), keeps_embeddings)


def labelled(job: ExtractJob, labels: LabelJob, lacking: tuple[int, ...] = ()) -> tuple[Part, str]:
    """A part of a real shard with made-up embeddings, as an actor hands it on, and its shard's identity."""
    shard = open_store(job.source.uri).write("a.tar", shard_bytes(0, ROWS))
    (row,) = read_parts(job, [ShardWork(shard)])
    part = Part.from_row(row)
    assert part.samples is not None
    embeddings_ND = np.random.default_rng(3).normal(size=(ROWS, WIDTH)).astype(np.float32)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(embeddings_ND.reshape(-1)), WIDTH)
    rows = part.samples.append_column("embedding", flat)
    predictions = tuple(
        open_predictor(one, StorageConfig()).predict_table(rows) if place in (lacking or (0, 1)) else None
        for place, one in enumerate(labels.bundles)
    )
    header = PartHeader(
        "a.tar", shard.identity, 0, last=True, samples=ROWS, fingerprint=FINGERPRINT, lacking=lacking
    )
    array = embeddings_ND if labels.keeps_embeddings else None
    return Part(header, part.samples, part.rejects, array, predictions=predictions), shard.identity


def written(job: ExtractJob, labels: LabelJob, part: Part) -> Receipt:
    return Receipt.from_json(write_labelled(job, labels, part.to_row())["receipt"][0].as_py())


def test_only_the_table_that_lacks_a_part_is_given_it(job: ExtractJob, tmp_path: Path) -> None:
    labels = labels_for(tmp_path, keeps_embeddings=False)
    part, identity = labelled(job, labels, lacking=(1,))
    receipt = written(job, labels, part)
    assert (receipt.rows, receipt.header.lacking, set(receipt.bundles)) == (ROWS, (1,), {1})
    assert receipt.bundles[1].rows == sum(receipt.bundles[1].label_counts.values()) == ROWS
    assert list(open_store(str(tmp_path / "labels-one")).names()) == []
    table, name = open_store(str(tmp_path / "labels-two")), part_name("a.tar", identity, 0, True)
    ((found, info),) = list_parts(table)
    assert found == name and read_part(table, info) == part.predictions[1]
    assert sorted(table.names()) == [f"also/{str(name).removesuffix('.parquet')}.csv", f"data/{name}"]
    facts = read_shard_prediction_facts(table, name)
    assert (facts.shard, facts.identity, facts.samples, facts.rejects) == ("a.tar", identity, ROWS, 0)
    assert (facts.bundle, facts.recipe_sha256) == (labels.bundles[1].bundle_id, "a" * 64)


def test_predictions_beside_embeddings_name_the_part_that_was_just_written(
    job: ExtractJob, tmp_path: Path
) -> None:
    labels = labels_for(tmp_path, keeps_embeddings=True)
    part, _ = labelled(job, labels)
    assert set(written(job, labels, part).bundles) == {0, 1}
    ((name, embeddings),) = list_parts(open_store(job.table_uri))
    for bundle, rows in zip(labels.bundles, part.predictions, strict=True):
        table = open_store(bundle.table_uri)
        ((found, info),) = list_parts(table)
        assert found == prediction_name(name, embeddings.identity)
        assert read_part(table, info) == rows
        facts: PredictionPartFacts = read_prediction_facts(table, info)
        assert (facts.embedding_part, facts.embedding_identity) == (str(name), embeddings.identity)


@pytest.mark.parametrize("keeps_embeddings", [True, False])
def test_a_sample_that_got_lost_stops_the_writing_before_anything_is_committed(
    job: ExtractJob, tmp_path: Path, keeps_embeddings: bool
) -> None:
    labels = labels_for(tmp_path, keeps_embeddings)
    part, _ = labelled(job, labels)
    fields = json.loads(part.to_row()["header"][0].as_py())
    row = part.to_row().set_column(0, "header", pa.array([json.dumps({**fields, "samples": ROWS + 1})]))
    with pytest.raises(EngineError, match="does not account for every sample"):
        write_labelled(job, labels, row)
    for uri in (job.table_uri, *(bundle.table_uri for bundle in labels.bundles)):
        assert list(part_names(open_store(uri))) == []
