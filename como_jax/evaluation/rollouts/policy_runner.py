"""Asks a trained policy for actions, in the units of its robot."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from como_jax.data.instructions import InstructionReader
from como_jax.errors import RunError
from como_jax.evaluation.rollouts.sampling import with_sampling
from como_jax.nn.model_def import ModelDef, Params
from como_jax.policies.build import POLICY_FAMILIES, build_policy
from como_jax.spec.interface import History, NormStats, PolicySpec, observation_arrays
from como_jax.training import sharding
from como_jax.training.run import open_run
from como_jax.types import Observation


class PolicyRunner:
    """A policy with its parameters, the normalisation of one robot and the reader of its instructions.

    Attributes:
      spec: of the policy, with the sizes of this robot's actions and states.
      step: updates that the policy has been trained for.
    """

    def __init__(
        self,
        model: ModelDef,
        params: Params,
        spec: PolicySpec,
        stats: NormStats,
        instructions: InstructionReader,
        mesh: Mesh,
        step: int = 0,
    ):
        self.spec, self._model_spec, self._stats = spec.sized_for(stats), spec, stats
        self.step, self._params, self._instructions = step, params, instructions
        self._replicated = sharding.replicated(mesh)

        self._sample = _sampler(model, self._replicated)

    def with_params(self, params: Params) -> PolicyRunner:
        """The same runner, with its compiled programs, and other parameters."""
        other = copy.copy(self)
        other._params = params
        return other

    def sample(self, histories: Sequence[History], seeds: Sequence[Sequence[int]]) -> np.ndarray:
        """Action chunks in the robot's units, float32 `[n, H, A]`.

        Args:
          histories: what the policy is asked about, n times; every n is compiled once.
          seeds: as many whole numbers for each, the same count for all, from which its noise follows.
        """
        observation = self._observe(histories)
        observation, seeds = jax.device_put((observation, np.asarray(seeds, np.uint32)), self._replicated)
        chunks = np.asarray(self._sample(self._params, observation, seeds))
        return self._stats.action.inverse(chunks[..., : self.spec.action_size])

    def _observe(self, histories: Sequence[History]) -> Observation:
        instructions = self._instructions([history.instruction for history in histories])
        arrays = observation_arrays(self._model_spec, self._stats, histories)
        return Observation(**arrays, **{self._instructions.key: instructions})


def load_policy(
    workdir: epath.PathLike, mesh: Mesh, dataset: str = "", sampling: Mapping[str, str] | None = None
) -> PolicyRunner:
    """The policy of a run with the newest parameters, their moving average where it has one.

    Args:
      workdir: of `experiments.train_policy`.
      mesh: of devices.
      dataset: the robot dataset whose normalisation is used, where there are several.
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
    spec = PolicySpec.load(epath.Path(workdir))
    if not spec.robots:
        raise RunError(
            f"{workdir} was trained on latent motion alone, so it cannot act; finetune it on robot data with "
            f"`python -m experiments.train_policy --config.init_from={workdir}`."
        )
    instructions = InstructionReader.make(run.config.text, workdir)
    return PolicyRunner(
        run.model, run.params, spec, spec.robots[spec.choose_robot(dataset)], instructions, mesh, run.step
    )


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
