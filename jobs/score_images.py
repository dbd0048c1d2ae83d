"""Scoring straight from images: shards through the bundles' backbone and heads in one pass. Part of the score job.

What `extract` does to shards is done here too (`jobs.extract.run_pass`), with the bundles behind the network.
Embeddings that are kept are written first, as `extract` would, and predictions after them, as `score` would: what a
run that was killed has left without predictions is scored from its embeddings. Where they are not kept, prediction
tables take their place: they account for every sample, and a shard is done when it is whole in all of them.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from engine.errors import BundleError, ContractMismatch, RecipeError
from engine.recipes import EmbeddingForm, EmbeddingOutput
from jobs.extract import (
    ImagePass,
    ImageRecipe,
    Labels,
    Stop,
    any_of,
    contract_of_recipe,
    demand_of_pass,
    demand_of_recipe,
    network_contract,
    plan_pass,
    run_pass,
)
from jobs.fit import EmbeddingInput
from jobs.outcome import Outcome, Run
from jobs.score import (
    Scored,
    ScoreRecipe,
    bundles_in_words,
    job_of,
    of_embeddings,
    pending_embeddings,
    record_of,
    require_published,
    require_same_if_begun,
    score_embeddings,
    summary_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.heads.bundle import Bundle
    from engine.tables import Record
    from jobs.extract import Demand


def run(
    recipe: ScoreRecipe,
    as_run: Run,
    until: float | None,
    prune: bool,
    prune_up_to: int | None,
    replay_rejects: bool,
) -> Outcome:
    """Score the shards that are not done; arguments as of `jobs.score.run`."""
    from engine.predictor import BundleCounts

    started = time.monotonic()
    work = _pass_of(recipe)
    assert work.labels is not None
    jobs = work.labels.job.bundles
    passed = run_pass(
        work,
        as_run,
        prune=prune,
        prune_up_to=prune_up_to,
        replay_rejects=replay_rejects,
        since=None,
        stop=Stop(until=until),
    )
    totals = tuple(passed.totals.bundles.get(place, BundleCounts()) for place in range(len(jobs)))
    scored = Scored(jobs, tuple(job.table_uri for job in jobs), totals, parts_read=0, parts_left=0)
    if recipe.output.uri is not None:
        rest = score_embeddings(
            _of_kept(recipe), as_run, held=False, until=until, address=recipe.compute.address
        )
        scored = _with_rest(scored, rest)
    summary = summary_of(as_run.run_id, scored, time.monotonic() - started)
    kept = {"embeddings": recipe.output.uri, "parts_left": scored.parts_left, "images": passed.summary}
    return Outcome({**summary, **kept}, passed.verdict)


def plan(recipe: ScoreRecipe, prune: bool, prune_up_to: int | None, replay_rejects: bool) -> dict[str, Any]:
    """What `run` would do, from validation and listings alone; touches nothing."""
    work = _pass_of(recipe)
    assert work.labels is not None
    found = plan_pass(work, prune=prune, prune_up_to=prune_up_to, replay_rejects=replay_rejects, since=None)
    facts = {"verb": "score", "embeddings": recipe.output.uri or "not kept"}
    facts |= bundles_in_words(work.labels.job.bundles)
    if recipe.output.uri is None:
        return {**facts, **found}
    is_begun = found["table_exists"]
    return {
        **facts,
        **found,
        "parts_to_score_from_embeddings": pending_embeddings(_of_kept(recipe)) if is_begun else 0,
    }


def demand(recipe: ScoreRecipe, *, is_reachable: bool) -> Demand:
    """For those who make room for a run.

    Args:
        is_reachable: look at the archive, the bundles and the tables; else sizes are the recipe's, without heads, and
            the tasks None.

    Raises:
        RecipeError: nobody may look, and the recipe does not say which network it is.
    """
    if is_reachable:
        return demand_of_pass(_pass_of(recipe))
    if recipe.backbone is None:
        raise RecipeError(
            "--offline: how large the images of the bundles' network are stands in the bundles",
            way_out="leave --offline out, or give the network as `backbone` in the recipe",
        )
    assert recipe.source is not None
    images = ImageRecipe(
        source=recipe.source,
        backbone=recipe.backbone,
        output=EmbeddingForm(dtype=recipe.output.dtype, rows_per_part=recipe.output.rows_per_part),
        compute=recipe.compute,
        limits=recipe.limits,
    )
    return demand_of_recipe(images)


def _of_kept(recipe: ScoreRecipe) -> ScoreRecipe:
    """The recipe that scores the embeddings which this one keeps."""
    assert recipe.output.uri is not None
    return ScoreRecipe(
        embeddings=EmbeddingInput(uri=recipe.output.uri), storage=recipe.storage, bundles=recipe.bundles
    )


def _with_rest(of_images: Scored, of_embeddings: Scored) -> Scored:
    """Both together; the second found what the first had not written."""
    for total, more in zip(of_images.totals, of_embeddings.totals, strict=True):
        total.add(more)
    return Scored(
        of_images.jobs,
        of_images.tables,
        of_images.totals,
        of_embeddings.parts_read,
        of_embeddings.parts_left,
    )


# ---------------------------------------------------------------- what belongs together


def _pass_of(recipe: ScoreRecipe) -> ImagePass:
    """The pass over images that the recipe asks for; refuses what is known to be wrong before anything starts."""
    bundles = _bundles(recipe)
    made_with = _made_with(bundles)
    if recipe.output.uri is None:
        return _pass_without_embeddings(recipe, bundles, made_with)
    return _pass_with_embeddings(recipe, bundles, made_with)


def _pass_with_embeddings(recipe: ScoreRecipe, bundles: Sequence[Bundle], made_with: Record) -> ImagePass:
    """Fills an embedding table; predictions go with its parts."""
    from engine.heads.bundle import check_fingerprint
    from engine.labelling import LabelJob
    from engine.storage import open_store
    from engine.tables import read_record

    assert recipe.output.uri is not None
    embeddings = open_store(recipe.output.uri, recipe.storage)
    if (begun := read_record(embeddings, "embeddings")) is not None:
        check_fingerprint(bundles[0], begun)
    embeddings_uri, fingerprint = embeddings.uri, made_with["fingerprint"]
    tables = [open_store(wanted.output.uri, recipe.storage) for wanted in recipe.bundles]
    jobs = tuple(
        of_embeddings(job_of(wanted, bundle, recipe.storage), embeddings_uri, fingerprint)
        for wanted, bundle in zip(recipe.bundles, bundles, strict=True)
    )
    records = tuple(record_of(embeddings_uri, fingerprint, job) for job in jobs)
    require_published(tables)
    for table, record in zip(tables, records, strict=True):
        require_same_if_begun(table, record["contract"])
    form = EmbeddingOutput(**recipe.output.model_dump())
    labels = Labels(LabelJob(jobs, keeps_embeddings=True), made_with, records, _head_bytes(bundles))
    return ImagePass("score", _image_recipe(recipe, form, made_with), (embeddings_uri,), labels)


def _pass_without_embeddings(recipe: ScoreRecipe, bundles: Sequence[Bundle], made_with: Record) -> ImagePass:
    """Fills the prediction tables; their contract is that of embeddings, and what is made of them."""
    from engine.config import stable_hash
    from engine.labelling import LabelJob

    jobs = [
        job_of(wanted, bundle, recipe.storage) for wanted, bundle in zip(recipe.bundles, bundles, strict=True)
    ]
    form = EmbeddingForm(dtype=recipe.output.dtype, rows_per_part=recipe.output.rows_per_part)
    images = _image_recipe(recipe, form, made_with)
    tables = tuple(job.table_uri for job in jobs)
    records: tuple[dict[str, Any], ...] = tuple(
        {
            "kind": "predictions",
            "contract": {"bundle": job.bundle_id, **job.decisions.contract},
            "bundle": job.bundle_id,
            "bundle_uri": job.bundle_uri,
        }
        for job in jobs
    )
    labels = Labels(LabelJob(tuple(jobs), keeps_embeddings=False), made_with, records, _head_bytes(bundles))
    work = ImagePass("score", images, tables, labels)
    _require_of_images(work)
    common = contract_of_recipe(images, any_of(work.records())) | network_contract(made_with)
    signed = tuple(
        dataclasses.replace(job, recipe_sha256=stable_hash({**common, **record["contract"]}))
        for job, record in zip(jobs, records, strict=True)
    )
    return dataclasses.replace(work, labels=dataclasses.replace(labels, job=LabelJob(signed, False)))


def _require_of_images(work: ImagePass) -> None:
    """Refuse tables of predictions that were made of embeddings: their parts have other names."""
    from engine.tables import is_of_images

    for uri, record in zip(work.tables, work.records(), strict=True):
        if record is not None and not is_of_images(record):
            raise ContractMismatch(
                f"{uri}: holds predictions of an embedding table",
                found=f"embeddings.uri {record['contract'].get('embeddings.uri')}",
                wanted="predictions that were made straight from images",
                way_out="name another output.uri, or give output.uri that embedding table: then they are kept, and "
                "their predictions go into the same table as before",
            )


def _image_recipe(recipe: ScoreRecipe, form: EmbeddingForm, made_with: Record) -> ImageRecipe:
    """What makes the embeddings: as the recipe says, and where it says nothing as they were made for the bundles."""
    from engine.resolve import stated_network
    from engine.runtimes.kinds import settled_runtime

    assert recipe.source is not None
    stated, runtime = stated_network(made_with)
    if recipe.runtime is not None:
        runtime = settled_runtime(recipe.runtime, made_with["runtime"])
    wanted = made_with["contract"].get("runtime.precision", runtime.precision)
    if runtime.precision != wanted:
        raise ContractMismatch(
            "runtime.precision: another one than that of the embeddings which the bundles were fitted on",
            found=runtime.precision,
            wanted=wanted,
            way_out="leave the block `runtime` out, or fit on embeddings of that precision",
        )
    return ImageRecipe(
        source=recipe.source,
        storage=recipe.storage,
        backbone=recipe.backbone or stated,
        runtime=runtime,
        output=form,
        compute=recipe.compute,
        limits=recipe.limits,
    )


def _bundles(recipe: ScoreRecipe) -> list[Bundle]:
    """Opened; of one network, and without side features that the source has not got."""
    from engine.heads.bundle import open_bundle
    from engine.heads.side_features import side_columns
    from engine.schema import embeddings_schema
    from engine.storage import open_store

    assert recipe.source is not None
    bundles = [open_bundle(open_store(wanted.uri, recipe.storage)) for wanted in recipe.bundles]
    first = bundles[0]
    there = embeddings_schema(1, "float32", recipe.source.metadata_columns()).names
    for bundle in bundles:
        for name in ("fingerprint", "width"):
            found, wanted = getattr(bundle.manifest, name), getattr(first.manifest, name)
            if found != wanted:
                raise ContractMismatch(
                    "bundles: fitted on embeddings of different networks, so that one pass cannot serve them",
                    found=f"{bundle.store.uri} has {name} {found}",
                    wanted=f"{name} {wanted}, as {first.store.uri} has",
                    way_out="score each group of bundles with a recipe of its own",
                )
        if absent := [name for name in side_columns(bundle.manifest.side_features) if name not in there]:
            raise RecipeError(
                f"bundle {bundle.store.uri}: takes columns that the images do not come with",
                found=", ".join(there),
                wanted=", ".join(absent),
                way_out="name them in source.metadata",
            )
    return bundles


def _head_bytes(bundles: Sequence[Bundle]) -> int:
    return sum(bundle.answering_bytes for bundle in bundles)


def _made_with(bundles: Sequence[Bundle]) -> Record:
    """`_table.json` of the embeddings that a bundle was fitted on; all of them are of one network."""
    wanted = ("backbone", "runtime", "contract")
    for bundle in bundles:
        record = bundle.document("embeddings_table")
        if all(name in record for name in wanted):
            return record
    raise BundleError(
        f"bundle {bundles[0].store.uri}: does not say which network it belongs to",
        found=f"an embeddings_table.json with {', '.join(record)}",
        wanted=", ".join(wanted),
        way_out="score embeddings of that table instead",
    )
