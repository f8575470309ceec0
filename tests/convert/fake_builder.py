"""A builder whose sources live in memory, in a module that worker processes can import."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from como_jax.convert import builder as base
from como_jax.convert import images
from como_jax.convert.settings import Settings
from como_jax.convert.sources import Source
from como_jax.data.schema import Episode, Step


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeSettings(Settings):
    """What each source is like, by name; and whether to stop at a source, while the file named so exists."""

    behaviours: tuple[str, ...] = ("good",) * 10
    stop_file: str = ""


class FakeBuilder(base.EpisodeBuilder):
    """Two episodes a source, unless the source is to behave otherwise."""

    settings_class = FakeSettings

    @property
    def layout(self) -> base.StepLayout:
        return base.StepLayout(state_size=1, action_size=2)

    def sources(self) -> list[Source]:
        return [Source(f"{index:02d}_{behaviour}") for index, behaviour in enumerate(self.settings.behaviours)]

    def warnings(self) -> list[str]:
        return ["about everything"]

    def episodes(self, source: Source) -> Iterator[Episode | base.LeftOut | base.Warned]:
        behaviour = source.name.partition("_")[2]
        if behaviour == "stops" and Path(self.settings.stop_file).exists():
            raise KeyboardInterrupt
        if behaviour == "kills once" and Path(self.settings.stop_file).exists():
            Path(self.settings.stop_file).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if behaviour == "kills":
            os.kill(os.getpid(), signal.SIGKILL)
        if behaviour == "broken":
            raise ValueError("damaged\nheader")
        yield fake_episode(source, 0, 5)
        if behaviour == "ends early":
            raise base.SourceError("ends early")
        if behaviour == "bug":
            raise TypeError("a mistake in the builder")
        if behaviour == "warns":
            yield base.Warned("dark images")
            yield base.Warned("dark images")
        if behaviour == "left out":
            yield base.LeftOut("record 1: unreadable")
        if behaviour == "not finite":
            yield fake_episode(source, 1, 3, action=np.nan)
        elif behaviour == "one step":
            yield fake_episode(source, 1, 1)
        else:
            yield fake_episode(source, 1, 3)


def fake_episode(source: Source, index: int, num_steps: int, action: float = 0.5) -> Episode:
    """An episode whose frames get brighter by a tenth of the range with every step."""
    frames = [np.full((8, 8, 3), 25.5 * step, np.uint8) for step in range(num_steps)]
    steps = [
        Step({"image": images.encode_jpeg(frame)}, np.full(1, step, np.float32), np.full(2, action))
        for step, frame in enumerate(frames)
    ]
    return Episode(
        episode_id=f"{source.name}/{index}",
        source_file=source.name,
        control_rate=4.0,
        steps=steps,
        motion=images.motion([images.thumbnail(frame) for frame in frames]),
    )
