"""One run from its directory to its last step: what all binaries that train share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import grain
import jax
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from como_jax import hosts
from como_jax.nn.model_def import ModelDef, Params
from como_jax.training import sharding
from como_jax.training.build import build_training
from como_jax.training.checkpoint import Checkpointer, check_workdir, claim_workdir
from como_jax.training.loop import LoopConfig, fit
from como_jax.training.train_state import Metrics, TrainState, create_state, evaluation_params
from como_jax.training.writers import MetricWriter, NullWriter

logger = logging.getLogger(__name__)

Evaluate = Callable[[Params, int, MetricWriter | NullWriter], dict[str, float]]


def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    model: ModelDef,
    mesh: Mesh,
    *,
    batches: grain.IterDataset,
    name_batch: Callable[[dict[str, Any]], Any],
    initialize: Callable[[TrainState], TrainState],
    evaluate: Evaluate,
    data_lines: Iterable[str],
    samples_per_step: int,
    unit: str,
    prepare: Callable[[], None] = lambda: None,
    watch: Callable[[int, Metrics], None] | None = None,
) -> TrainState:
    """Runs or resumes a training run.

    Args:
      config: with `train`, `optim`, `mesh` and `data.batch_size`, as in `configs.common`.
      workdir: gets config.json, checkpoints, tensorboard, pictures and metrics.jsonl.
      model: what is trained.
      mesh: of devices.
      batches: this host's stream of batches, as dictionaries.
      name_batch: makes of a dictionary what the model's loss takes.
      initialize: puts what a fresh run takes from elsewhere into its state.
      evaluate: of all parameters, the step and the writer; what it returns is logged.
      data_lines: that describe the data.
      samples_per_step, unit: for the displayed rate.
      prepare: writes what else belongs into the run's directory.
      watch: see `fit`.

    Raises:
      UsageError: config, data and workdir do not fit together.
      NonFiniteError: training diverged.
    """
    with hosts.in_step():
        if hosts.is_first():
            check_workdir(workdir, config)
    training, loop = build_training(config, model, mesh), loop_config(config)
    iterator = iter(batches)
    checkpointer = Checkpointer(workdir, keep=config.train.keep_checkpoints)
    try:
        resumed = checkpointer.latest_step() is not None
        if resumed:
            state = checkpointer.restore(training.abstract, iterator)
        else:
            state = initialize(create_state(model, training.optimizer, training.abstract, seed=config.seed))
        step, writer = int(state.step), NullWriter()
        with hosts.in_step():
            # Not before there is a state, so that a command which fails until then can be mended and run again.
            if hosts.is_first():
                claim_workdir(workdir, config)
                prepare()
                writer = MetricWriter(workdir, step)
        missed = resumed and loop.evaluation_due(step) and bool(hosts.which(not writer.has_evaluation(step)))
        describe(config, workdir, mesh, data_lines, state, f"{samples_per_step} {unit}")
        return fit(
            state,
            training.step,
            iterator,
            lambda batch: sharding.shard_batch(name_batch(batch), mesh),
            loop,
            checkpointer=checkpointer,
            writer=writer,
            evaluate=lambda state, step: log_metrics(evaluate(evaluation_params(state), step, writer)),
            samples_per_step=samples_per_step,
            unit=unit,
            # All see the same numbers.
            watch=watch if hosts.is_first() else None,
            missed_evaluation=missed,
        )
    finally:
        checkpointer.close()


def loop_config(config: ConfigDict) -> LoopConfig:
    """The loop's part of the config."""
    train = config.train
    return LoopConfig(
        num_steps=train.num_steps,
        stop_after=train.stop_after,
        log_every=train.log_every,
        evaluate_every=train.evaluate_every,
        checkpoint_every=train.checkpoint_every,
        profile=config.profile,
    )


def describe(
    config: ConfigDict, workdir: epath.PathLike, mesh: Mesh, data_lines: Iterable[str], state: TrainState, load: str
) -> None:
    """Says what is about to run, on what, how much a step is, and where the results go."""
    devices = jax.devices()

    def millions(params: dict) -> float:
        return sum(leaf.size for leaf in traverse_util.flatten_dict(params).values()) / 1e6

    lines = [
        f"Run: {workdir} (config.json, metrics.jsonl, tensorboard/, pictures/, checkpoints/)",
        f"Devices: {len(devices)} x {devices[0].device_kind}, {jax.process_count()} hosts, mesh {dict(mesh.shape)}",
        f"Model: {config.family}, {millions(state.params):.2f} M parameters trained, {millions(state.frozen):.2f} M "
        f"frozen, compute in {config.train.dtype}",
        *(f"Data: {line}" for line in data_lines),
        f"Training from step {int(state.step)} to {config.train.num_steps}, {load} a step",
    ]
    for line in lines:
        logger.info(line)


def log_metrics(metrics: dict[str, float]) -> None:
    """One line a split for the means over datasets."""
    for split, title in (("train", "training"), ("val", "held-out")):
        prefix = f"eval_{split}/"
        means = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
        line = "  ".join(f"{name} {value:.3f}" for name, value in means.items() if "/" not in name)
        logger.info("On %s episodes: %s", title, line or "nothing to evaluate")
