"""What `engine submit` sends, and what it refuses before anything is sent; on a cluster: tests/flows/test_submit.py."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config import read_document
from engine.errors import ClusterError, RecipeError
from jobs.cli import main
from jobs.extract import ExtractRecipe
from jobs.submit import JobLog, Submission, connect, prepare

RECIPE = """
source:   {kind: webdataset, uri: "s3://archive/2026/", label: cls}
backbone: {kind: keras_application, name: MobileNetV2, weights: imagenet, input_size: 160}
output:   {uri: "s3://features/table"}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "extract.yaml"
    path.write_text(RECIPE)
    return path


def prepared(recipe: Path, *overrides: str, **more: object) -> Submission:
    return prepare("extract", ExtractRecipe, recipe, overrides, (), **more)  # type: ignore[arg-type]


def written(submission: Submission, folder: Path) -> str:
    folder.mkdir()
    return submission.write(folder)


def test_the_recipe_is_sent_with_its_overrides_and_nothing_else(recipe: Path, tmp_path: Path) -> None:
    submission = prepared(recipe, "compute.actors=3", "limits.max_reject_fraction=0.00001")
    written(submission, tmp_path / "sent")
    assert sorted(path.name for path in (tmp_path / "sent").iterdir()) == ["recipe.yaml", "submitted.py"]
    sent = read_document(tmp_path / "sent" / "recipe.yaml")
    assert sent == {
        **read_document(recipe),
        "compute": {"actors": 3},
        "limits": {"max_reject_fraction": 1e-05},
    }
    assert submission.command == "python submitted.py extract recipe.yaml --json"


def test_an_argument_of_the_verb_reaches_its_command_as_one_word(recipe: Path) -> None:
    submission = prepare("extract", ExtractRecipe, recipe, (), ("--profile", "7; rm -rf /"))
    assert submission.command == "python submitted.py extract recipe.yaml --json --profile '7; rm -rf /'"


def test_the_digest_is_that_of_all_that_is_sent(recipe: Path, tmp_path: Path) -> None:
    module = tmp_path / "my_heads.py"
    module.write_text("WIDTH = 17")
    same = {written(prepared(recipe, include=[module]), tmp_path / str(run)) for run in range(2)}
    assert len(same) == 1
    others = {
        written(prepared(recipe), tmp_path / "without"),
        written(prepared(recipe, "compute.actors=2", include=[module]), tmp_path / "override"),
        written(
            prepare("extract", ExtractRecipe, recipe, (), ("--prune",), include=[module]), tmp_path / "prune"
        ),
    }
    module.write_text("WIDTH = 19")
    others.add(written(prepared(recipe, include=[module]), tmp_path / "changed"))
    assert len(others | same) == 5


def test_the_engine_itself_is_sent_where_it_is_asked_for(recipe: Path, tmp_path: Path) -> None:
    written(prepared(recipe, with_code=True), tmp_path / "sent")
    assert (tmp_path / "sent" / "engine" / "errors.py").exists()
    assert (tmp_path / "sent" / "jobs" / "extract.py").exists()
    assert not list((tmp_path / "sent").rglob("*.pyc"))
    script = "import engine, jobs.cli; print(engine.__file__)"
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "sent", capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == str(tmp_path / "sent" / "engine" / "__init__.py")


def test_a_log_is_shown_by_whole_lines_and_the_summary_kept(capsys: pytest.CaptureFixture[str]) -> None:
    log = JobLog()
    summary = '{"verb": "extract", "rows": 17}'
    for piece in (
        'one\n{"time": "12:00", "verb": "extract", "mess',
        'age": "two"}\n',
        summary[:9],
        summary[9:],
    ):
        log.add(piece)
    log.end()
    assert capsys.readouterr().err == 'one\n{"time": "12:00", "verb": "extract", "message": "two"}\n'
    assert log.summary == {"verb": "extract", "rows": 17}


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("source.uri=shards", "source.uri"),
        ("output.uri=~/table", "output.uri"),
        ("backbone.weights=mine.weights.h5", "backbone.weights"),
    ],
)
def test_a_place_that_only_this_machine_has_is_refused_by_its_field(
    recipe: Path, override: str, field: str
) -> None:
    with pytest.raises(RecipeError, match=f"{field} is a place on this machine") as refused:
        prepared(recipe, override)
    assert refused.value.found == override.partition("=")[2]


def test_a_full_path_is_the_clusters_and_is_said_to_be(recipe: Path) -> None:
    submission = prepared(recipe, "source.uri=/mnt/archive")
    assert submission.notes == ("source.uri: /mnt/archive is looked for on the cluster's nodes, not here",)


def test_a_file_that_is_sent_along_may_be_named_by_its_bare_name(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "mine.weights.h5"
    weights.write_bytes(b"17")
    submission = prepared(recipe, "backbone.weights=mine.weights.h5", include=[Path("mine.weights.h5")])
    written(submission, tmp_path / "sent")
    assert (tmp_path / "sent" / "mine.weights.h5").read_bytes() == b"17"
    assert read_document(tmp_path / "sent" / "recipe.yaml")["backbone"]["weights"] == "mine.weights.h5"


@pytest.mark.parametrize(
    ("name", "said"), [("absent.py", "no such file or folder"), ("engine", "another thing")]
)
def test_what_cannot_be_included_is_refused(recipe: Path, tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "engine").mkdir()
    with pytest.raises(RecipeError, match="cannot be sent") as refused:
        prepared(recipe, include=[tmp_path / name])
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--verb", "extrakt"], "extract, fit, finetune, score, nightly"),
        (["--verb", "extract", "--set", "compute.actor=2"], "did you mean 'actors'?"),
        (["--verb", "extract", "--", "--prun"], "--prun"),
        (["--verb", "extract", "--", "--set", "compute.actors=2"], "--set belongs before"),
        (["--verb", "extract", "--address", "ray://head:10001"], "http://host:8265"),
        (["--verb", "extract", "--address", "http://me:secret-17@head:8265"], "a password in it"),
    ],
)
def test_wrong_arguments_exit_2_before_anything_is_sent(
    recipe: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(recipe), *arguments]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "secret-17" not in told


def test_an_address_of_a_cluster_that_is_no_job_server_says_where_it_came_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(RecipeError, match="RAY_ADDRESS: not the address of a Ray job server"):
        connect(None)


class StubOfAHead(http.server.BaseHTTPRequestHandler):
    """Answers every request alike, as the head of another Ray or another web server would."""

    answer = b""
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a web server; `connect` leaves that in the environment, which this takes away."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StubOfAHead)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "answer", "said"),
    [
        (200, json.dumps({"ray_version": "2.40.0", "version": "4"}), "Ray 2.40.0 there"),
        (200, "<html>hello</html>", "no Ray job server answers|refuses"),
        (404, "nothing here", "refuses"),
        (503, "upstream is starting", "no Ray job server answers"),
    ],
)
def test_a_server_that_is_no_ray_of_ours_is_told_apart(
    stub: str, status: int, answer: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StubOfAHead, "status", status)
    monkeypatch.setattr(StubOfAHead, "answer", answer.encode())
    with pytest.raises(ClusterError) as refused:
        connect(stub)
    assert any(one in str(refused.value) for one in said.split("|"))


def test_an_address_where_nobody_listens_says_how_to_reach_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with pytest.raises(ClusterError, match="no Ray job server answers at http://127.0.0.1:9") as refused:
        connect("http://127.0.0.1:9")
    assert "kubectl port-forward" in (refused.value.way_out or "")


def test_an_address_that_is_given_wins_over_the_environment(
    stub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setattr(StubOfAHead, "status", 200)
    monkeypatch.setattr(StubOfAHead, "answer", json.dumps({"ray_version": "2.60.3"}).encode())
    assert connect(stub).ray_version == "2.60.3"


def test_a_cluster_without_the_engine_says_so_in_a_word(repository: Path, tmp_path: Path) -> None:
    """The launcher as a Python of the machine's own would run it, which has no packages."""
    launcher = tmp_path / "submitted.py"
    launcher.write_bytes((repository / "jobs" / "submitted.py").read_bytes())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ended = subprocess.run(
        [sys.executable, "-S", str(launcher), "extract", "recipe.yaml"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert "found:   No module named 'jobs'" in ended.stderr
    assert "engine submit --with-code" in ended.stderr
    assert "Traceback" not in ended.stderr
