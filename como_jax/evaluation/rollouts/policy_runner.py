"""Asks a trained policy for actions, in the units of its robot."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence

import chex
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from como_jax.data.instructions import InstructionReader
from como_jax.errors import RunError
from como_jax.evaluation.rollouts.sampling import with_sampling
from como_jax.nn.model_def import ModelDef, Params
from como_jax.policies.build import POLICY_FAMILIES, build_policy
from como_jax.policies.spec import PolicySpec, Scales, Scene
from como_jax.spec.images import fitting_part, resize
from como_jax.training import sharding
from como_jax.training.run import open_run
from como_jax.types import Observation


class PolicyRunner:
    """A policy with its parameters, the scales of one robot and the reader of its instructions.

    Attributes:
      spec: of the policy, with the sizes of this robot's actions and states.
      step: updates that the policy has been trained for.
    """

    def __init__(
        self,
        model: ModelDef,
        params: Params,
        spec: PolicySpec,
        scales: Scales,
        instructions: InstructionReader,
        mesh: Mesh,
        step: int = 0,
    ):
        """Takes the model, its numbers, what it sees, the scales of its robot and what reads its instructions."""
        own_state = scales.state.size if scales.state else 0
        self.spec = dataclasses.replace(spec, action_size=scales.action.size, state_size=own_state)
        self.step, self._params, self._scales, self._instructions = step, params, scales, instructions
        # Of the largest state of all robots.
        self._state_size = spec.state_size
        self._replicated = sharding.replicated(mesh)

        self._sample = _sampler(model, self._replicated)

    def with_params(self, params: Params) -> PolicyRunner:
        """The same runner, with its compiled programs, and other parameters."""
        other = copy.copy(self)
        other._params = params
        return other

    def sample(self, scenes: Sequence[Scene], seeds: Sequence[Sequence[int]]) -> np.ndarray:
        """Action chunks in the robot's units, float32 `[n, H, A]`.

        Args:
          scenes: what the policy sees, n times; every n is compiled once.
          seeds: as many whole numbers for each, the same count for all, from which its noise follows.
        """
        observation = self._observe(scenes)
        observation, seeds = jax.device_put((observation, np.asarray(seeds, np.uint32)), self._replicated)
        chunks = np.asarray(self._sample(self._params, observation, seeds))
        return self._scales.action.inverse(chunks[..., : self.spec.action_size])

    def _observe(self, scenes: Sequence[Scene]) -> Observation:
        spec, count = self.spec, len(scenes)
        images = np.empty((count, spec.instants, len(spec.cameras), spec.image_size, spec.image_size, 3), np.uint8)
        for row, scene in enumerate(scenes):
            for instant, pictures in enumerate(scene.images):
                for slot, camera in enumerate(spec.cameras):
                    resize(fitting_part(pictures[camera], spec.fit), images[row, instant, slot])
        return Observation(
            images=images,
            has_camera=np.ones((count, len(spec.cameras)), np.float32),
            **self._states(scenes),
            **{self._instructions.key: self._instructions([scene.instruction for scene in scenes])},
        )

    def _states(self, scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
        spec, normalizer = self.spec, self._scales.state
        if not self._state_size:
            return {}
        found = np.zeros((len(scenes), spec.instants, self._state_size), np.float32)
        if normalizer is not None:
            states = np.stack([scene.states for scene in scenes])
            chex.assert_shape(states, (len(scenes), spec.instants, normalizer.size))
            found[..., : normalizer.size] = normalizer(states)
        has_state = np.full(len(scenes), normalizer is not None, np.float32)
        return {"state": found, "has_state": has_state}


def load_policy(
    workdir: epath.PathLike, mesh: Mesh, dataset: str = "", sampling: Mapping[str, str] | None = None
) -> PolicyRunner:
    """The policy of a run with the newest parameters, their moving average where it has one.

    Args:
      workdir: of `experiments.train_policy`.
      mesh: of devices.
      dataset: the robot dataset whose scales to use, where there are several.
      sampling: settings that differ from the run's, see `como_jax.evaluation.rollouts.sampling`.

    Raises:
      RunError: no policy there, or one that was trained on latent motion alone.
      ConfigError: the dataset is not one of the policy's, or a setting none of its own.
    """
    run = open_run(
        workdir,
        mesh,
        POLICY_FAMILIES,
        lambda config: build_policy(with_sampling(config, sampling or {})),
        "is not a policy",
    )
    spec = PolicySpec.load(workdir)
    if not spec.scales:
        raise RunError(
            f"{workdir} was trained on latent motion alone, so it cannot act; finetune it on robot data with "
            f"`python -m experiments.train_policy --config.init_from={workdir}`."
        )
    instructions = InstructionReader.make(run.config.text, workdir)
    return PolicyRunner(run.model, run.params, spec, spec.scales_of(dataset), instructions, mesh, run.step)


@functools.lru_cache(maxsize=32)
def _sampler(model: ModelDef, replicated: jax.sharding.Sharding) -> jax.stages.Wrapped:
    """From parameters, an observation and seeds `[n, k]` to n chunks of actions; made once for a model."""

    def sample(params: Params, observation: Observation, seeds: jax.Array) -> jax.Array:
        return model.bind(params).sample_actions(observation, jax.vmap(_fold)(seeds))

    return jax.jit(sample, out_shardings=replicated)


def _fold(seeds: jax.Array) -> jax.Array:
    """One key from whole numbers `[n]`."""
    key = jax.random.key(0)
    for number in range(len(seeds)):
        key = jax.random.fold_in(key, seeds[number])
    return key
