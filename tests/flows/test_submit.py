"""`engine submit` to a real Ray cluster that asks for a token: logs, exit codes, interrupts, lost connections, keys."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from engine.storage import open_store
from engine.tables import open_table
from tests.clusters import StartedHead, start_head
from tests.commands import Ended
from tests.flows.archives import extract_recipe, write_shards

TOKEN = "a-token-of-this-test-0123456789abcdef"
CANARIES = {"AWS_ACCESS_KEY_ID": "AKIACANARY17", "AWS_SECRET_ACCESS_KEY": "canary-secret-19"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[StartedHead]:
    """One node with two CPUs; whoever talks to it needs the token."""
    with start_head({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, num_cpus=2) as cluster:
        yield cluster


def sender(cluster: StartedHead, **more: str) -> dict[str, str]:
    """The environment of somebody who may submit, with keys for a store that are nobody else's business."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    return {
        **environment,
        "RAY_API_SERVER_ADDRESS": cluster.job_server,
        "RAY_AUTH_TOKEN": TOKEN,
        **CANARIES,
        **more,
    }


def start(repository: Path, environment: dict[str, str], *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "submit", *map(str, arguments)],
        cwd=repository,
        env=environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Ended:
    """Wait for its end; what `read_until` has read is left out."""
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        stderr = process.stderr.read()  # first: of stdout there is a line at most
        stdout = process.stdout.read()
    return Ended(process.returncode, stdout, stderr)


def read_until(process: subprocess.Popen[str], said: str) -> str:
    """Its stderr up to a line that has this in it."""
    assert process.stderr is not None
    told = ""
    for line in process.stderr:
        told += line
        if said in line:
            return told
    raise AssertionError(f"never said {said!r}: {told}")


def job_named(told: str) -> str:
    found = re.search(r"job (engine-[a-z]+-[0-9a-f]{12}-\d+)", told)
    assert found, told
    return found[1]


def talk(repository: Path, cluster: StartedHead, address: str, script: str) -> subprocess.Popen[str]:
    """A few lines with a `RayJobs`, in a process that knows the token."""
    begin = "import sys\nfrom pathlib import Path\nfrom engine.ray_jobs import RayJobs\n"
    return subprocess.Popen(
        [sys.executable, "-c", f"{begin}jobs = RayJobs({address!r})\n{script}"],
        cwd=repository,
        env=sender(cluster, RAY_AUTH_MODE="token"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ask(repository: Path, cluster: StartedHead, script: str) -> str:
    """What they print."""
    ended = finish(talk(repository, cluster, cluster.job_server, script))
    assert ended.code == 0, ended.stderr
    return ended.stdout


def test_a_recipe_is_run_followed_again_after_ctrl_c_and_ends_with_its_own_exit_code(
    cluster: StartedHead, repository: Path, tmp_path: Path
) -> None:
    source = open_store(str(tmp_path / "shards"))
    keys = write_shards(source, shards=4, images=70)
    # One sample of 281 is no image, and the budget is none: done, but judged.
    source.write(
        "broken.tar", (tmp_path / "shards" / "00000.tar").read_bytes().replace(b"\xff\xd8\xff", b"\0\0\0", 1)
    )
    recipe = extract_recipe(tmp_path, str(tmp_path / "shards"), str(tmp_path / "table"))
    command = [recipe, "--verb", "extract", "--with-code", "--json", "--set", "limits.max_reject_fraction=0"]
    environment = sender(cluster)

    first = start(repository, environment, *command)
    told = read_until(first, "5 of 5 shards pending")
    name = job_named(told)
    first.send_signal(signal.SIGINT)
    interrupted = finish(first)
    assert interrupted.code == 130, interrupted.stderr  # were the log late, the job would be over
    assert f"job {name} goes on" in interrupted.stderr
    assert f"ray job stop {name}" in interrupted.stderr

    second = finish(start(repository, environment, *command))
    assert f"following job {name}" in second.stderr, second.stderr
    assert second.code == 3, second.stderr
    assert "5 of 5 shards pending" in second.stderr  # the log from its beginning
    assert f"job {name} ended with exit code 3" in second.stderr
    answer = second.summary
    assert (answer["submission_id"], answer["status"]) == (name, "FAILED")
    assert answer["summary"]["rejects"] == 1
    assert answer["summary"]["shards_done"] == 5
    table = open_table(open_store(str(tmp_path / "table")))
    assert sorted(set(table.read(["key"])["key"].to_pylist())) == keys

    third = finish(start(repository, environment, *command))
    assert third.code == 3, third.stderr
    assert job_named(third.stderr) == f"{name.removesuffix('-1')}-2"  # over: the same again is a new job
    assert third.summary["summary"]["shards_skipped"] == 5

    told_by_ray = ask(repository, cluster, "print(jobs._client.list_jobs())")
    assert name in told_by_ray
    for canary in (*CANARIES.values(), TOKEN):
        for ended in (interrupted, second, third):
            assert canary not in ended.stdout + ended.stderr
        assert canary not in told_by_ray
        for path in cluster.folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert canary.encode() not in path.read_bytes(), path


def test_stop_on_interrupt_ends_the_job_as_well(
    cluster: StartedHead, repository: Path, tmp_path: Path
) -> None:
    write_shards(open_store(str(tmp_path / "shards")), shards=4, images=70)
    recipe = extract_recipe(tmp_path, str(tmp_path / "shards"), str(tmp_path / "table"))
    process = start(
        repository, sender(cluster), recipe, "--verb", "extract", "--with-code", "--stop-on-interrupt"
    )
    name = job_named(read_until(process, "4 of 4 shards pending"))
    process.send_signal(signal.SIGTERM)
    ended = finish(process)
    assert ended.code == 130, ended.stderr
    assert f"job {name} was stopped" in ended.stderr
    assert ask(repository, cluster, f"print(jobs.state({name!r}).status)") == "STOPPED\n"


def test_a_job_that_fails_on_the_cluster_hands_its_exit_code_and_words_back(
    cluster: StartedHead, repository: Path, tmp_path: Path
) -> None:
    recipe = extract_recipe(tmp_path, str(tmp_path / "absent"), str(tmp_path / "table"))
    ended = finish(start(repository, sender(cluster), recipe, "--verb", "extract", "--with-code", "--json"))
    assert ended.code == 1
    assert "no shards here" in ended.stderr
    assert "is looked for on the cluster's nodes" in ended.stderr
    assert ended.summary["summary"] is None


def test_no_wait_names_the_job_and_returns_at_once(
    cluster: StartedHead, repository: Path, tmp_path: Path
) -> None:
    recipe = extract_recipe(tmp_path, str(tmp_path / "absent"), str(tmp_path / "table"))
    command = [recipe, "--verb", "extract", "--with-code", "--no-wait", "--json", "--", "--plan"]
    ended = finish(start(repository, sender(cluster), *command))
    assert ended.code == 0, ended.stderr
    assert re.fullmatch(r"engine-extract-[0-9a-f]{12}-1", ended.summary["submission_id"])
    assert ended.summary["status"] in ("PENDING", "RUNNING")


@pytest.mark.parametrize(
    ("command", "status", "code"),
    [("exit 0", "SUCCEEDED", 0), ("exit 3", "FAILED", 3), ("kill -9 $$", "FAILED", 137)],
)
def test_the_exit_code_of_a_job_is_what_a_shell_would_say(
    cluster: StartedHead, repository: Path, tmp_path: Path, command: str, status: str, code: int
) -> None:
    script = (
        f"assert jobs.submit('exit-{code}', {command!r}, Path({str(tmp_path)!r}), {{}})\n"
        f"assert not jobs.submit('exit-{code}', 'exit 17', Path({str(tmp_path)!r}), {{}})\n"  # the name is taken
        f"state = jobs.follow('exit-{code}', print, print)\nprint(state.status, state.exit_code)"
    )
    (tmp_path / "file").write_text("a folder without files is not sent")
    assert ask(repository, cluster, script).splitlines()[-1] == f"{status} {code}"


class CutLine:
    """Hands connections on to the job server; can cut all of them and refuse new ones for a while."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.is_cut = False
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self.is_cut = True
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        for one in (self._listener, *self._open):
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.is_cut:
                    client.close()
                    continue
                server = socket.create_connection(self._target)
                self._open += [client, server]
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._hand_on, args=(source, target), daemon=True).start()

    @staticmethod
    def _hand_on(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@contextmanager
def line_to(cluster: StartedHead) -> Iterator[CutLine]:
    line = CutLine(cluster.job_server)
    try:
        yield line
    finally:
        line.close()


def test_a_lost_connection_loses_neither_the_job_nor_a_line_of_its_log(
    cluster: StartedHead, repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("17")
    command = "for n in 1 2 3 4 5 6 7 8 9 10 11 12; do echo line $n; sleep 1; done"
    script = (
        f"jobs.submit('long', {command!r}, Path({str(tmp_path)!r}), {{}})\n"
        "show = lambda text: print(text, end='', flush=True)\n"
        "state = jobs.follow('long', show, lambda note: print(note, file=sys.stderr, flush=True))\n"
        "print(state.status)"
    )
    seen: list[str] = []
    with line_to(cluster) as line:
        process = talk(repository, cluster, line.address, script)
        assert process.stdout is not None
        while "line 3" not in seen:
            seen.append(process.stdout.readline().strip())
        line.cut()
        read_until(process, "lost the connection")
        line.is_cut = False
        ended = finish(process)
    seen += ended.stdout.splitlines()
    assert [one for one in seen if one.startswith("line ")] == [f"line {number}" for number in range(1, 13)]
    assert seen[-1] == "SUCCEEDED"
    assert "connected again" in ended.stderr


def test_two_at_once_make_one_job(cluster: StartedHead, repository: Path, tmp_path: Path) -> None:
    write_shards(open_store(str(tmp_path / "shards")), shards=4, images=70)
    recipe = extract_recipe(tmp_path, str(tmp_path / "shards"), str(tmp_path / "table"))
    command = [recipe, "--verb", "extract", "--with-code", "--no-wait", "--json"]
    both = [finish(one) for one in [start(repository, sender(cluster), *command) for _ in range(2)]]
    assert [one.code for one in both] == [0, 0], [one.stderr for one in both]
    first, second = (one.summary["submission_id"] for one in both)
    assert first == second
    assert sorted("following" in one.stderr for one in both) == [False, True]
    ask(repository, cluster, f"jobs.stop({first!r})")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"RAY_AUTH_TOKEN": "another-token-0123456789abcdef"}, "does not take our token"),
        ({"RAY_AUTH_TOKEN": ""}, "does not take our token"),
    ],
)
def test_without_the_clusters_token_nothing_is_sent_and_the_way_out_names_it(
    cluster: StartedHead, repository: Path, tmp_path: Path, more: dict[str, str], said: str
) -> None:
    recipe = extract_recipe(tmp_path, str(tmp_path / "absent"), str(tmp_path / "table"))
    ended = finish(start(repository, sender(cluster, **more), recipe, "--verb", "extract"))
    assert ended.code == 1
    assert said in ended.stderr
    assert "RAY_AUTH_TOKEN_PATH" in ended.stderr
    assert "0123456789abcdef" not in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_token_in_a_file_will_do(cluster: StartedHead, repository: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    recipe = extract_recipe(tmp_path, str(tmp_path / "absent"), str(tmp_path / "table"))
    environment = sender(cluster, RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    del environment["RAY_AUTH_TOKEN"]
    ended = finish(start(repository, environment, recipe, "--verb", "extract", "--with-code", "--no-wait"))
    assert ended.code == 0, ended.stderr
