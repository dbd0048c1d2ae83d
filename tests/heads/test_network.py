"""Where a head's network is computed: on the CPU, whatever device the process is at work on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.embedding_tables import publish_mlp

ROOT = Path(__file__).parents[2]

# Logical devices must exist before TensorFlow runs, so that this is a process of its own; its second CPU stands for a
# GPU that other work goes to.
ANSWER = """
import sys

import numpy as np
import tensorflow as tf

from engine.heads.bundle import open_bundle
from engine.predictor import Predictor
from engine.storage import open_store

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
tf.debugging.set_log_device_placement(True)
with tf.device("CPU:1"):
    predictor = Predictor(open_bundle(open_store(sys.argv[1])), 2)
    assert np.isfinite(predictor.probabilities(np.ones((3, 5), np.float32))).all()
"""


def test_a_network_that_answers_is_on_the_cpu_where_other_work_is_elsewhere(tmp_path: Path) -> None:
    publish_mlp(tmp_path / "bundle", 5, ("ant", "bee"))
    command = [sys.executable, "-c", ANSWER, str(tmp_path / "bundle")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "0"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    places = re.findall(r"hidden_0\S*/\w*MatMul: \S+ \S+(CPU:\d)", ended.stdout + ended.stderr)
    assert set(places) == {"CPU:0"}, ended.stderr[-3000:]
