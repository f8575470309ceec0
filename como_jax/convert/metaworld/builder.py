"""Builder that records demonstrations of Meta-World's scripted experts."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator

from como_jax.convert import images
from como_jax.convert.builder import (
    ConversionError,
    EpisodeBuilder,
    LeftOut,
    Settings,
    SourceError,
    StepLayout,
    Warned,
)
from como_jax.convert.demonstrations import check_demonstrations
from como_jax.convert.metaworld.demonstrations import demonstrate
from como_jax.convert.sources import Source
from como_jax.data.schema import Episode, Step
from como_jax.envs import metaworld
from como_jax.envs.base import SEED_STRIDE, EnvironmentOptions
from como_jax.errors import ConfigError

# Each takes 90 MB and 0.4 seconds to make, about as long as a demonstration.
_KEPT_ENVIRONMENTS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaWorldSettings(Settings):
    """Settings of `MetaWorldDemonstrations`.

    Attributes:
      image_size: side of the square pictures, as rendered.
      episodes: number of demonstrations.
      tasks: which tasks, in turn; ("all",) for all.
      camera: names of the cameras; the first is the main one.
      noise: standard deviation of the Gaussian noise on every action.
      actions: whether to record actions and states; without, the dataset is video with language.
      action_repeat: steps of the simulator that each action lasts.
    """

    image_size: int = 64
    episodes: int = 200
    tasks: tuple[str, ...] = ("all",)
    camera: tuple[str, ...] = metaworld.CAMERAS[:1]
    noise: float = 0.0
    actions: bool = True
    action_repeat: int = metaworld.DEFAULT_ACTION_REPEAT

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            metaworld.check_cameras(self.camera)
            metaworld.check_image_size(self.image_size)
        except ConfigError as error:
            raise ConversionError(str(error)) from error
        check_demonstrations(self, metaworld.TASKS)
        if self.action_repeat < 1:
            raise ConversionError(f"action_repeat must be 1 or more, got {self.action_repeat}")


class MetaWorldDemonstrations(EpisodeBuilder):
    """One successful demonstration of the scripted expert for every seed; failed ones are left out."""

    settings_class = MetaWorldSettings
    settings: MetaWorldSettings
    max_sources_per_shard = 256
    # Nothing is decoded, and a simulator that does not run is no fault of one source.
    decoder_errors = ()

    @property
    def layout(self) -> StepLayout:
        """The cameras, and the hand's state and actions unless they are to be left off."""
        recorded = self.settings.actions
        return StepLayout(
            self.settings.camera,
            state_size=metaworld.STATE_SIZE if recorded else None,
            action_size=metaworld.ACTION_SIZE if recorded else None,
        )

    def sources(self) -> list[Source]:
        """One source a demonstration.

        Raises:
          ConversionError: Meta-World is not installed.
        """
        try:
            metaworld.load_mujoco()
        except ConfigError as error:
            raise ConversionError(str(error)) from error
        tasks = metaworld.TASKS if "all" in self.settings.tasks else self.settings.tasks
        first = self.settings.seed * SEED_STRIDE
        return [Source(f"{tasks[index % len(tasks)]}/{first + index:09d}") for index in range(self.settings.episodes)]

    def episodes(self, source: Source) -> Iterator[Episode | LeftOut | Warned]:
        """The demonstration."""
        task, _, seed = source.path.partition("/")
        environment = self._environment(task)
        demonstration = demonstrate(environment, int(seed), self.settings.noise)
        if not demonstration.success:
            raise SourceError("the demonstration did not solve its task")
        recorded, main = self.settings.actions, self.settings.camera[0]
        steps = [
            Step(
                {name: images.encode_jpeg(image) for name, image in observation.images.items()},
                observation.state if recorded else None,
                action if recorded else None,
            )
            for observation, action in zip(demonstration.observations, demonstration.actions, strict=True)
        ]
        yield Episode(
            episode_id=source.path,
            source_file=source.path,
            control_rate=environment.spec.control_rate,
            steps=steps,
            motion=images.motion(
                [images.thumbnail(observation.images[main]) for observation in demonstration.observations]
            ),
            language_instruction=environment.instruction,
        )

    def _environment(self, task: str) -> metaworld.MetaWorldEnvironment:
        """The environment of a task, with those of the last few tasks kept."""
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
