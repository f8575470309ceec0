"""Builder that records demonstrations of the scripted expert in LIBERO's simulator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from como_jax.convert import images
from como_jax.convert.builder import EpisodeBuilder, Item, LeftOut, SourceError, StepLayout
from como_jax.convert.libero_sim.recording import FailedAttempt, MakeExpert, record
from como_jax.convert.settings import Settings, number, one_of, setting, some_of
from como_jax.convert.sources import Source, assign_splits
from como_jax.envs.base import MAX_DEMONSTRATION_SEED, SEED_STRIDE, EnvironmentOptions
from como_jax.envs.libero import arm, benchmark, make
from como_jax.envs.libero.render import LOOKS
from como_jax.envs.libero.variation import VARIATIONS
from como_jax.errors import ConversionError, UsageError, closest, one_line

ATTEMPTS = 8
"""Starts that are tried for one demonstration, each with a seed of its own."""
_SEED_DIGITS = 9


def _known_suite(name: str, value: str) -> None:
    if value not in benchmark.SUITES:
        known = ", ".join(benchmark.SUITES)
        raise ConversionError(f"{name} must be one of {known}, got {value!r}{closest(value, benchmark.SUITES)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiberoSimSettings(Settings):
    """Settings of `LiberoDemonstrations`."""

    image_size: int = setting("side of the square images, as rendered", 128, number(16, 1024))
    seed: int = setting("fixes the split and all episodes", 0, number(0, MAX_DEMONSTRATION_SEED))
    suite: str = setting("of LIBERO or LIBERO-PRO, as in libero_spatial or libero_spatial_swap", check=_known_suite)
    tasks: tuple[str, ...] = setting("numbers of tasks, or `all`", ("all",))
    episodes_per_task: int = setting("demonstrations of each task", 50, number(1, SEED_STRIDE // ATTEMPTS))
    noise: float = setting("standard deviation of the Gaussian noise on every action", 0.0, number(0))
    actions: bool = setting("whether to record actions and states; without them, this is video with language", True)
    camera: tuple[str, ...] = setting(
        "names of cameras, the main camera first [all]", tuple(arm.CAMERAS), some_of(tuple(arm.CAMERAS), False)
    )
    state: tuple[str, ...] = setting(
        "names of states, joined in this order", ("ee_states", "gripper_states"), some_of(tuple(arm.STATES), False)
    )
    orientation: str = setting(
        "how images are turned: rotate180, flip or stored", arm.ORIENTATIONS[0], one_of(arm.ORIENTATIONS)
    )
    variation: tuple[str, ...] = setting(
        f"what looks otherwise in each episode, of {', '.join(VARIATIONS)}", (), some_of(VARIATIONS)
    )
    look: str = setting("fast or full, see como_jax/envs/README.md", LOOKS[0], one_of(LOOKS))

    def __post_init__(self) -> None:
        super().__post_init__()
        count, _ = benchmark.SUITES[self.suite]
        known = [str(task) for task in range(count)]
        unknown = [task for task in self.tasks if task not in (*known, "all")]
        if unknown or not self.tasks:
            raise ConversionError(f"tasks of {self.suite} are numbers from 0 to {count - 1}, or all, got {unknown}")

    @property
    def task_names(self) -> list[str]:
        """The tasks by suite and number, each once."""
        count, _ = benchmark.SUITES[self.suite]
        numbers = map(str, range(count)) if "all" in self.tasks else dict.fromkeys(self.tasks)
        return [f"{self.suite}/{task}" for task in numbers]


class LiberoDemonstrations(EpisodeBuilder):
    """Successful demonstrations of every task; one that fails is replaced by another and reported."""

    settings_class = LiberoSimSettings
    settings: LiberoSimSettings
    # Nothing is decoded, and a simulator that does not run is not the fault of one source.
    decoder_errors = ()
    make_expert: ClassVar[MakeExpert] = staticmethod(arm.make_expert)

    @property
    def layout(self) -> StepLayout:
        settings = self.settings
        if not settings.actions:
            return StepLayout(settings.camera)
        return StepLayout(settings.camera, sum(arm.STATES[name] for name in settings.state), arm.ACTION_SIZE)

    @property
    def environment(self) -> dict[str, str]:
        settings = self.settings
        return {
            "family": "libero",
            "look": settings.look,
            "orientation": settings.orientation,
            "state": ",".join(settings.state),
        }

    def sources(self) -> list[Source]:
        """One source a demonstration, those of a task together; both splits have demonstrations of each task.

        Raises:
          ConversionError: LIBERO is not installed.
        """
        try:
            benchmark.task_names()
        except UsageError as error:
            raise ConversionError(str(error)) from error
        sources = []
        for task in self.settings.task_names:
            members = [Source(f"{task}/{index:05d}") for index in range(self.settings.episodes_per_task)]
            sources += assign_splits(members, self.settings.validation_fraction, self.settings.seed)
        return sources

    def episodes(self, source: Source) -> Iterator[Item]:
        """The demonstration, after the attempts that failed."""
        task, _, index = source.path.rpartition("/")
        first = self.settings.seed * SEED_STRIDE + int(index) * ATTEMPTS
        env = self._environment(task)
        for seed in range(first, first + ATTEMPTS):
            try:
                found = record(env, self.make_expert, seed, self.settings.noise)
            except FailedAttempt as error:
                yield LeftOut(f"the attempt with seed {seed} was replaced: {error}")
                continue
            except UsageError:
                # No attempt would do better where there is nothing to draw with.
                raise
            # A simulator raises errors of all kinds where its state becomes bad; the next attempt begins anew.
            except (RuntimeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
                yield LeftOut(f"the attempt with seed {seed} was replaced: {one_line(error)}")
                continue
            frames = {
                camera: [images.make_frame(image, self.settings.image_size) for image in stack]
                for camera, stack in found.images.items()
            }
            vectors = (found.states, found.actions) if self.settings.actions else (None, None)
            name = f"{task}/{seed:0{_SEED_DIGITS}d}"
            yield images.make_episode(name, task, found.control_rate, frames, *vectors, found.instruction)
            return
        raise SourceError(f"none of {ATTEMPTS} attempts solved the task")

    def _environment(self, task: str) -> arm.PandaEnvironment:
        """The environment of a task. The last one is kept, and no other: each takes 1 to 2 GiB."""
        kept: dict[str, arm.PandaEnvironment] = self.__dict__.setdefault("_kept", {})
        if task not in kept:
            while kept:
                kept.popitem()[1].close()
            settings = {name: value for name, value in self.environment.items() if name != "family"}
            settings |= {"init": "drawn", "render_size": str(self.settings.image_size)}
            settings["variation"] = ",".join(self.settings.variation)
            options = EnvironmentOptions(self.settings.image_size, self.settings.camera, settings=settings)
            kept[task] = make("libero", task, options)
        return kept[task]
