"""What a policy's run reports about itself while it trains: errors of its actions, and success in an environment."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from como_jax.data.policy_build import PolicyData, policy_evaluation_batches
from como_jax.data.policy_reader import to_policy_batch
from como_jax.envs.build import EnvironmentOptions, environment_names
from como_jax.errors import ConfigError
from como_jax.evaluation.in_loop import with_means
from como_jax.evaluation.rollout_checks import parse_settings
from como_jax.evaluation.rollouts import RolloutOptions, check_rollouts, picture_size, roll_out
from como_jax.evaluation.success import summarize
from como_jax.evaluation.transitions import fit_batch
from como_jax.policies.controller import ControlConfig
from como_jax.policies.runner import PolicyRunner
from como_jax.training import sharding
from como_jax.training.train_state import ModelDef, Params
from como_jax.training.writers import MetricWriter, NullWriter
from como_jax.types import PolicyBatch

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PolicyEvaluationConfig:
    """Sizes of the in-loop evaluation.

    Attributes:
      num_samples: of every dataset and split.
      batch_size: samples at once.
      env: FAMILY:TASK,... or FAMILY:all, where success is measured; empty for none.
      env_settings: NAME=VALUE of the environment.
      rollout_every: steps between two rollouts; 0 for the last step alone.
      episodes: of every task.
      execute: actions of every chunk that are executed.
      env_workers: processes.
    """

    num_samples: int = 512
    batch_size: int = 64
    env: str = ""
    env_settings: tuple[str, ...] = ()
    rollout_every: int = 0
    episodes: int = 10
    execute: int = 8
    env_workers: int = 2

    def environments(self) -> tuple[str, ...]:
        """Names of the environments; raises ConfigError for unknown ones or a simulator that is not there."""
        return environment_names(self.env) if self.env else ()


class PolicyEvaluator:
    """The loss on every dataset, the error of sampled actions beside that of the mean action, and success rates."""

    def __init__(
        self,
        model: ModelDef,
        sets: Sequence[PolicyData],
        runner: PolicyRunner | None,
        mesh: Mesh,
        config: PolicyEvaluationConfig,
        *,
        num_steps: int,
    ):
        """Takes opened data of both splits, what asks the policy in an environment, and the run's length."""
        self._sets, self._runner, self._mesh, self._config = sets, runner, mesh, config
        self._batch_size, self._num_steps = fit_batch(config.batch_size, mesh), num_steps
        self._names = config.environments()
        if self._names:
            self._environment = self._check_environment()

        def analyze(params: Params, batch: PolicyBatch, keys: jax.Array, count: jax.Array) -> dict[str, jax.Array]:
            policy, window = model.bind(params), batch.action.shape[1]
            found = policy.loss(batch, keys[0]).terms
            found = {name: value for name, value in found.items() if name.endswith("_loss")}
            if runner is None:
                return found
            chunk = policy.sample_actions(batch.observation, keys)
            there = jnp.arange(len(keys))[:, None, None] < count
            mask = batch.has_action[:, window - chunk.shape[1] :] * there
            true = batch.action[:, window - chunk.shape[1] :]
            return found | {
                "squared": (mask * (chunk - true) ** 2).sum((0, 1)),
                "count": mask.sum((0, 1)),
                "sum": (mask * true).sum((0, 1)),
                "power": (mask * true**2).sum((0, 1)),
            }

        self._analyze = jax.jit(analyze, out_shardings=sharding.replicated(mesh))

    def __call__(self, params: Params, step: int, writer: MetricWriter | NullWriter) -> dict[str, float]:
        """Evaluates, writes and returns `eval_<split>/<metric>` and `success/<task>`.

        Where several datasets have a metric, it is their mean, beside `eval_<split>/<dataset>/<metric>`.
        """
        metrics: dict[str, float] = {}
        for data in self._sets:
            metrics |= self._evaluate_split(params, data)
        metrics = with_means(metrics)
        if self._names and self._rollouts_due(step):
            metrics |= self._roll_out(params)
        writer.scalars(step, metrics)
        return metrics

    def _evaluate_split(self, params: Params, data: PolicyData) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for number, part in enumerate(data.parts):
            sums, losses, total = {}, {}, 0
            batches = policy_evaluation_batches(data, number, self._config.num_samples, self._batch_size)
            for batch, count in batches:
                found = self._run(params, to_policy_batch(batch), count)
                for name, value in found.items():
                    into, weight = (losses, count) if name.endswith("_loss") else (sums, 1)
                    into[name] = into.get(name, 0) + weight * value
                total += count
            prefix = f"eval_{part.source.split}/{part.source.directory.name}"
            own = "action_loss" if part.action else "latent_loss"
            if own in losses:
                metrics[f"{prefix}/{own}"] = float(losses[own] / total)
            if part.action and sums:
                metrics |= {f"{prefix}/{name}": value for name, value in _action_errors(sums).items()}
        return metrics

    def _run(self, params: Params, batch: PolicyBatch, count: int) -> dict[str, np.ndarray]:
        keys = jax.device_put(jax.random.split(jax.random.key(0), self._batch_size), sharding.replicated(self._mesh))
        return jax.tree.map(np.asarray, self._analyze(params, sharding.shard_batch(batch, self._mesh), keys, count))

    def _rollouts_due(self, step: int) -> bool:
        every = self._config.rollout_every
        return step == self._num_steps or bool(every and step % every == 0)

    def _check_environment(self) -> EnvironmentOptions:
        """Raises ConfigError, before anything is trained, unless the policy can act in the environments."""
        if self._runner is None:
            raise ConfigError("evaluation.env needs a policy with actions; this one learns latent motion alone.")
        size, settings = picture_size(self._runner.spec), parse_settings(self._config.env_settings)
        environment = EnvironmentOptions(image_size=size, settings=settings)
        check_rollouts(self._runner.spec, self._names, environment, self._rollout_options())
        return environment

    def _rollout_options(self) -> RolloutOptions:
        config = self._config
        return RolloutOptions(config.episodes, config.env_workers, control=ControlConfig(config.execute))

    def _roll_out(self, params: Params) -> dict[str, float]:
        runner = self._runner.with_params(params)
        summary = summarize(roll_out(runner, self._names, self._environment, self._rollout_options()))
        if summary.total.crashed:
            logger.warning("%d of %d episodes crashed.", summary.total.crashed, summary.total.episodes)
        rates = {f"success/{rate.task}": rate.rate for rate in summary.tasks if rate.rate is not None}
        if summary.mean_rate is not None:
            rates["success/mean"] = summary.mean_rate
        logger.info("Success: %s", "  ".join(f"{name[8:]} {rate:.0%}" for name, rate in rates.items()))
        return rates


def _action_errors(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean squared errors of normalised actions: of the policy's, and of the mean action, dimension by dimension."""
    count = np.maximum(sums["count"], 1)
    mean = sums["sum"] / count
    variance = sums["power"] / count - mean**2
    return {
        "action_mse": float(sums["squared"].sum() / count.sum()),
        "mean_action_mse": float((variance * count).sum() / count.sum()),
    }
