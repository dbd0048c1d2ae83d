"""The clusters that `engine plan` knows by name are those that the overlays may grow to."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.estimate import CLUSTERS


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_a_cluster_on_paper_is_the_overlay_at_its_most(repository: Path, name: str) -> None:
    assert (repository / "k8s").is_dir(), "no k8s/ here: there are no overlays to compare with"
    from tests.k8s.rendering import of_kind, overlay

    extract = of_kind(overlay(name), "RayJob")["extract"]
    groups = {one["groupName"]: one for one in extract["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    cores = {group: int(one["rayStartParams"]["num-cpus"]) for group, one in groups.items()}
    nodes = {group: one["maxReplicas"] for group, one in groups.items()}
    paper = CLUSTERS[f"{name}-overlay"]
    assert set(cores.values()) == {paper.cores_per_node}
    if name == "cpu":
        assert (nodes, paper.gpus_per_node) == ({"cpu": paper.nodes}, 0)
    else:
        assert nodes == {"gpu": paper.nodes, "cpu": paper.decode_nodes}
        assert int(groups["gpu"]["rayStartParams"]["num-gpus"]) == paper.gpus_per_node
