"""The one adapter between plain callables and Ray: a session, tasks, Ray Data stages and Ray Train workers.

Nothing is computed here. Errors travel as rows, because Ray does not carry an exception's own class and fields
from a stage to the driver (checked in Ray 2.60: the cause of a UserCodeException is lost when it is pickled).
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import os
import pickle
import signal
import socket
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import (
    ActorPoolStrategy,
    DataContext,
    Dataset,
    Datasource,
    ExecutionResources,
    ReadTask,
    TaskPoolStrategy,
)
from ray.data.block import BlockMetadata
from ray.exceptions import RayError
from ray.util import metrics as ray_metrics

from engine.cluster_head import head_watched, require_answer, unreachable
from engine.errors import ClusterError, EngineError
from engine.extraction import (
    Answer,
    ExtractJob,
    PartEmbedder,
    Receipt,
    decode_part,
    read_parts,
    write_part,
)
from engine.labelling import LabelJob, PartLabeller, write_labelled
from engine.log_lines import json_log, use_json_log_on_worker
from engine.quiet_start import routine_left_out
from engine.run_metrics import Kind, Metric, RunMetrics
from engine.sizing import (
    READ_TASK_CPUS,
    SMALL_PART_BYTES,
    WRITE_TASK_CPUS,
    WRITER_BYTES,
    Machines,
    Sizing,
    WorkerShare,
)
from engine.worklist import WorkList

# A part must leave its task as soon as it is ready: at Ray's default of 128 MiB no part moved on for 25 s.
TARGET_BLOCK_BYTES = 1 << 20
# Ray 2.57 lowered the default from 10 to 2, which starves actors that start slowly.
DOWNSTREAM_CAPACITY_RATIO = 10.0
# One part is computed on while the other is unpacked, or its answer is put away; a GPU goes on with it at once.
PARTS_IN_FLIGHT_PER_ACTOR = 2
# Ray Data adds an actor once this share of the calls that its actors may compute at once is taken. Its default of 1.75
# counts on calls that wait in an actor, of which ours have none: no pool ever grew (Ray 2.60, 2026-11-23).
BUSY_SHARE_TO_GROW = 0.9
# Stages take turns in being idle. Ray's default of one second ended their processes meanwhile, and 8,000 images took
# 7 s longer for starting others (two cores, 2026-11-22).
IDLE_WORKER_MS = 600_000
# Ray's agents hear of metrics every 10 s, and forget a gauge that was not set for twice that (Ray 2.60).
EXPORT_EVERY_S = 2.0
TRAINING_RESTARTS = 3  # after as many lost workers a training is given up; its checkpoint stays
_FAILURE = "failure"

Stage = Callable[[pa.Table], pa.Table]
Report = Callable[[dict[str, Any]], None]


# ---------------------------------------------------------------- the session


@contextlib.contextmanager
def ray_session(
    address: str | None,
    local_cpus: float,
    metrics: RunMetrics | None = None,
    ends: contextlib.ExitStack | None = None,
) -> Iterator[None]:
    """Connect to a cluster, or start a local Ray and end it afterwards; a session of an earlier job is shared.

    Args:
        address: of a running cluster. None: the cluster this process was submitted to (RAY_ADDRESS), else a local Ray.
        local_cpus: logical CPUs of a local Ray; at least what the stages reserve, or they would wait for ever.
        metrics: of this run, handed on meanwhile; a local Ray ends with the block, so that nobody could ask it.
        ends: ends a session with a cluster, instead of this block: what comes after is seen, too, and shares it.

    Raises:
        ClusterError: no cluster answers there.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    _quieten()
    require_answer(address)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not (address or "").startswith("ray://"):  # Ray's client cannot send the hook (2.60)
        common |= _worker_logs()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with routine_left_out():
            if address:
                ray.init(address=address, **common)
            else:
                # "local": without it Ray joins a cluster that `ray start` made here, whatever the recipe says.
                cpus = max(1, math.ceil(local_cpus))
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    _system_config={"idle_worker_killing_time_threshold_ms": IDLE_WORKER_MS},
                    **common,
                )
    except (ConnectionError, ValueError, TimeoutError, RuntimeError) as error:
        raise unreachable(address, " ".join(str(error).split())[:500]) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(
                signal.SIGTERM, on_sigterm
            )  # ray.init puts its own there, which ends with exit code 15
    proxied = (address or "").startswith("ray://")  # the proxy holds the session
    with contextlib.ExitStack() as stack:
        stack.callback(ray.shutdown)
        if not proxied:
            stack.enter_context(head_watched(ray.get_runtime_context().gcs_address))
        if address and not proxied and metrics is not None:
            stack.enter_context(_metrics_exported(metrics))
        if address and ends is not None:
            ends.push(stack.pop_all())
        yield


def machines_of_cluster() -> Machines:
    """What the connected cluster has now."""
    nodes = [node["Resources"] for node in _nodes() if node["Alive"]]
    workers = [node for node in nodes if node.get("CPU")]
    if not workers:
        raise ClusterError(
            "the Ray cluster has no CPUs to work on",
            found=f"{len(nodes)} nodes without CPU resources",
            way_out="add worker nodes (a head with num-cpus 0 does no work)",
        )
    cpus = [node["CPU"] for node in workers]
    gpus = [node.get("GPU", 0.0) for node in nodes]
    memory = [node.get("memory", 0.0) for node in workers]
    return Machines(
        cpus=sum(cpus),
        gpus=sum(gpus),
        largest_node_cpus=max(cpus),
        largest_node_gpus=max(gpus),
        nodes=len(workers),
        memory=sum(memory),
        object_store=sum(node.get("object_store_memory", 0.0) for node in workers),
        largest_node_memory=max(memory),
        node_cpus=tuple(cpus),
        node_gpus=tuple(gpus),
    )


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


def _quieten() -> None:
    """Ray's own progress and INFO lines would drown ours; its other warnings stay."""
    # At every start of an actor that may start again Ray's C++ prints an error about its arguments (ray#53727), which
    # Ray Data keeps. What becomes of a run comes as an exception all the same.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # no FutureWarning about GPUs on CPU workers
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message="The maximum number of concurrent tasks for", category=UserWarning
    )
    # An actor computes on its GPU and unpacks on its core: both are meant.
    logging.getLogger("ray.data._internal.execution.operators.map_operator").addFilter(
        lambda record: "both num_cpus and num_gpus" not in record.getMessage()
    )
    # "Progress bars disabled", at every run. A filter, because Ray Data sets levels again when it starts.
    logging.getLogger("ray.data._internal.progress").addFilter(lambda _record: False)


def _worker_logs() -> dict[str, Any]:
    """Arguments of `ray.init` that let our code on workers log as this process does."""
    log = json_log()
    if log is None:
        return {}
    context = log.context

    def use() -> None:
        use_json_log_on_worker(context)

    return {"runtime_env": {"worker_process_setup_hook": use}}


# ---------------------------------------------------------------- metrics


@contextlib.contextmanager
def _metrics_exported(metrics: RunMetrics) -> Iterator[None]:
    """Hand a run's metrics to Ray's agent of this node while the block lasts, and once more at its end.

    The agent keeps counters after the driver has gone, and gauges for 20 s. What was handed over last leaves with
    `ray.shutdown`.
    """
    exporters: dict[Metric, Callable[..., None]] = {}

    def export() -> None:
        for change in metrics.changes():
            if change.metric not in exporters:
                exporters[change.metric] = _exporter(change.metric)
            exporters[change.metric](change.value, tags=change.labels)

    export()
    try:
        with _again_and_again(export, EXPORT_EVERY_S):
            yield
    finally:
        export()


def _exporter(metric: Metric) -> Callable[..., None]:
    """What takes a value and tags."""
    labels = ("verb", *metric.labels)
    export: Callable[..., None]
    if metric.kind == Kind.COUNTER:
        export = ray_metrics.Counter(metric.name, metric.says, labels).inc
    elif metric.kind == Kind.GAUGE:
        export = ray_metrics.Gauge(metric.name, metric.says, labels).set
    else:
        export = ray_metrics.Histogram(metric.name, metric.says, list(metric.buckets), labels).observe
    return export


# ---------------------------------------------------------------- one task


def run_on_worker(
    function: Callable[..., Any], *arguments: Any, num_cpus: float, num_gpus: float
) -> ObjectAnswer:
    """Run one plain function as a task where actors would run, to its end.

    Its process ends with it: else it would go on to read shards, with 0.4 GB of TensorFlow in it.

    Raises:
        EngineError: as the function raised it.
    """

    @ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=3, max_calls=1)
    def task() -> tuple[Any, bytes | None]:
        try:
            return function(*arguments), None
        except EngineError as error:
            return None, pickle.dumps(error)

    reference = task.remote()
    with _ray_errors_translated():
        ray.wait([reference])
        answer = ObjectAnswer(reference)
        answer.get()
    return answer


class ObjectAnswer:
    """What a task answered, for any process of the cluster."""

    def __init__(self, reference: Any) -> None:
        self._references = [reference]

    def get(self) -> Any:
        """The answer; raises EngineError as the task's function raised it."""
        answer, failure = ray.get(self._references[0])
        if failure is not None:
            raise pickle.loads(failure)
        return answer


# ---------------------------------------------------------------- Ray Data


def run_extract(
    job: ExtractJob,
    setup: Answer,
    groups: Sequence[WorkList],
    sizing: Sizing,
    labels: LabelJob | None = None,
) -> Generator[Receipt]:
    """Stream shards through readers, actors and writers; receipts come as parts are committed, in any order.

    Readers begin while actors still wait for the setup.

    Where there are fewer read tasks than cores for them, the readers only read, and other tasks decode.

    Args:
        labels: what actors label, too; None: nothing, embeddings are all that is made.

    Raises:
        EngineError: as the first stage to fail raised it; parts committed so far stay.
    """
    _set_data_context(sizing.bytes_in_flight)
    needs = sizing.footprint
    decoders = sizing.decoders(len(groups), sum(sum(group.sizes) for group in groups))
    dataset = ray.data.read_datasource(
        _ShardSource(ray.put(job), groups, apart=decoders > 0),
        compute=TaskPoolStrategy(size=min(sizing.decode_tasks, len(groups))),
        override_num_blocks=len(groups),
        num_cpus=READ_TASK_CPUS,
        memory=sizing.reader_bytes,
    )
    if decoders:
        dataset = dataset.map_batches(
            _decode_row,
            fn_args=(job,),
            compute=TaskPoolStrategy(size=decoders),
            num_cpus=READ_TASK_CPUS,
            memory=sizing.reader_bytes,
            **_ONE_PART_A_CALL,
        )
    dataset = dataset.map_batches(
        _EmbedActor,
        fn_constructor_args=(job, setup, sizing.writers == 0, labels),
        compute=ActorPoolStrategy(
            min_size=sizing.min_actors,
            max_size=sizing.actors,
            initial_size=sizing.start_actors,
            max_tasks_in_flight_per_actor=PARTS_IN_FLIGHT_PER_ACTOR,
            max_concurrent_calls_per_actor=PARTS_IN_FLIGHT_PER_ACTOR,
            enable_true_multi_threading=True,
        ),
        num_cpus=sizing.actor_cpus,
        num_gpus=sizing.actor_gpus or None,
        memory=needs.actor,
        **_ONE_PART_A_CALL,
    )
    if sizing.writers:
        dataset = dataset.map_batches(
            _write_row,
            fn_args=(job, labels),
            compute=TaskPoolStrategy(size=sizing.writers),
            num_cpus=WRITE_TASK_CPUS,
            memory=WRITER_BYTES,
            **_ONE_PART_A_CALL,
        )
    for receipt in _column(dataset, "receipt"):
        yield Receipt.from_json(receipt)


def run_read(job: ExtractJob, groups: Sequence[WorkList], readers: int) -> Generator[pa.Table]:
    """Read and decode shards on the cluster; parts come as they are ready, in any order, each as one row.

    May be called within a training worker: what is read goes straight to its process.

    Args:
        groups: shards of one read task each; none: nothing is read.
        readers: tasks at once.

    Raises:
        EngineError: as a reader raised it.
    """
    if not groups:
        return
    part = job.rows_per_part * job.backbone.input_size**2 * 3
    _set_data_context(4.0 * (readers + 1) * max(part, SMALL_PART_BYTES))
    dataset = ray.data.read_datasource(
        _ShardSource(ray.put(job), groups, apart=False),
        compute=TaskPoolStrategy(size=min(readers, len(groups))),
        override_num_blocks=len(groups),
        num_cpus=READ_TASK_CPUS,
    )
    batch: Any
    with _ray_errors_translated():
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for place in range(batch.num_rows):
                row = batch.slice(place, 1)
                failure = row[_FAILURE][0].as_py()
                if failure is not None:
                    raise pickle.loads(failure)
                yield row.drop_columns([_FAILURE])


def run_parts(
    actor: type[Any],
    constructor_args: tuple[Any, ...],
    items: Sequence[str],
    num_actors: int,
    actor_cpus: float,
) -> Generator[str]:
    """Spread items (JSON texts) over a pool of actors that answer each with a JSON text.

    Args:
        actor: a plain class; `actor(*constructor_args)(text) -> text`.
    """
    _set_data_context()
    dataset: Dataset = ray.data.from_arrow([pa.table({"item": [item]}) for item in items])
    dataset = dataset.map_batches(
        _ItemActor,
        fn_constructor_args=(actor, constructor_args),
        compute=ActorPoolStrategy(size=num_actors),
        num_cpus=actor_cpus,
        **_ONE_PART_A_CALL,
    )
    yield from _column(dataset, "answer")


_ONE_PART_A_CALL: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}


def _set_data_context(bytes_in_flight: float = math.inf) -> None:
    """What Ray Data is told once for each dataset.

    Args:
        bytes_in_flight: of rows between the stages at most. Ray's own limit is its object store: with a slow actor
            all 48 parts of a test were read ahead, with 15 parts' bytes as the limit 10 were.
    """
    context = DataContext.get_current()
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        object_store_memory=bytes_in_flight
    )
    context.target_max_block_size = TARGET_BLOCK_BYTES
    context.enable_progress_bars = False
    context.enable_rich_progress_bars = False
    context.downstream_capacity_backpressure_ratio = DOWNSTREAM_CAPACITY_RATIO
    context.autoscaling_config.actor_pool_util_upscaling_threshold = BUSY_SHARE_TO_GROW
    context.log_internal_stack_trace_to_stdout = False
    context.issue_detectors_config.detectors = []  # they measure a reused process, and blame the stage it runs now


class _ShardSource(Datasource):
    """One read task per group of shards; what a task yields is fixed by its group alone."""

    def __init__(self, job: ray.ObjectRef[ExtractJob], groups: Sequence[WorkList], apart: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._job, self._groups, self._apart = job, groups, apart

    def get_name(self) -> str:
        return "Shards"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(_Reader(self._job, group, self._apart), unknown) for group in self._groups]


class _Reader:
    """Picklable body of a read task; small, for there may be thousands: the job is fetched where it runs."""

    def __init__(self, job: ray.ObjectRef[ExtractJob], works: WorkList, apart: bool) -> None:
        self._job, self._works, self._apart = job, works, apart

    def __call__(self) -> Iterator[pa.Table]:
        try:
            for row in read_parts(ray.get(self._job), self._works, self._apart):
                yield _passed(row)
        except EngineError as error:
            yield _failed(error)


class _EmbedActor:
    """A failing start is kept and told with the first row: Ray would retry the actor and hide the message.

    Args:
        writes: write each part as well, while another is computed on.
    """

    def __init__(self, job: ExtractJob, setup: Answer, writes: bool, labels: LabelJob | None) -> None:
        self._stage: Stage | EngineError
        try:
            embed = PartEmbedder(job, setup) if labels is None else PartLabeller(job, labels, setup)
            self._stage = (lambda row: _written(job, labels, embed(row))) if writes else embed
        except EngineError as error:
            self._stage = error

    def __call__(self, row: pa.Table) -> pa.Table:
        return _guarded(self._stage, row)


def _decode_row(row: pa.Table, job: ExtractJob) -> pa.Table:
    return _guarded(lambda part: decode_part(job, part), row)


def _write_row(row: pa.Table, job: ExtractJob, labels: LabelJob | None) -> pa.Table:
    return _guarded(lambda part: _written(job, labels, part), row)


def _written(job: ExtractJob, labels: LabelJob | None, row: pa.Table) -> pa.Table:
    return write_part(job, row) if labels is None else write_labelled(job, labels, row)


class _ItemActor:
    def __init__(self, actor: type[Any], constructor_args: tuple[Any, ...]) -> None:
        self._actor: Any
        try:
            self._actor = actor(*constructor_args)
        except EngineError as error:
            self._actor = error
        gc.freeze()  # what is loaded now stays: looking through it again and again took 3 % of a scorer's time

    def __call__(self, row: pa.Table) -> pa.Table:
        if isinstance(self._actor, EngineError):
            return _failed(self._actor)
        try:
            return _passed(pa.table({"answer": [self._actor(row["item"][0].as_py())]}))
        except EngineError as error:
            return _failed(error)


def _guarded(stage: Stage | EngineError, row: pa.Table) -> pa.Table:
    """Run a stage on a row; a row that failed before is handed on, an EngineError becomes such a row."""
    if row[_FAILURE][0].is_valid:
        return row
    if isinstance(stage, EngineError):
        return _failed(stage)
    try:
        return _passed(stage(row.drop_columns([_FAILURE])))
    except EngineError as error:
        return _failed(error)


def _passed(row: pa.Table) -> pa.Table:
    return row.append_column(_FAILURE, pa.nulls(row.num_rows, pa.binary()))


def _failed(error: EngineError) -> pa.Table:
    return pa.table({_FAILURE: pa.array([pickle.dumps(error)], pa.binary())})


def _column(dataset: Dataset, name: str) -> Iterator[str]:
    """The texts of one column as they arrive; raises the first failure that arrives instead."""
    batch: Any
    with _ray_errors_translated():
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for failure in batch[_FAILURE].to_pylist():
                if failure is not None:
                    raise pickle.loads(failure)
            yield from batch[name].to_pylist()


@contextlib.contextmanager
def _ray_errors_translated() -> Iterator[None]:
    """A lost worker, or an exception that is not ours, in one message; what was committed until then stays."""
    try:
        yield
    except (RayError, RuntimeError) as error:
        raise _lost(error) from None


def _lost(error: Exception) -> ClusterError:
    return ClusterError(
        "a worker was lost, or broke on something unforeseen",
        found=str(error)[-2000:],
        way_out="run the same command again: what is done stays done; `ray logs` on the cluster says more",
    )


# ---------------------------------------------------------------- Ray Train


def run_training(
    function: Callable[[Report], dict[str, Any] | None],
    on_report: Report,
    workers: int,
    share: WorkerShare,
) -> dict[str, Any]:
    """Run training workers under Ray Train and return what the first one answers.

    A worker that is lost takes the others with it, and all start again: they find what they need in a checkpoint.

    Args:
        function: the whole training; runs in a process of its own for each worker. Picklable. What it reports
            (dicts of numbers) reaches `on_report` here. Of several workers each has TF_CONFIG in its environment.
        on_report: called in order, from another thread; all reports come before the answer.
        workers: how many.
        share: what each of them is given.

    Raises:
        EngineError: as the function raised it.
        ClusterError: workers were lost time and again.
    """
    # Not Ray's TensorflowTrainer: it imports TensorFlow here and in the controller (6 s each), and switches the
    # workers to Keras 2 (TF_USE_LEGACY_KERAS; Ray 2.60).
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.backend import Backend, BackendConfig
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Trainer(DataParallelTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Ray's would end this process with exit code 0 or 1 at Ctrl-C; Python's own raises here."""

        def _create_default_callbacks(self) -> list[Any]:
            """Without the cleaner of placement groups: where another Ray runs on the machine, it asks that one whether
            this training lives, hears no, and ends the workers (Ray 2.60). Ours end with the job."""
            callbacks = super()._create_default_callbacks()
            return [one for one in callbacks if not isinstance(one, PlacementGroupCleanerCallback)]

    class Introduced(Backend):
        def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
            """Tell the workers of each other, before TensorFlow runs in them."""
            addresses = worker_group.execute(_free_address)
            for rank in range(len(worker_group)):
                worker_group.execute_single(rank, _introduce, addresses, rank)

    class AmongSeveral(BackendConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return Introduced

    # Beside the driver, without which there is nobody to tell; ray.train.report would want a checkpoint each time.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mail = _Mail.options(num_cpus=0, scheduling_strategy=here).remote()  # type: ignore[attr-defined]

    def loop() -> tuple[dict[str, Any] | None, bytes | None]:
        failure = ray.get(mail.failure.remote())
        if failure is not None:  # of workers before these: it would come again
            return None, failure
        try:
            return function(lambda report: ray.get(mail.put.remote(report))), None
        except EngineError as error:
            failure = pickle.dumps(error)
        except _FAULTS:
            way_out = "a fault of the code, a custom head's perhaps: the last lines say where"
            told = ClusterError(
                "training: a worker broke", found=traceback.format_exc()[-2000:], way_out=way_out
            )
            failure = pickle.dumps(told)
        if workers > 1:
            ray.get(mail.fail.remote(failure))
            raise _WorkerFailed  # the others wait for this one, until Ray ends them
        return None, failure

    def hand_on_reports() -> None:
        for report in ray.get(mail.take.remote()):
            on_report(report)

    resources = {"CPU": share.cpus} | ({"GPU": share.gpus} if share.gpus else {})
    with tempfile.TemporaryDirectory(prefix="engine-train-") as scratch, _ray_errors_translated():
        trainer: Any = Trainer(
            loop,
            backend_config=AmongSeveral() if workers > 1 else BackendConfig(),
            scaling_config=ScalingConfig(
                num_workers=workers, use_gpu=share.gpus > 0, resources_per_worker=resources
            ),
            run_config=RunConfig(
                storage_path=scratch,
                name=f"fit-{int(time.time())}",
                failure_config=FailureConfig(max_failures=TRAINING_RESTARTS),
            ),
        )
        try:
            with _again_and_again(hand_on_reports, every_s=0.1):
                answer, failure = trainer.fit().return_value
        except TrainingFailedError as error:  # neither a RayError nor a RuntimeError
            failure = ray.get(mail.failure.remote())
            if failure is None:
                raise _lost(error) from None
        hand_on_reports()
    if failure is not None:
        raise pickle.loads(failure)
    result: dict[str, Any] = answer
    return result


# What comes again however often a worker is started; what a lost neighbour causes is of other kinds.
_FAULTS = (
    TypeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    LookupError,
    ImportError,
    NotImplementedError,
)


class _WorkerFailed(Exception):
    """Ends a worker whose failure has been told."""


@ray.remote
class _Mail:
    """What training workers have to tell the driver."""

    def __init__(self) -> None:
        self._reports: list[dict[str, Any]] = []
        self._failure: bytes | None = None

    def put(self, report: dict[str, Any]) -> None:
        self._reports.append(report)

    def take(self) -> list[dict[str, Any]]:
        """All since the last time."""
        taken, self._reports = self._reports, []
        return taken

    def fail(self, failure: bytes) -> None:
        """An EngineError, pickled: no use in starting again."""
        self._failure = failure

    def failure(self) -> bytes | None:
        return self._failure


def _free_address() -> str:
    """A port of this worker's machine that nobody listens on now."""
    host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, 0))
        port = listener.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _introduce(addresses: list[str], rank: int) -> None:
    os.environ["TF_CONFIG"] = json.dumps(
        {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
    )


@contextlib.contextmanager
def _again_and_again(function: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call a function in a thread, which ends before this does: Ray kills a process that uses it after
    `ray.shutdown` (exit code 1, not a word)."""
    over = threading.Event()

    def run() -> None:
        with contextlib.suppress(RayError):
            while not over.wait(every_s):
                function()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
