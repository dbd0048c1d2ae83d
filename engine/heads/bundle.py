"""A published head on storage: written whole or not at all, checked on reading. Not for: fitting or predicting.

    <bundle>/head.<sha8>.keras               the network, logits out; of a custom head instead weights.<sha8>.npz
    <bundle>/matrix.<sha8>.npz               kernel_DK and bias_K, where the head is only a matrix product
    <bundle>/metrics.<sha8>.json             how well it does, and on which rows
    <bundle>/embeddings_table.<sha8>.json    the `_table.json` of the embeddings it was fitted on
    <bundle>/recipe.<sha8>.json              the recipe of the fit
    <bundle>/feature_space.<sha8>.keras      how columns become numbers, where the head takes some
    <bundle>/suspects.<sha8>.json            labels that are probably wrong, where they were looked for
    <bundle>/gallery.<sha8>.json             rows of the judged split for people to look at, with the answers to them
    <bundle>/embedding_map.<sha8>.json       embeddings as points of a plane
    <bundle>/rejects.<sha8>.json             rejects of the table by reason, with examples
    <bundle>/pictures.<sha8>.json            small pictures of the rows that the report shows, or why there are none
    <bundle>/reference.<sha8>.npz            what later embeddings are compared with; older bundles have none
    <bundle>/bundle.json                     names all of these with their sha-256; written last
    <bundle>/report.html                     a page about it for people, made of the documents above

`<sha8>` is the beginning of the file's own sha-256, so publishing to the same place again never touches a file of
the bundle that is there: until the new `bundle.json` replaces the old one, readers see the old bundle, whole.
Afterwards the files that only the old one named are deleted. What a killed publish leaves behind is named by no
`bundle.json` and harms nobody. A bundle's id is a digest of what decides its answers (tensors, classes, calibration,
the embeddings it belongs to), so a fit that is repeated exactly has the same id, and its predictions stay valid.

`report.html` is found by that name alone, so `bundle.json` does not name it, and it is written last: a publish that is
killed before it leaves the page of the bundle before, or none. Nothing is computed from it, it says which bundle it is
about, and it can be made again from the documents.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import logging
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import numpy as np
from pydantic import Field, ValidationError, model_validator

from engine.config import Config, stable_hash
from engine.errors import BundleError, ContractMismatch, EngineError, ObjectNotFound
from engine.heads.base import AffineMap
from engine.heads.confidence import Calibration
from engine.heads.kinds import (
    AnyHeadConfig,
    CustomHeadConfig,
    HeadConfig,
    KnnHeadConfig,
    SideFeatureConfig,
    open_head,
)
from engine.heads.reference import Reference
from engine.storage import Store

if TYPE_CHECKING:
    import keras

    from engine.heads.side_features import SideEncoder

log = logging.getLogger(__name__)
Made = TypeVar("Made")
Task = Literal["single_label", "multi_label"]
BUNDLE_SCHEMA_VERSION: Literal[1] = 1
MANIFEST = "bundle.json"
REPORT = "report.html"
VERSIONED_PACKAGES = ("image-feature-engine", "tensorflow", "keras", "numpy")


class BundleFile(Config):
    """One file of a bundle."""

    path: str = Field(pattern=r"^[a-z_]+\.[0-9a-f]{8}\.(keras|npz|json)$")
    """Name within the bundle's folder."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the file's bytes, hex."""
    size_bytes: int = Field(ge=0)
    """Size of the file."""


class Manifest(Config):
    """What `bundle.json` says."""

    schema_version: Literal[1] = BUNDLE_SCHEMA_VERSION
    """Version of this file's fields."""
    task: Task
    """What the head answers: one class for each row, or any number of them."""
    classes: tuple[str, ...] = Field(min_length=1)
    """Names of the classes in the order of the logits, sorted by code point."""
    class_ids: tuple[str, ...] = ()
    """Of each class its id in the catalogue that the classes are from (WordNet's for ImageNet); none: there is none."""
    fingerprint: str
    """Of the embeddings that the head was fitted on; others are refused."""
    width: int = Field(ge=1)
    """Numbers in one embedding."""
    head: HeadConfig
    """The head's recipe block."""
    calibration: Calibration = Calibration()
    """How logits become probabilities."""
    thresholds: tuple[float, ...] = ()
    """Of each class the probability from which on a row is given it; of single_label bundles none."""
    side_features: tuple[SideFeatureConfig, ...] = ()
    """Columns of a table that the head takes beside its embedding."""
    side_sha256: str | None = None
    """Of what they become: categories, means and deviations."""
    tensors_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the head's tensors: shape, dtype and bytes of each, in the network's order."""
    files: dict[str, BundleFile]
    """The bundle's files by role: head or weights, metrics, embeddings_table, recipe; perhaps matrix, feature_space,
    suspects, reference, and what else the report shows."""
    versions: dict[str, str]
    """Of Python and of the packages that made the bundle."""
    created: str
    """UTC, ISO 8601."""

    @model_validator(mode="after")
    def _classes_go_with_the_task(self) -> Self:
        several = self.task == "multi_label"
        if self.class_ids and len(self.class_ids) != len(self.classes):
            raise ValueError(f"class_ids: {len(self.class_ids)} for {len(self.classes)} classes")
        if len(self.classes) < 2 and not several:
            raise ValueError("classes: a single_label head tells at least two apart")
        if len(self.thresholds) != (len(self.classes) if several else 0):
            raise ValueError(
                f"thresholds: {len(self.thresholds)} for {len(self.classes)} {self.task} classes"
            )
        return self


@dataclass(frozen=True, slots=True)
class TrainedHead:
    """A head as training leaves it."""

    config: AnyHeadConfig
    network: keras.Model  # (B, D) float32 to (B, K) logits
    classes: tuple[str, ...]  # K names, sorted by code point
    task: Task
    calibration: Calibration = field(default_factory=Calibration)
    thresholds: tuple[float, ...] = ()  # K of them for multi_label, else none
    side_features: tuple[SideFeatureConfig, ...] = ()
    side: SideEncoder | None = None  # of those
    class_ids: tuple[str, ...] = ()  # K of them where the classes are from a catalogue


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle. Files are fetched when asked for, and checked against their sha-256 each time."""

    id: str
    manifest: Manifest
    store: Store

    def network(self) -> keras.Model:
        """The Keras model, (B, D) float32 to (B, K) logits; nothing in the file is run as code.

        Raises:
            BundleError: the file is damaged, holds code, or is of a Keras that this one cannot read.
        """
        import keras

        if isinstance(self.manifest.head, CustomHeadConfig):
            return self._rebuilt(self.manifest.head)
        if isinstance(self.manifest.head, KnnHeadConfig):
            import engine.heads.knn_layer  # noqa: F401  (the layer is ours, and safe mode must know it)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "head.keras"
            path.write_bytes(self.read("head"))
            try:
                return keras.saving.load_model(path, compile=False, safe_mode=True)
            except (ValueError, TypeError) as error:  # what Keras raises for all that it does not take
                raise BundleError(
                    f"bundle {self.store.uri}: the head cannot be loaded by Keras {keras.__version__} in safe mode",
                    found=" ".join(str(error).split())[:500],
                    wanted=f"a network as Keras {self.manifest.versions.get('keras', '3')} saved it, without code",
                    way_out="use the Keras that the bundle names, or fit again",
                ) from None

    def _rebuilt(self, config: CustomHeadConfig) -> keras.Model:
        from engine.heads.custom import rebuilt

        side = self.side_encoder()
        width = self.manifest.width + (side.width if side else 0)
        with np.load(io.BytesIO(self.read("weights")), allow_pickle=False) as tensors:
            try:
                return rebuilt(config, width, len(self.manifest.classes), tensors)
            except ValueError as error:  # what Keras raises for weights of another shape
                raise BundleError(
                    f"bundle {self.store.uri}: head.build {config.build} builds another network than was fitted",
                    found=" ".join(str(error).split())[:500],
                    wanted="one that its weights fit: the function must answer the same each time",
                ) from None

    def matrix(self) -> AffineMap | None:
        """The head as a matrix product, which needs no Keras; None where it is more than that."""
        if "matrix" not in self.manifest.files:
            return None
        with np.load(io.BytesIO(self.read("matrix")), allow_pickle=False) as arrays:
            return AffineMap(arrays["kernel_DK"], arrays["bias_K"])

    def reference(self) -> Reference | None:
        """What it remembers of the embeddings it was fitted on; None where it was published without.

        Raises:
            BundleError: the file is gone or damaged.
        """
        if "reference" not in self.manifest.files:
            return None
        return Reference.from_bytes(self.read("reference"))

    @property
    def reference_sha256(self) -> str | None:
        """Of that; None where there is none."""
        file = self.manifest.files.get("reference")
        return file.sha256 if file else None

    def side_encoder(self) -> SideEncoder | None:
        """What turns columns of a table into numbers; None where the head takes embeddings alone.

        Raises:
            BundleError: the file is damaged, or of a Keras that this one cannot read.
        """
        if not self.manifest.side_features:
            return None
        from engine.heads.side_features import SideEncoder

        return SideEncoder.from_bytes(self.manifest.side_features, self.read("feature_space"))

    @property
    def answering_bytes(self) -> int:
        """Sizes of the files that answering takes: the matrix where there is one, else the network; and how columns
        become numbers."""
        files = self.manifest.files
        head = next(role for role in ("matrix", "head", "weights") if role in files)
        return sum(files[role].size_bytes for role in (head, "feature_space") if role in files)

    def document(self, role: Literal["metrics", "embeddings_table", "recipe", "suspects"]) -> dict[str, Any]:
        """One of the bundle's JSON files."""
        content: dict[str, Any] = json.loads(self.read(role))
        return content

    def documents(self) -> dict[str, Any]:
        """All that the bundle says of itself, as JSON: id, uri, manifest, and each of its JSON files by role.

        Raises:
            BundleError: a file is gone or damaged.
        """
        roles = (role for role, file in self.manifest.files.items() if file.path.endswith(".json"))
        return _documents(self, {f"{role}.json": self.read(role) for role in roles})

    def read(self, role: str) -> bytes:
        """The bytes of a file.

        Raises:
            BundleError: the file is gone, or is not what `bundle.json` says.
        """
        file = self.manifest.files[role]
        try:
            content = self.store.read(file.path)
        except ObjectNotFound:
            raise self._damaged(file.path, "no such file") from None
        found = hashlib.sha256(content).hexdigest()
        if found != file.sha256:
            raise self._damaged(file.path, f"{len(content)} bytes, sha256 {found}", f"sha256 {file.sha256}")
        return content

    def _damaged(self, path: str, found: str, wanted: str | None = None) -> BundleError:
        return BundleError(
            f"bundle {self.store.uri}: {path} is not the file that {MANIFEST} names",
            found=found,
            wanted=wanted or f"the file of bundle {self.id}",
            way_out="run again if the bundle was republished just now; otherwise fit and publish it again",
        )


def publish_bundle(  # noqa: PLR0913
    store: Store,
    head: TrainedHead,
    *,
    table_record: Mapping[str, Any],
    metrics: Mapping[str, Any],
    recipe: Mapping[str, Any],
    suspects: Sequence[Mapping[str, Any]] | None = None,
    reference: Reference | None = None,
    shown: Mapping[str, Mapping[str, Any]] | None = None,
    report: Callable[[Mapping[str, Any]], str] | None = None,
) -> Bundle:
    """Write a bundle, then `bundle.json`, delete the files of the bundle it replaces, and write its report.

    Args:
        store: the bundle's folder.
        head: what was trained.
        table_record: `_table.json` of the embeddings; its fingerprint and width become the bundle's.
        metrics: for metrics.json.
        recipe: for recipe.json.
        suspects: for suspects.json; None: no such file.
        reference: for reference.npz, which is no part of the bundle's id; None: no such file.
        shown: further documents for the report, by role: `gallery` for gallery.json.
        report: makes report.html of what `Bundle.documents()` will be; None: none is written. Where it fails there is a
            warning, and no page.

    Raises:
        StorageError: a file could not be written; a bundle that was there before is still whole.
    """
    contents = {**_network_file(head), **_matrix_file(head)}
    if head.side is not None:
        contents["feature_space.keras"] = head.side.to_bytes()
    for name, document in (("metrics", metrics), ("embeddings_table", table_record), ("recipe", recipe)):
        contents[f"{name}.json"] = _json_bytes(document)
    if suspects is not None:
        contents["suspects.json"] = _json_bytes({"suspects": list(suspects)})
    contents |= {f"{role}.json": _json_bytes(document) for role, document in (shown or {}).items()}
    if reference is not None:
        contents["reference.npz"] = reference.to_bytes()
    files = {name.partition(".")[0]: _described(name, content) for name, content in contents.items()}
    manifest = Manifest(
        task=head.task,
        classes=head.classes,
        class_ids=head.class_ids,
        fingerprint=table_record["fingerprint"],
        width=table_record["width"],
        head=open_head(head.config).stated,
        calibration=head.calibration,
        thresholds=head.thresholds,
        side_features=head.side_features,
        side_sha256=head.side.sha256() if head.side else None,
        tensors_sha256=_tensors_sha256(head.network),
        files=files,
        versions=_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    superseded = _paths_named(store)
    for file, content in zip(files.values(), contents.values(), strict=True):
        store.write(file.path, content)
    manifest_bytes = _json_bytes(manifest.model_dump(mode="json"))
    store.write(MANIFEST, manifest_bytes)
    # Read again what is named now: another fit may have published here since, and may share a file with the old one.
    for path in sorted(superseded - {file.path for file in files.values()} - _paths_named(store)):
        store.delete(path)
    bundle = Bundle(_bundle_id(manifest), manifest, store)
    if report is not None:
        make = report  # mypy forgets within a lambda that it is there
        page = for_people(REPORT, lambda: make(_documents(bundle, contents)).encode())
        if page is not None:
            store.write(REPORT, page)
    return bundle


def for_people(what: str, make: Callable[[], Made]) -> Made | None:
    """What only people look at; None, and a warning, where it cannot be made: a bundle is as good without it."""
    try:
        return make()
    except Exception as error:  # noqa: BLE001 (hours of training are not lost for a page, whatever is wrong with it)
        said = error.thing if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
        log.warning("%s could not be made: %s", what, said)
        return None


def report_uri(bundle: Bundle) -> str | None:
    """Where the page about a bundle lies; None where there is none, or it is about another one.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        page = bundle.store.read(REPORT)
    except ObjectNotFound:
        return None
    named = all(text.encode() in page for text in (bundle.id, bundle.manifest.created))
    return f"{bundle.store.uri}/{REPORT}" if named else None


def open_bundle(store: Store, bundle_id: str | None = None) -> Bundle:
    """Open a published bundle; only `bundle.json` is read now.

    Args:
        store: the bundle's folder.
        bundle_id: the bundle that a job began with, so that all its tasks use the same one; None: whichever is there.

    Raises:
        BundleError: nothing is published there, it is not a bundle that this version reads, or another one.
    """
    try:
        content = store.read(MANIFEST)
    except ObjectNotFound:
        raise BundleError(
            f"bundle {store.uri}: not published",
            found=f"no {MANIFEST}, which a fit writes last",
            way_out="check the URI, or run `engine fit` to its end",
        ) from None
    manifest = _parsed(content, store)
    bundle = Bundle(_bundle_id(manifest), manifest, store)
    if bundle_id is not None and bundle.id != bundle_id:
        raise BundleError(
            f"bundle {store.uri}: another bundle was published meanwhile",
            found=bundle.id,
            wanted=bundle_id,
            way_out="run the job again; it will use the new bundle throughout",
        )
    return bundle


def check_fingerprint(bundle: Bundle, table_record: Mapping[str, Any]) -> None:
    """Refuse embeddings that the head was not fitted on.

    Raises:
        ContractMismatch: the table's fingerprint or width is not the bundle's.
    """
    for name in ("fingerprint", "width"):
        found, wanted = table_record[name], getattr(bundle.manifest, name)
        if found != wanted:
            raise ContractMismatch(
                f"bundle {bundle.store.uri}: fitted on embeddings with another {name}",
                found=f"the table has {name} {found}",
                wanted=f"the bundle has {name} {wanted}",
                way_out="score the table that the bundle was fitted on, or fit a head on this one",
            )


def _parsed(content: bytes, store: Store) -> Manifest:
    try:
        document = json.loads(content)
        version = document["schema_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise BundleError(f"bundle {store.uri}: {MANIFEST} is not a bundle's", found=repr(error)) from None
    if version != BUNDLE_SCHEMA_VERSION:
        raise BundleError(
            f"bundle {store.uri}: unknown schema version",
            found=repr(version),
            wanted=str(BUNDLE_SCHEMA_VERSION),
            way_out="use the version of the engine that published it, or fit again with this one",
        )
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()
        )
        raise BundleError(f"bundle {store.uri}: {MANIFEST} is not a bundle's", found=problems) from None


def _documents(bundle: Bundle, contents: Mapping[str, bytes]) -> dict[str, Any]:
    """What `Bundle.documents` answers, of files by role and kind, those that are not JSON among them."""
    read = {
        name.removesuffix(".json"): json.loads(content)
        for name, content in contents.items()
        if name.endswith(".json")
    }
    return {
        "id": bundle.id,
        "uri": bundle.store.uri,
        "manifest": bundle.manifest.model_dump(mode="json"),
        **read,
    }


def _paths_named(store: Store) -> set[str]:
    """Files of the bundle that is published there now; none if there is none that we can read."""
    try:
        return {file.path for file in open_bundle(store).manifest.files.values()}
    except BundleError:
        return set()


def _network_file(head: TrainedHead) -> dict[str, bytes]:
    if isinstance(head.config, CustomHeadConfig):  # saving it whole might save code
        from engine.heads.custom import tensors_of

        buffer = io.BytesIO()
        tensors: dict[str, Any] = tensors_of(head.network)
        np.savez(buffer, **tensors)
        return {"weights.npz": buffer.getvalue()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.keras"
        head.network.save(path)
        return {"head.keras": path.read_bytes()}


def _matrix_file(head: TrainedHead) -> dict[str, bytes]:
    matrix = open_head(head.config).as_matrix(head.network)
    if matrix is None:
        return {}
    buffer = io.BytesIO()
    np.savez(buffer, kernel_DK=matrix.kernel_DK, bias_K=matrix.bias_K)
    return {"matrix.npz": buffer.getvalue()}


def _json_bytes(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _described(name: str, content: bytes) -> BundleFile:
    stem, _, extension = name.partition(".")
    sha256 = hashlib.sha256(content).hexdigest()
    return BundleFile(path=f"{stem}.{sha256[:8]}.{extension}", sha256=sha256, size_bytes=len(content))


def _bundle_id(manifest: Manifest) -> str:
    """16 hex digits over the fields that decide a prediction; not when, by what, or how well it was made."""
    fields = manifest.model_dump(mode="json", exclude={"files", "versions", "created"})
    if not manifest.calibration.entropy_exponent:
        del fields["calibration"]["entropy_exponent"]  # bundles from before there was one keep their ids
    for name in ("class_ids", "thresholds", "side_features", "side_sha256"):
        if not fields[name]:
            del fields[name]
    return stable_hash(fields)[:16]


def _tensors_sha256(network: keras.Model) -> str:
    digest = hashlib.sha256()
    for tensor in network.get_weights():
        digest.update(f"{tensor.dtype.str}{tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor).data)
    return digest.hexdigest()


def _versions(packages: Iterable[str] = VERSIONED_PACKAGES) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except (
            importlib.metadata.PackageNotFoundError
        ):  # the engine run from a folder, as `ray job submit` does
            versions[package] = "not installed"
    return versions
