"""Storage that breaks in the middle of a run and stays broken: one message and an end within bounds; once it is well
again, the same command completes the table."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.storage import StorageConfig, Store, open_store
from engine.tables import list_parts, open_table
from engine.verification import verify_table
from tests.commands import Ended, Engine
from tests.flows.archives import crop_label, extract_recipe, write_shards
from tests.proxy import open_breaking_proxy, open_proxy
from tests.stores import S3TestStore

SHARDS, IMAGES = 6, 100
PARTS = 2 * SHARDS
LONGEST_END_S = 180
ONLY_IN_CHAOS = pytest.mark.skipif("ENGINE_CHAOS_ROUNDS" not in os.environ, reason="`make chaos` runs it")


def assert_one_message(ended: Ended, *words: str) -> None:
    """Exit code 1, and one message of ours with all these words."""
    assert ended.code == 1, ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    assert ended.stderr.count("way out:") == 1, ended.stderr
    assert [word for word in words if word not in ended.stderr] == [], ended.stderr


def assert_complete(table: Store, keys: list[str]) -> None:
    """Every key once, with its label, and `engine verify` finds nothing."""
    rows = open_table(table).read(["key", "label"]).sort_by("key")
    assert rows["key"].to_pylist() == keys
    assert rows["label"].to_pylist() == [crop_label(int(key)) for key in keys]
    checked = verify_table(table)
    assert not (checked.damage or checked.leftovers or checked.unfinished), checked


# ---------------------------------------------------------------- an object store


@dataclass(frozen=True)
class Archive:
    """Shards on S3, the keys in them, and the place of their table."""

    uri: str
    config: StorageConfig
    store: S3TestStore
    keys: list[str]

    @property
    def table(self) -> Store:
        return open_store(f"{self.uri}/table", self.config)

    def recipe(self, folder: Path, endpoint_url: str) -> Path:
        """To extract it through a proxy."""
        storage = f'storage: {{endpoint_url: "{endpoint_url}", region: {self.config.region}}}'
        return extract_recipe(folder, f"{self.uri}/shards", self.table.uri, storage)


@pytest.fixture
def archive(s3_uri: str, s3_config: StorageConfig, s3_store: S3TestStore) -> Archive:
    keys = write_shards(open_store(f"{s3_uri}/shards", s3_config), SHARDS, IMAGES)
    return Archive(s3_uri, s3_config, s3_store, keys)


@dataclass(frozen=True)
class Refusal:
    """What the store answers from some moment on, words of the message, and how often it may be asked in vain."""

    status: int
    code: str
    words: tuple[str, ...]
    most_refused: int = 40

    def __str__(self) -> str:
        return f"{self.status} {self.code}: so it is"


@ONLY_IN_CHAOS
@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(400, "ExpiredToken", ("AWS_SESSION_TOKEN",)),
        Refusal(403, "ExpiredToken", ("AWS_SESSION_TOKEN",)),
        Refusal(403, "RequestTimeTooSkewed", ("set the clock",)),
        Refusal(503, "SlowDown", ("after 10 attempts", "run again when it is well"), most_refused=200),
    ],
    ids=str,
)
def test_a_store_that_refuses_for_ever_ends_the_run_and_a_rerun_completes_it(
    archive: Archive, engine_process: Engine, refusal: Refusal, tmp_path: Path
) -> None:
    with open_breaking_proxy(archive.store, 24, refusal.status, refusal.code) as proxy:
        recipe = archive.recipe(tmp_path, proxy.endpoint_url)
        started = time.monotonic()
        ended = engine_process("extract", recipe)
        seconds = time.monotonic() - started
        kept = [name for name, _ in list_parts(archive.table)]
        print(
            f"{refusal}: the end after {seconds:.0f} s, {proxy.refused} refused, {len(kept)} of {PARTS} parts kept"
        )
        print(ended.stderr)
        assert_one_message(ended, str(refusal), proxy.endpoint_url, archive.uri, *refusal.words)
        assert seconds < LONGEST_END_S
        assert 0 < proxy.refused <= refusal.most_refused
        proxy.mend()
        rerun = engine_process("extract", recipe, "--json")
    assert rerun.code == 0, rerun.stderr
    assert rerun.summary["parts_written"] == PARTS - len(kept)
    assert_complete(archive.table, archive.keys)


@ONLY_IN_CHAOS
def test_requests_that_stall_for_30_seconds_are_ridden_out(
    archive: Archive, engine_process: Engine, repository: Path, tmp_path: Path
) -> None:
    with open_proxy(repository, archive.store, stall_s=30) as proxy:
        proxy.set_faults(
            match=r"^(GET \S*/shards/00001|PUT \S*/data/00002\S*00000)", max_per_key=1, stall=1.0
        )
        ended = engine_process("extract", archive.recipe(tmp_path, proxy.endpoint_url), "--json")
        assert ended.code == 0, ended.stderr
        assert ended.summary["rows"] == SHARDS * IMAGES
        assert proxy.faults()["stall"] >= 2
        print(f"{proxy.requests()} requests, {proxy.faults()}, {ended.summary['seconds']} s")
    assert_complete(archive.table, archive.keys)


# ---------------------------------------------------------------- a disk

# In a mount namespace of its own: Ray's session stays on the normal disk, and the small disk goes with the process.
ON_A_SMALL_DISK = """
set -eu
mount -t tmpfs -o size={size_kib}k,{options} none "{disk}"
{script}
"""


def on_a_small_disk(disk: Path, script: str, options: str = "rw", size_kib: int = 4096) -> Ended:
    """Run a shell script in a namespace where a small, empty disk is mounted; skips where that is not allowed."""
    disk.mkdir()
    shell = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    may_mount = [*shell, f'mount -t tmpfs none "{disk}"']
    if shutil.which("unshare") is None or subprocess.run(may_mount, check=False).returncode:
        pytest.skip("a user may not mount a disk in a namespace of his own here")
    script = ON_A_SMALL_DISK.format(disk=disk, options=options, size_kib=size_kib, script=script)
    ended = subprocess.run([*shell, script], capture_output=True, text=True, timeout=280, check=False)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@ONLY_IN_CHAOS
def test_a_full_disk_ends_the_run_with_its_parts_kept_and_a_rerun_completes_it(
    repository: Path, tmp_path: Path
) -> None:
    keys = write_shards(open_store(str(tmp_path / "shards")), SHARDS, IMAGES)
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    recipe = extract_recipe(tmp_path, str(tmp_path / "shards"), str(disk / "table"))
    extract = f'"{sys.executable}" -m jobs.cli extract "{recipe}"'
    ended = on_a_small_disk(
        disk,
        f"""
cd "{repository}"
head -c 4010k /dev/zero > "{disk}/ballast"
code=0; {extract} 2> "{tmp_path}/first" || code=$?; echo "$code"
ls -A "{disk}/table" "{disk}/table/data"
cp -r "{disk}/table" "{kept}"
rm "{disk}/ballast"
{extract} --json
cp -r "{disk}/table" "{tmp_path}/complete"
""",
    )
    assert ended.code == 0, ended.stderr
    code, *listing, _ = ended.stdout.splitlines()
    message = (tmp_path / "first").read_text()
    assert_one_message(
        Ended(int(code), "", message), "No space left on device", "the disk is full", f"{disk}/table"
    )
    assert [name for name in listing if name.endswith(".tmp")] == []
    parts = [name for name, _ in list_parts(open_store(str(kept)))]
    assert 0 < len(parts) < PARTS
    checked = verify_table(open_store(str(kept)))
    assert not (checked.damage or checked.leftovers), checked
    assert Ended(0, ended.stdout.splitlines()[-1], "").summary["parts_written"] == PARTS - len(parts)
    assert_complete(open_store(str(tmp_path / "complete")), keys)
    print(f"the disk was full after {len(parts)} of {PARTS} parts")


@ONLY_IN_CHAOS
def test_an_output_that_cannot_be_written_is_one_message(repository: Path, tmp_path: Path) -> None:
    write_shards(open_store(str(tmp_path / "shards")), 1, 2)
    disk = tmp_path / "disk"
    recipe = extract_recipe(tmp_path, str(tmp_path / "shards"), str(disk / "table"))
    script = f'cd "{repository}"; "{sys.executable}" -m jobs.cli extract "{recipe}"'
    ended = on_a_small_disk(disk, script, options="ro")
    assert_one_message(ended, "Read-only file system", f"{disk}/table", "choose another place")
