"""Small datasets of robots with any cameras, sizes and instructions, and labels that are drawn at random."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from etils import epath

from como_jax.convert import builder as base
from como_jax.convert import images
from como_jax.convert.settings import Settings
from como_jax.convert.sources import Source
from como_jax.data.schema import Episode, Step
from como_jax.labelling.shards import latent_statistics, list_shards
from tests.export.conftest import Row, change_tables

GAP = 2
"""Steps at the end of an episode that have no label."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobotSettings(Settings):
    """What a dataset holds; the last episode is that of `val`. Sizes of None leave actions or states out."""

    cameras: tuple[str, ...] = ("image",)
    action_size: int | None = 3
    state_size: int | None = 2
    lengths: tuple[int, ...] = (9, 5, 7, 6)
    instructions: tuple[str, ...] = ("push", "pull it", "lift", "wave")
    height: int = 24
    width: int = 40


class RobotBuilder(base.EpisodeBuilder):
    """One episode a source, of random numbers."""

    settings_class = RobotSettings
    settings: RobotSettings

    @property
    def layout(self) -> base.StepLayout:
        settings = self.settings
        return base.StepLayout(settings.cameras, settings.state_size, settings.action_size)

    def sources(self) -> list[Source]:
        last = len(self.settings.lengths) - 1
        return [Source(str(number), "val" if number == last else "train") for number in range(last + 1)]

    def episodes(self, source: Source) -> Iterator[Episode]:
        settings, number = self.settings, int(source.path)
        rng = np.random.default_rng((settings.seed, number))

        def draw(size: int | None) -> np.ndarray | None:
            return None if size is None else rng.normal(3, 5, size).astype(np.float32)

        def image() -> bytes:
            coarse = rng.integers(0, 256, (settings.height // 8, settings.width // 8, 3), np.uint8)
            return images.encode_jpeg(coarse.repeat(8, axis=0).repeat(8, axis=1))

        steps = [
            Step(
                {camera: image() for camera in settings.cameras},
                draw(settings.state_size),
                draw(settings.action_size),
            )
            for _ in range(settings.lengths[number])
        ]
        yield Episode(
            episode_id=f"episode {number}",
            source_file=source.path,
            control_rate=5.0,
            steps=steps,
            motion=np.zeros(len(steps), np.float32),
            language_instruction=settings.instructions[number],
        )


def make_robot(directory: Path, **settings: object) -> Path:
    """Writes a dataset; keyword arguments are those of `RobotSettings`."""
    RobotBuilder(directory, RobotSettings(**settings)).convert()
    return directory


def add_labels(
    dataset: Path, directory: Path, *, parameters: str = "model", codebook_size: int = 0, gap: int = GAP
) -> Path:
    """A copy of a dataset with random labels of two tokens of three numbers; the last steps have none."""
    shutil.copytree(dataset, directory)
    rng = np.random.default_rng(1)

    def label(row: Row) -> Row:
        steps = row["num_steps"]
        codes = rng.integers(0, max(1, codebook_size), (steps, 2))
        # As the labeller has it.
        codes[max(0, steps - gap) :] = -1
        return {
            **row,
            "latent_motion": rng.normal(2, 3, (steps, 6)).astype(np.float32).tolist(),
            "latent_valid": [step < steps - gap for step in range(steps)],
            "latent_codes": codes.tolist() if codebook_size else None,
        }

    change_tables(directory, label)
    path = epath.Path(directory)
    statistics = json.loads((path / "statistics.json").read_text())
    statistics["latent_motion"] = latent_statistics(path, list_shards(path))
    (path / "statistics.json").write_text(json.dumps(statistics))
    labels = {"parameters": parameters, "latent_shape": [2, 3], "codebook_size": codebook_size}
    (path / "labels.json").write_text(json.dumps(labels))
    return directory
