"""Trains a policy on robot data and labelled videos together.

    python -m experiments.train_policy --config configs/policy_diffusion.py:tiny --workdir RUN --data ROBOT,LABELLED

ROBOT has true actions; LABELLED is what `experiments.extract_labels` wrote of videos. `--config.data.videos=()` leaves
the videos out. Run the same command again to resume; `python -m experiments.rollout` tries the policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from absl import flags
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from como_jax import cli, hosts
from como_jax.data.chunks import to_policy_batch
from como_jax.data.instructions import EMBEDDINGS_NAME, InstructionEmbeddings, InstructionReader, write_embeddings
from como_jax.data.mixture import mixture_text
from como_jax.data.pipeline import training_batches
from como_jax.data.policy_data import PolicyData, make_spec, open_policy_data
from como_jax.evaluation.rollouts.in_loop import PolicyEvaluationConfig, PolicyEvaluator
from como_jax.evaluation.rollouts.policy_runner import PolicyRunner
from como_jax.files import write_json
from como_jax.nn.model_def import ModelDef
from como_jax.spec.interface import POLICY_FILE, NormStats
from como_jax.spec.normalization import Scales
from como_jax.training import sharding
from como_jax.training.models import make_model, resolve, unit_of
from como_jax.training.pretrained import load_policy_parts
from como_jax.training.run import NOTHING_ELSE, Allowed, allowed_by_flags, define_resume_flags
from como_jax.training.run_data import read_scales
from como_jax.training.train_state import TrainState
from como_jax.training.trainer import Task, train


def train_policy(config: ConfigDict, workdir: epath.PathLike, allowed: Allowed = NOTHING_ELSE) -> TrainState:
    """Runs or resumes a policy's training.

    Args:
      config: of configs/policy_*.py.
      workdir: gets policy.json, config.json, data.json, checkpoints, tensorboard and metrics.jsonl.
      allowed: what may differ from what the run began with.

    Raises:
      UsageError: config, data and workdir do not fit together.
      NonFiniteError: training diverged.
    """
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch_size(mesh, config.data.batch_size, config.train.accumulation)
    with hosts.in_step():
        scales = read_scales(workdir)
    data = open_policy_data(config, scales=scales)
    config = resolve(config, data.sizes())
    model = make_model(config)
    task = Task(
        model=model,
        batches=training_batches(config, data.reader, sharding.batch_rows(mesh, config.data.batch_size)),
        to_batch=to_policy_batch,
        initialise=lambda state: load_policy_parts(config, state),
        evaluate=make_evaluator(config, model, data, workdir, mesh, scales),
        unit=unit_of(config),
        data_lines=data.describe(),
        prepare=lambda: write_inputs(config, data, workdir, scales),
        identify=data.identify,
        scales=data.scales(),
    )
    return train(task, config, workdir, mesh, allowed)


def make_evaluator(
    config: ConfigDict, model: ModelDef, data: PolicyData, workdir: epath.PathLike, mesh: Mesh, scales: Scales
) -> PolicyEvaluator:
    """What evaluates the run while it trains."""
    evaluation = PolicyEvaluationConfig(**{**config.evaluation, "env_settings": tuple(config.evaluation.env_settings)})
    spec, runner = make_spec(data, config), None
    if spec.robots:
        robot, stats = next(iter(spec.robots.items()))
        instructions, environment = _instruction_reader(config, data, workdir), spec.environments.get(robot)
        runner = PolicyRunner(model, {}, spec, stats, instructions, hosts.local_mesh(mesh), environment=environment)
    sets = [item for item in (data, open_policy_data(config, "val", scales)) if item.parts]
    return PolicyEvaluator(model, sets, runner, mesh, evaluation, num_steps=config.train.num_steps)


def _instruction_reader(config: ConfigDict, data: PolicyData, workdir: epath.PathLike) -> InstructionReader:
    """What `InstructionReader.make` will give once the run's directory is written."""
    if embeddings := data.embeddings():
        return InstructionReader.of_embeddings(InstructionEmbeddings(epath.Path(workdir) / EMBEDDINGS_NAME, embeddings))
    return InstructionReader.make(config.text, workdir)


def write_inputs(config: ConfigDict, data: PolicyData, workdir: epath.PathLike, scales: Scales) -> None:
    """What the policy needs to act, beside its config and its numbers."""
    spec = make_spec(data, config)
    # Of robots that the run was started with, even if it goes on without their data.
    known = {name: NormStats(each["action"], each["state"]) for name, each in scales.items() if each["action"]}
    spec = dataclasses.replace(spec, robots={**spec.robots, **known})
    write_json(epath.Path(workdir) / POLICY_FILE, spec.to_json())
    if embeddings := data.embeddings():
        write_embeddings(workdir, embeddings)


def define_flags() -> None:
    """Defines the flags of the command."""
    config_flags.DEFINE_config_file("config", None, "Recipe, as configs/NAME.py or configs/NAME.py:VARIANT.")
    flags.DEFINE_string("workdir", None, "Directory of the run; an existing run of an equal config is resumed.")
    flags.DEFINE_string("data", None, "DIR[:SPLIT][=WEIGHT],DIR... or MIXTURE.toml instead of the config's mixture.")
    flags.mark_flags_as_required(["config", "workdir"])
    define_resume_flags()
    hosts.define_flags()


def main(arguments: Sequence[str]) -> None:
    """Reads the flags."""
    cli.no_arguments(arguments)
    hosts.connect(share_sigterm=True)
    given = flags.FLAGS
    if given.data is not None:
        given.config.data.mixture = mixture_text(given.data)
    train_policy(given.config, given.workdir, allowed_by_flags())


if __name__ == "__main__":
    define_flags()
    cli.run(main)
