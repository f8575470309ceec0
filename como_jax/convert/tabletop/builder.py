"""Builder that records demonstrations in the embedded tabletop environment."""

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
from como_jax.convert.sources import Source
from como_jax.data.schema import Episode, Step
from como_jax.envs import tabletop
from como_jax.envs.base import SEED_STRIDE
from como_jax.names import DEFAULT_CAMERA


@dataclasses.dataclass(frozen=True, kw_only=True)
class TabletopSettings(Settings):
    """Settings of `TabletopDemonstrations`.

    Attributes:
      image_size: side of the square pictures, as rendered.
      episodes: number of demonstrations.
      tasks: which tasks, in turn; ("all",) for all.
      look: plain, moving, hard or human.
      noise: standard deviation of the Gaussian noise on every action.
      actions: whether to record actions and states; without, the dataset is video with language.
    """

    image_size: int = tabletop.IMAGE_SIZES[0]
    episodes: int = 200
    tasks: tuple[str, ...] = ("all",)
    look: str = "plain"
    noise: float = 0.0
    actions: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = tabletop.IMAGE_SIZES
        if not low <= self.image_size <= high:
            raise ConversionError(f"image_size must lie between {low} and {high}, got {self.image_size}")
        check_demonstrations(self, tabletop.TASKS)
        if self.look not in tabletop.LOOKS:
            raise ConversionError(f"unknown look {self.look!r}; there are {', '.join(tabletop.LOOKS)}")


class TabletopDemonstrations(EpisodeBuilder):
    """One successful demonstration of the scripted expert for every seed; failed ones are left out."""

    settings_class = TabletopSettings
    settings: TabletopSettings
    max_sources_per_shard = 256

    @property
    def layout(self) -> StepLayout:
        """One camera, and the gripper's state and actions unless they are to be left off."""
        size = 4 if self.settings.actions else None
        return StepLayout(state_size=size, action_size=size)

    def sources(self) -> list[Source]:
        """One source a demonstration."""
        tasks = tabletop.TASKS if "all" in self.settings.tasks else self.settings.tasks
        first = self.settings.seed * SEED_STRIDE
        return [Source(f"{tasks[index % len(tasks)]}/{first + index:09d}") for index in range(self.settings.episodes)]

    def episodes(self, source: Source) -> Iterator[Episode | LeftOut | Warned]:
        """The demonstration, without the last picture, after which nothing is done."""
        task, _, seed = source.path.partition("/")
        demonstration = tabletop.demonstrate(self._environment(task), int(seed), self.settings.noise)
        if not demonstration.success:
            raise SourceError("the demonstration did not solve its task")
        recorded = self.settings.actions
        steps = [
            Step(
                {DEFAULT_CAMERA: images.encode_jpeg(image)},
                state if recorded else None,
                action if recorded else None,
            )
            # zip leaves off the last picture and state, which no action follows.
            for image, state, action in zip(
                demonstration.images, demonstration.states, demonstration.actions, strict=False
            )
        ]
        yield Episode(
            episode_id=source.path,
            source_file=source.path,
            control_rate=float(tabletop.CONTROL_RATE_HZ),
            steps=steps,
            motion=images.motion([images.thumbnail(image) for image in demonstration.images[: len(steps)]]),
            language_instruction=demonstration.instruction,
        )

    def _environment(self, task: str) -> tabletop.Tabletop:
        return self._environments[task]

    @functools.cached_property
    def _environments(self) -> dict[str, tabletop.Tabletop]:
        return {
            task: tabletop.Tabletop(task, self.settings.image_size, tabletop.LOOKS[self.settings.look])
            for task in tabletop.TASKS
        }
