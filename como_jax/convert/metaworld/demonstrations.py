"""Demonstrations of an environment's own expert."""

from __future__ import annotations

import dataclasses

import numpy as np

from como_jax.envs.base import Environment, Observation


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """One recorded episode of T steps.

    Attributes:
      observations: T of them; the last picture, after which nothing is done, is left off.
      actions: float32 `[T, A]`; `actions[t]` was executed after `observations[t]`.
      success: whether the task was solved.
    """

    observations: list[Observation]
    actions: np.ndarray
    success: bool


def demonstrate(environment: Environment, seed: int, noise: float = 0.0) -> Demonstration:
    """Records one episode, until it ends.

    Args:
      environment: reset with `seed`.
      seed: fixes the episode and the noise.
      noise: standard deviation of Gaussian noise added to each action before it is executed and recorded.
    """
    rng = np.random.default_rng([seed, 2])
    observations, actions, done, observation = [], [], False, environment.reset(seed)
    while not done:
        action = environment.expert_action()
        action = np.clip(action + noise * rng.standard_normal(action.shape), -1.0, 1.0).astype(np.float32)
        result = environment.step(action)
        observations.append(observation)
        actions.append(action)
        observation, done = result.observation, result.done
    return Demonstration(observations, np.stack(actions), result.success)
