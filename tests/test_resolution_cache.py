"""What a node keeps of networks it has resolved: found again without Keras, never in place of something else."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engine import resolution_cache
from engine.backbones.kinds import KerasApplicationConfig
from engine.errors import CanaryMismatch, RecipeError, WeightsError
from engine.recipes import Limits
from engine.resolve import Archive, Network, resolve
from engine.runtimes.kinds import OpenVINORuntimeConfig, TensorFlowRuntimeConfig
from engine.shards.kinds import WebDatasetSource
from engine.storage import StorageConfig, open_store
from tests.backbones.small_networks import ROOT
from tests.flows.archives import shard_bytes

BACKBONE = KerasApplicationConfig(name="MobileNetV2", weights="random", input_size=32)
NETWORK = Network(BACKBONE, TensorFlowRuntimeConfig(), StorageConfig(), num_threads=1)
OPENVINO = replace(NETWORK, runtime=OpenVINORuntimeConfig(kind="openvino"))
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="the extra `openvino` is not installed"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENGINE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "networks"


def archive(folder: Path, images: int) -> Archive:
    store = open_store(str(folder / "shards"))
    shards = (store.write("a.tar", shard_bytes(0, images)),) if images else ()
    return Archive(WebDatasetSource(uri=store.uri, image=("jpg",), label="cls"), Limits(), shards)


IN_ANOTHER_PROCESS = """
import json, sys
from engine.backbones.kinds import KerasApplicationConfig
from engine.resolve import Network, resolve
from engine.runtimes.kinds import TensorFlowRuntimeConfig
from engine.storage import StorageConfig
backbone = KerasApplicationConfig(name="MobileNetV2", weights="random", input_size=32, seed=int(sys.argv[1]))
found = resolve(Network(backbone, TensorFlowRuntimeConfig(), StorageConfig(), num_threads=1), None)
heavy = [name for name in ("tensorflow", "keras") if name in sys.modules]
print(json.dumps([found.fingerprint, found.canary, len(found.graph.graph_def), heavy]))
"""


def test_a_network_resolved_before_needs_neither_keras_nor_tensorflow() -> None:
    first = resolve(NETWORK, None)
    answer = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, "0"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    fingerprint, canary, size, heavy = json.loads(answer.stdout)
    assert heavy == []
    assert (fingerprint, size) == (first.fingerprint, len(first.graph.graph_def))
    assert tuple(map(tuple, canary)) == first.canary
    again = resolve(NETWORK, None)
    assert again == first, "what is kept is not what was resolved"


def test_whatever_changes_the_network_or_how_it_is_run_is_resolved_anew(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "w.weights.h5"
    weights.write_bytes(b"first")
    of_file = KerasApplicationConfig(name="MobileNetV2", weights=str(weights), input_size=32)

    def name(backbone: KerasApplicationConfig = of_file, **settings: object) -> str:
        return resolution_cache.entry_name(backbone, StorageConfig(), settings)

    names = [name(), name(runtime="openvino"), name(of_file.model_copy(update={"input_size": 64}))]
    names.append(name(BACKBONE))
    names.append(name(BACKBONE.model_copy(update={"seed": 1})))
    os.utime(weights, ns=(1, 1))
    names.append(name())
    monkeypatch.setattr(resolution_cache, "_source_digest", lambda: "another engine")
    names.append(name())
    monkeypatch.setattr(resolution_cache, "_version", lambda library: "another version")
    names.append(name())
    assert len(set(names)) == len(names)
    assert name() == names[-1]
    weights.unlink()
    with pytest.raises(WeightsError, match="nothing at"):
        name()


def test_imagenet_weights_that_were_replaced_in_keras_own_folder_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    imagenet = KerasApplicationConfig(name="MobileNetV2", weights="imagenet", input_size=96)
    absent = resolution_cache.entry_name(imagenet, StorageConfig(), {})
    file = tmp_path / "keras" / "models" / "mobilenet.h5"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"1")
    there = resolution_cache.entry_name(imagenet, StorageConfig(), {})
    file.write_bytes(b"22")
    assert len({absent, there, resolution_cache.entry_name(imagenet, StorageConfig(), {})}) == 3


def test_a_table_of_another_network_is_refused_by_what_is_kept() -> None:
    first = resolve(NETWORK, None)
    contract = {f"fingerprint.{name}": value for name, value in first.fingerprint_fields.items()}
    record = {"contract": contract, "canary": [[1.0, 2.0]]}
    assert resolve(NETWORK, None, record).canary == ((1.0, 2.0),)
    other = {**record, "contract": contract | {"fingerprint.tensor_digest": "f" * 64}}
    with pytest.raises(CanaryMismatch, match="has loaded another backbone"):
        resolve(NETWORK, None, other)


@needs_openvino
def test_a_runtime_is_judged_once_on_images_and_its_verdict_kept(tmp_path: Path, cache: Path) -> None:
    unjudged = resolve(OPENVINO, None)
    assert unjudged.trials == ()
    judged = resolve(OPENVINO, archive(tmp_path, 4))
    (trial,) = judged.trials
    assert trial.cosine is not None and trial.cosine > 0.9999 and trial.refused is None
    assert resolve(OPENVINO, archive(tmp_path, 0)) == judged, "judged again, by no image at all"
    assert len(list(cache.glob("*.network"))) == 2


@needs_openvino
def test_what_hangs_on_the_archive_is_not_kept(tmp_path: Path, cache: Path) -> None:
    # Where the processor has bfloat16, a few images may well refuse it: then there is nothing to keep either.
    with contextlib.suppress(RecipeError):
        resolve(
            replace(OPENVINO, runtime=OpenVINORuntimeConfig(kind="openvino", precision="bfloat16")),
            archive(tmp_path, 16),
        )
    assert not list(cache.glob("*.network"))


def test_a_table_in_progress_is_resolved_without_a_canary_of_its_own_and_that_is_kept_too() -> None:
    first = resolve(NETWORK, None)
    contract = {f"fingerprint.{name}": value for name, value in first.fingerprint_fields.items()}
    one_thread_more = replace(NETWORK, num_threads=2)
    found = resolve(one_thread_more, None, {"contract": contract, "canary": [[1.0]]})
    assert found.canary == ((1.0,),)
    new_table = resolve(one_thread_more, None)
    assert new_table.canary != ((1.0,),), "the canary of one table became another's"
    assert len(new_table.canary) == len(first.canary)


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "other text"])
def test_a_damaged_entry_is_none_and_goes(cache: Path, damage: str) -> None:
    resolution_cache.save("a", {"n": 1}, b"graph\nof two lines")
    assert resolution_cache.load("a") == ({"n": 1}, b"graph\nof two lines")
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(
        {
            "cut": whole[:-1],
            "changed": whole[:-1] + b"X",
            "empty": b"",
            "other text": b"[]\n",
        }[damage]
    )
    assert resolution_cache.load("a") is None
    assert list(cache.iterdir()) == []


def test_the_oldest_entries_make_room_and_the_newest_always_stays(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolution_cache, "KEPT_BYTES", 3_500)
    for number, name in enumerate("abc"):
        resolution_cache.save(name, {}, bytes(1_000))
        os.utime(cache / f"{name}.network", (number, number))
    resolution_cache.load("a")
    resolution_cache.save("d", {}, bytes(1_000))
    assert sorted(file.stem for file in cache.iterdir()) == ["a", "c", "d"]
    resolution_cache.save("e", {}, bytes(10_000))
    assert [file.stem for file in cache.iterdir()] == ["e"]


def test_where_nothing_can_be_written_nothing_is_kept_and_nobody_complains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a-file").write_text("")
    monkeypatch.setenv("ENGINE_CACHE_DIR", str(tmp_path / "a-file"))
    resolution_cache.save("a", {}, b"graph")
    assert resolution_cache.load("a") is None
    assert len(resolve(NETWORK, None).canary) == 4
