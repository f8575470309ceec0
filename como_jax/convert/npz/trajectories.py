"""From the arrays of an .npz file to episodes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from etils import epath

from como_jax.convert import images
from como_jax.convert.npz.archive import ArrayHeader, NpzArchive
from como_jax.convert.npz.selection import Selection, check
from como_jax.data.schema import Episode, Step


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One recording of T steps.

    Attributes:
      pictures: uint8 `[T, H, W, 3]` by camera.
      states: float32 `[T, state_size]`, or None.
      actions: float32 `[T, action_size]`, or None.
      language: instruction, empty if there is none.
      without_last: whether a last picture was left off since no action belongs to it.
    """

    pictures: Mapping[str, np.ndarray]
    states: np.ndarray | None = None
    actions: np.ndarray | None = None
    language: str = ""
    without_last: bool = False


def read_trajectories(path: epath.PathLike, selection: Selection) -> Iterator[Trajectory]:
    """Yields the trajectories of a file, of which a batch is held one at a time.

    Raises:
      ValueError, OSError: the file is damaged, or does not hold what is selected.
    """
    with NpzArchive(path) as archive:
        steps = check(archive.headers, selection)
        is_batch = len(steps) > 1
        # A key may stand for a state and an action.
        values = [archive.rows(key) if is_batch else iter([archive.read(key)]) for key in selection.keys]
        texts = _texts(archive, selection.language, steps)
        for arrays, text in zip(zip(*values, strict=True), texts, strict=True):
            by_key = dict(zip(selection.keys, arrays, strict=True))
            length = steps[-1]
            pictures = {name: by_key[key][:length] for name, key in selection.cameras.items()}
            yield Trajectory(
                pictures,
                _join(by_key, selection.states, length),
                _join(by_key, selection.actions, length),
                text,
                any(len(by_key[key]) > length for key in selection.cameras.values()),
            )


def vector_size(headers: Mapping[str, ArrayHeader], keys: Sequence[str], num_leading: int) -> int | None:
    """Number of values a step in the joined arrays, or None without arrays; the leading axes are batch and time."""
    return sum(math.prod(headers[key].shape[num_leading:]) for key in keys) if keys else None


def make_episode(trajectory: Trajectory, name: str, source_file: str, control_rate: float, image_size: int) -> Episode:
    """The trajectory with encoded pictures; the first camera is the one that motion is measured on."""
    jpegs: dict[str, list[bytes]] = {}
    thumbnails: dict[str, list[np.ndarray]] = {}
    for camera, pictures in trajectory.pictures.items():
        small = [images.shrink(picture, image_size) for picture in pictures]
        jpegs[camera] = [images.encode_jpeg(picture) for picture in small]
        thumbnails[camera] = [images.thumbnail(picture) for picture in small]
    main = next(iter(jpegs))
    steps = [
        Step(
            {camera: jpegs[camera][index] for camera in jpegs},
            None if trajectory.states is None else trajectory.states[index],
            None if trajectory.actions is None else trajectory.actions[index],
        )
        for index in range(len(jpegs[main]))
    ]
    return Episode(name, source_file, control_rate, steps, images.motion(thumbnails[main]), trajectory.language)


def _join(arrays: Mapping[str, np.ndarray], keys: Sequence[str], length: int) -> np.ndarray | None:
    """float32 `[T, size]` from arrays `[T, ...]`."""
    if not keys:
        return None
    # Numbers too large for float32 become infinite, and are found with the others that are not finite.
    with np.errstate(over="ignore"):
        return np.concatenate([arrays[key][:length].reshape(length, -1).astype(np.float32) for key in keys], axis=1)


def _texts(archive: NpzArchive, key: str | None, steps: tuple[int, ...]) -> list[str]:
    """One text a trajectory, from one for all, one for each, or one for each step, of which the first counts."""
    count = steps[0] if len(steps) > 1 else 1
    if key is None:
        return [""] * count
    values = archive.read(key)
    if values.ndim and len(steps) > 1 and len(values) != count:
        raise ValueError(f"array {key!r} has {len(values)} texts for {count} trajectories")
    first = [row.flat[0] for row in values] if values.ndim and len(steps) > 1 else [values.flat[0]] * count
    return [(text.decode() if isinstance(text, bytes) else str(text)).strip() for text in first]
