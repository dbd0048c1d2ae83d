from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

from engine.backbones.fetch import cache_folder, fetch_weights
from engine.backbones.fingerprint import tensor_digest
from engine.backbones.weights import load_weights, python_random_kept, randomise
from engine.errors import RecipeError, WeightsError
from engine.storage import StorageConfig, open_store
from tests.backbones.small_networks import ROOT, fill_with_primes, small_network, tensors

# Keras 3.15 saves with NumPy 2.4 through an __array__ that does not know `copy` yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENGINE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


def fetched_files(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_file_is_fetched_once_and_again_when_the_object_changed(tmp_path: Path, own_cache: Path) -> None:
    source = tmp_path / "w.h5"
    source.write_bytes(b"first")
    first = fetch_weights(str(source), None, StorageConfig())
    inode = first.stat().st_ino
    assert fetch_weights(f"file://{source}", None, StorageConfig()) == first
    assert first.stat().st_ino == inode
    source.write_bytes(b"other")
    os.utime(source, ns=(1, 1))
    second = fetch_weights(str(source), None, StorageConfig())
    assert (first.read_bytes(), second.read_bytes()) == (b"first", b"other")
    assert len(fetched_files(own_cache)) == 2


def test_cached_file_of_the_wrong_size_is_fetched_again(tmp_path: Path) -> None:
    source = tmp_path / "w.h5"
    source.write_bytes(b"whole")
    cached = fetch_weights(str(source), None, StorageConfig())
    cached.write_bytes(b"who")
    assert fetch_weights(str(source), None, StorageConfig()).read_bytes() == b"whole"


def test_name_with_a_space_is_found_by_file_uri_and_by_path(tmp_path: Path) -> None:
    source = tmp_path / "my weights.h5"
    source.write_bytes(b"x")
    assert fetch_weights(f"file://{tmp_path}/my%20weights.h5", None, StorageConfig()).read_bytes() == b"x"
    assert fetch_weights(str(source), None, StorageConfig()).read_bytes() == b"x"


def test_file_in_an_object_store_is_fetched(s3_uri: str, s3_config: StorageConfig) -> None:
    open_store(s3_uri, s3_config).write("models/w.h5", b"from the store")
    assert fetch_weights(f"{s3_uri}/models/w.h5", None, s3_config).read_bytes() == b"from the store"


def test_digest_that_differs_is_refused_with_both(tmp_path: Path, own_cache: Path) -> None:
    source = tmp_path / "w.h5"
    source.write_bytes(b"content")
    right = hashlib.sha256(b"content").hexdigest()
    assert fetch_weights(str(source), right, StorageConfig()).read_bytes() == b"content"
    with pytest.raises(WeightsError) as caught:
        fetch_weights(str(source), "0" * 64, StorageConfig())
    assert right in str(caught.value)
    assert "0" * 64 in str(caught.value)
    assert fetched_files(own_cache) == []


def test_missing_file_is_refused_with_its_uri(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"backbone.weights: nothing at .*/no.h5"):
        fetch_weights(f"{tmp_path}/no.h5", None, StorageConfig())


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="names a folder"):
        fetch_weights(f"{tmp_path}/", None, StorageConfig())


def test_processes_that_fetch_at_once_get_one_whole_file(tmp_path: Path, own_cache: Path) -> None:
    source = tmp_path / "w.h5"
    source.write_bytes(bytes(range(256)) * 40_000)
    code = (
        "import hashlib, sys; from engine.backbones.fetch import fetch_weights;"
        "from engine.storage import StorageConfig, open_store;"
        "print(hashlib.sha256(fetch_weights(sys.argv[1], None, StorageConfig()).read_bytes()).hexdigest())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(source)], cwd=ROOT, stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    digests = {process.communicate(timeout=60)[0].decode().strip() for process in processes}
    assert digests == {hashlib.sha256(source.read_bytes()).hexdigest()}
    assert len(fetched_files(own_cache)) == 1


def test_cache_that_cannot_be_made_says_which_variable_moves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "occupied").write_text("a file")
    monkeypatch.setenv("ENGINE_CACHE_DIR", str(tmp_path / "occupied"))
    with pytest.raises(WeightsError, match="set ENGINE_CACHE_DIR"):
        cache_folder()


@pytest.mark.parametrize("name", ["w.weights.h5", "w.h5", "w.keras"])
def test_every_format_of_keras_is_read_bit_for_bit(tmp_path: Path, name: str) -> None:
    saved, fresh = small_network(), small_network()
    fill_with_primes(saved)
    (saved.save_weights if ".weights." in name else saved.save)(tmp_path / name)
    load_weights(fresh, tmp_path / name, name)
    assert [x.tobytes() for x in tensors(fresh)] == [x.tobytes() for x in tensors(saved)]


def test_old_format_under_the_new_ending_is_told_by_its_content(tmp_path: Path) -> None:
    saved, fresh = small_network(), small_network()
    fill_with_primes(saved)
    saved.save(tmp_path / "w.h5")
    (tmp_path / "w.h5").rename(tmp_path / "w.weights.h5")  # as Keras 2 wrote it
    load_weights(fresh, tmp_path / "w.weights.h5", "w.weights.h5")
    assert [x.tobytes() for x in tensors(fresh)] == [x.tobytes() for x in tensors(saved)]


def test_classifier_that_only_the_file_has_is_left_out(tmp_path: Path) -> None:
    saved, fresh = small_network(), small_network()
    fill_with_primes(saved)
    top = keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(saved.output))
    keras.Model(saved.input, top).save_weights(tmp_path / "top.weights.h5")
    load_weights(fresh, tmp_path / "top.weights.h5", "top")
    assert [x.tobytes() for x in tensors(fresh)] == [x.tobytes() for x in tensors(saved)]


@pytest.mark.parametrize("name", ["w.weights.h5", "w.h5", "w.keras"])
def test_weights_of_another_network_are_refused_with_what_fits(tmp_path: Path, name: str) -> None:
    other = small_network(width=11)
    (other.save_weights if ".weights." in name else other.save)(tmp_path / name)
    with pytest.raises(WeightsError) as caught:
        load_weights(small_network(), tmp_path / name, f"s3://b/{name}")
    assert f"s3://b/{name} does not fit small" in str(caught.value)
    assert "wanted:  7 tensors with 197 numbers" in str(caught.value)


def test_file_with_numbers_that_are_not_finite_is_refused_naming_the_tensor(tmp_path: Path) -> None:
    broken = small_network()
    broken.get_layer("last_conv").set_weights([np.full((1, 1, 5, 7), np.nan), np.zeros(7)])
    broken.save_weights(tmp_path / "w.weights.h5")
    with pytest.raises(
        WeightsError, match="1 tensors absent from it or not finite, such as last_conv/kernel"
    ):
        load_weights(small_network(), tmp_path / "w.weights.h5", "w")


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04"])
def test_file_that_is_no_weights_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.h5").write_bytes(content)
    with pytest.raises(WeightsError, match="does not fit small"):
        load_weights(small_network(), tmp_path / "w.h5", "w.h5")


def test_config_inside_a_keras_file_is_never_looked_at(tmp_path: Path) -> None:
    saved, fresh = small_network(), small_network()
    fill_with_primes(saved)
    saved.save(tmp_path / "good.keras")
    evil = {"class_name": "Lambda", "config": {"function": "__import__('os').mkdir('ran')"}}
    with (
        zipfile.ZipFile(tmp_path / "good.keras") as good,
        zipfile.ZipFile(tmp_path / "evil.keras", "w") as archive,
    ):
        for name in good.namelist():
            archive.writestr(name, json.dumps(evil) if name == "config.json" else good.read(name))
    load_weights(fresh, tmp_path / "evil.keras", "evil")
    assert [x.tobytes() for x in tensors(fresh)] == [x.tobytes() for x in tensors(saved)]


def test_random_weights_are_these_numbers_for_ever() -> None:
    network = small_network()
    randomise(network, 17)
    kernel, *_, last_kernel, last_bias = tensors(network)
    assert kernel.ravel()[:3].tolist() == [0.23004986345767975, -0.22601793706417084, 0.038496363908052444]
    limit = np.sqrt(3 / 27)  # 3 x 3 positions, 3 channels in
    assert np.abs(kernel).max() <= limit
    assert kernel.std() == pytest.approx(limit / np.sqrt(3), rel=0.1)
    assert last_kernel.shape == (1, 1, 5, 7)
    assert last_bias.tolist() == [0.0] * 7


def test_random_weights_have_this_digest_in_every_process_and_another_for_another_seed() -> None:
    digests = []
    for seed in (1, 1, 2):
        network = small_network()
        randomise(network, seed)
        digests.append(tensor_digest(network))
        random.random()  # what the process drew before must not matter
    assert digests[0] == digests[1] == "8960bdc4799713921d69461cebc45777607a2e2ebf587bc28bb6dbb325a55450"
    assert digests[2] != digests[0]


def test_random_numbers_of_the_process_go_on_as_if_nothing_was_built() -> None:
    random.seed(3)
    expected = random.Random(3).random()
    with python_random_kept():
        small_network()
    assert random.random() == expected
