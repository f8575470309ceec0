"""An example of a robot's side: plays an episode of a simulator by the actions of a policy server.

python -m tools.serve.client --url ws://127.0.0.1:8000 --env tabletop:reach
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from absl import flags

from como_jax import cli
from como_jax.envs.base import EnvironmentOptions
from como_jax.envs.registry import environment_names, make_environment
from como_jax.serving.client import PolicyClient

logger = logging.getLogger("como_jax.serve_client")


def play(client: PolicyClient, env: str, seed: int = 0) -> bool:
    """Whether the policy solves an episode. Works with whole chunks and with chunks of one action alike."""
    environment = make_environment(env, EnvironmentOptions())
    observation, done, success = environment.reset(seed), False, False
    while not done:
        images = {f"observation/{camera}": image for camera, image in observation.images.items()}
        answer = client.infer({**images, "observation/state": observation.state, "prompt": environment.instruction})
        for action in answer["actions"]:
            result = environment.step(action)
            observation, done, success = result.observation, result.done, success or result.success
            if done:
                break
    environment.close()
    return success


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("url", "ws://127.0.0.1:8000", "Of the server.")
    flags.DEFINE_string("token", "", "That the server asks for.")
    flags.DEFINE_string("env", "tabletop:reach", "FAMILY:TASK, as for experiments.rollout.")
    flags.DEFINE_integer("seed", 0, "Of the episode.")


def main(arguments: Sequence[str]) -> None:
    """Plays one episode."""
    cli.no_arguments(arguments)
    given = flags.FLAGS
    with PolicyClient(given.url, given.token) as client:
        logger.info("The policy: %s", client.metadata)
        print("solved" if play(client, environment_names(given.env)[0], given.seed) else "not solved")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
