"""The training loop of all models. `train` reads from top to bottom; a `Task` says what is trained, and on what."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from como_jax import hosts
from como_jax.data.identity import Identity
from como_jax.nn.model_def import ModelDef, Params
from como_jax.spec.normalization import Scales
from como_jax.spec.sections import fields_of
from como_jax.training import sharding
from como_jax.training.checkpoint import Checkpointer
from como_jax.training.models import Unit
from como_jax.training.monitors import Progress, StepTrace, StopRequest, Watch
from como_jax.training.run import NOTHING_ELSE, Allowed, check_workdir, claim_workdir
from como_jax.training.run_data import check_data, write_data
from como_jax.training.train_state import TrainState, create_state, evaluation_params
from como_jax.training.train_step import Training, build_training
from como_jax.training.writers import MetricWriter, NullWriter

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Task:
    """All that differs between one kind of training and another.

    Attributes:
      model: what is trained.
      batches: this host's endless stream of batches, as dictionaries of NumPy arrays.
      to_batch: makes the argument of the model's loss from such a dictionary.
      initialise: puts parameters from elsewhere into the state of a fresh run.
      evaluate: takes all parameters, the step and the writer; writes metrics, and returns those that are to be shown.
      unit: what is counted in the rates that are shown.
      data_lines: lines that describe the data.
      prepare: writes what else belongs into the directory of a run, before the first step.
      identify: gives the identity of every dataset by its directory; it is called on the first host alone.
      scales: what normalises the numbers of the datasets.
      watch: gets every step and its metrics, on the first host alone.
    """

    model: ModelDef
    batches: grain.IterDataset
    to_batch: Callable[[dict[str, Any]], Any]
    initialise: Callable[[TrainState], TrainState]
    evaluate: Callable[[Params, int, MetricWriter | NullWriter], dict[str, float]]
    unit: Unit
    data_lines: Sequence[str] = ()
    prepare: Callable[[], None] = lambda: None
    identify: Callable[[], Mapping[str, Identity]] = dict
    scales: Scales = dataclasses.field(default_factory=dict)
    watch: Watch | None = None


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """The `train` section of a recipe: how a step is computed, and when a run logs, evaluates, saves and ends.

    Attributes:
      num_steps: updates of the whole run; the learning-rate schedule ends there.
      stop_after: updates after which this process saves and stops, to be resumed later; 0 for `num_steps`.
      accumulation: microbatches whose gradients are averaged before one update.
      dtype: "bfloat16" or "float32", of what is computed; parameters and reductions are float32.
      remat: what is computed again for the gradient instead of being kept: "none", "dots" (all but matrix products) or
        "full".
      attention: "xla", or "cudnn", fused kernels of a GPU, for bfloat16 and the train step alone.
      log_every, evaluate_every, checkpoint_every: in steps; with 0, only the last step is evaluated or saved.
      keep_checkpoints: the newest so many are kept.
    """

    num_steps: int = 100_000
    stop_after: int = 0
    accumulation: int = 1
    dtype: str = "bfloat16"
    remat: str = "none"
    attention: str = "xla"
    log_every: int = 50
    evaluate_every: int = 5000
    checkpoint_every: int = 5000
    keep_checkpoints: int = 2

    @property
    def last_step(self) -> int:
        """The step after which this process stops."""
        return min(self.num_steps, self.stop_after or self.num_steps)

    def log_due(self, step: int) -> bool:
        """Whether the metrics of this step are written."""
        return _due(step, self.log_every) or step == self.num_steps

    def evaluation_due(self, step: int) -> bool:
        """Whether the state after this step is evaluated."""
        return _due(step, self.evaluate_every) or step == self.num_steps

    def checkpoint_due(self, step: int) -> bool:
        """Whether the state after this step is saved."""
        return _due(step, self.checkpoint_every) or step == self.last_step


def train(
    task: Task, config: ConfigDict, workdir: epath.PathLike, mesh: Mesh, allowed: Allowed = NOTHING_ELSE
) -> TrainState:
    """Runs or resumes a training run, until its last step, SIGTERM or a number that is not finite.

    A step that is both saved and evaluated is saved first. On SIGTERM the run saves and stops; an evaluation that is
    due then is left to the run that resumes it. Returns the last state, which is also saved.

    Args:
      task: what is trained, and on what.
      config: with the sections `train`, `optim`, `mesh` and `data`; no size is 0 any more (see `resolve`).
      workdir: gets config.json, data.json, metrics.jsonl, checkpoints/, tensorboard/ and images/.
      mesh: the devices.
      allowed: what may differ from what the run began with.

    Raises:
      UsageError: config, data and workdir do not fit together.
      NonFiniteError: a loss or gradient is not finite; the last checkpoint is from before that step.
    """
    datasets: Mapping[str, Identity] = {}
    with hosts.in_step():
        if hosts.is_first():
            check_workdir(workdir, config, allowed)
            datasets = task.identify()
            if not allowed.other_data:
                check_data(workdir, datasets)
    settings = TrainSettings(**fields_of(TrainSettings, config.train))
    training, batches = build_training(config, task.model, mesh), iter(task.batches)
    with Checkpointer(workdir, keep=settings.keep_checkpoints) as checkpointer:
        resumed = checkpointer.latest_step() is not None
        state = checkpointer.restore(training.abstract, batches) if resumed else _fresh_state(task, config, training)
        step = int(state.step)
        with hosts.in_step():
            # Now that there is a state, so that a command which fails before can be corrected and run again.
            writer = _open_run(task, config, workdir, step, datasets, allowed) if hosts.is_first() else NullWriter()
        missed = resumed and settings.evaluation_due(step) and bool(hosts.which(not writer.has_evaluation(step)))
        _describe(task, config, workdir, mesh, state)
        with (
            StopRequest() as stop,
            StepTrace(config.profile if hosts.is_first() else "") as trace,
            _progress(task, config, writer, step) as progress,
        ):
            stopping = False
            if missed:
                _evaluate(task, state, step, writer)
            while step < settings.last_step and not stopping:
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    batch = sharding.shard_batch(task.to_batch(next(batches)), mesh)
                    state, metrics = training.step(state, batch)
                step += 1
                trace.after_step(metrics)
                stopping = stop.reached(step)
                progress.after_step(step, metrics, log=settings.log_due(step))
                saving = settings.checkpoint_due(step) or stopping
                evaluating = settings.evaluation_due(step) and not stopping
                if saving or evaluating:
                    progress.check()
                if saving:
                    checkpointer.save(step, state, batches)
                if evaluating:
                    _evaluate(task, state, step, writer)
                if saving or evaluating:
                    progress.restart_clock(step)
            progress.check()
            # Further signals do no harm until this block is left.
            checkpointer.wait()
            if stopping:
                logger.info("Stopped at step %d on SIGTERM; run the same command to go on.", step)
    return state


def _fresh_state(task: Task, config: ConfigDict, training: Training) -> TrainState:
    return task.initialise(create_state(task.model, training.optimizer, training.abstract, seed=config.seed))


def _open_run(
    task: Task,
    config: ConfigDict,
    workdir: epath.PathLike,
    step: int,
    datasets: Mapping[str, Identity],
    allowed: Allowed,
) -> MetricWriter:
    """Makes the directory that of this run, and opens its metrics at a step."""
    claim_workdir(workdir, config, allowed)
    write_data(workdir, datasets, task.scales, step)
    task.prepare()
    return MetricWriter(workdir, step)


def _progress(task: Task, config: ConfigDict, writer: MetricWriter | NullWriter, step: int) -> Progress:
    return Progress(
        writer,
        step=step,
        num_steps=config.train.num_steps,
        unit=task.unit.name,
        per_step=task.unit.per_element * config.data.batch_size,
        watch=task.watch if hosts.is_first() else None,
    )


def _evaluate(task: Task, state: TrainState, step: int, writer: MetricWriter | NullWriter) -> None:
    """Evaluates a state, and shows the means over all datasets in one line for each split."""
    metrics = task.evaluate(evaluation_params(state), step, writer)
    for split, title in (("train", "training"), ("val", "held-out")):
        prefix = f"eval_{split}/"
        means = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
        line = "  ".join(f"{name} {value:.3f}" for name, value in means.items() if "/" not in name)
        logger.info("On %s episodes: %s", title, line or "nothing to evaluate")


def _describe(task: Task, config: ConfigDict, workdir: epath.PathLike, mesh: Mesh, state: TrainState) -> None:
    """Says what is about to run, on what, how much a step is, and where the results go."""
    devices = jax.devices()

    def millions(params: Params) -> float:
        return sum(leaf.size for leaf in traverse_util.flatten_dict(params).values()) / 1e6

    lines = [
        f"Run: {workdir} (config.json, metrics.jsonl, tensorboard/, images/, checkpoints/)",
        f"Devices: {len(devices)} x {devices[0].device_kind}, {jax.process_count()} hosts, mesh {dict(mesh.shape)}",
        f"Model: {config.family}, {millions(state.params):.2f} M parameters trained, {millions(state.frozen):.2f} M "
        f"frozen, compute in {config.train.dtype}",
        *(f"Data: {line}" for line in task.data_lines),
        f"Training from step {int(state.step)} to {config.train.num_steps}, "
        f"{task.unit.per_element * config.data.batch_size} {task.unit.name} a step",
    ]
    for line in lines:
        logger.info(line)


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
