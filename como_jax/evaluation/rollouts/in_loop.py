"""What a policy's run measures while it trains: errors of actions and latents, and success in an environment."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from como_jax import hosts
from como_jax.data.chunks import PolicyPart, to_policy_batch
from como_jax.data.pipeline import evaluation_batches
from como_jax.data.policy_data import PolicyData
from como_jax.envs.base import EnvironmentOptions
from como_jax.envs.registry import environment_names
from como_jax.errors import ConfigError
from como_jax.evaluation.latents.in_loop import with_means
from como_jax.evaluation.latents.transitions import fit_batch
from como_jax.evaluation.rollouts.policy_runner import PolicyRunner
from como_jax.evaluation.rollouts.results import summarize
from como_jax.evaluation.rollouts.rollout import (
    RolloutOptions,
    check_rollouts,
    parse_settings,
    rendered_size,
    roll_out,
    trained_settings,
)
from como_jax.nn.model_def import ModelDef, Params
from como_jax.spec.control import ControlConfig
from como_jax.training import sharding
from como_jax.training.writers import MetricWriter, NullWriter
from como_jax.types import PolicyBatch

logger = logging.getLogger(__name__)

Sums = dict[str, Any]
"""Over samples, by name: scalars, or one number a dimension."""


@dataclasses.dataclass(frozen=True)
class PolicyEvaluationConfig:
    """Sizes of the in-loop evaluation.

    Attributes:
      num_samples: samples of every dataset and split.
      batch_size: samples per batch.
      env: FAMILY:TASK,... or FAMILY:all, the tasks in which success is measured; empty for none.
      env_settings: NAME=VALUE, settings of the environment.
      rollout_every: steps between two rollouts; 0 for one after the last step alone.
      episodes: episodes of every task.
      execute: executed actions of every chunk.
      env_workers: processes that simulate.
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
        """Names of the environments; raises ConfigError for unknown ones or a simulator that is not installed."""
        return environment_names(self.env) if self.env else ()


class PolicyEvaluator:
    """Measures on every dataset what the policy learns of it, actions, latents or both; and success rates.

    These are the loss, and the mean squared error of samples beside that of always predicting the mean. For latents
    that are codes it is the accuracy, given the codes before them, beside that of always predicting the most frequent
    code of the training episodes.
    """

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
        """Prepares the evaluation.

        Args:
          model: of the policy.
          sets: the opened data of both splits.
          runner: acts in environments; None for a policy that cannot act.
          mesh: of devices.
          config: sizes.
          num_steps: steps of the whole run.

        Raises:
          ConfigError: the policy cannot act in an environment of the config.
        """
        self._sets, self._runner, self._mesh, self._config = sets, runner, mesh, config
        self._batch_size, self._num_steps = fit_batch(config.batch_size, mesh), num_steps
        self._rows = sharding.batch_rows(mesh, self._batch_size)
        # Made on all devices by one program: a single host cannot place arrays on devices of others.
        replicated = sharding.replicated(mesh)
        self._keys = jax.jit(lambda: jax.random.split(jax.random.key(0), self._batch_size), out_shardings=replicated)()
        self._names = config.environments()
        if self._names:
            with hosts.in_step(ConfigError):
                self._environment = self._check_environment() if hosts.is_first() else None
        # Per dataset, which is harder to beat than the most frequent codes of all datasets together.
        train = [part for data in sets for part in data.parts if part.source.split == "train"]
        self._priors = {part.source.directory.name: _most_frequent(part) for part in train if part.codes is not None}
        options = {"static_argnames": "now", "out_shardings": sharding.replicated(mesh)}
        self._sum_actions = sharding.jit_once(_sum_actions, mesh, model, **options)
        self._sum_latents = sharding.jit_once(_sum_latents, mesh, model, **options)

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
            actions, latents = self._sum_up(params, data, number)
            found = _means(actions, "action") | _means(latents, "latent")
            prefix = f"eval_{part.source.split}/{part.source.directory.name}"
            metrics |= {f"{prefix}/{name}": value for name, value in found.items()}
        return metrics

    def _sum_up(self, params: Params, data: PolicyData, number: int) -> tuple[Sums, Sums]:
        """Sums over one dataset, for actions and for latents; each is empty if the dataset has none."""
        part, now = data.parts[number], data.filler.chunks.history
        prior = self._priors.get(part.source.directory.name)
        actions: Sums = {}
        latents: Sums = {}
        sizes = {"num_samples": self._config.num_samples, "batch_size": self._batch_size}
        for batch, _ in evaluation_batches(data.reader, number, **sizes, rows=self._rows):
            batch = sharding.shard_batch(to_policy_batch(batch), self._mesh)
            if part.action is not None:
                _add(actions, self._sum_actions(params, batch, self._keys, now=now))
            if part.latent is not None:
                _add(latents, self._sum_latents(params, batch, self._keys, prior, now=now))
        return actions, latents

    def _rollouts_due(self, step: int) -> bool:
        every = self._config.rollout_every
        return step == self._num_steps or bool(every and step % every == 0)

    def _check_environment(self) -> EnvironmentOptions:
        """Options of the environments; raises ConfigError, before training, if the policy cannot act in them."""
        if self._runner is None:
            raise ConfigError("evaluation.env needs a policy with actions; this one learns latent motion alone.")
        size, given = rendered_size(self._runner.spec), parse_settings(self._config.env_settings)
        settings = trained_settings(self._runner.environment, self._names, given)
        environment = EnvironmentOptions(image_size=size, settings=settings)
        check_rollouts(self._runner.spec, self._names, environment, self._rollout_options())
        return environment

    def _rollout_options(self) -> RolloutOptions:
        config = self._config
        return RolloutOptions(config.episodes, config.env_workers, control=ControlConfig(config.execute), videos=0)

    def _roll_out(self, params: Params) -> dict[str, float]:
        """Success rates, from the first host alone: simulators on several hosts would not stay in step."""
        if jax.process_count() > 1:
            params = hosts.gather(params)
        with hosts.in_step():
            return self._roll_out_here(params) if hosts.is_first() else {}

    def _roll_out_here(self, params: Params) -> dict[str, float]:
        if jax.process_count() > 1:
            params = jax.device_put(params, sharding.tree_shardings(params, hosts.local_mesh(self._mesh)))
        runner = self._runner.with_params(params)
        summary = summarize(roll_out(runner, self._names, self._environment, self._rollout_options()))
        if summary.total.crashed:
            logger.warning("%d of %d episodes crashed.", summary.total.crashed, summary.total.episodes)
        rates = {f"success/{rate.task}": rate.rate for rate in summary.tasks if rate.rate is not None}
        if summary.mean_rate is not None:
            rates["success/mean"] = summary.mean_rate
        logger.info("Success: %s", "  ".join(f"{name[8:]} {rate:.0%}" for name, rate in rates.items()))
        return rates


def _sum_actions(model: ModelDef, params: Params, batch: PolicyBatch, keys: jax.Array, *, now: int) -> Sums:
    """Sums over a batch, without its true latents, which the policy does not have either when it acts."""
    policy = model.bind(params)
    if batch.has_latent is not None:
        batch = dataclasses.replace(batch, has_latent=jnp.zeros_like(batch.has_latent))
    mask = batch.has_action[:, now:]
    sums = _sum_terms(policy.loss(batch, keys[0]).terms, "action", mask)
    return sums | _sum_errors(policy.sample_actions(batch.observation, keys), batch.action[:, now:], mask)


def _sum_latents(
    model: ModelDef, params: Params, batch: PolicyBatch, keys: jax.Array, prior: jax.Array | None, *, now: int
) -> Sums:
    """Sums over a batch, without its actions: some policies learn only one of the two from a sample."""
    policy, known = model.bind(params), batch.has_latent[:, now, None]
    batch = dataclasses.replace(batch, has_action=jnp.zeros_like(batch.has_action))
    sums = _sum_terms(policy.loss(batch, keys[0]).terms, "latent", known)
    if "accuracy" in sums and prior is not None:
        right = jnp.mean(batch.codes[:, now] == prior, axis=1, keepdims=True)
        sums["prior_accuracy"] = jnp.sum(known * right)
    if "loss" in sums and "accuracy" not in sums and hasattr(policy, "predict_latents"):
        sums |= _sum_errors(policy.predict_latents(batch.observation, keys), batch.latent[:, now], known)
    return sums


def _sum_terms(terms: dict[str, jax.Array], kind: str, mask: jax.Array) -> Sums:
    """Loss and accuracy of one kind: their means over the samples that have a target, times the number of these."""
    samples = jnp.sum(jnp.any(mask > 0, axis=tuple(range(1, mask.ndim))))
    found = {name: terms.get(f"{kind}_{name}") for name in ("loss", "accuracy")}
    return {name: samples * value for name, value in found.items() if value is not None} | {"samples": samples}


def _sum_errors(said: jax.Array, true: jax.Array, mask: jax.Array) -> Sums:
    """The sums `[D]` from which `_means` makes squared errors, of arrays `[B, ..., D]` where the mask is 1."""
    chex.assert_equal_shape([said, true])
    mask, axes = jnp.broadcast_to(mask, true.shape), tuple(range(true.ndim - 1))
    said, true = (jnp.where(mask > 0, values, 0.0) for values in (said, true))
    found = {"squared": (said - true) ** 2, "total": true, "power": true**2, "count": mask}
    return {name: values.sum(axes) for name, values in found.items()}


def _add(sums: Sums, more: Sums) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0) + np.asarray(value, np.float64)


def _means(sums: Sums, kind: str) -> dict[str, float]:
    """Means over a dataset; errors are of normalised numbers, also of always predicting each dimension's mean."""
    if not sums or not sums["samples"]:
        return {}
    names = [name for name in ("loss", "accuracy", "prior_accuracy") if name in sums]
    found = {f"{kind}_{name}": float(sums[name] / sums["samples"]) for name in names}
    if "squared" in sums:
        count = np.maximum(sums["count"], 1)
        variance = sums["power"] / count - (sums["total"] / count) ** 2
        found[f"{kind}_mse"] = float(sums["squared"].sum() / count.sum())
        found[f"mean_{kind}_mse"] = float((variance * count).sum() / count.sum())
    return found


def _most_frequent(part: PolicyPart) -> np.ndarray:
    """The most frequent code of each position, int32 `[Q]`."""
    return np.array([np.bincount(codes).argmax() for codes in part.codes[part.labelled].T], np.int32)
