"""Builder that records demonstrations of Meta-World's scripted experts."""

from __future__ import annotations

import collections
import dataclasses
import functools

import numpy as np

from como_jax.convert.demonstrations import Demonstration, DemonstrationBuilder, DemonstrationSettings
from como_jax.convert.settings import number, setting, some_of
from como_jax.convert.sources import Source
from como_jax.envs import metaworld
from como_jax.envs.base import Environment, EnvironmentOptions
from como_jax.envs.metaworld.simulator import IMAGE_SIZES
from como_jax.errors import ConfigError, ConversionError

# Each takes 90 MB and 0.4 seconds to make, about as long as a demonstration.
_KEPT_ENVIRONMENTS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaWorldSettings(DemonstrationSettings):
    """Settings of `MetaWorldDemonstrations`."""

    image_size: int = setting("side of the square images, as rendered", 64, number(*IMAGE_SIZES))
    camera: tuple[str, ...] = setting(
        "names of cameras, the main camera first", metaworld.CAMERAS[:1], some_of(metaworld.CAMERAS, may_be_empty=False)
    )
    action_repeat: int = setting("simulator steps that an action lasts", metaworld.DEFAULT_ACTION_REPEAT, number(1))

    known_tasks = metaworld.TASKS


class MetaWorldDemonstrations(DemonstrationBuilder):
    """Demonstrations of the tasks of Meta-World v3."""

    settings_class = MetaWorldSettings
    settings: MetaWorldSettings
    state_size, action_size = metaworld.STATE_SIZE, metaworld.ACTION_SIZE
    # Nothing is decoded, and a simulator that does not run is not the fault of one source.
    decoder_errors = ()

    @property
    def cameras(self) -> tuple[str, ...]:
        return self.settings.camera

    def sources(self) -> list[Source]:
        """One source a demonstration; raises ConversionError if Meta-World is not installed."""
        try:
            metaworld.load_mujoco()
        except ConfigError as error:
            raise ConversionError(str(error)) from error
        return super().sources()

    def demonstrate(self, task: str, seed: int) -> Demonstration:
        return demonstrate(self._environment(task), seed, self.settings.noise)

    def _environment(self, task: str) -> metaworld.MetaWorldEnvironment:
        """Returns the environment of a task; those of the last few tasks are kept."""
        kept = self._environments
        if task not in kept:
            if len(kept) >= _KEPT_ENVIRONMENTS:
                kept.popitem(last=False)[1].close()
            settings = {"action_repeat": str(self.settings.action_repeat)}
            options = EnvironmentOptions(self.settings.image_size, self.settings.camera, settings=settings)
            kept[task] = metaworld.make("metaworld", task, options)
        kept.move_to_end(task)
        return kept[task]

    @functools.cached_property
    def _environments(self) -> collections.OrderedDict[str, metaworld.MetaWorldEnvironment]:
        return collections.OrderedDict()


def demonstrate(environment: Environment, seed: int, noise: float = 0.0) -> Demonstration:
    """Records one episode of an environment's own expert, until it ends.

    Args:
      environment: is reset with `seed`.
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
    return Demonstration(
        images={camera: [each.images[camera] for each in observations] for camera in environment.spec.cameras},
        states=np.stack([each.state for each in observations]),
        actions=np.stack(actions),
        instruction=environment.instruction,
        control_rate=environment.spec.control_rate,
        success=result.success,
    )
