"""The verb `manifest`: a recipe becomes a RayJob and its ConfigMap, sized for what there is to do.

    engine manifest extract recipe.yaml --image registry.example.org/image-feature-engine:0.1.0 | kubectl create -f -

Touches nothing: it lists what `--plan` lists, and prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from engine.config import Config
    from engine.kubernetes.manifest import JobWish, Manifest
    from engine.kubernetes.pods import PodPlan, Wish


@dataclass(frozen=True)
class ManifestOptions:
    """What the command line says beside the recipe and its pods.

    Attributes:
        name: of the RayJob; None: the verb and the recipe's file.
        image: that all containers run.
        recipe_map: name of a ConfigMap that has the recipe already; None: one is printed.
        retries: as of `JobWish`; None: as the verb's kind of work wants it.
        deadline_s, suspend: as of `JobWish`.
        offline: do not look at the archive or the tables.
    """

    name: str | None
    image: str
    recipe_map: str | None
    deadline_s: int
    retries: int | None
    suspend: bool
    offline: bool


def manifests(
    verb: str, recipe: Config, path: Path, overrides: Sequence[str], wish: Wish, options: ManifestOptions
) -> list[Manifest]:
    """The objects that run this recipe: its ConfigMap, unless the cluster has it, and its RayJob.

    Raises:
        EngineError: the recipe cannot be used, the pods cannot hold it, or the archive cannot be reached.
    """
    from engine.config import resolved_text
    from engine.errors import RecipeError, StorageError
    from engine.kubernetes.manifest import name_of_recipe_map, recipe_config_map

    if options.recipe_map is not None and overrides:
        raise RecipeError(
            "--recipe-map: the recipe is in the cluster already, and --set cannot change it there",
            way_out="leave one of them out",
        )
    _require_fit_for_a_cluster(recipe)
    try:
        plan = pods_for(verb, recipe, wish, is_reachable=not options.offline)
    except StorageError as error:
        way_out = f"{error.way_out}; or --offline" if error.way_out else "--offline"
        raise type(error)(
            error.thing,
            found=error.found,
            wanted=error.wanted,
            way_out=f"{way_out}: as many pods as the options say",
        ) from None
    name = options.name or _default_name(verb, path)
    if options.recipe_map is not None:
        return [_ray_job(_job(verb, name, path, options.recipe_map, options), plan)]
    text = resolved_text(path, overrides)
    job = _job(verb, name, path, name_of_recipe_map(name, path.name, text), options)
    return [recipe_config_map(job.recipe_map, job.recipe_file, text), _ray_job(job, plan)]


def _ray_job(job: JobWish, plan: PodPlan) -> Manifest:
    from engine.kubernetes.manifest import ray_job
    from jobs.outcome import say

    if plan.note:
        say(f"note: {plan.note}")
    return ray_job(job, plan)


def _default_name(verb: str, path: Path) -> str:
    file = path.stem.lower().replace("_", "-")
    return file if file.startswith(verb) else f"{verb}-{file}"


def _job(verb: str, name: str, path: Path, recipe_map: str, options: ManifestOptions) -> JobWish:
    from engine.kubernetes.manifest import JobWish

    # A fine-tuning that came to nothing has published nothing, so that a second try would train it all again.
    by_default = 0 if verb == "finetune" else 1
    return JobWish(
        verb=verb,
        name=name,
        image=options.image,
        recipe_map=recipe_map,
        recipe_file=path.name,
        deadline_s=options.deadline_s,
        retries=by_default if options.retries is None else options.retries,
        suspend=options.suspend,
    )


def _require_fit_for_a_cluster(recipe: Any) -> None:
    """Refuse a recipe that names another cluster; say what lies on this machine alone."""
    from engine.errors import RecipeError
    from jobs.outcome import say

    if getattr(getattr(recipe, "compute", None), "address", None) is not None:
        raise RecipeError(
            f"compute.address is {recipe.compute.address}: a RayJob runs on a cluster of its own",
            way_out="leave it out, or --set compute.address=null",
        )
    for uri in _uris(recipe.model_dump(mode="json")):
        if "://" not in uri:
            say(
                f"note: {uri} is a path; every pod would look for it on a disk of its own (s3:// is the same for all)"
            )


def _uris(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "uri" and isinstance(value, str):
                yield value
            else:
                yield from _uris(value)
    elif isinstance(node, list):
        for value in node:
            yield from _uris(value)


def pods_for(verb: str, recipe: Any, wish: Wish, *, is_reachable: bool) -> PodPlan:
    """The pods of one job, by what its verb does."""
    from engine.kubernetes.pods import extraction_pods, scoring_pods, training_pods
    from jobs import extract, score, score_images

    if verb in ("extract", "nightly") or (verb == "score" and recipe.source is not None):
        if verb == "score":
            needs, tasks = score_images.demand(recipe, is_reachable=is_reachable)
        else:
            extraction = recipe if verb == "extract" else recipe.extraction()
            needs, tasks = extract.demand(extraction, is_reachable=is_reachable)
        most = (wish.workers + wish.gpu_pods) * wish.cpus
        pending = tasks(most) if tasks else None
        return extraction_pods(wish, recipe.compute, needs, pending, may_be_idle=verb == "nightly")
    if verb == "score":
        parts = score.plan(recipe)["parts_pending"] if is_reachable else None
        return scoring_pods(wish, parts)
    return training_pods(wish, recipe.strategy, with_readers=verb == "finetune")
