"""A bundle is published whole or not at all, and what is read from it is what was published."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from engine.errors import BundleError, ContractMismatch, StorageError
from engine.heads.bundle import (
    REPORT,
    Bundle,
    TrainedHead,
    check_fingerprint,
    open_bundle,
    publish_bundle,
    report_uri,
)
from engine.heads.kinds import LinearHeadConfig, build_head
from engine.heads.reference import Reference
from engine.storage import InputStream, ObjectInfo, Store, open_store

CLASSES = ("ant", "bee", "cat")
RECORD = {"fingerprint": "f" * 64, "width": 7, "schema_version": 1}


def trained_head(seed: int = 0) -> TrainedHead:
    rng = np.random.default_rng(seed)
    network = build_head(LinearHeadConfig(), 7, 3, seed=0)
    network.set_weights([rng.normal(size=(7, 3)), rng.normal(size=3)])
    return TrainedHead(LinearHeadConfig(), network, CLASSES, "single_label")


def publish(store: Store, head: TrainedHead | None = None, **changes: Any) -> Bundle:
    documents = {"table_record": RECORD, "metrics": {"test": None}, "recipe": {"head": "ö"}, **changes}
    return publish_bundle(store, head or trained_head(), **documents)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "bundle"))


def paths(store: Store) -> list[str]:
    return [info.path for info in store.list()]


def test_a_bundle_comes_back_as_it_was_published(store: Store) -> None:
    head = trained_head()
    published, opened = publish(store, head), open_bundle(store)
    assert opened.id == published.id
    assert re.fullmatch("[0-9a-f]{16}", opened.id)
    manifest = opened.manifest
    assert (manifest.classes, manifest.task, manifest.fingerprint, manifest.width) == (
        CLASSES,
        "single_label",
        "f" * 64,
        7,
    )
    assert manifest.calibration.temperature == 1.0
    assert manifest.versions["keras"] == keras.__version__
    assert opened.document("recipe") == {"head": "ö"}
    assert opened.document("embeddings_table") == RECORD
    assert opened.document("metrics") == {"test": None}
    rows_BD = np.random.default_rng(9).normal(size=(5, 7)).astype(np.float32)
    np.testing.assert_array_equal(opened.network()(rows_BD).numpy(), head.network(rows_BD).numpy())
    matrix = opened.matrix()
    assert matrix is not None
    np.testing.assert_array_equal(matrix.kernel_DK, head.network.get_weights()[0])


def test_every_file_bears_the_beginning_of_its_own_digest(store: Store) -> None:
    publish(store)
    named = json.loads(store.read("bundle.json"))["files"]
    assert sorted(named) == ["embeddings_table", "head", "matrix", "metrics", "recipe"]
    assert sorted(paths(store)) == sorted([*(file["path"] for file in named.values()), "bundle.json"])
    for role, file in named.items():
        content = store.read(file["path"])
        digest = hashlib.sha256(content).hexdigest()
        assert (file["sha256"], file["size_bytes"]) == (digest, len(content))
        assert file["path"].split(".")[:2] == [role, digest[:8]]


def test_an_unpublished_bundle_says_so(store: Store) -> None:
    with pytest.raises(BundleError, match=r"(?s)not published.*engine fit"):
        open_bundle(store)


class StoreOnDisk(Store):
    """A store on disk that does one thing of its own in `before_write` and `after_write`."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner.uri, inner.config)
        self.inner = inner

    def before_write(self, path: str) -> None:
        """Called before each write."""

    def after_write(self, path: str) -> None:
        """Called after each write."""

    def write(self, path: str, data: bytes) -> ObjectInfo:
        self.before_write(path)
        written = self.inner.write(path, data)
        self.after_write(path)
        return written

    def read(
        self, path: str, offset: int = 0, length: int | None = None, expected: ObjectInfo | None = None
    ) -> bytes:
        return self.inner.read(path, offset, length, expected)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self.inner.list(prefix)

    def info(self, path: str) -> ObjectInfo:
        return self.inner.info(path)

    def open_input(self, info: ObjectInfo, offset: int = 0) -> InputStream:
        return self.inner.open_input(info, offset)

    def create(self, path: str, data: bytes) -> bool:
        return self.inner.create(path, data)

    def copy(self, info: ObjectInfo, path: str) -> ObjectInfo:
        return self.inner.copy(info, path)

    def delete(self, path: str) -> None:
        self.inner.delete(path)

    def sub(self, path: str) -> Store:
        return self.inner.sub(path)


class FailingStore(StoreOnDisk):
    """Only so many more writes succeed, as on a disk that fills up."""

    def __init__(self, inner: Store, writes_left: int) -> None:
        super().__init__(inner)
        self.writes_left = writes_left

    def before_write(self, path: str) -> None:
        self.writes_left -= 1
        if self.writes_left < 0:
            raise StorageError(f"{path}: no space left on device")


class SharedStore(StoreOnDisk):
    """Another fit publishes here right after our `bundle.json` was written."""

    def after_write(self, path: str) -> None:
        if path == "bundle.json":
            publish(self.inner, trained_head(2))


@pytest.mark.parametrize("writes_done", range(6))
def test_a_publish_that_breaks_off_leaves_the_old_bundle_whole(store: Store, writes_done: int) -> None:
    old = publish(store)
    failing = FailingStore(store, writes_left=writes_done)
    with pytest.raises(StorageError, match="no space left"):
        publish(failing, trained_head(1), metrics={"test": 1}, recipe={}, table_record={**RECORD, "x": 1})
    opened = open_bundle(store)
    assert opened.id == old.id
    for role in opened.manifest.files:
        opened.read(role)


def test_a_first_publish_that_breaks_off_is_no_bundle(store: Store) -> None:
    with pytest.raises(StorageError):
        publish(FailingStore(store, writes_left=5))
    assert len(paths(store)) == 5
    with pytest.raises(BundleError, match="not published"):
        open_bundle(store)


def of_bundle(documents: Mapping[str, Any]) -> str:
    """The simplest report."""
    return f"{documents['id']} {documents['manifest']['created']}"


def test_a_report_is_made_of_what_the_bundle_says_of_itself_and_is_none_of_its_files(store: Store) -> None:
    told: list[Mapping[str, Any]] = []

    def remember(documents: Mapping[str, Any]) -> str:
        told.append(documents)
        return of_bundle(documents)

    bundle = publish(store, suspects=[{"key": "a"}], report=remember)
    assert told == [open_bundle(store).documents()]
    assert sorted(told[0]) == sorted(
        ["id", "uri", "manifest", "metrics", "embeddings_table", "recipe", "suspects"]
    )
    assert told[0]["suspects"] == {"suspects": [{"key": "a"}]}
    assert (told[0]["id"], told[0]["uri"]) == (bundle.id, store.uri)
    assert store.read(REPORT).decode() == of_bundle(told[0])
    assert REPORT not in {file.path for file in bundle.manifest.files.values()}
    assert report_uri(open_bundle(store)) == f"{store.uri}/report.html"


def test_a_publish_that_breaks_off_before_its_report_leaves_a_page_that_is_not_taken_for_its_own(
    store: Store,
) -> None:
    old = publish(store, report=of_bundle)
    page = store.read(REPORT)
    for writes_done in range(7):  # five files, bundle.json, and then the report fails
        changes: dict[str, Any] = {"metrics": {"test": 1}, "recipe": {}, "table_record": {**RECORD, "x": 1}}
        with pytest.raises(StorageError, match=REPORT if writes_done == 6 else "no space left"):
            publish(FailingStore(store, writes_done), trained_head(1), report=of_bundle, **changes)
        opened = open_bundle(store)
        assert (opened.id == old.id) == (writes_done < 6)
        assert store.read(REPORT) == page
        assert (report_uri(opened) is None) == (writes_done == 6)
    assert report_uri(publish(store, trained_head(1), report=of_bundle)) == f"{store.uri}/report.html"


def test_a_report_that_cannot_be_made_is_a_warning_and_the_new_bundle_is_whole(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(documents: Mapping[str, Any]) -> str:
        raise ValueError(documents["id"])

    old = publish(store)
    new = publish(store, trained_head(1), report=broken)
    assert caplog.messages == [f"report.html could not be made: ValueError: {new.id}"]
    opened = open_bundle(store)
    assert opened.id != old.id and report_uri(opened) is None
    for role in opened.manifest.files:
        opened.read(role)
    assert sorted(paths(store)) == sorted(
        ["bundle.json", *(file.path for file in opened.manifest.files.values())]
    )


def test_the_id_is_that_of_the_answers_not_of_the_day(store: Store) -> None:
    first = publish(store).id
    again = publish(store, metrics={"test": 2}, recipe={"head": "other words"}).id
    assert again == first
    assert publish(store, trained_head(1)).id != first
    assert publish(store, table_record={**RECORD, "fingerprint": "e" * 64}).id != first


def test_publishing_again_replaces_the_bundle_and_removes_only_its_files(store: Store) -> None:
    store.write("notes.txt", b"mine")
    old, new = publish(store), publish(store, trained_head(1))
    assert open_bundle(store).id == new.id != old.id
    assert sorted(paths(store)) == sorted(
        ["bundle.json", "notes.txt", *(file.path for file in new.manifest.files.values())]
    )
    # The recipe is the same in both: a shared file stays.
    assert new.manifest.files["recipe"] == old.manifest.files["recipe"]
    assert new.manifest.files["head"] != old.manifest.files["head"]


def test_of_two_fits_that_publish_at_once_the_later_bundle_is_whole(store: Store) -> None:
    old = publish(store)
    ours = publish(SharedStore(store), trained_head(1), recipe={"of": "ours"})
    theirs = open_bundle(store)
    assert theirs.id not in (old.id, ours.id)
    # They share the recipe's file with the old bundle, which ours superseded.
    assert theirs.manifest.files["recipe"] == old.manifest.files["recipe"]
    for role in theirs.manifest.files:
        theirs.read(role)


def test_a_reader_of_a_replaced_bundle_is_told(store: Store) -> None:
    old = publish(store)
    publish(store, trained_head(1))
    with pytest.raises(BundleError, match=r"(?s)no such file.*republished just now"):
        old.network()
    with pytest.raises(BundleError, match=f"(?s)another bundle was published meanwhile.*{old.id}"):
        open_bundle(store, bundle_id=old.id)


def test_a_flipped_bit_is_noticed_in_every_file(store: Store) -> None:
    bundle = publish(store)
    for role, file in bundle.manifest.files.items():
        content = bytearray(store.read(file.path))
        content[len(content) // 2] ^= 1
        store.write(file.path, bytes(content))
        with pytest.raises(BundleError) as error:
            bundle.read(role)
        assert file.path in str(error.value) and file.sha256 in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "(?s)unknown schema version.*found:   2"),
        ({"schema_version": "1"}, "unknown schema version"),
        ({"extra": 1}, "extra"),
        (
            {"files": {"head": {"path": "../../etc/passwd", "sha256": "0" * 64, "size_bytes": 1}}},
            "files.head.path",
        ),
        ({"classes": ["one"]}, "classes"),
    ],
)
def test_a_manifest_of_something_else_is_refused(store: Store, change: dict[str, Any], message: str) -> None:
    publish(store)
    manifest = json.loads(store.read("bundle.json"))
    store.write("bundle.json", json.dumps({**manifest, **change}).encode())
    with pytest.raises(BundleError, match=message):
        open_bundle(store)


@pytest.mark.parametrize("content", [b"", b"[]", b"not json", b"{}"])
def test_a_file_that_is_no_manifest_is_refused_and_can_be_replaced(store: Store, content: bytes) -> None:
    store.write("bundle.json", content)
    with pytest.raises(BundleError, match="bundle.json is not a bundle's"):
        open_bundle(store)
    assert publish(store).id == open_bundle(store).id


def test_embeddings_of_another_backbone_are_refused_with_both_fingerprints(store: Store) -> None:
    bundle = publish(store)
    check_fingerprint(bundle, RECORD)
    with pytest.raises(ContractMismatch) as error:
        check_fingerprint(bundle, {**RECORD, "fingerprint": "e" * 64})
    assert "e" * 64 in str(error.value) and "f" * 64 in str(error.value)
    with pytest.raises(ContractMismatch, match=r"(?s)width 8.*width 7"):
        check_fingerprint(bundle, {**RECORD, "width": 8})


def test_code_inside_a_head_file_is_not_run(store: Store) -> None:
    network = keras.Sequential([keras.Input((7,)), keras.layers.Lambda(lambda rows: rows[:, :3])])
    head = trained_head()
    bundle = publish(store, head)
    path = Path(store.uri.removeprefix("file://")) / "lambda.keras"
    network.save(path)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    file = bundle.manifest.files["head"].model_copy(
        update={"path": f"head.{digest[:8]}.keras", "sha256": digest, "size_bytes": len(content)}
    )
    store.write(file.path, content)
    files = {**bundle.manifest.files, "head": file}
    planted = Bundle(bundle.id, bundle.manifest.model_copy(update={"files": files}), store)
    with pytest.raises(BundleError, match=r"(?s)in safe mode.*Lambda"):
        planted.network()


def test_a_reference_is_a_further_file_that_decides_no_answer(store: Store) -> None:
    rows_ND = np.random.default_rng(4).normal(size=(11, 7)).astype(np.float32)
    targets_N = np.arange(11) % 3
    given_MK = np.eye(3, dtype=np.bool_)[targets_N[7:]]
    reference = Reference.of(rows_ND, targets_N, np.arange(7), np.arange(7, 11), given_MK)
    without = publish(store)
    assert without.reference() is None
    bundle = publish(store, reference=reference)
    assert bundle.id == without.id
    assert re.fullmatch(r"reference\.[0-9a-f]{8}\.npz", bundle.manifest.files["reference"].path)
    opened = open_bundle(store).reference()
    assert opened is not None
    np.testing.assert_array_equal(opened.centroids_CD, reference.centroids_CD)
    assert opened.to_bytes() == reference.to_bytes()
    assert "reference" not in open_bundle(store).documents()
    publish(store)
    assert not [path for path in paths(store) if path.startswith("reference")]


def test_an_opened_bundle_travels_to_workers(store: Store) -> None:
    bundle = publish(store)
    travelled = pickle.loads(pickle.dumps(bundle))
    assert (travelled.id, travelled.manifest, travelled.read("recipe")) == (
        bundle.id,
        bundle.manifest,
        bundle.read("recipe"),
    )
