from __future__ import annotations

import subprocess
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from engine.backbones.base import Backbone
from engine.backbones.fetch import cache_folder
from engine.backbones.fingerprint import tensor_digest
from engine.backbones.kinds import SavedModelConfig, build_backbone, describe_backbone
from engine.config import check_recipe
from engine.errors import RecipeError, WeightsError
from engine.finetuning.kinds import require_learning_network
from engine.runtimes.freeze import freeze
from engine.runtimes.kinds import TensorFlowRuntimeConfig
from engine.runtimes.tensorflow import TensorFlowRuntime
from engine.storage import StorageConfig, open_store

SIDE = 20
PIXELS = np.random.default_rng(2).integers(0, 256, (3, SIDE, SIDE, 3)).astype(np.uint8)


def config_of(path: Path | str, **fields: Any) -> SavedModelConfig:
    stated = {"kind": "saved_model", "weights": str(path), "input_size": SIDE, "scaling": "unit"}
    return check_recipe(SavedModelConfig, stated | fields)


def opened(path: Path | str, **fields: Any) -> Backbone:
    return build_backbone(config_of(path, **fields), StorageConfig())


class HubModule(tf.Module):
    """As TensorFlow Hub's feature vectors: pixels 0..1 in, several outputs, one of them named default; BatchNorms that
    are one operation, a branch, a nested function."""

    def __init__(self) -> None:
        super().__init__()
        random = np.random.default_rng(4)
        self.kernel = tf.Variable(random.uniform(-1, 1, (3, 3, 3, 7)).astype(np.float32), name="kernel")
        self.depthwise = tf.Variable(random.uniform(-1, 1, (3, 3, 7, 1)).astype(np.float32), name="kernel")
        self.norms = [tf.Variable(random.uniform(0.5, 1, 7).astype(np.float32)) for _ in range(8)]
        self.extra = tf.constant([1.0, 2.0, 3.0])

    @tf.function
    def inner(self, x: tf.Tensor, first: int) -> tf.Tensor:
        scale, offset, mean, variance = self.norms[first : first + 4]
        normed, *_ = tf.raw_ops.FusedBatchNormV3(
            x=x, scale=scale, offset=offset, mean=mean, variance=variance, epsilon=1e-3, is_training=False
        )
        return normed

    @tf.function(input_signature=[tf.TensorSpec((None, SIDE, SIDE, 3), tf.float32, name="images")])
    def __call__(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        if tf.reduce_min(images) < 0:
            images = -images
        x = self.inner(tf.nn.conv2d(images * self.extra, self.kernel, 2, "SAME"), 0)
        x = self.inner(tf.nn.depthwise_conv2d(x, self.depthwise, (1, 1, 1, 1), "SAME"), 4)
        return {"default": tf.reduce_mean(tf.nn.relu6(x), (1, 2)), "block": x}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HubModule]:
    folder, module = tmp_path_factory.mktemp("hub") / "module", HubModule()
    tf.saved_model.save(module, folder, signatures=module.__call__.get_concrete_function())
    return folder, module


def test_feature_vector_of_a_hub_module_is_what_tensorflow_computes(hub: tuple[Path, HubModule]) -> None:
    folder, module = hub
    backbone = opened(folder)
    wanted = np.asarray(module(tf.constant(PIXELS / np.float32(255)))["default"])
    scaled = np.asarray(backbone.scaling.apply(PIXELS.astype(np.float32)), np.float32)
    np.testing.assert_allclose(np.asarray(backbone.network(scaled)), wanted, rtol=1e-5, atol=1e-6)
    assert (backbone.width, backbone.network.count_params()) == (7, 3 * 3 * 3 * 7 + 3 * 3 * 7 + 8 * 7)
    graph = freeze(backbone.network, backbone.scaling, SIDE)
    found = TensorFlowRuntime(TensorFlowRuntimeConfig(), graph, None, False).run(PIXELS)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_another_output_is_a_feature_map_that_is_pooled(hub: tuple[Path, HubModule]) -> None:
    folder, module = hub
    scaled = PIXELS / np.float32(255)
    wanted = np.asarray(module(tf.constant(scaled))["block"]).max(axis=(1, 2))
    backbone = opened(folder, output="block", pooling="max")
    np.testing.assert_allclose(np.asarray(backbone.network(scaled)), wanted, rtol=1e-5, atol=1e-6)
    assert backbone.architecture != opened(folder).architecture
    with pytest.raises(RecipeError, match=r"backbone\.output[\s\S]*block, default"):
        opened(folder, output="features")


def test_batchnorms_that_are_one_operation_become_part_of_the_convolutions(tmp_path: Path) -> None:
    class Straight(HubModule):
        @tf.function(input_signature=[tf.TensorSpec((None, None, None, 3), tf.float32)])
        def __call__(self, images: tf.Tensor) -> tf.Tensor:
            x = self.inner(tf.nn.conv2d(images, self.kernel, 2, "SAME"), 0)
            x = self.inner(tf.nn.depthwise_conv2d(x, self.depthwise, (1, 1, 1, 1), "SAME"), 4)
            return tf.reduce_mean(x, (1, 2))

    module = Straight()
    tf.saved_model.save(module, tmp_path / "m", signatures=module.__call__.get_concrete_function())
    backbone = opened(tmp_path / "m", scaling="none")
    frozen = freeze(backbone.network, backbone.scaling, SIDE)
    graph = tf.compat.v1.GraphDef.FromString(frozen.graph_def)
    counts = Counter(node.op for node in graph.node)
    assert {"Conv2D": 1, "DepthwiseConv2dNative": 1, "BiasAdd": 2}.items() <= counts.items()
    assert not {"Mul", "AddV2", "FusedBatchNormV3"} & set(counts)
    found = TensorFlowRuntime(TensorFlowRuntimeConfig(), frozen, None, False).run(PIXELS)
    wanted = np.asarray(module(tf.constant(PIXELS.astype(np.float32))))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


def test_saved_model_of_tensorflow_1_is_read(tmp_path: Path) -> None:
    graph = tf.Graph()
    with graph.as_default(), tf.compat.v1.Session(graph=graph) as session:
        images = tf.compat.v1.placeholder(tf.float32, (None, SIDE, SIDE, 3), name="images")
        kernel = tf.compat.v1.get_variable("kernel", (3, 3, 3, 5), use_resource=False)
        bias = tf.compat.v1.get_variable(
            "bias", initializer=tf.constant([1.0, 2, 3, 4, 5]), use_resource=True
        )
        features = tf.nn.bias_add(tf.nn.conv2d(images, kernel, 2, "SAME"), bias)
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.saved_model.simple_save(
            session, str(tmp_path / "old"), {"images": images}, {"features": features}
        )
        wanted = session.run(tf.reduce_mean(features, (1, 2)), {images: PIXELS / np.float32(255)})
    found = np.asarray(opened(tmp_path / "old").network(PIXELS / np.float32(255)))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_archive_is_the_same_as_its_folder(hub: tuple[Path, HubModule], tmp_path: Path) -> None:
    folder, _ = hub
    with tarfile.open(tmp_path / "module.tar.gz", "w:gz") as tar:
        tar.add(folder, arcname=".")
    left, right = opened(folder), opened(tmp_path / "module.tar.gz")
    assert tensor_digest(left.network) == tensor_digest(right.network)
    assert left.architecture == right.architecture
    with pytest.raises(WeightsError, match="is not the file the recipe means"):
        opened(tmp_path / "module.tar.gz", weights_sha256="0" * 64)


def test_folder_is_fetched_from_a_store_once(
    hub: tuple[Path, HubModule], s3_uri: str, s3_config: StorageConfig
) -> None:
    folder, _ = hub
    store = open_store(f"{s3_uri}/hub", s3_config)
    for path in ("saved_model.pb", "variables/variables.index", "variables/variables.data-00000-of-00001"):
        store.write(path, (folder / path).read_bytes())
    store.write("assets/secret.txt", b"not fetched")
    config = config_of(f"{s3_uri}/hub")
    digests = {tensor_digest(build_backbone(config, s3_config).network) for _ in range(2)}
    assert digests == {tensor_digest(opened(folder).network)}
    assert not list(cache_folder().rglob("secret.txt"))


def test_archive_writes_nothing_outside_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "content").write_bytes(b"x")
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for name in ("../evil", "/tmp/evil-of-test", "variables/../../evil", "saved_model.pb"):
            tar.add(tmp_path / "content", arcname=name)
    before = {path for path in cache_folder().rglob("*") if "evil" in path.name}
    with pytest.raises(WeightsError, match="is not a network that can be read"):
        opened(tmp_path / "bad.tar")
    assert {path for path in cache_folder().rglob("*") if "evil" in path.name} == before
    assert not Path("/tmp/evil-of-test").exists()


def module_that(does: Any) -> tf.Module:
    """A module whose function also does something else."""
    module = tf.Module()
    module.factor = tf.Variable(2.0)

    @tf.function(input_signature=[tf.TensorSpec((None, SIDE, SIDE, 3), tf.float32)])
    def function(images: tf.Tensor) -> tf.Tensor:
        with tf.control_dependencies([does()]):
            return tf.reduce_mean(images * module.factor, (1, 2))

    module.function = function
    return module


@pytest.mark.parametrize(
    ("does", "operation"),
    [
        (lambda: tf.io.write_file("/tmp/written-by-a-network", "x"), "WriteFile"),
        (lambda: tf.io.read_file("/etc/hostname"), "ReadFile"),
        (lambda: tf.py_function(lambda: 1.0, [], tf.float32), "EagerPyFunc"),
        (
            lambda: tf.cond(tf.constant(True), lambda: tf.random.normal(()), lambda: 0.0),
            "RandomStandardNormal",
        ),
        (lambda: tf.print("x"), "PrintV2"),
    ],
)
def test_operations_that_do_more_than_compute_are_refused_by_name(
    does: Any, operation: str, tmp_path: Path
) -> None:
    module = module_that(does)
    tf.saved_model.save(module, tmp_path / "m", signatures=module.function.get_concrete_function())
    with pytest.raises(WeightsError) as caught:
        opened(tmp_path / "m")
    assert operation in str(caught.value)
    assert not Path("/tmp/written-by-a-network").exists()


def test_initialisers_of_a_file_are_not_run(tmp_path: Path) -> None:
    """TensorFlow's own loader fills lookup tables, and would run whatever else the file has it run."""
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(["a"], [1.0]), 0.0)
    module = module_that(tf.no_op)
    module.table = table
    tf.saved_model.save(module, tmp_path / "m", signatures=module.function.get_concrete_function())
    assert opened(tmp_path / "m").width == 3


def rewritten(folder: Path, change: Any) -> None:
    """The same SavedModel after `change(meta graph, its restoring function)`."""
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((folder / "saved_model.pb").read_bytes())
    (meta_graph,) = saved.meta_graphs
    restore = meta_graph.saver_def.restore_op_name.partition(":")[0]
    (call,) = (node for node in meta_graph.graph_def.node if node.name == restore)
    library = meta_graph.graph_def.library.function
    (function,) = (one for one in library if one.signature.name == call.attr["f"].func.name)
    change(meta_graph, function)
    (folder / "saved_model.pb").write_bytes(saved.SerializeToString())


def text_constant(function: Any, name: str, text: str) -> None:
    node = function.node_def.add(name=name, op="Const")
    node.attr["dtype"].type = tf.string.as_datatype_enum
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(text))


def test_function_that_nobody_calls_cannot_take_the_place_of_one(tmp_path: Path) -> None:
    """TensorFlow's optimizer swaps functions that say they implement the same."""
    module, target = module_that(tf.no_op), tmp_path / "written by a network"
    tf.saved_model.save(module, tmp_path / "m", signatures=module.function.get_concrete_function())

    def add_a_writing_twin(meta_graph: Any, restoring: Any) -> None:
        twin = meta_graph.graph_def.library.function.add()
        twin.CopyFrom(restoring)
        twin.signature.name = "twin"
        text_constant(twin, "path", str(target))
        text_constant(twin, "text", "x")
        twin.node_def.add(name="write", op="WriteFile", input=["path:output:0", "text:output:0"])
        twin.control_ret["write"] = "write"
        twin.signature.control_output.append("write")
        twin.signature.is_stateful = True
        for function, device in ((restoring, b"GPU"), (twin, b"CPU")):
            function.attr["api_implements"].s = b"restoring"
            function.attr["api_preferred_device"].s = device
        for node in meta_graph.graph_def.node:
            if node.op == "StatefulPartitionedCall":
                node.device = "/device:CPU:0"

    rewritten(tmp_path / "m", add_a_writing_twin)
    assert opened(tmp_path / "m").width == 3
    assert not target.exists()


def test_variables_come_from_the_checkpoint_beside_it_wherever_the_file_points(tmp_path: Path) -> None:
    for name, factor in (("own", 2.0), ("other", 7.0)):
        module = module_that(tf.no_op)
        module.factor.assign(factor)
        tf.saved_model.save(module, tmp_path / name, signatures=module.function.get_concrete_function())

    def point_elsewhere(_: Any, restoring: Any) -> None:
        text_constant(restoring, "elsewhere", str(tmp_path / "other/variables/variables"))
        for node in restoring.node_def:
            if node.op == "RestoreV2":
                node.input[0] = "elsewhere:output:0"

    rewritten(tmp_path / "own", point_elsewhere)
    (factor,) = opened(tmp_path / "own").network.weights
    assert float(factor.value) == 2.0


def test_archive_that_claims_more_than_it_holds_is_not_unpacked(tmp_path: Path) -> None:
    with (tmp_path / "saved_model.pb").open("wb") as file:
        file.truncate(3 << 30)
    command = ["tar", "--sparse", "-cf", str(tmp_path / "m.tar"), "-C", str(tmp_path), "saved_model.pb"]
    subprocess.run(command, check=True)
    assert (tmp_path / "m.tar").stat().st_size < 1 << 20
    with pytest.raises(WeightsError, match="which is not unpacked"):
        opened(tmp_path / "m.tar")


def test_what_is_not_there_is_said(hub: tuple[Path, HubModule], tmp_path: Path) -> None:
    folder, _ = hub
    with pytest.raises(WeightsError, match=r"no SavedModel at[\s\S]*saved_model\.pb"):
        opened(tmp_path)
    with pytest.raises(RecipeError, match=r"backbone\.signature[\s\S]*serving_default"):
        opened(folder, signature="serving_defualt")
    with pytest.raises(RecipeError, match="takes images of 20 x 20 pixels"):
        opened(folder, input_size=32)
    (tmp_path / "saved_model.pb").write_bytes(b"\xff\xff no protobuf")
    with pytest.raises(WeightsError, match="is not a network that can be read"):
        opened(tmp_path)


def test_variables_that_are_gone_are_noticed(hub: tuple[Path, HubModule], tmp_path: Path) -> None:
    folder, _ = hub
    (tmp_path / "saved_model.pb").write_bytes((folder / "saved_model.pb").read_bytes())
    with pytest.raises(WeightsError, match="is not a network that can be read"):
        opened(tmp_path)


def test_one_cannot_be_cut_fine_tuned_or_checked_by_a_digest_of_a_folder(hub: tuple[Path, HubModule]) -> None:
    folder, _ = hub
    with pytest.raises(RecipeError, match="no layers to cut at"):
        config_of(folder, layer="x")
    with pytest.raises(RecipeError, match="of a folder there is none"):
        config_of(folder, weights_sha256="0" * 64)
    with pytest.raises(RecipeError, match="a saved_model cannot be fine-tuned"):
        require_learning_network(config_of(folder))


def test_it_is_described_from_its_folder(hub: tuple[Path, HubModule]) -> None:
    described = describe_backbone(f"{hub[0]}/", input_size=SIDE)
    assert (described["kind"], described["width"], described["trainable"]) == ("saved_model", 7, 0)
