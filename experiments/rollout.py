"""Rolls a trained policy out in a simulator and counts how often it solves its tasks.

    python -m experiments.rollout --workdir RUN --env tabletop:all --episodes 20
    python -m experiments.rollout --workdir RUN --env metaworld:reach-v3,push-v3 --workers 8 --execute 4 --ensemble 0.01

Writes to RUN/rollouts/ENV-stepN: table.md and table.csv, success of every task and suite with its 95 % Wilson interval
and the mean length of episodes; episodes.csv; summary.json; videos/TASK-EPISODE-OUTCOME.mp4; and grid.png, images of
some episodes. The same command goes on where it was stopped or killed. Episodes are the same for equal --seed, whatever
the number of workers; the simulator is reset with seeds from 900,000,000 on, which demonstrations do not use. Settings
of the environment that are not given are those of the policy's dataset, where it names them. Episodes whose simulator
crashes or hangs are counted apart. The exit status is 1 if all did.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence

from absl import flags
from etils import epath

from como_jax import cli
from como_jax.envs.base import EnvironmentOptions
from como_jax.envs.registry import environment_names
from como_jax.evaluation.rollouts.policy_runner import SAMPLING_FIELDS, load_policy
from como_jax.evaluation.rollouts.results import (
    EpisodeResult,
    Recording,
    RolloutRecorder,
    RolloutSummary,
    table_markdown,
)
from como_jax.evaluation.rollouts.resuming import read_episodes, rollout_directory
from como_jax.evaluation.rollouts.rollout import (
    RolloutOptions,
    parse_settings,
    rendered_size,
    roll_out,
    trained_settings,
)
from como_jax.spec.control import ControlConfig
from como_jax.training import sharding

logger = logging.getLogger("como_jax.rollout")
_TIMEOUTS = ("step_timeout", "start_timeout")


def rollout(
    workdir: epath.PathLike,
    env: str,
    options: RolloutOptions,
    *,
    out: epath.PathLike | None = None,
    dataset: str = "",
    image_size: int = 0,
    max_steps: int = 0,
    settings: Mapping[str, str] | None = None,
    sampling: Mapping[str, str] | None = None,
) -> RolloutSummary:
    """Rolls the newest checkpoint of a run out, and writes the files that the module names.

    Args:
      workdir: of the run.
      env: FAMILY:TASK,TASK or FAMILY:all.
      options: of the rollouts.
      out: gets the files; a new directory in `workdir`/rollouts by default.
      dataset, image_size, max_steps, settings, sampling: see `define_flags`.

    Raises:
      UsageError: run, environment and `out` do not fit together.
    """
    names = environment_names(env)
    runner = load_policy(workdir, sharding.make_mesh(), dataset, sampling)
    options = dataclasses.replace(options, control=options.control.resolve(runner.spec.chunk))
    size = image_size or rendered_size(runner.spec)
    settings = trained_settings(runner.environment, names, settings or {})
    environment = EnvironmentOptions(image_size=size, max_steps=max_steps, settings=settings)
    facts = {
        "workdir": str(workdir),
        "step": runner.step,
        "env": env,
        "dataset": dataset,
        "sampling": dict(sampling or {}),
        "options": dataclasses.asdict(options),
        "environment": dataclasses.asdict(environment),
    }
    # None of these changes an episode.
    same = {name: value for name, value in facts["options"].items() if name not in ("workers", "videos", *_TIMEOUTS)}
    parent = epath.Path(workdir) / "rollouts"
    with rollout_directory(out, parent, f"{env}-step{runner.step}", facts | {"options": same}) as directory:
        ended = [result for result in read_episodes(directory) if not result.crashed]
        recorder = RolloutRecorder(directory, len(names), options.videos, ended)
        total = len(names) * options.episodes
        logger.info("%d episodes of %d tasks, written to %s", total, len(names), directory)
        if ended:
            logger.info("%d of them have ended there before.", len(ended))

        def on_episode(result: EpisodeResult, recording: Recording) -> None:
            reason = f": {result.reason}" if result.crashed else ""
            outcome = f"{result.outcome} after {result.steps} steps{reason}"
            logger.info("%s, episode %d: %s", result.task, result.episode, outcome)
            recorder(result, recording)

        results = roll_out(runner, names, environment, options, on_episode, ended=ended)
        summary = recorder.finish(results, facts)
        logger.info("Table: %s", directory / "table.md")
    return summary


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Directory of a policy's run.", required=True)
    flags.DEFINE_string("env", None, "FAMILY:TASK,TASK or FAMILY:all, as in tabletop:reach.", required=True)
    flags.DEFINE_integer("episodes", 20, "Episodes of every task.")
    flags.DEFINE_integer("workers", 2, "Simulators at the same time, each in a process.")
    flags.DEFINE_integer("seed", 0, "Another seed gives other episodes.")
    flags.DEFINE_integer("execute", 0, "Steps of each chunk before the next is asked for; 0 for half of them.")
    flags.DEFINE_float(
        "ensemble", None, "Averages all chunks that cover a step, weighted by exp(-ENSEMBLE * steps since the oldest)."
    )
    flags.DEFINE_float("step_timeout", 120.0, "Seconds after which a simulator that does not answer counts as crashed.")
    flags.DEFINE_integer("max_steps", 0, "Steps of an episode; 0 for the environment's own limit.")
    flags.DEFINE_integer("image_size", 0, "Side of the rendered images; 0 for that of the policy, but at least 64.")
    flags.DEFINE_multi_string("env_setting", [], "NAME=VALUE of the environment, as in look=hard; may be repeated.")
    flags.DEFINE_multi_string(
        "sampling", [], f"NAME=VALUE instead of the run's, as in temperature=0.5; of {', '.join(SAMPLING_FIELDS)}."
    )
    flags.DEFINE_string("dataset", "", "Robot dataset whose normalisation is used, for policies of several robots.")
    flags.DEFINE_integer("videos", None, "Episodes of every task to write videos of; all by default.", lower_bound=0)
    flags.DEFINE_string("out", None, "Gets the files; RUN/rollouts/ENV-stepN by default.")


def main(arguments: Sequence[str]) -> None:
    """Reads the flags."""
    cli.no_arguments(arguments)
    values = flags.FLAGS.flag_values_dict()
    names = ("episodes", "workers", "seed", "videos", "step_timeout")
    options = RolloutOptions(
        **{name: values[name] for name in names}, control=ControlConfig(values["execute"], values["ensemble"])
    )
    names = ("workdir", "env", "out", "dataset", "image_size", "max_steps")
    try:
        summary = rollout(
            **{name: values[name] for name in names},
            options=options,
            settings=parse_settings(values["env_setting"]),
            sampling=parse_settings(values["sampling"]),
        )
    except KeyboardInterrupt:
        logger.info("Stopped; episodes.csv lists the episodes that ended, and the same command goes on from there.")
        sys.exit(130)
    print(table_markdown(summary), end="")
    if not summary.total.finished:
        logger.error("All %d episodes crashed; their reasons are in episodes.csv.", summary.total.crashed)
        sys.exit(1)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
