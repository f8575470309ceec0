"""The base of the builders that record demonstrations of a scripted expert in a simulator."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np

from como_jax.convert import images
from como_jax.convert.builder import EpisodeBuilder, Item, SourceError, StepLayout
from como_jax.convert.settings import Settings, number, setting
from como_jax.convert.sources import Source
from como_jax.envs.base import MAX_DEMONSTRATION_SEED, SEED_STRIDE
from como_jax.errors import ConversionError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemonstrationSettings(Settings):
    """What every such builder can be asked for."""

    image_size: int = setting("side of the square images, as rendered", 64, number(1))
    seed: int = setting("fixes the split and all episodes", 0, number(0, MAX_DEMONSTRATION_SEED))
    episodes: int = setting("number of demonstrations", 200, number(1, SEED_STRIDE))
    tasks: tuple[str, ...] = setting("names of tasks, which take turns, or `all`", ("all",))
    noise: float = setting("standard deviation of the Gaussian noise on every action", 0.0, number(0))
    actions: bool = setting("whether to record actions and states; without them, this is video with language", True)

    known_tasks: ClassVar[Sequence[str]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [task for task in self.tasks if task not in (*self.known_tasks, "all")]
        if unknown or not self.tasks:
            raise ConversionError(f"unknown tasks {unknown}; there are all, {', '.join(self.known_tasks)}")


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """One recorded episode of T steps, without the last image, after which nothing is done.

    Attributes:
      images: T RGB images, uint8 `[H, W, 3]`, of every camera; the first camera is the main one.
      states: float32 `[T, S]`.
      actions: float32 `[T, A]`; `actions[t]` was executed after `images[...][t]`.
      instruction: what the task is, in words.
      control_rate: steps per second (Hz).
      success: whether the task was solved.
    """

    images: Mapping[str, Sequence[np.ndarray]]
    states: np.ndarray
    actions: np.ndarray
    instruction: str
    control_rate: float
    success: bool


class DemonstrationBuilder(EpisodeBuilder):
    """One successful demonstration for every seed; failed ones are left out."""

    settings: DemonstrationSettings
    cameras: tuple[str, ...]
    state_size: ClassVar[int]
    action_size: ClassVar[int]

    @abc.abstractmethod
    def demonstrate(self, task: str, seed: int) -> Demonstration:
        """Records one demonstration."""

    @property
    def layout(self) -> StepLayout:
        """The cameras, and states and actions unless they are to be left out."""
        recorded = self.settings.actions
        return StepLayout(self.cameras, *((self.state_size, self.action_size) if recorded else (None, None)))

    def sources(self) -> list[Source]:
        """One source a demonstration."""
        settings = self.settings
        tasks = settings.known_tasks if "all" in settings.tasks else settings.tasks
        first = settings.seed * SEED_STRIDE
        return [Source(f"{tasks[index % len(tasks)]}/{first + index:09d}") for index in range(settings.episodes)]

    def episodes(self, source: Source) -> Iterator[Item]:
        """The demonstration."""
        task, _, seed = source.path.partition("/")
        found = self.demonstrate(task, int(seed))
        if not found.success:
            raise SourceError("the demonstration did not solve its task")
        size = self.settings.image_size
        frames = {camera: [images.make_frame(image, size) for image in stack] for camera, stack in found.images.items()}
        vectors = (found.states, found.actions) if self.settings.actions else (None, None)
        yield images.make_episode(source.path, source.path, found.control_rate, frames, *vectors, found.instruction)
