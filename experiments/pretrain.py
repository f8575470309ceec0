"""Pretrains a motion model, or the encoder it starts from, on videos.

    python -m experiments.pretrain --config configs/pretrain_como.py:tiny --workdir RUN --data DIR[=WEIGHT],DIR

Run the same command again to resume.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import jax
from absl import flags
from etils import epath
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from como_jax import cli
from como_jax.data import pipeline
from como_jax.data.build import TrainingData, build_training_data
from como_jax.data.mixture import mixture_text, parse_mixture
from como_jax.errors import ConfigError
from como_jax.evaluation.in_loop import EvaluationConfig, EvaluationSet, MaeEvaluator, MotionEvaluator
from como_jax.models.build import build_model
from como_jax.training import sharding
from como_jax.training.build import build_training
from como_jax.training.checkpoint import Checkpointer, claim_workdir
from como_jax.training.loop import LoopConfig, fit
from como_jax.training.pretrained import check_perceptual_file, load_pretrained
from como_jax.training.train_state import ModelDef, TrainState, create_state, evaluation_params
from como_jax.training.watch import CollapseWatch
from como_jax.training.writers import MetricWriter, NullWriter

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, as configs/NAME.py or configs/NAME.py:VARIANT.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; an existing run of an equal config is resumed.")
DATA = flags.DEFINE_string("data", None, "DIR[=WEIGHT],DIR[=WEIGHT] instead of the config's own mixture.")

logger = logging.getLogger("como_jax.pretrain")


def pretrain(config: ConfigDict, workdir: epath.PathLike) -> TrainState:
    """Runs or resumes a pretraining run.

    Args:
      config: of configs/pretrain_*.py.
      workdir: gets config.json, checkpoints, tensorboard, pictures and metrics.jsonl.

    Raises:
      UsageError: config, data and workdir do not fit together.
      NonFiniteError: training diverged.
    """
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch_size(mesh, config.data.batch_size, config.train.accumulation)
    check_perceptual_file(config)
    data = build_training_data(config)
    config = with_label_size(config, data)
    model = build_model(config)
    evaluator = make_evaluator(config, model, mesh)
    claim_workdir(workdir, config)
    training = build_training(config, model, mesh)

    iterator = iter(data.batches)
    checkpointer = Checkpointer(workdir, keep=config.train.keep_checkpoints)
    try:
        if checkpointer.latest_step() is None:
            state = create_state(model, training.optimizer, training.abstract, seed=config.seed)
            state = load_pretrained(config, state)
        else:
            state = checkpointer.restore(training.abstract, iterator)
        writer = MetricWriter(workdir, int(state.step)) if jax.process_index() == 0 else NullWriter()
        describe(config, workdir, mesh, data, state)
        return fit(
            state,
            training.step,
            iterator,
            lambda batch: sharding.shard_batch(pipeline.to_frame_pairs(batch), mesh),
            loop_config(config),
            checkpointer=checkpointer,
            writer=writer,
            evaluate=lambda state, step: log_metrics(evaluator(evaluation_params(state), step, writer)),
            samples_per_step=config.data.batch_size * (config.data.instants - 1),
            watch=CollapseWatch(config.train.collapse_steps),
        )
    finally:
        checkpointer.close()


def with_label_size(config: ConfigDict, data: TrainingData) -> ConfigDict:
    """The config with the size of the labels that the data has, where it leaves it open."""
    if data.labels is None:
        return config
    if config.model.label_size not in (0, data.labels.size):
        raise ConfigError(f"model.label_size is {config.model.label_size}, but the data's is {data.labels.size}.")
    config = config.copy_and_resolve_references()
    config.model.label_size = data.labels.size
    return config


def make_evaluator(config: ConfigDict, model: ModelDef, mesh: Mesh) -> MotionEvaluator | MaeEvaluator:
    """What judges the run while it trains."""
    sets = EvaluationSet.open_all(
        parse_mixture(config.data.mixture),
        gap_seconds=config.data.gap_seconds,
        image_size=config.data.image_size,
        camera=config.data.camera,
        fit=config.data.fit,
    )
    evaluator = MaeEvaluator if config.family == "mae" else MotionEvaluator
    return evaluator(model, sets, mesh, EvaluationConfig(**config.evaluation))


def loop_config(config: ConfigDict) -> LoopConfig:
    """The loop's part of the config."""
    train = config.train
    return LoopConfig(train.num_steps, train.stop_after, train.log_every, train.evaluate_every, train.checkpoint_every)


def describe(config: ConfigDict, workdir: epath.PathLike, mesh: Mesh, data: TrainingData, state: TrainState) -> None:
    """Says what is about to run, on what, and where the results go."""
    devices = jax.devices()

    def millions(params: dict) -> float:
        return sum(leaf.size for leaf in traverse_util.flatten_dict(params).values()) / 1e6

    lines = [
        f"Run: {workdir} (config.json, metrics.jsonl, tensorboard/, pictures/, checkpoints/)",
        f"Devices: {len(devices)} x {devices[0].device_kind}, {jax.process_count()} hosts, mesh {dict(mesh.shape)}",
        f"Model: {config.family}, {millions(state.params):.2f} M parameters trained, {millions(state.frozen):.2f} M "
        f"frozen, compute in {config.train.dtype}",
        *(f"Data: {line}" for line in data.describe()),
        f"Training from step {int(state.step)} to {config.train.num_steps}, {config.data.batch_size} clips a step",
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


def main(arguments: Sequence[str]) -> None:
    """Reads the flags."""
    cli.no_arguments(arguments)
    config = CONFIG.value
    if DATA.value is not None:
        config.data.mixture = mixture_text(DATA.value)
    pretrain(config, WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
