"""What is settled once for a whole table, by one process: the network as a frozen graph, its fingerprint, its runtime.

Everything that needs Keras and the weights happens here; actors get the graph. What came out is kept on the node
(`engine.resolution_cache`): the next table of the same network, or the next night, needs neither. Shape letters: C
canary images, D embedding width, N images, S side in pixels.
"""

from __future__ import annotations

import functools
import resource
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from engine import resolution_cache
from engine.backbones.fingerprint import fingerprint, fingerprint_fields, tensor_digest
from engine.backbones.kinds import BackboneConfig, build_backbone
from engine.embedder import Embedder
from engine.errors import BundleError, CanaryMismatch, ShardDamaged, StorageError
from engine.images import DECODE_VERSION, ImageRejected, decode_image
from engine.recipes import Limits
from engine.runtime_choice import Images, Trial, choose_runtime
from engine.runtimes.base import FrozenGraph
from engine.runtimes.kinds import (
    ResolvedRuntime,
    RuntimeConfig,
    candidates,
    freeze_network,
    prepare_to_freeze,
)
from engine.shards.base import Resume
from engine.shards.kinds import SourceConfig, open_reader
from engine.storage import ObjectInfo, StorageConfig, open_store

SHARDS_TRIED = 8  # enough for an `Archive`
_BYTES_TRIED = 256 << 20  # but no more than this is read for it


@dataclass(frozen=True)
class Resolution:
    """What actors and the table's record are made from.

    Attributes:
        graph: the network.
        runtime: how it is run; nothing in it is left open.
        fingerprint, fingerprint_fields: as `engine.backbones.fingerprint` makes them.
        canary: embeddings of the canary images, C rows of D numbers.
        trials: of runtimes, where there was something to choose or to judge.
        peak_bytes: the most memory that this process has held.
    """

    graph: FrozenGraph
    runtime: ResolvedRuntime
    fingerprint: str
    fingerprint_fields: dict[str, Any]
    canary: tuple[tuple[float, ...], ...]
    trials: tuple[Trial, ...]
    peak_bytes: int


@dataclass(frozen=True)
class Network:
    """What is loaded.

    Attributes:
        num_threads: CPU threads of an actor; None: all cores.
        use_gpu: whether actors have a GPU.
    """

    backbone: BackboneConfig
    runtime: RuntimeConfig
    storage: StorageConfig
    num_threads: int | None = None
    use_gpu: bool = False


@dataclass(frozen=True)
class Archive:
    """Where images are found to try runtimes on: a few shards, for the first images of each are read."""

    source: SourceConfig
    limits: Limits
    shards: tuple[ObjectInfo, ...]


def resolve(network: Network, archive: Archive | None, record: Mapping[str, Any] | None = None) -> Resolution:
    """Load the backbone, state its fingerprint and canary, choose its runtime, and freeze it.

    Args:
        archive: has the images that runtimes are tried on; None: the table there is has settled the runtime, once for
            all, and tonight's images do not judge it again.
        record: of a table that names this very backbone config: what is loaded must be what it was made with, and its
            canary stays.

    Raises:
        RecipeError, WeightsError, BackboneError: as `engine.backbones.kinds.build_backbone`.
        RecipeError: no runtime that the recipe allows keeps the accuracy contract.
        CanaryMismatch: the record's table was made with another network.
    """
    names = _entry_names(network, archive)
    kept = next(filter(None, (_kept(network, name) for name in names)), None)
    if kept is not None and record is not None:
        check_fields(record, kept.fingerprint_fields | {"precision": _precision(record)})
    found = kept or _by_keras(network, archive, record)
    if record is None and not found.canary:
        embedder = Embedder(found.graph, found.runtime, network.num_threads, network.use_gpu)
        canary = tuple(tuple(float(number) for number in row) for row in embedder.canary())
        found = replace(found, canary=canary, peak_bytes=peak_resident_bytes())
    if (
        found is not kept and names and _entry_names(network, archive) == names
    ):  # else: weights came meanwhile
        _keep(names[0], found)
    return found if record is None else replace(found, canary=tuple(map(tuple, record["canary"])))


def _precision(record: Mapping[str, Any]) -> str:
    precision: str = record["contract"]["fingerprint.precision"]
    return precision


def _by_keras(network: Network, archive: Archive | None, record: Mapping[str, Any] | None) -> Resolution:
    """Without a canary."""
    has_gpu = prepare_to_freeze(network.num_threads, network.use_gpu)
    built = build_backbone(network.backbone, network.storage)

    def fields_at(precision: str) -> dict[str, Any]:
        return fingerprint_fields(built, DECODE_VERSION, network.backbone.resize, precision, digest)

    digest = tensor_digest(built.network)
    if record is not None:
        check_fields(record, fields_at(_precision(record)))
    graph = freeze_network(built.network, built.scaling, built.input_size)

    def keras_embed(pixels_NSS3: np.ndarray) -> np.ndarray:
        if not len(pixels_NSS3):
            return np.empty((0, graph.width), np.float32)
        scaled = np.asarray(built.scaling.apply(pixels_NSS3.astype(np.float32)), np.float32)
        return np.asarray(built.network(scaled, training=False), np.float32)

    options = candidates(network.runtime, has_gpu)
    runtime = options[0]
    trials: list[Trial] = []
    if archive is not None:
        runtime, trials = choose_runtime(
            options,
            graph,
            keras_embed,
            functools.partial(images_of, archive, network),
            network.num_threads,
            network.use_gpu,
        )
    fields = fields_at(runtime.precision)
    return Resolution(graph, runtime, fingerprint(fields), fields, (), tuple(trials), peak_resident_bytes())


# ---------------------------------------------------------------- what this node has resolved before


def _entry_names(network: Network, archive: Archive | None) -> list[str]:
    """Names of entries that would do, the one to save under first; none where something is to be measured or judged
    that differs from archive to archive, or that only a GPU can answer."""
    if network.use_gpu:
        return []
    options = candidates(network.runtime, has_gpu=False)
    if len(options) > 1 or (archive is not None and options[0].precision != "float32"):
        return []
    is_trusted = options[0].kind == "tensorflow"  # as `choose_runtime` says
    judged = (True,) if archive is not None and not is_trusted else (False, True)
    runtime = options[0].model_dump(mode="json")
    return [
        resolution_cache.entry_name(
            network.backbone,
            network.storage,
            {"runtime": runtime, "threads": network.num_threads, "judged": was_judged},
        )
        for was_judged in judged
    ]


def _kept(network: Network, name: str) -> Resolution | None:
    entry = resolution_cache.load(name)
    if entry is None:
        return None
    facts, graph = entry
    fields = facts["fingerprint_fields"]
    return Resolution(
        graph=FrozenGraph(graph, facts["input_size"], facts["width"]),
        runtime=candidates(network.runtime, has_gpu=False)[0],
        fingerprint=fingerprint(fields),
        fingerprint_fields=fields,
        canary=tuple(map(tuple, facts["canary"])),
        trials=tuple(Trial(**trial) for trial in facts["trials"]),
        peak_bytes=facts["peak_bytes"],
    )


def _keep(name: str, found: Resolution) -> None:
    facts = {
        "input_size": found.graph.input_size,
        "width": found.graph.width,
        "fingerprint_fields": found.fingerprint_fields,
        "canary": found.canary,
        "trials": [trial.to_json() for trial in found.trials],
        "peak_bytes": found.peak_bytes,
    }
    resolution_cache.save(name, facts, found.graph.graph_def)


def stated_network(made_with: Mapping[str, Any]) -> tuple[BackboneConfig, RuntimeConfig]:
    """The network and its runtime as the record of an embedding table states them, for a bundle that was fitted on it.

    Raises:
        BundleError: it states none, or one that this engine does not know.
    """
    try:
        return (
            TypeAdapter(BackboneConfig).validate_python(made_with["backbone"]),
            TypeAdapter(RuntimeConfig).validate_python(made_with["runtime"]),
        )
    except (KeyError, ValidationError) as error:
        raise BundleError(
            "bundles: what they were fitted on names no network that this engine knows",
            found=" ".join(str(error).split())[:300],
            way_out="score embeddings of that table, or fit on a table that this engine has made",
        ) from None


def check_fields(record: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a network that is not the one of the table's record, though its config is.

    Raises:
        CanaryMismatch: with this host's name and both values.
    """
    wanted = {name: record["contract"].get(f"fingerprint.{name}") for name in here}
    other = [name for name in here if wanted[name] != here[name]]
    if other:
        raise CanaryMismatch(
            f"host {socket.gethostname()} has loaded another backbone than the table was resolved with",
            found=", ".join(f"{name} {here[name]}" for name in other),
            wanted=", ".join(f"{name} {wanted[name]}" for name in other),
            way_out="the same weights must be reachable from every node: look into the caches "
            "(~/.keras/models, ENGINE_CACHE_DIR) of this one; if the weights were replaced on purpose, "
            "start a new table",
        )


def images_of(archive: Archive, network: Network, count: int) -> Images:
    """The first images of some of the archive's shards, decoded; what cannot be read or decoded is passed over.

    Args:
        count: images at most.
    """
    side = network.backbone.input_size
    store = open_store(archive.source.uri, network.storage)
    reader = open_reader(archive.source, archive.limits.max_sample_bytes)
    pixels: list[np.ndarray] = []
    labels: list[str | None] = []
    bytes_left = _BYTES_TRIED
    for place, shard in enumerate(archive.shards):
        enough = count * (place + 1) // len(archive.shards)
        try:
            for sample in reader.read(store, shard, Resume(index=0, offset=None)):
                if len(pixels) >= enough or bytes_left <= 0:
                    break
                if sample.problem is not None or sample.image is None:
                    continue
                bytes_left -= len(sample.image)
                try:
                    decoded = decode_image(
                        sample.image, side, network.backbone.resize, archive.limits.max_pixels
                    )
                except ImageRejected:
                    continue
                pixels.append(decoded.pixels_SS3)
                labels.append(sample.label)
        except (ShardDamaged, StorageError):
            continue  # the run itself will say what is wrong with it
    return Images(np.stack(pixels) if pixels else np.empty((0, side, side, 3), np.uint8), tuple(labels))


def peak_resident_bytes() -> int:
    """The most memory that this process has held until now."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
