"""One episode as the checks see it, whatever it was read from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from como_jax.convert import images
from como_jax.data.schema import Episode

PROBES = 6
"""Pictures of every camera that are looked at, evenly spaced over the episode."""


@dataclasses.dataclass(frozen=True)
class Recording:
    """An episode with all its numbers and a few of its pictures.

    Axes: T steps.

    Attributes:
      episode_id: unique within the dataset.
      control_rate: Hz, or None when unknown.
      motion: float32 `[T]`, see `schema.EPISODE_TABLE_SCHEMA`.
      pictures: of every camera, the main one first, RGB uint8 `[H, W, 3]` at `probe_steps(T)`.
      resolution: height and width of the pictures of every camera as they are stored.
      action, state: float32 `[T, size]`, or None.
      instruction: empty when unknown.
      split: empty when the dataset has none.
    """

    episode_id: str
    control_rate: float | None
    motion: np.ndarray
    pictures: Mapping[str, Sequence[np.ndarray]]
    resolution: Mapping[str, tuple[int, int]]
    action: np.ndarray | None = None
    state: np.ndarray | None = None
    instruction: str = ""
    split: str = ""


def probe_steps(num_steps: int) -> list[int]:
    """The steps whose pictures are looked at, always `PROBES` of them."""
    return np.linspace(0, num_steps - 1, PROBES).round().astype(int).tolist()


def record_episode(
    episode: Episode,
    control_rate: float | None,
    resolution: Mapping[str, tuple[int, int]] | None = None,
    split: str = "",
) -> Recording:
    """An episode of a dataset builder as a recording.

    Args:
      episode: with at least one step.
      control_rate: Hz, or None when unknown, whatever the episode says.
      resolution: of the cameras whose stored pictures are larger than those of the episode.
      split: of the dataset.

    Raises:
      ValueError: a picture is damaged, or the steps do not fit together.
    """
    probed = [episode.steps[index] for index in probe_steps(len(episode.steps))]
    pictures = {camera: [images.decode_image(step.images[camera]) for step in probed] for camera in probed[0].images}
    return Recording(
        episode_id=episode.episode_id,
        control_rate=control_rate,
        motion=np.asarray(episode.motion, np.float32),
        pictures=pictures,
        resolution={camera: shots[0].shape[:2] for camera, shots in pictures.items()} | dict(resolution or {}),
        action=_stack([step.action for step in episode.steps], "action"),
        state=_stack([step.state for step in episode.steps], "state"),
        instruction=episode.language_instruction,
        split=split,
    )


def _stack(values: Sequence[np.ndarray | None], kind: str) -> np.ndarray | None:
    present = [np.asarray(value, np.float32) for value in values if value is not None]
    if not present:
        return None
    if len(present) < len(values) or len({value.shape for value in present}) > 1:
        raise ValueError(f"not every step has the same number of {kind} values")
    return np.stack(present)
