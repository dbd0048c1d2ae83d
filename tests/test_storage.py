"""What only one kind of store does: paths and links of a disk, keys, faults and error answers of S3."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec.asyn
import pytest

from engine.errors import AccessDenied, ObjectChanged, ObjectNotFound, RecipeError, StorageError
from engine.storage import ObjectInfo, StorageConfig, open_folder_of, open_store
from tests.proxy import FaultyProxy
from tests.stores import S3TestStore, aws_environment

# ---------------------------------------------------------------------------------------------------- URIs


def test_all_spellings_of_a_folder_are_one_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    want = f"{tmp_path}/a b"
    for spelling in ["a b", "./a b/", "x/../a b", "~/a b", f"{tmp_path}//a b//", f"/{tmp_path}/a b"]:
        assert open_store(spelling).uri == want
    for spelling in [
        f"file://{tmp_path}/a%20b",
        f"file://localhost{tmp_path}/a b/",
        f"FILE:{tmp_path}/a%20b",
    ]:
        assert open_store(spelling).uri == want
    assert open_store(want).uri == want


def test_only_file_uris_are_percent_decoded() -> None:
    assert open_store("/x/%41#b?c").uri == "/x/%41#b?c"
    assert open_store("file:///x/%41%23b%3Fc").uri == "/x/A#b?c"
    assert open_store("s3://bucket/%41 #b?c//").uri == "s3://bucket/%41 #b?c"
    assert open_store("S3://bucket/").uri == open_store("s3://bucket").uri == "s3://bucket"


@pytest.mark.parametrize(
    ("uri", "folder", "name"),
    [
        ("/x/y.csv", "/x", "y.csv"),
        ("/y.csv", "/", "y.csv"),
        ("file:///x%20z/%41#b.csv", "/x z", "A#b.csv"),
        ("s3://bucket/y%41.csv", "s3://bucket", "y%41.csv"),
        ("s3://bucket/x/y.csv", "s3://bucket/x", "y.csv"),
    ],
)
def test_a_file_lies_in_the_folder_that_its_uri_names(uri: str, folder: str, name: str) -> None:
    store, found = open_folder_of(uri)
    assert (store.uri, found) == (folder, name)


def test_a_file_without_a_folder_lies_in_the_present_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_folder_of("y.csv")[0].uri == str(tmp_path)


@pytest.mark.parametrize("uri", ["/", "/x/", "s3://bucket", "s3://bucket/x/"])
def test_a_folder_is_no_file(uri: str) -> None:
    with pytest.raises(RecipeError, match="names no file"):
        open_folder_of(uri)


def test_a_linked_folder_keeps_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    open_store(f"{tmp_path}/link").write("a", b"1")
    assert open_store(f"{tmp_path}/link").uri == f"{tmp_path}/link"
    assert (tmp_path / "real/a").read_bytes() == b"1"


@pytest.mark.parametrize("uri", ["gs://bucket/x", "http://host/x", "s3a://bucket", "C:/x"])
def test_another_scheme_is_refused_with_the_allowed_ones(uri: str) -> None:
    with pytest.raises(RecipeError, match=r"wanted:  s3://bucket/prefix, file:///folder, or a plain path"):
        open_store(uri)


@pytest.mark.parametrize(
    "uri", ["", "file://", "file://host/x", "a\0b", "s3://", "s3:/b/x", "s3://b c/x", "s3://b/a/../c"]
)
def test_a_uri_that_names_no_place_is_refused(uri: str) -> None:
    with pytest.raises(RecipeError, match="wanted"):
        open_store(uri)


def test_an_endpoint_without_http_is_refused() -> None:
    with pytest.raises(ValueError, match="http:// or https://"):
        StorageConfig(endpoint_url="localhost:9000")


def test_recipes_do_not_pay_for_the_s3_client() -> None:
    code = (
        "import sys; from engine.storage import open_store; open_store('/'); assert 's3fs' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---------------------------------------------------------------------------------------------------- disk


def test_what_a_killed_writer_left_is_not_listed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("data/.mine.tmp", b"1")
    (tmp_path / f"data/.engine-{'0123456789abcdef' * 2}.tmp").write_bytes(b"half")
    assert [info.path for info in store.list()] == ["data/.mine.tmp"]


def test_files_are_readable_by_those_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        open_store(str(tmp_path)).write("a", b"1")
        assert open_store(str(tmp_path)).create("b", b"1")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o640, 0o640]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    store = open_store(f"{tmp_path}/root")
    store.write("real/a", b"123")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/b").write_bytes(b"12345")
    links = {"file": "real/a", "folder": "../outside", "real/up": "..", "gone": "nowhere", "self": "self"}
    for link, target in links.items():
        (tmp_path / "root" / link).symlink_to(target)
    found = [(info.path, info.size) for info in store.list()]
    assert found == [("file", 3), ("folder/b", 5), ("real/a", 3)]


def test_a_name_that_is_not_utf8_is_refused_aloud(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.tar")).write_bytes(b"1")
    with pytest.raises(StorageError, match="rename the file"):
        list(open_store(str(tmp_path)).list())


def test_a_file_or_folder_in_the_wrong_place_is_named(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("a/b", b"1")
    with pytest.raises(StorageError, match="is a file, not a folder"):
        store.sub("a/b").list()
    for request in (store.info, store.read):
        with pytest.raises(ObjectNotFound, match=f"{tmp_path}/a"):
            request("a")
    with pytest.raises(StorageError, match=f"cannot write {tmp_path}/a/b/c"):
        store.write("a/b/c", b"2")


def test_a_file_changed_in_place_is_noticed_at_its_end(tmp_path: Path) -> None:
    info = open_store(str(tmp_path)).write("a", bytes(1009))
    with open_store(str(tmp_path)).open_input(info) as stream:
        with (tmp_path / "a").open("r+b") as file:
            file.write(b"x")
        os.utime(tmp_path / "a", ns=(1, 1))
        with pytest.raises(ObjectChanged, match="wanted:  mtime:"):
            stream.read()


def test_a_copy_on_one_disk_takes_no_room(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.copy(store.write("held/a", bytes(1009)), "data/a")
    assert (tmp_path / "held/a").samefile(tmp_path / "data/a")


def test_a_copy_to_a_linked_folder_on_another_disk_has_the_bytes(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        if os.stat(memory).st_dev == tmp_path.stat().st_dev:
            pytest.skip("/dev/shm and the temporary folder are one disk")
        (tmp_path / "data").symlink_to(memory)
        store = open_store(str(tmp_path))
        source = store.write("a", bytes(range(251)) * 101)
        target = store.copy(source, "data/a")
        assert (store.info("data/a"), store.read("data/a")) == (target, bytes(range(251)) * 101)
        assert os.listdir(memory) == ["a"]
        store.write("a", bytes(range(250, -1, -1)) * 101)
        with pytest.raises(ObjectChanged, match="wanted:  mtime:"):
            store.copy(source, "data/b")
        assert os.listdir(memory) == ["a"]


def test_a_copy_of_a_link_is_a_copy_of_its_file(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write("real", b"123")
    (tmp_path / "link").symlink_to("real")
    store.copy(store.info("link"), "data/a")
    store.delete("real")
    assert store.read("data/a") == b"123"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else_is_denied(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(AccessDenied, match="way out"):
        open_store(str(tmp_path)).write("a", b"1")


# ---------------------------------------------------------------------------------------------- S3: asking


def test_a_listing_of_many_pages_is_whole_and_in_order(
    s3_uri: str, s3_config: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.storage.s3.KEYS_PER_PAGE", 3)
    store = open_store(s3_uri, s3_config)
    names = [f"{folder}{i}" for folder in ("a/", "a", "a-", "b/c/", "b.") for i in range(7)]
    for name in names:
        store.write(name, b"x")
    assert [info.path for info in store.list()] == sorted(names)
    assert [info.path for info in store.list("a/")] == [f"a/{i}" for i in range(7)]


def test_a_listing_holds_no_more_than_it_may(
    s3_uri: str, s3_config: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_uri, s3_config)
    for i in range(9):
        store.write(f"a/{i}", b"x")
    monkeypatch.setattr("engine.storage.s3.KEYS_HELD", 4)
    monkeypatch.setattr("engine.storage.s3.KEYS_PER_PAGE", 2)
    listing = store.list()
    assert next(listing).path == "a/0"
    store.delete("a/8")  # on a page that is not fetched yet: a lazy listing cannot have seen it
    assert [info.path for info in listing] == [f"a/{i}" for i in range(1, 8)]


def test_folder_markers_are_no_objects(s3_uri: str, s3_config: StorageConfig, s3_store: S3TestStore) -> None:
    store = open_store(s3_uri, s3_config)
    prefix = s3_uri.partition(s3_store.bucket + "/")[2]
    for key in (f"{prefix}/", f"{prefix}/folder/"):
        s3_store.client().put_object(Bucket=s3_store.bucket, Key=key, Body=b"")
    store.write("folder/a", b"1")
    assert [info.path for info in store.list()] == ["folder/a"]


def test_identities_are_the_stores_own_etags(
    s3_uri: str, s3_config: StorageConfig, s3_store: S3TestStore
) -> None:
    written = open_store(s3_uri, s3_config).write("a", b"12345")
    prefix = s3_uri.partition(s3_store.bucket + "/")[2]
    etag = s3_store.client().head_object(Bucket=s3_store.bucket, Key=f"{prefix}/a")["ETag"]
    assert written.identity == f"etag:{etag.strip(chr(34))}:5"


def test_a_listing_from_a_disk_is_refused_by_a_bucket(s3_uri: str, s3_config: StorageConfig) -> None:
    with pytest.raises(StorageError, match="wanted:  etag:"):
        open_store(s3_uri, s3_config).read("a", expected=ObjectInfo("a", 1, "mtime:1:1"))


def test_a_large_object_is_copied_in_parts(
    s3_uri: str, s3_config: StorageConfig, s3_store: S3TestStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.storage.s3_copy.COPY_BYTES", 5 * 2**20)  # the smallest part that S3 takes
    store = open_store(s3_uri, s3_config)
    data = bytes(range(251)) * (12 * 2**20 // 251)
    old = store.write("held/a", data)
    target = store.copy(old, "data/a b")
    assert target == store.info("data/a b")
    assert target.identity.endswith(f"-3:{len(data)}")  # as an ETag tells the number of parts
    assert store.read("data/a b") == data
    new = store.write("held/a", data[::-1])
    with pytest.raises(ObjectChanged, match=f"{s3_uri}/held/a was changed"):
        store.copy(old, "data/b")
    assert list(store.list()) == [target, new]
    under_way = s3_store.client().list_multipart_uploads(Bucket=s3_store.bucket)
    assert under_way.get("Uploads", []) == []


# ---------------------------------------------------------------------------------------------- S3: refused


def says(error: StorageError, *words: str) -> bool:
    message = str(error)
    assert [word for word in words if word not in message] == [], message
    return True


def test_a_wrong_key_or_secret_is_said_at_once(
    s3_store: S3TestStore, s3_config: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, endpoint = open_store(f"s3://{s3_store.bucket}/x", s3_config), s3_store.endpoint_url
    for access_key, secret_key, code, variable in [
        ("nobody", "testsecret123", "403 InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
        (s3_store.access_key, "wrong", "403 SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
    ]:
        for name, value in aws_environment(access_key, secret_key).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(AccessDenied) as caught:
            list(store.list())
        assert says(caught.value, f"cannot list s3://{s3_store.bucket}/x", code, endpoint, variable)
        with pytest.raises(AccessDenied) as caught:
            store.info("a")  # the answer to a HEAD request has no body that could give a reason
        assert says(caught.value, f"cannot find s3://{s3_store.bucket}/x/a", "403", endpoint, "AWS_")


def test_a_read_only_key_reads_and_does_not_write(
    s3_store: S3TestStore, s3_uri: str, s3_config: StorageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = s3_store.read_only_environment()
    if environment is None:
        pytest.skip("the store named by the environment has no read-only keys for us")
    store = open_store(s3_uri, s3_config)
    store.write("a", b"1")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert store.read("a") == b"1"
    for request in (
        lambda: store.write("a", b"2"),
        lambda: store.create("b", b"2"),
        lambda: store.copy(store.info("a"), "b"),
        lambda: store.delete("a"),
    ):
        with pytest.raises(AccessDenied) as caught:
            request()
        assert says(caught.value, s3_uri, "403 AccessDenied", s3_store.endpoint_url, "way out")
    assert store.read("a") == b"1"


def test_a_missing_bucket_is_not_an_empty_one(
    s3_environment: dict[str, str], s3_config: StorageConfig
) -> None:
    store = open_store("s3://engine-no-such-bucket/x", s3_config)
    for request in (lambda: list(store.list()), lambda: store.read("a"), lambda: store.delete("a")):
        with pytest.raises(ObjectNotFound) as caught:
            request()
        assert says(caught.value, "s3://engine-no-such-bucket/x", "404 NoSuchBucket", "create the bucket")


def test_without_any_keys_the_variables_are_named(s3_store: S3TestStore, s3_config: StorageConfig) -> None:
    with pytest.raises(AccessDenied) as caught:
        open_store(f"s3://{s3_store.bucket}/x", s3_config).read("a")
    assert says(
        caught.value, f"s3://{s3_store.bucket}/x/a", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "storage.anonymous"
    )


def test_anonymous_requests_read_a_public_bucket(s3_store: S3TestStore) -> None:
    if s3_store.public_bucket is None:
        pytest.skip("the store named by the environment has no public bucket for us")
    s3_store.client().put_object(Bucket=s3_store.public_bucket, Key="x/a", Body=b"123")
    config = StorageConfig(endpoint_url=s3_store.endpoint_url, anonymous=True)
    store = open_store(f"s3://{s3_store.public_bucket}", config)
    assert [info.path for info in store.list()] == ["x/a"]
    assert store.read("x/a") == b"123"
    with pytest.raises(AccessDenied):
        store.write("x/b", b"1")


def test_an_endpoint_where_nobody_answers_is_given_up_soon(
    s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.storage.s3_errors.UNREACHABLE_PATIENCE_S", 1.0)
    store = open_store("s3://bucket/x", StorageConfig(endpoint_url="http://127.0.0.1:9"))
    began = time.monotonic()
    with pytest.raises(StorageError) as caught:
        store.read("a")
    assert says(
        caught.value, "s3://bucket/x/a", "no connection to http://127.0.0.1:9", "storage.endpoint_url"
    )
    assert time.monotonic() - began < 10  # ten attempts take 23 s


# ------------------------------------------------------------------------- S3: stores of another character


class SloppyStore(BaseHTTPRequestHandler):
    """A store that keeps objects but has never heard of Range, If-Match or If-None-Match."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]
    requests: list[str]
    conditions: list[str | None]  # the If-Match of each

    def do_GET(self) -> None:
        body = self.objects.get(self.path)
        if body is None:
            self.answer(404, b"<Error><Code>NoSuchKey</Code><Message>none</Message></Error>")
        else:
            self.answer(200, body)

    def do_PUT(self) -> None:
        self.objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, b"", self.objects[self.path])

    def tag(self, content: bytes) -> str:
        return str(hash(content))

    def answer(self, status: int, body: bytes, tagged: bytes | None = None) -> None:
        self.requests.append(self.command)
        self.conditions.append(self.headers["If-Match"])
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{self.tag(body if tagged is None else tagged)}"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


class RefusingStore(SloppyStore):
    """A store that answers everything with one error."""

    status: int
    code: str

    def do_GET(self) -> None:
        self.answer(
            self.status, f"<Error><Code>{self.code}</Code><Message>so it is</Message></Error>".encode()
        )


class MisleadingStore(SloppyStore):
    """A store whose ETags have the look of an MD5, as those of objects under keys of their own have on AWS."""

    def tag(self, content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()[:32]


class CopyingStore(SloppyStore):
    """A store that copies, but has never heard of x-amz-copy-source-if-match, and tells no ETag."""

    def do_PUT(self) -> None:
        source = self.headers["x-amz-copy-source"]
        if source is None:
            super().do_PUT()
        else:
            self.objects[self.path] = self.objects[f"/{source}"]
            self.answer(200, b"<CopyObjectResult></CopyObjectResult>")

    def do_HEAD(self) -> None:
        body = self.objects[self.path]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{self.tag(body)}"')
        self.end_headers()

    def do_DELETE(self) -> None:
        self.objects.pop(self.path)
        self.answer(204, b"")


class WriteOnlyStore(CopyingStore):
    """A store that takes a request to copy for an empty write."""

    do_PUT = SloppyStore.do_PUT


class StumblingStore(CopyingStore):
    """A store that says 200 to its first copy, and then that it failed, as AWS may."""

    def do_PUT(self) -> None:
        if self.headers["x-amz-copy-source"] and "PUT" not in self.requests[1:]:
            self.answer(200, b"<Error><Code>InternalError</Code><Message>so it is</Message></Error>")
        else:
            super().do_PUT()


class ForgetfulStore(CopyingStore):
    """A store that forgets an upload in parts as soon as it is complete, and whose answer to that is lost."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path.endswith("?uploads"):
            self.answer(200, b"<R><UploadId>7</UploadId></R>")
        elif self.requests.count("POST") == 1:
            self.requests.append("POST")
            self.objects["/bucket/b"] = self.objects["/bucket/a"]
            self.close_connection = True
        else:
            self.answer(404, b"<Error><Code>NoSuchUpload</Code><Message>none</Message></Error>")

    def do_PUT(self) -> None:
        if "partNumber" in self.path:
            self.answer(200, b"<CopyPartResult><ETag>1</ETag></CopyPartResult>")
        else:
            super().do_PUT()


class HangingStore(SloppyStore):
    """A store that takes its time over every answer."""

    def do_GET(self) -> None:
        time.sleep(5)
        super().do_GET()


@contextlib.contextmanager
def serving(kind: type[SloppyStore], **attributes: object) -> Iterator[tuple[str, type[SloppyStore]]]:
    handler = type(kind.__name__, (kind,), {"objects": {}, "requests": [], "conditions": [], **attributes})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()


def test_a_store_that_ignores_conditions_neither_mixes_nor_overwrites(s3_environment: dict[str, str]) -> None:
    with serving(SloppyStore) as (endpoint, handler):
        store = open_store("s3://bucket", StorageConfig(endpoint_url=endpoint))
        old = store.write("a", b"1" * 20)
        new = store.write("a", b"2" * 20)
        with pytest.raises(ObjectChanged):
            store.read("a", expected=old)
        with pytest.raises(StorageError, match="wanted:  bytes 5-"):
            store.read("a", 5, 3, expected=new)
        wanted = [
            info.identity.split(":")[1] for info in (old, new)
        ]  # without quotes: radosgw 16 wants it so
        assert [etag for etag in handler.conditions if etag] == wanted
        assert store.create("t", b"one") is True
        assert store.create("t", b"two") is False
        assert store.read("t") == b"one"


def test_a_store_that_ignores_the_condition_of_a_copy_leaves_no_wrong_one(
    s3_environment: dict[str, str],
) -> None:
    with serving(CopyingStore) as (endpoint, handler):
        store = open_store("s3://bucket", StorageConfig(endpoint_url=endpoint))
        old = store.write("a", b"1" * 20)
        new = store.write("a", b"2" * 20)
        with pytest.raises(ObjectChanged, match="s3://bucket/a was changed"):
            store.copy(old, "b")
        assert list(handler.objects) == ["/bucket/a"]
        assert store.copy(new, "b") == store.info("b")
        assert handler.objects["/bucket/b"] == b"2" * 20


def test_a_store_that_cannot_copy_is_named_and_leaves_no_empty_object(s3_environment: dict[str, str]) -> None:
    with serving(WriteOnlyStore) as (endpoint, handler):
        store = open_store("s3://bucket", StorageConfig(endpoint_url=endpoint))
        with pytest.raises(StorageError) as caught:
            store.copy(store.write("a", b"1" * 20), "b")
        assert says(caught.value, "did not copy s3://bucket/a to b", "found:   0 bytes", "wanted:  20 bytes")
        assert list(handler.objects) == ["/bucket/a"]


def test_a_copy_in_parts_that_the_store_has_forgotten_was_complete(
    s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.storage.s3_copy.COPY_BYTES", 7)
    with serving(ForgetfulStore) as (endpoint, handler):
        store = open_store("s3://bucket", StorageConfig(endpoint_url=endpoint))
        target = store.copy(store.write("a", b"1" * 20), "b")
        assert target == store.info("b")
        assert handler.objects["/bucket/b"] == b"1" * 20
        assert handler.requests == ["PUT", "POST", *["PUT"] * 3, "POST", "POST"]


def test_an_error_within_an_answer_of_200_is_an_error(s3_environment: dict[str, str]) -> None:
    with serving(StumblingStore) as (endpoint, handler):
        store = open_store("s3://bucket", StorageConfig(endpoint_url=endpoint))
        store.copy(store.write("a", b"1" * 20), "b")
        assert handler.objects["/bucket/b"] == b"1" * 20
        assert handler.requests == ["PUT"] * 3


@pytest.mark.parametrize(
    ("status", "code", "error", "way_out"),
    [
        (400, "ExpiredToken", AccessDenied, "AWS_SESSION_TOKEN"),
        (403, "RequestTimeTooSkewed", AccessDenied, "clock"),
        (400, "AuthorizationHeaderMalformed", StorageError, "storage.region"),
        (501, "NotImplemented", StorageError, "store's own log"),
    ],
)
def test_an_answer_that_lasts_is_asked_for_once(
    s3_environment: dict[str, str], status: int, code: str, error: type[StorageError], way_out: str
) -> None:
    with serving(RefusingStore, status=status, code=code) as (endpoint, handler):
        with pytest.raises(error) as caught:
            open_store("s3://bucket", StorageConfig(endpoint_url=endpoint)).read("a")
        assert type(caught.value) is error
        assert says(caught.value, "s3://bucket/a", f"{status} {code}: so it is", endpoint, way_out)
        assert handler.requests == ["GET"]


def test_a_store_that_stays_busy_is_asked_ten_times(
    s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.storage.s3_errors.LONGEST_PAUSE_S", 0.01)
    with serving(RefusingStore, status=503, code="SlowDown") as (endpoint, handler):
        with pytest.raises(StorageError) as caught:
            open_store("s3://bucket", StorageConfig(endpoint_url=endpoint)).read("a")
        assert says(caught.value, "503 SlowDown: so it is", "after 10 attempts")
        assert handler.requests == ["GET"] * 10


def test_closing_a_stream_ends_its_requests(s3_environment: dict[str, str]) -> None:
    with serving(HangingStore) as (endpoint, _):
        store = open_store("s3://bucket", StorageConfig(endpoint_url=endpoint))
        stream = store.open_input(store.write("a", bytes(10)))
        assert requests_under_way() == 1
        stream.close()
        assert requests_under_way() == 0


def requests_under_way() -> int:
    """Tasks in s3fs's event loop, after a moment in which cancelled ones end."""

    async def others() -> int:
        await asyncio.sleep(0.2)
        return len(asyncio.all_tasks()) - 1

    return asyncio.run_coroutine_threadsafe(others(), fsspec.asyn.get_loop()).result()


# ------------------------------------------------------------------------------------- S3: injected faults


def test_nothing_is_lost_or_mixed_when_one_request_in_ten_fails(proxy: FaultyProxy, s3_uri: str) -> None:
    store = open_store(s3_uri, StorageConfig(endpoint_url=proxy.endpoint_url))
    proxy.set_faults(cut=0.03, reset=0.02, e500=0.02, slowdown=0.02, lost=0.02)
    big = bytes(range(251)) * 100_003

    def work(i: int) -> bool:
        info = store.write(f"{i:02}", big[: 100_003 + i])
        created = store.create(f"table/{i:02}", b"%d" % i)
        again = store.create(f"table/{i:02}", b"other")
        return created and not again and store.read(info.path, expected=info) == big[: info.size]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(40)))
    info = store.write("big", big)
    with store.open_input(info) as stream:
        assert stream.read() == big
    assert [found.path for found in store.list()] == [f"{i:02}" for i in range(40)] + ["big"] + [
        f"table/{i:02}" for i in range(40)
    ]
    assert sum(proxy.faults().values()) >= 5  # about 26


def test_copies_are_made_while_one_request_in_five_fails(
    proxy: FaultyProxy, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.storage.s3_copy.COPY_BYTES", 5 * 2**20)
    store = open_store(s3_uri, StorageConfig(endpoint_url=proxy.endpoint_url))
    data = bytes(range(251)) * (11 * 2**20 // 251)
    infos = [store.write(f"held/{i:02}", data[: 10_007 + i]) for i in range(40)]
    infos += [store.write(f"held/{i}", data[i:]) for i in (40, 41)]  # in three parts
    proxy.set_faults(cut=0.05, reset=0.05, e500=0.05, lost=0.05)
    with ThreadPoolExecutor(8) as pool:
        copied = list(pool.map(lambda info: store.copy(info, f"data/{info.path[5:]}"), infos))
    faults = proxy.faults()
    assert sum(faults.values()) >= 5  # about 11
    assert list(store.list("data/")) == copied
    for info, target in zip(infos, copied, strict=True):
        assert store.read(target.path, expected=target) == store.read(info.path, expected=info)


def test_a_copy_in_parts_whose_last_answer_is_lost_is_whole(
    proxy: FaultyProxy, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.storage.s3_copy.COPY_BYTES", 5 * 2**20)
    store = open_store(s3_uri, StorageConfig(endpoint_url=proxy.endpoint_url))
    data = bytes(range(251)) * (6 * 2**20 // 251)
    source = store.write("held/a", data)
    proxy.set_faults(match=r"^POST .*uploadId=", max_per_key=1, lost=1.0)
    target = store.copy(source, "data/a")
    assert proxy.faults() == {"lost": 1}
    assert store.read("data/a", expected=target) == data


def test_a_cut_read_goes_on_at_the_byte_it_reached(
    proxy: FaultyProxy, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.storage.s3.BLOCK_BYTES", 2**16)  # 100 blocks, of which a fifth is cut
    store = open_store(s3_uri, StorageConfig(endpoint_url=proxy.endpoint_url))
    data = bytes(range(251)) * (100 * 2**16 // 251)
    info = store.write("a", data)
    proxy.set_faults(match="^GET", cut=0.2)
    with store.open_input(info, 17) as stream:
        assert stream.read() == data[17:]
        assert stream.bytes_read == len(data) - 17
    assert store.read("a") == data
    assert proxy.faults()["cut"] >= 5


def test_a_create_whose_answer_is_lost_is_still_ours(proxy: FaultyProxy, s3_uri: str) -> None:
    store = open_store(s3_uri, StorageConfig(endpoint_url=proxy.endpoint_url))
    proxy.set_faults(match="^PUT", max_per_key=1, lost=1.0)
    assert store.create("_table.json", b"mine") is True
    assert proxy.faults() == {"lost": 1}
    assert store.create("_table.json", b"theirs") is False


def test_a_flipped_bit_in_a_whole_object_is_noticed_by_its_digest_and_read_again(
    proxy: FaultyProxy, s3_uri: str
) -> None:
    store = open_store(s3_uri, StorageConfig(endpoint_url=proxy.endpoint_url))
    data = bytes(range(251)) * 2003
    infos = [store.write(f"{i}", data[i:]) for i in range(20)]
    proxy.set_faults(match="^GET", corrupt=0.5)
    for i, info in enumerate(infos):
        assert store.read(info.path, expected=info) == data[i:]
        with store.open_input(info) as stream:  # shorter than a block: read whole
            assert stream.read() == data[i:]
    assert proxy.faults()["corrupt"] >= 5


def test_a_store_whose_etags_only_look_like_digests_is_read_twice_for_some_objects_only(
    s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.storage.s3_download._buckets_with_md5", set())
    monkeypatch.setattr("engine.storage.s3_download._without_md5", Counter())
    with serving(MisleadingStore) as (endpoint, handler):
        store = open_store("s3://bucket", StorageConfig(endpoint_url=endpoint))
        infos = [store.write(name, b"12345") for name in "abcde"]
        handler.requests.clear()
        assert [store.read(info.path, expected=info) for info in infos] == [b"12345"] * 5
        assert handler.requests == ["GET"] * (2 * 3 + 2)


def test_a_link_whose_way_leads_through_a_file_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "odd").symlink_to(tmp_path / "file" / "below")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    store = open_store(str(tmp_path))
    assert [info.path for info in store.list()] == list(store.names()) == ["file"]


def test_names_of_a_place_that_is_a_file_are_refused_as_its_listing_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for listing in (open_store(str(tmp_path / "file")).list, open_store(str(tmp_path / "file")).names):
        with pytest.raises(StorageError, match="is a file, not a folder"):
            list(listing())
