"""Asks a trained policy for actions, in the units of its robot; and how it samples them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from como_jax.data.instructions import InstructionReader
from como_jax.errors import ConfigError, RunError, closest
from como_jax.nn.model_def import ModelDef, Params
from como_jax.policies.models import POLICY_FAMILIES, build_policy
from como_jax.spec.interface import History, NormStats, PolicySpec, observation_arrays
from como_jax.training import sharding
from como_jax.training.run import open_run
from como_jax.types import Observation

SAMPLING_FIELDS = (
    "temperature",
    "generate_latents",
    "guidance",
    "flow_steps",
    "diffusion.sample_steps",
    "diffusion.eta",
)
"""Fields of `config.model` that change how actions are sampled, but no parameter; each family has some of them."""


class PolicyRunner:
    """A policy with its parameters, the normalisation of one robot and the reader of its instructions.

    Attributes:
      spec: of the policy, with the sizes of this robot's actions and states.
      step: updates that the policy has been trained for.
      environment: family and settings of the environment that the robot's dataset was made in, where they are known.
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
        environment: Mapping[str, str] | None = None,
    ):
        self.spec, self._model_spec, self._stats = spec.sized_for(stats), spec, stats
        self.environment = environment or {}
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
          seeds: integers for each, equally many for all, from which its noise follows.
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
      sampling: settings that differ from those of the run, see `with_sampling`.

    Raises:
      RunError: no policy there, or one that was trained on latent motion alone.
      ConfigError: the policy was not trained on this dataset, or has no such setting.
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
    robot = spec.choose_robot(dataset)
    environment = spec.environments.get(robot)
    return PolicyRunner(run.model, run.params, spec, spec.robots[robot], instructions, mesh, run.step, environment)


def with_sampling(config: ConfigDict, settings: Mapping[str, str]) -> ConfigDict:
    """The config of a policy with other settings of sampling.

    Args:
      config: of the run.
      settings: values as text, by names of `SAMPLING_FIELDS`.

    Raises:
      ConfigError: a name that this policy does not have, or a value of another type.
    """
    config = config.copy_and_resolve_references()
    nested = {f"diffusion.{name}": value for name, value in config.model.get("diffusion", {}).items()}
    fields = {**config.model, **nested}
    known = [name for name in SAMPLING_FIELDS if name in fields]
    for name, text in settings.items():
        if name not in known:
            raise ConfigError(f"`sampling` {name}: this policy has {', '.join(known)}{closest(name, known)}")
        config.update_from_flattened_dict({f"model.{name}": _parse(name, text, fields[name])})
    return config


def _parse(name: str, text: str, like: Any) -> Any:
    """The value of the text, of the type of `like`."""
    try:
        if isinstance(like, bool):
            return {"true": True, "false": False}[text.lower()]
        return type(like)(text)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"`sampling` {name}={text}: the value must be like {like!r}.") from error


@functools.lru_cache(maxsize=32)
def _sampler(model: ModelDef, replicated: jax.sharding.Sharding) -> jax.stages.Wrapped:
    """From parameters, an observation and seeds `[n, k]` to n chunks of actions; made once for a model."""

    def sample(params: Params, observation: Observation, seeds: jax.Array) -> jax.Array:
        return model.bind(params).sample_actions(observation, jax.vmap(_fold)(seeds))

    return jax.jit(sample, out_shardings=replicated)


def _fold(seeds: jax.Array) -> jax.Array:
    """One key from integers `[n]`."""
    key = jax.random.key(0)
    for number in range(len(seeds)):
        key = jax.random.fold_in(key, seeds[number])
    return key
