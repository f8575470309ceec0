"""Pretrains a motion model, or the encoder it starts from, on videos.

    python -m experiments.pretrain --config configs/pretrain_como.py:tiny --workdir RUN --data DIR[=WEIGHT],DIR

Run the same command again to resume. On several hosts, start it on each, by a launcher or with the flags of
`como_jax.hosts`.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from como_jax import cli, hosts
from como_jax.data.mixture import mixture_text, parse_mixture
from como_jax.data.motion_data import open_motion_data, to_frame_pairs
from como_jax.data.pipeline import training_batches
from como_jax.evaluation.latents.in_loop import EvaluationConfig, EvaluationSet, MaeEvaluator, MotionEvaluator
from como_jax.motion.models import batch_parts
from como_jax.nn.model_def import ModelDef
from como_jax.training import sharding
from como_jax.training.models import make_model, resolve, unit_of
from como_jax.training.monitors import CollapseWatch
from como_jax.training.pretrained import check_perceptual_file, load_pretrained
from como_jax.training.run import NOTHING_ELSE, Allowed, allowed_by_flags, define_resume_flags
from como_jax.training.run_data import read_scales
from como_jax.training.train_state import TrainState
from como_jax.training.trainer import Task, train

CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, as configs/NAME.py or configs/NAME.py:VARIANT.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; an existing run of an equal config is resumed.")
define_resume_flags()
DATA = flags.DEFINE_string("data", None, "DIR[:SPLIT][=WEIGHT],DIR... instead of the config's own mixture.")


def pretrain(config: ConfigDict, workdir: epath.PathLike, allowed: Allowed = NOTHING_ELSE) -> TrainState:
    """Runs or resumes a pretraining run.

    Args:
      config: of configs/pretrain_*.py.
      workdir: gets config.json, data.json, checkpoints, tensorboard, images and metrics.jsonl.
      allowed: what may differ from what the run began with.

    Raises:
      UsageError: config, data and workdir do not fit together.
      NonFiniteError: training diverged.
    """
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch_size(mesh, config.data.batch_size, config.train.accumulation)
    check_perceptual_file(config)
    with hosts.in_step():
        scales = read_scales(workdir)
    data = open_motion_data(config, batch_parts(config), scales)
    config = resolve(config, data.sizes())
    model = make_model(config)
    task = Task(
        model=model,
        batches=training_batches(config, data.reader, sharding.batch_rows(mesh, config.data.batch_size)),
        to_batch=to_frame_pairs,
        initialise=lambda state: load_pretrained(config, state),
        evaluate=make_evaluator(config, model, mesh),
        unit=unit_of(config),
        data_lines=data.describe(),
        watch=CollapseWatch(config.train.collapse_steps),
        identify=data.identify,
        scales=data.scales(),
    )
    return train(task, config, workdir, mesh, allowed)


def make_evaluator(config: ConfigDict, model: ModelDef, mesh: Mesh) -> MotionEvaluator | MaeEvaluator:
    """What evaluates the run while it trains."""
    sets = EvaluationSet.open_all(
        parse_mixture(config.data.mixture),
        gap_seconds=config.data.gap_seconds,
        image_size=config.data.image_size,
        camera=config.data.camera,
        fit=config.data.fit,
    )
    evaluator = MaeEvaluator if config.family == "mae" else MotionEvaluator
    return evaluator(model, sets, mesh, EvaluationConfig(**config.evaluation))


def main(arguments: Sequence[str]) -> None:
    """Reads the flags."""
    cli.no_arguments(arguments)
    hosts.connect(share_sigterm=True)
    config = CONFIG.value
    if DATA.value is not None:
        config.data.mixture = mixture_text(DATA.value)
    pretrain(config, WORKDIR.value, allowed_by_flags())


if __name__ == "__main__":
    hosts.define_flags()
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
