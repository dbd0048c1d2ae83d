"""The `engine` command: arguments, exit codes, and the verbs that are not jobs of their own.

Imports stay light, so that `--help` and a wrong recipe answer at once; a verb imports what it needs when it runs.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import os
import re
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from engine.errors import EXIT_DONE, BundleError, EngineError, Interrupted, RecipeError
from engine.log_lines import LogContext, json_log, plain_text, print_error
from jobs.logs import json_logs, wanted_format

if TYPE_CHECKING:
    from engine.backbones.kinds import BackboneConfig
    from engine.runtimes.kinds import RuntimeConfig
    from engine.storage import StorageConfig, Store

app = typer.Typer(
    name="engine",
    help="Image archives to embeddings, classifiers and labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 done; 1 the run failed; 2 wrong recipe or arguments; 3 finished, but over the error "
    "budget or a gate said no; 130 interrupted (safe to run again).",
)

Recipe = Annotated[Path, typer.Argument(help="YAML file; `engine schema VERB` says what it may hold.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH.TO.KEY=VALUE", help="Change one field of the recipe; may be repeated."
    ),
]


def _moment(text: str) -> float:
    """Seconds since 1970 UTC: of a date or time as ISO 8601 writes it, or so long ago."""
    if age := re.fullmatch(r"(\d+(?:\.\d+)?)([mhd])", text):
        return time.time() - float(age[1]) * {"m": 60, "h": 3600, "d": 86_400}[age[2]]
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no time; wanted: 2026-11-20, 2026-11-20T22:00, 2026-11-20T22:00+00:00, 90m, 36h or 7d"
        ) from None


def _size(text: str) -> int:
    """Bytes, of a number with a unit."""
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMG]i?B)", text)
    size = round(float(found[1]) * units[found[2]]) if found and found[2] in units else 0
    if size < 1:
        raise typer.BadParameter(f"{text!r} is no size; wanted: 512MiB, 1GiB, 500MB")
    return size


Since = Annotated[
    float | None,
    typer.Option(
        metavar="WHEN",
        parser=_moment,
        help="Of shards that are not begun only those that came since: 2026-11-20, 2026-11-20T22:00 (on this machine's "
        "clock) or an age, 36h. The others stay pending. S3 dates an upload in pieces by its beginning: ask for some "
        "hours more than there are between runs.",
    ),
]
Plan = Annotated[bool, typer.Option("--plan", help="Print what would be done and touch nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON summary as the last line of stdout.")]


EndpointUrl = Annotated[str | None, typer.Option(help="Address of an S3-compatible store.")]
Region = Annotated[str | None, typer.Option(help="Region of the bucket.")]
Anonymous = Annotated[
    bool, typer.Option("--anonymous", help="Send requests without keys, for public buckets.")
]


class PoolingName(StrEnum):
    """`engine.backbones.kinds.Pooling`, as the command line needs it."""

    AVG = "avg"
    MAX = "max"


class ResizeName(StrEnum):
    """`engine.backbones.kinds.Resize`, likewise."""

    STRETCH = "stretch"
    LETTERBOX = "letterbox"
    CENTER_CROP = "center_crop"


class UnmappedName(StrEnum):
    """What `PredictionForm.unmapped` may be."""

    REFUSE = "refuse"
    KEEP = "keep"


class TableForm(StrEnum):
    """What a table can be exported as."""

    NPY = "npy"
    CSV = "csv"


RECIPE_CLASSES = {
    "extract": "ExtractRecipe",
    "fit": "FitRecipe",
    "finetune": "FinetuneRecipe",
    "score": "ScoreRecipe",
    "nightly": "NightlyRecipe",
}


@app.command()
def extract(  # noqa: PLR0913, PLR0917
    recipe: Recipe,
    overrides: Overrides = None,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            help="Remove the parts of shards that are gone from the source; refused above a tenth of the table.",
        ),
    ] = False,
    prune_up_to: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="As --prune, with N shards as the limit instead of a tenth."),
    ] = None,
    replay_rejects: Annotated[
        bool, typer.Option("--replay-rejects", help="Do again the parts that have rejects.")
    ] = False,
    profile: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Stop after about N images (several parts' worth), which stay in the table; say what held them up.",
        ),
    ] = None,
    since: Since = None,
    plan: Plan = False,
    as_json: Json = False,
) -> None:
    """Stream image shards through a frozen backbone and write embedding parts; only what is new is done."""
    options = {
        "prune": prune,
        "prune_up_to": prune_up_to,
        "replay_rejects": replay_rejects,
        "profile": profile,
        "since": since,
    }
    _run_job("extract", recipe, overrides, plan, as_json, options)


@app.command()
def fit(recipe: Recipe, overrides: Overrides = None, plan: Plan = False, as_json: Json = False) -> None:
    """Fit a head on an embedding table and publish it as a bundle."""
    _run_job("fit", recipe, overrides, plan, as_json)


@app.command()
def finetune(recipe: Recipe, overrides: Overrides = None, plan: Plan = False, as_json: Json = False) -> None:
    """Train a backbone further with its head; publishes new weights and their bundle if that helped, else exit 3."""
    _run_job("finetune", recipe, overrides, plan, as_json)


@app.command()
def score(
    recipe: Recipe,
    overrides: Overrides = None,
    prune: Annotated[bool, typer.Option("--prune", help="As of extract; only with `source`.")] = False,
    prune_up_to: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="As of extract; only with `source`.")
    ] = None,
    replay_rejects: Annotated[
        bool, typer.Option("--replay-rejects", help="As of extract; only with `source`.")
    ] = False,
    plan: Plan = False,
    as_json: Json = False,
) -> None:
    """Label an embedding table, or images, with bundles; writes prediction parts, only what is new."""
    options = {"prune": prune, "prune_up_to": prune_up_to, "replay_rejects": replay_rejects}
    _run_job("score", recipe, overrides, plan, as_json, options)


@app.command()
def nightly(  # noqa: PLR0913, PLR0917
    recipe: Recipe,
    overrides: Overrides = None,
    publish: Annotated[
        bool,
        typer.Option(
            "--publish", help="Only publish what an earlier night held back; you have looked at it."
        ),
    ] = False,
    prune: Annotated[bool, typer.Option("--prune", help="As of extract.")] = False,
    prune_up_to: Annotated[int | None, typer.Option(metavar="N", min=0, help="As of extract.")] = None,
    since: Since = None,
    plan: Plan = False,
    as_json: Json = False,
) -> None:
    """Extract what is new, score it, judge it, publish it; what looks wrong is held back, with exit code 3."""
    _run_job(
        "nightly",
        recipe,
        overrides,
        plan,
        as_json,
        {"publish": publish, "prune": prune, "prune_up_to": prune_up_to, "since": since},
    )


@app.command()
def submit(  # noqa: PLR0913, PLR0917 (each is an option)
    recipe: Recipe,
    verb: Annotated[str, typer.Option(help=", ".join(RECIPE_CLASSES))],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="Behind `--`: further arguments of the verb, such as --prune or --plan."),
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Of the head's dashboard, http://host:8265; without it RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this "
            "machine.",
        ),
    ] = None,
    with_code: Annotated[
        bool,
        typer.Option("--with-code", help="Send the engine itself along, for a cluster that lacks it."),
    ] = False,
    include: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file or folder that the job is to find beside its recipe, such as a module with a custom head; "
            "may be repeated."
        ),
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not follow the job.")] = False,
    stop_on_interrupt: Annotated[
        bool, typer.Option("--stop-on-interrupt", help="Ctrl-C and SIGTERM stop the job as well.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe as a job on a Ray cluster: sends it, prints the job's log, ends with the job's exit code.

    The same command while the job runs follows it; after that it makes a new job. Ctrl-C lets the job go on. No key of
    this machine is sent: the cluster has its own. A token is read from RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN.
    """
    from jobs.submit import connect, follow, prepare, start

    model = _recipe_class(verb)
    _check_arguments(verb, recipe, arguments or [])
    submission = prepare(verb, model, recipe, overrides or (), arguments or (), with_code, include or ())
    with _interruptible():
        cluster = connect(address)
        name = start(cluster, submission)
        if no_wait:
            if as_json:
                print(json.dumps({"submission_id": name, "status": cluster.state(name).status}))
            return
        ended = follow(cluster, name, stop_on_interrupt)
    if as_json:
        print(json.dumps(ended.to_json()))
    if (code := ended.exit_code()) != EXIT_DONE:
        print(f"job {name} ended with exit code {code}", file=sys.stderr)
        raise typer.Exit(code)


@app.command()
def plan(
    images: Annotated[float, typer.Option(metavar="N", help="Images in the archive, such as 1e9.")],
    cluster: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="cpu-overlay or gpu-overlay, or a YAML file: {nodes: 4, cores_per_node: 16, gpus_per_node: 1, "
            "node_price_per_hour: 4.92}.",
        ),
    ] = "gpu-overlay",
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Say on paper what extracting an archive would take: objects, requests, bytes, hours, money, and where it stops.

    Nothing is asked of any store or cluster. Rates and prices are those that it names with their sources; --set puts
    yours in their place (archive.bytes_per_image=50000). What is pending of a real archive: `engine extract --plan`.
    """
    from jobs.plan import facts_of, paper_plan, print_facts

    facts = facts_of(paper_plan(images, cluster, overrides or ()))
    if as_json:
        print(json.dumps(facts))
    else:
        print_facts(facts)


@app.command()
def verify(
    table: Annotated[str, typer.Argument(help="URI of an embedding or prediction table.")],
    source: Annotated[
        bool,
        typer.Option("--source", help="Also list the source: new, replaced and removed shards are named."),
    ] = False,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="With --source: which objects are shards, as in the recipe; the table does not keep it."
        ),
    ] = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
    as_json: Json = False,
) -> None:
    """Read a whole table again and name all that is not as it should be; exit 1 on any damage.

    Leftovers (nobody needs them) and unfinished work (the next job does it) are listed, and are no damage. Nothing is
    changed. Keys for S3 come from the usual AWS environment or role.
    """
    storage = _storage("verify", endpoint_url, region, anonymous)
    _verify(table, storage, source or pattern is not None, pattern, as_json)


@app.command()
def inspect(
    uri: Annotated[
        str,
        typer.Argument(help="URI of a bundle, a table, a part of a prediction table, or a folder of files."),
    ],
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
    as_json: Json = False,
) -> None:
    """Say what lies at a URI: a bundle and how good it is, a table and how far it is, or files.

    Of files that look like an archive of images it tells the first sample, and the block `source` of a recipe that has
    read it. Reads records, listings and footers; of a bundle each file, whose sha-256 is checked. Of a prediction
    table, or one part of it, also what it was made from, and whether that is still there: bundle, embeddings, shards.
    Keys for S3 come from the usual AWS environment or role.
    """
    from engine.inspection import inspect_uri
    from engine.storage import open_store

    store = open_store(uri, _storage("inspect", endpoint_url, region, anonymous))
    facts = inspect_uri(store)
    if "source" in facts and not as_json:
        facts["source"] = json.dumps(facts["source"])  # in one line, as YAML takes it
    _print_facts(facts, as_json)
    if facts.get("damaged"):
        raise BundleError(f"{uri}: the bundle is damaged", found=", ".join(facts["damaged"]))


@app.command()
def review(  # noqa: PLR0913, PLR0917 (each is an option)
    predictions: Annotated[str, typer.Argument(help="URI of a prediction table.")],
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Rows wanted.")] = 200,
    other: Annotated[
        str | None,
        typer.Option(
            help="URI of another bundle's prediction table over the same shards: where they differ comes first."
        ),
    ] = None,
    near_duplicate: Annotated[
        float,
        typer.Option(min=0, max=1, help="Cosine of embeddings above which two images are asked about once."),
    ] = 0.98,
    held: Annotated[
        bool, typer.Option("--held", help="Of what a night holds back, instead of what is published.")
    ] = False,
    out: Annotated[
        str | None,
        typer.Option(
            help="URI of the file to write, .parquet or .csv; without it PREDICTIONS/review/<run id>.parquet."
        ),
    ] = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
    as_json: Json = False,
) -> None:
    """Pick the rows most worth a person's look, as a file with an empty column `answer`.

    Fill it in and fit on it: labels: {uri: FILE, label: answer}. Rows left empty are no labels. Keys for S3 come
    from the usual AWS environment or role.
    """
    from engine.review import require_review_uri, review_queue, write_review
    from engine.storage import open_store
    from jobs.outcome import new_run_id, print_summary, progress_bar, say

    storage, run_id = _storage("review", endpoint_url, region, anonymous), new_run_id("review")
    store = open_store(predictions, storage)
    target = out or f"{store.uri}/review/{run_id}.parquet"
    require_review_uri(target, storage)
    with _interruptible(), progress_bar("parts", 0) as (bar, task):
        found = review_queue(
            store,
            count,
            None if other is None else open_store(other, storage),
            near_duplicate,
            lambda done, total: bar.update(task, completed=done, total=total),
            held,
        )
        write_review(found.rows, target, storage)
    for note in found.notes:
        say(f"note: {note}")
    summary = {"verb": "review", "run_id": run_id, "table": store.uri, "rows_read": found.rows_read}
    reasons = dict(Counter(found.rows["reason"].to_pylist()))
    summary |= {"rows": found.rows.num_rows, "reasons": reasons, "out": target, "notes": len(found.notes)}
    print_summary(summary)
    if as_json:
        print(json.dumps({**summary, "notes": list(found.notes)}))


@app.command()
def predict(  # noqa: PLR0913, PLR0917 (each is an option)
    bundle: Annotated[
        str, typer.Argument(help="URI of a bundle, of `engine fit`, `finetune` or `imagenet`.")
    ],
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Image files or folders of them, as paths or URIs, at most 1,000; - is one image on stdin."
        ),
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(metavar="FILE_OR_URI", help="One more of IMAGES; may be repeated.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="Candidates shown for each image.")] = 5,
    min_confidence: Annotated[
        str,
        typer.Option(
            metavar="NUMBER|YAML",
            help="Confidence below which there is no label; or {default: 0.5, classes: {cat: 0.9}}.",
        ),
    ] = "0.0",
    label_map: Annotated[
        str | None,
        typer.Option(
            metavar="URI|YAML",
            help="Your ids for the classes: a .csv, .tsv or .parquet file, {cat: id-7, dog: id-9}, or class_ids.",
        ),
    ] = None,
    unmapped: Annotated[
        UnmappedName, typer.Option(help="Classes that --label-map does not name.")
    ] = UnmappedName.REFUSE,
    save: Annotated[
        str | None,
        typer.Option(
            metavar="PICTURE",
            help="Also draw images and bars side by side: a new .png or .svg, of 24 at most.",
        ),
    ] = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
    as_json: Json = False,
) -> None:
    """Say what a bundle sees in some images: label, confidence, and a bar for each of the best candidates.

    Decoded, embedded and classified as `engine score` would, in this process, on its processors. An image that cannot
    be decoded, or is not there, is named with its reason; the others are labelled, and the exit code is 3. Keys for S3
    come from the usual AWS environment or role.
    """
    from rich.console import Console

    from engine.config import read_value
    from jobs.outcome import console as stderr
    from jobs.predict import predict as predict_images

    storage = _storage("predict", endpoint_url, region, anonymous)
    form = {
        "top_k": top_k,
        "min_confidence": read_value("--min-confidence", min_confidence),
        "label_map": None if label_map is None else read_value("--label-map", label_map),
        "unmapped": unmapped.value,
    }
    shown = Console(highlight=False, soft_wrap=True)
    if as_json:  # a log of JSON lines has no place for bars, and the summary has it all
        shown = stderr if json_log() is None else Console(quiet=True)
    with _interruptible():
        outcome = predict_images(bundle, [*(image or ()), *(images or ())], form, storage, save, shown)
    if as_json:
        print(json.dumps(outcome.summary))
    if outcome.verdict is not None:
        raise outcome.verdict


@app.command()
def similar(  # noqa: PLR0913, PLR0917 (each is an option)
    table: Annotated[str, typer.Argument(help="URI of an embedding table.")],
    image: Annotated[
        str | None,
        typer.Option(help="Path or URI of an image: embedded by the network that the table was made with."),
    ] = None,
    key: Annotated[str | None, typer.Option(help="Key of a row, which is left out of the answer.")] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="Shard of the row, as the table's column has it: where several have the key."),
    ] = None,
    index: Annotated[
        int | None, typer.Option(min=0, help="Position of the row in its shard, likewise.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=100_000, help="Rows wanted.")] = 20,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
    as_json: Json = False,
) -> None:
    """Find the rows of a table that are nearest to an image, or to one of its rows, by cosine.

    Every row is compared, none is skipped; memory does not grow with the table. With --image the network is loaded as
    it was for the table and must compute the same numbers here. Keys for S3 come from the usual AWS environment or
    role.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is loaded
    from engine.storage import open_store
    from jobs.similar import Query, find_similar, print_similar

    if (image is None) == (key is None and shard is None and index is None):
        raise typer.BadParameter("either --image, or the row: --key, or --shard and --index")
    store = open_store(table, _storage("similar", endpoint_url, region, anonymous))
    with _interruptible():
        found = find_similar(store, Query(image, key, shard, index), k)
    if as_json:
        print(json.dumps(found))
    else:
        print_similar(found)


@app.command()
def duplicates(  # noqa: PLR0913, PLR0917 (each is an option)
    table: Annotated[str, typer.Argument(help="URI of an embedding table.")],
    threshold: Annotated[
        float,
        typer.Option(
            help="Cosine above which two images are near duplicates; 1: only the same bytes. Which is right hangs on "
            "network, input size and images: 0.95 is for EfficientNet-Lite0 and photos of twice its input."
        ),
    ] = 0.95,
    output: Annotated[
        str | None, typer.Option(help="URI of a .parquet file for all groups; none is written over.")
    ] = None,
    scratch: Annotated[
        Path | None,
        typer.Option(
            help="Folder for a copy of the embeddings as float32, which goes when the command ends; by default that "
            "for temporary files."
        ),
    ] = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
    as_json: Json = False,
) -> None:
    """Group the images of a table that are there more than once: the same bytes, or near to each other by cosine.

    A group has a representative, the one with the most pixels, to which every other is near: groups do not chain from
    one image to a stranger. Up to 65,536 images each is compared with each; beyond that within cells of like ones, and
    the summary has the share of near duplicates that this finds (recall, on a sample). Nothing is deleted. Keys for S3
    come from the usual AWS environment or role.
    """
    from engine.storage import open_store
    from jobs.duplicates import print_duplicates, search_duplicates

    storage = _storage("duplicates", endpoint_url, region, anonymous)
    with _interruptible():
        found, summary = search_duplicates(open_store(table, storage), threshold, output, scratch)
    print_duplicates(found, summary, as_json)


@app.command()
def export(  # noqa: PLR0913, PLR0917 (each is an option)
    source: Annotated[str, typer.Argument(metavar="BUNDLE|TABLE", help="URI of a bundle, or of a table.")],
    target: Annotated[
        str,
        typer.Argument(
            metavar="DEST",
            help="Of a bundle: URI of the folder for the SavedModel; it must be empty. Of a table: on this machine's "
            "disk, a folder (npy) or a file (csv).",
        ),
    ],
    to: Annotated[
        TableForm | None,
        typer.Option(
            "--to", help="Of a table: npy for its embeddings as an array, csv for its other columns."
        ),
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="With --to csv: embeddings too, as JSON arrays.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --to: replace the files of an earlier export.")
    ] = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
    as_json: Json = False,
) -> None:
    """Write a bundle as a TensorFlow SavedModel, or a table as a NumPy array or CSV; what lies at the URI decides.

    Of a bundle: backbone and head as one model, images in, labels and probabilities out. Signature serving_default
    takes pixels, uint8 (B, S, S, 3), RGB, and answers what the pipeline answers, which is checked before anything is
    written. Signature encoded takes whole JPEG, PNG, GIF or BMP files; TensorFlow decodes them by its own rules, so
    that probabilities differ a little, and pictures that say they are turned are not.

    Of a table: --to npy writes DEST/embeddings.npy, (rows, width), and DEST/rows.parquet, the other columns of the same
    rows; --to csv one file. Rows come in the order of shard and index. A file has its name only when it is whole.

    Keys for S3 come from the usual AWS environment or role.
    """
    from engine.inspection import BUNDLE, TABLE, kind_at
    from engine.storage import open_store

    storage = _storage("export", endpoint_url, region, anonymous)
    store = open_store(source, storage)
    kind = kind_at(store)
    if kind == TABLE and to is None:
        raise typer.BadParameter(f"{source} is a table: say --to npy or --to csv")
    if kind == BUNDLE and to is not None:
        raise typer.BadParameter(f"{source} is a bundle: --to is for tables")
    if (embeddings and to is not TableForm.CSV) or (overwrite and to is None):
        raise typer.BadParameter("--embeddings belongs to --to csv, --overwrite to --to npy or csv")
    if to is not None and "://" in target:
        raise typer.BadParameter(
            f"{target}: an export is written on this machine's disk; `engine compact` writes to S3"
        )
    if to is None:
        _export_bundle(store, open_store(target, storage), as_json)
    else:
        _export_table(store, Path(target), to, embeddings, overwrite, as_json)


def _export_bundle(store: Store, target: Store, as_json: bool) -> None:
    _import_tensorflow()
    from engine.export import export_bundle
    from engine.heads.bundle import open_bundle

    exported = export_bundle(open_bundle(store), target, store.config)
    _print_facts(asdict(exported), as_json)


def _export_table(
    store: Store, target: Path, to: TableForm, embeddings: bool, overwrite: bool, as_json: bool
) -> None:
    from engine.table_export import export_arrays, export_csv
    from engine.tables import open_any_table
    from jobs.outcome import print_summary, progress_bar, say_incomplete

    table = open_any_table(store)
    with _interruptible(), progress_bar("parts", 0) as (bar, task):

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if to is TableForm.NPY:
            exported = export_arrays(table, target, overwrite, report)
        else:
            exported = export_csv(table, target, embeddings, overwrite, report)
    say_incomplete(exported.incomplete_shards)
    summary = {"verb": "export", "table": store.uri, "kind": table.record["kind"], **asdict(exported)}
    print_summary({**summary, "files": ", ".join(exported.files)})
    if as_json:
        print(json.dumps(summary))


@app.command()
def sql(  # noqa: PLR0913, PLR0917 (each is an option)
    query: Annotated[str, typer.Argument(metavar="SQL", help="One SELECT, in DuckDB's SQL.")],
    tables: Annotated[
        list[str],
        typer.Option(
            "--table",
            metavar="[NAME=]URI",
            help="Of an embedding or prediction table; may be repeated. With NAME the view has that name.",
        ),
    ],
    csv: Annotated[
        Path | None, typer.Option(help="Write the rows to this CSV file; one that is there is not replaced.")
    ] = None,
    parquet: Annotated[Path | None, typer.Option(help="Likewise, to a Parquet file.")] = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
    as_json: Json = False,
) -> None:
    """Ask tables something in SQL, wherever they lie: views `embeddings`, `predictions` and `rejects`.

    A prediction table brings the embeddings it was made of. Each shard is read in one version; columns and rows that
    are not asked for stay where they are, and nothing is changed. Other files can be joined by their path: FROM
    'answers.csv'. Needs DuckDB: pip install 'image-feature-engine[analytics]'. Keys for S3 come from the usual AWS
    environment or role.
    """
    from jobs.sql import run_sql

    if csv is not None and parquet is not None:
        raise typer.BadParameter("--csv or --parquet, not both")
    storage = _storage("sql", endpoint_url, region, anonymous)
    with _interruptible():
        run_sql(query, tables, storage, csv, parquet, as_json)


@app.command()
def compact(  # noqa: PLR0913, PLR0917 (each is an option)
    table: Annotated[str, typer.Argument(help="URI of an embedding or prediction table.")],
    target: Annotated[
        str,
        typer.Argument(
            metavar="DEST", help="URI of the copy, an empty place; unfinished work is begun again."
        ),
    ],
    file_size: Annotated[
        int,
        typer.Option(
            parser=_size, metavar="SIZE", help="Of a file of the copy, about; such as 512MiB or 1GiB."
        ),
    ] = "512MiB",  # type: ignore[assignment]  # the parser reads it
    scratch: Annotated[
        Path | None,
        typer.Option(
            help="Folder of this machine with room for the whole table; by default that for temporary files."
        ),
    ] = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
    as_json: Json = False,
) -> None:
    """Copy a table into few large Parquet files, sorted by key, and read the copy again before saying that it is done.

    The table is only read. The copy is for programs that read whole tables; no job adds to it. Some GiB of memory are
    enough for any table. Keys for S3 come from the usual AWS environment or role.
    """
    from engine.compaction import compact_table
    from engine.storage import open_store
    from engine.tables import open_any_table
    from jobs.outcome import print_summary, progress_bar, say_incomplete

    storage, started = _storage("compact", endpoint_url, region, anonymous), time.monotonic()
    opened, place = open_any_table(open_store(table, storage)), open_store(target, storage)
    with _interruptible(), progress_bar("parts read", 0) as (bar, task):
        done = compact_table(
            opened,
            place,
            file_size,
            scratch,
            lambda step, count, total: bar.update(task, description=step, completed=count, total=total),
        )
    say_incomplete(done.incomplete_shards)
    summary = {"verb": "compact", **asdict(done), "seconds": round(time.monotonic() - started, 3)}
    print_summary(summary)
    if as_json:
        print(json.dumps(summary))


@app.command()
def imagenet(  # noqa: PLR0913, PLR0917 (each is an option)
    backbone: Annotated[
        str,
        typer.Argument(
            help="A network as `engine backbones` lists it, or the recipe (.yaml) of the `extract` whose network it is."
        ),
    ],
    target: Annotated[str, typer.Argument(help="URI of the bundle's folder.")],
    input_size: Annotated[
        int | None,
        typer.Option(help="Side of the square input in pixels, 224 if not given; a recipe says it itself."),
    ] = None,
    resize: Annotated[
        ResizeName | None,
        typer.Option(help="How images become squares, stretch if not given; a recipe says it itself."),
    ] = None,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
    as_json: Json = False,
) -> None:
    """Publish a network's own ImageNet classifier as a bundle: labels of 1,000 classes without training.

    For networks whose classifier is one dense layer on pooled features; others are refused by name. The bundle scores
    embeddings of that network, or images, as any other. Its labels are the first words of WordNet's synsets; with
    `label_map: class_ids` a prediction table has WordNet's ids instead. Keys for S3 come from the usual AWS environment
    or role.
    """
    _import_tensorflow()
    from engine.imagenet import publish_imagenet_bundle
    from engine.storage import open_store

    storage = _storage("imagenet", endpoint_url, region, anonymous)
    shape = {"input_size": input_size, "resize": resize.value if resize else None}
    config, runtime, storage = _network_of(backbone, shape, storage)
    bundle = publish_imagenet_bundle(config, runtime, open_store(target, storage), storage)
    facts = {
        "bundle": bundle.store.uri,
        "id": bundle.id,
        "classes": len(bundle.manifest.classes),
        "fingerprint": bundle.manifest.fingerprint,
        "width": bundle.manifest.width,
        "backbone": config.model_dump(mode="json"),
        "runtime": runtime.model_dump(mode="json"),
    }
    _print_facts(facts, as_json)


@app.command()
def backbones(  # noqa: PLR0913, PLR0917 (each is an option)
    name: Annotated[
        str | None,
        typer.Argument(
            help="Show this one, or the network in a .keras file, or in a SavedModel's folder/ or .tar.gz by its URI; "
            "without it, list all names."
        ),
    ] = None,
    input_size: Annotated[int, typer.Option(help="Side of the square input in pixels.")] = 224,
    pooling: Annotated[
        PoolingName, typer.Option(help="How a feature map becomes one vector.")
    ] = PoolingName.AVG,
    layer: Annotated[str | None, typer.Option(help="Cut at this layer.")] = None,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers",
            help="Also list its layers: index, name, kind, parameters; for `unfreeze` of a recipe.",
        ),
    ] = False,
    endpoint_url: EndpointUrl = None,
    region: Region = None,
    anonymous: Anonymous = False,
    as_json: Json = False,
) -> None:
    """List the backbones, or show one: parameters, trainable and frozen, layers, width, scaling."""
    from engine.backbones.kinds import backbone_names, describe_backbone

    if name is None and layers:
        raise typer.BadParameter("--layers belongs to one NAME")
    _import_tensorflow()
    if name is not None:
        facts = describe_backbone(
            name,
            input_size,
            pooling.value,
            layer,
            layers,
            _storage("backbones", endpoint_url, region, anonymous),
        )
        rows = facts.pop("layer_table", None)
        if rows is not None and as_json:
            facts["layer_table"] = rows
        elif rows is not None:
            for row in rows:
                print(f"{row['index']:>5}  {row['name']:<40} {row['kind']:<24} {row['parameters']:>12,}")
        _print_facts(facts, as_json)
    elif as_json:
        print(json.dumps(backbone_names()))
    else:
        print("\n".join(backbone_names()))


@app.command()
def manifest(  # noqa: PLR0913, PLR0917 (each is an option)
    verb: Annotated[str, typer.Argument(help=", ".join(RECIPE_CLASSES))],
    recipe: Recipe,
    image: Annotated[str, typer.Option(help="Image of the engine, with a tag or a digest.")],
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Of the RayJob; by default the verb and the file.")] = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs in all, at most.")] = 0,
    gpus_per_pod: Annotated[int, typer.Option(min=1, max=16, help="GPUs of each pod that has some.")] = 1,
    workers: Annotated[int, typer.Option(min=1, max=4096, help="Pods without GPUs, at most.")] = 4,
    cpus: Annotated[
        int,
        typer.Option(
            min=1, max=1024, help="Cores of each worker pod; one less than its machine has, which keeps some."
        ),
    ] = 7,
    memory_gib: Annotated[
        int | None, typer.Option(min=1, help="GiB of each worker pod; by default what its processes need.")
    ] = None,
    scratch_gib: Annotated[
        int, typer.Option(min=1, help="GiB of disk for files, and as many for spilled objects.")
    ] = 20,
    deadline_hours: Annotated[float, typer.Option(min=0.01, help="After which the job is ended.")] = 12,
    retries: Annotated[
        int | None,
        typer.Option(
            min=0, max=10, help="Further tries after a failure of any kind; by default 1, of finetune 0."
        ),
    ] = None,
    recipe_map: Annotated[
        str | None,
        typer.Option(help="ConfigMap of the cluster that has the recipe; by default one is printed."),
    ] = None,
    suspend: Annotated[
        bool,
        typer.Option(
            "--suspend", help="Print a template that `engine launch` starts, and that waits till then."
        ),
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Do not look at the archive: as many pods as the options say.")
    ] = False,
) -> None:
    """Print the RayJob that runs a recipe on Kubernetes, and the ConfigMap with the recipe; changes nothing.

    Pods are sized by what the job's processes take, and there are no more of them than --plan finds work for. What
    they could not hold is refused.
    """
    from engine.config import load_recipe, to_yaml
    from engine.kubernetes.pods import GIB, Wish
    from jobs.manifest import ManifestOptions, manifests

    loaded = load_recipe(_recipe_class(verb), recipe, overrides or ())
    wish = Wish(
        cpus=cpus,
        workers=workers,
        gpus=gpus,
        gpus_per_pod=gpus_per_pod,
        memory=None if memory_gib is None else memory_gib * GIB,
        scratch=scratch_gib * GIB,
    )
    options = ManifestOptions(
        name=name,
        image=image,
        recipe_map=recipe_map,
        deadline_s=round(deadline_hours * 3600),
        retries=retries,
        suspend=suspend,
        offline=offline,
    )
    with _interruptible():
        print(to_yaml(*manifests(verb, loaded, recipe, overrides or (), wish, options)), end="")


@app.command()
def launch(
    template: Annotated[str, typer.Argument(help="Name of a suspended RayJob of this namespace.")],
    run: Annotated[
        str, typer.Option(envvar="ENGINE_RUN", help="Name of this run, one for each tick of a schedule.")
    ],
    owner_uid: Annotated[
        str | None,
        typer.Option(
            envvar="ENGINE_RUN_UID", help="uid of the Kubernetes Job --run, with which the RayJobs go."
        ),
    ] = None,
    attempts: Annotated[int, typer.Option(min=1, max=9, help="RayJobs at most, one after the other.")] = 3,
    poll_seconds: Annotated[float, typer.Option(min=0.01, help="Between two looks.")] = 10.0,
    service_account: Annotated[
        Path | None, typer.Option(help="Folder with token, ca.crt and namespace; by default the pod's own.")
    ] = None,
) -> None:
    """In a pod: run a copy of a RayJob to its end, and end with its exit code; a CronJob's command.

    A pod that is started again under the same --run waits for the RayJob that is there. Exit codes 2 and 3 are final;
    other failures are tried again, each on a cluster of its own. Nothing is deleted.
    """
    from engine.kubernetes.api import SERVICE_ACCOUNT, ApiAddress, RayJobs
    from engine.kubernetes.launch import Launch
    from engine.kubernetes.launch import launch as launch_job
    from jobs.outcome import say

    wanted = Launch(template, run, attempts, owner_uid, poll_seconds)
    address = ApiAddress.of_this_pod(os.environ, service_account or SERVICE_ACCOUNT)
    with _interruptible():
        ending = launch_job(RayJobs(address), wanted, say)
    if ending.code != EXIT_DONE:
        raise typer.Exit(ending.code)


@app.command()
def schema(
    verb: Annotated[str, typer.Argument(help=", ".join(RECIPE_CLASSES))],
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Tables for people: fields, types, defaults, meanings.")
    ] = False,
) -> None:
    """Print the JSON Schema of a verb's recipe."""
    model = _recipe_class(verb)
    if markdown:
        from engine.recipe_page import recipe_page

        print(recipe_page({verb: model}), end="")
    else:
        print(json.dumps(model.model_json_schema(), indent=2))


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where shards, tables and the bundle go.")] = Path(
        "demo-output"
    ),
    as_json: Json = False,
) -> None:
    """Run the whole cycle on bundled real images: shards, extract, fit, score."""
    from jobs.demo import run_demo

    with _interruptible():
        summary = run_demo(folder)
    if as_json:
        print(json.dumps(summary))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; every error of ours is one message, without a stack trace."""
    signal.signal(signal.SIGTERM, _interrupt)
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if wanted_format() != "json":
            return _run(words)
    except RecipeError as error:
        print_error(error)
        return error.exit_code
    from jobs.outcome import new_run_id

    verb = words[0] if words and words[0].isalpha() else "engine"
    with json_logs(LogContext(verb, new_run_id(verb))):
        return _run(words)


def _run(words: list[str]) -> int:
    try:
        app(args=words, prog_name="engine")
    except SystemExit as end:  # how typer ends, also after a usage error
        return end.code if isinstance(end.code, int) else EXIT_DONE
    except EngineError as error:
        print_error(error)
        return error.exit_code
    return EXIT_DONE


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM end a job with exit code 130 and a word on how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted", way_out="nothing is lost; run the same command again to go on"
        ) from None


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _run_job(
    verb: str,
    path: Path,
    overrides: list[str] | None,
    plan: bool,
    as_json: bool,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Load the recipe, run or plan the job, print its summary, leave with its exit code."""
    from engine.config import load_recipe

    job = importlib.import_module(f"jobs.{verb}")
    recipe = load_recipe(_recipe_class(verb), path, overrides or ())
    if plan:
        _print_facts(job.plan(recipe, **options), as_json)
        return
    from jobs.outcome import new_run_id, only_warnings, print_summary
    from jobs.watched import run_watched

    log = json_log()
    run_id = new_run_id(verb) if log is None else log.context.run_id

    # Ray prints what it has to say of lost tasks; stdout is for the summary alone.
    told = only_warnings() if wanted_format() == "quiet" else contextlib.nullcontext()
    with _interruptible(), told, contextlib.redirect_stdout(sys.stderr):
        outcome = run_watched(verb, job, recipe, run_id, options, _as_typed(verb, path, overrides or ()))
    print_summary(outcome.summary)
    if as_json:
        print(json.dumps(outcome.summary))
    if outcome.verdict is not None:
        raise outcome.verdict


def _as_typed(verb: str, recipe: Path, overrides: Sequence[str]) -> str:
    """The command on this recipe, without options of one run."""
    words = ["engine", verb, str(recipe), *(word for one in overrides for word in ("--set", one))]
    return shlex.join(words)


def _check_arguments(verb: str, recipe: Path, arguments: Sequence[str]) -> None:
    """Refuse here what the verb would refuse on the cluster."""
    command: Any = typer.main.get_command(app)
    context = command.commands[verb].make_context(f"engine {verb}", [str(recipe), *arguments])
    if context.params.get("overrides"):
        raise typer.BadParameter("--set belongs before the `--`: the recipe is checked before it is sent")


def _import_tensorflow() -> None:
    """For a verb that computes in this process; without the lines that TensorFlow has for every start."""
    from engine.quiet_start import quiet_start

    with quiet_start():
        import engine.runtimes.tensorflow  # noqa: F401


def _storage(verb: str, endpoint_url: str | None, region: str | None, anonymous: bool) -> StorageConfig:
    from engine.config import check_recipe
    from engine.storage import StorageConfig

    options = {"endpoint_url": endpoint_url, "region": region, "anonymous": anonymous}
    return check_recipe(StorageConfig, options, verb)


def _network_of(
    backbone: str, shape: Mapping[str, Any], storage: StorageConfig
) -> tuple[BackboneConfig, RuntimeConfig, StorageConfig]:
    """From a name, or from a recipe of `extract`, which also says how storage is reached."""
    from engine.backbones.kinds import named_backbone
    from engine.config import load_recipe
    from engine.runtimes.kinds import TensorFlowRuntimeConfig

    if not backbone.endswith((".yaml", ".yml")):
        fields = {"input_size": 224} | {name: value for name, value in shape.items() if value is not None}
        return named_backbone(backbone, fields), TensorFlowRuntimeConfig(), storage
    if any(value is not None for value in shape.values()):
        raise typer.BadParameter(
            "--input-size and --resize belong to a NAME; a recipe has its block `backbone`"
        )
    recipe = load_recipe(_recipe_class("extract"), backbone)
    return recipe.backbone, recipe.runtime, recipe.storage


FINDINGS_SHOWN = 20  # of each group on a terminal
FINDINGS_IN_JSON = 1000  # of each group; the counts are of all


def _verify(
    table: str, storage: StorageConfig, with_source: bool, pattern: str | None, as_json: bool
) -> None:
    """Check a table, say what was found, and fail on damage."""
    from dataclasses import asdict

    from engine.errors import TableDamaged
    from engine.storage import open_store
    from engine.verification import source_shards, verify_table
    from jobs.outcome import print_summary, progress_bar, say

    started, store = time.monotonic(), open_store(table, storage)
    with _interruptible(), progress_bar("parts", 0) as (bar, task):

        def report(done: int, total: int, bytes_read: int) -> None:
            rate = bytes_read / 1e6 / max(1e-3, time.monotonic() - started)
            bar.update(task, completed=done, total=total, rate=f"{rate:,.0f} MB/s")

        result = verify_table(store, source_shards(store, pattern) if with_source else None, report)
    groups = {"damage": result.damage, "leftovers": result.leftovers, "unfinished": result.unfinished}
    for group, findings in groups.items():
        for finding in findings[:FINDINGS_SHOWN]:
            say(f"{group}: {finding.kind}: {finding.object}: {finding.message}")
        if len(findings) > FINDINGS_SHOWN:
            say(f"{group}: ... and {len(findings) - FINDINGS_SHOWN:,} more")
    summary: dict[str, Any] = {"verb": "verify", "table": result.table, "kind": result.kind}
    summary |= {name: getattr(result, name) for name in ("shards", "parts", "rows", "rejects", "bytes_read")}
    summary["seconds"] = round(time.monotonic() - started, 3)
    summary |= {group: dict(Counter(str(f.kind) for f in findings)) for group, findings in groups.items()}
    print_summary(summary)
    if as_json:
        named = {
            group: [asdict(f) for f in findings[:FINDINGS_IN_JSON]] for group, findings in groups.items()
        }
        print(json.dumps({**summary, "findings": named}))
    if result.damage:
        raise TableDamaged(
            f"{result.table}: the table is damaged",
            found=f"{len(result.damage):,} findings, named above",
            way_out="delete the damaged parts and run the job that wrote them again: it makes only what is missing",
        )


def _recipe_class(verb: str) -> Any:
    if verb not in RECIPE_CLASSES:
        raise RecipeError(
            f"{verb}: no job of that name has a recipe", found=repr(verb), wanted=", ".join(RECIPE_CLASSES)
        )
    return getattr(importlib.import_module(f"jobs.{verb}"), RECIPE_CLASSES[verb])


def _print_facts(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts))
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            print(name)
            for step in value:  # of a lineage
                line = f"  {step['what']:<{width}}{step['state']:<11} {step['uri'] or '-'}: {step['says']}"
                print(plain_text(line))
        else:
            print(plain_text(f"{name:<{width}}  {_in_words(value)}"))


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if type(value) is int else str(value)


if __name__ == "__main__":
    sys.exit(main())
