"""Whether a policy can act in an environment, said before anything is done there."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from como_jax.envs.base import EnvironmentOptions, EnvironmentSpec
from como_jax.errors import ConfigError
from como_jax.evaluation.rollouts.workers import Failed, Start, WorkerPool
from como_jax.spec.interface import PolicySpec

logger = logging.getLogger(__name__)


def check_tasks(
    policy: PolicySpec, names: Sequence[str], environment: EnvironmentOptions, seed: int, pool: WorkerPool
) -> None:
    """Begins an episode of every task; one whose simulator crashes is warned of, since it may not do so again.

    Raises:
      ConfigError: the policy cannot act in one of them, or one cannot be made.
    """
    warnings: dict[str, None] = {}
    for first in range(0, len(names), len(pool)):
        batch = names[first : first + len(pool)]
        for slot, name in enumerate(batch):
            pool.request(slot, Start(name, environment, seed))
        for slot, reply in pool.gather().items():
            if isinstance(reply, Failed):
                warnings[f"{batch[slot]} could not be checked: {reply.reason}"] = None
            else:
                warnings |= dict.fromkeys(check_compatible(policy, reply.spec, reply.instruction))
    for warning in warnings:
        logger.warning(warning)


def check_compatible(policy: PolicySpec, environment: EnvironmentSpec, instruction: str) -> list[str]:
    """Warnings of what may harm a policy in an environment.

    Raises:
      ConfigError: the policy cannot act there.
    """
    name = environment.name
    if environment.action_size != policy.action_size:
        raise ConfigError(
            f"{name} takes actions of {environment.action_size} numbers, the policy's have {policy.action_size}."
        )
    if policy.state_size and environment.state_size != policy.state_size:
        raise ConfigError(
            f"{name} has a state of {environment.state_size} numbers, the policy was trained on {policy.state_size}."
        )
    if set(environment.cameras) != set(policy.cameras):
        raise ConfigError(
            f"{name} has the cameras {', '.join(environment.cameras)}, the policy was trained on "
            f"{', '.join(policy.cameras)}: they must be the same."
        )
    if policy.uses_text and not instruction.strip():
        raise ConfigError(f"{name} gives no instruction, and the policy needs one to act.")
    if not np.isclose(environment.control_rate, policy.control_rate, rtol=0.01):
        rates = f"{environment.control_rate:g} actions a second, and the policy was trained on {policy.control_rate:g}"
        return [f"The environment takes {rates}."]
    return []


def parse_settings(texts: Sequence[str], flag: str = "--env_setting") -> dict[str, str]:
    """Settings from NAME=VALUE of each, which were given by a flag.

    Raises:
      ConfigError: one that is not of this form.
    """
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ConfigError(f"{flag} {text}: must be NAME=VALUE.")
        settings[name] = value
    return settings
