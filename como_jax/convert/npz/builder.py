"""Builder for a folder of .npz files."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from etils import epath

from como_jax.convert import images
from como_jax.convert.builder import Item, StepLayout, Warned
from como_jax.convert.folder import FolderBuilder, FolderSettings
from como_jax.convert.labels import SIDECAR_SUFFIXES
from como_jax.convert.npz.archive import ArrayHeader, NpzArchive
from como_jax.convert.selection import Selection, as_identifier, missing_warnings
from como_jax.convert.settings import RATE, setting
from como_jax.convert.sources import Source
from como_jax.data.schema import Episode
from como_jax.errors import ConversionError

CHANGES = "the language changes within a trajectory: that of its first step counts"
WITHOUT_LAST = "there is one action less than there are images: the last image was left off"
_ACTION_KEYS = ("action", "actions")
_STATE_KEYS = ("state", "states")
_LANGUAGE_KEYS = ("language_instruction", "instruction", "language", "task")
_NUMBER_KINDS = "biuf"
_TEXT_KINDS = "US"

Headers = Mapping[str, ArrayHeader]
"""The headers of the arrays of a file, by key."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpzSettings(FolderSettings):
    """Settings of `Npz`."""

    control_rate: float = setting("steps per second (Hz), which arrays do not say", check=RATE)
    camera: tuple[str, ...] = setting("keys of images, the main camera first [the only array with images]", ())
    action: tuple[str, ...] | None = setting("keys, joined in this order; '' for none [action or actions]", None)
    state: tuple[str, ...] | None = setting("keys, joined in this order; '' for none [state or states]", None)
    language: str | None = setting("key of a text; '' for none [the first of the usual ones]", None)


class Npz(FolderBuilder):
    """The trajectories of all .npz files in a folder, whose arrays have the same keys in every file."""

    settings_class = NpzSettings
    settings: NpzSettings
    suffixes = (".npz",)
    contents = ".npz file"

    @property
    def layout(self) -> StepLayout:
        return self._chosen[1]

    def warnings(self) -> list[str]:
        """What was not understood in the folder, and what is missing from the dataset."""
        known = (*self.suffixes, *SIDECAR_SUFFIXES)
        labels = set(self.instructions.label_files)
        others = [name for name in self.listing.files if not name.lower().endswith(known) and name not in labels]
        messages = [*super().warnings(), *self.instructions.warnings]
        if others:
            messages.append(f"{len(others)} files that are not .npz were ignored, such as {others[0]}")
        selection = self._chosen[0]
        return messages + missing_warnings(action=selection.actions, state=selection.states)

    def label_files(self) -> list[str]:
        """The files of the folder that hold labels, or look as if they did."""
        return self.instructions.label_files

    def episodes(self, source: Source) -> Iterator[Item]:
        """The trajectories of one file, in order."""
        for index, trajectory in enumerate(read_trajectories(self.path(source), self._chosen[0])):
            if trajectory.without_last:
                yield Warned(WITHOUT_LAST)
            if trajectory.language_changes:
                yield Warned(CHANGES)
            if not trajectory.language:
                trajectory = dataclasses.replace(trajectory, language=self.instructions.by_name.get(source.path, ""))
            name, rate = f"{source.path}/{index:06d}", self.settings.control_rate
            yield trajectory.to_episode(name, source.path, rate, self.settings.image_size)

    @functools.cached_property
    def _chosen(self) -> tuple[Selection, StepLayout]:
        """What is read from every file, as the first file that has it decides."""
        settings, fault = self.settings, ""
        for name in self.names:
            try:
                with NpzArchive(self.root / name) as archive:
                    headers = archive.headers
                    chosen = select(headers, settings.camera, settings.action, settings.state, settings.language)
            except (OSError, ValueError) as error:
                fault = fault or f"{name}: {error}"
                continue
            axes = len(check(headers, chosen))
            sizes = [_vector_size(headers, keys, axes) for keys in (chosen.states, chosen.actions)]
            return chosen, StepLayout(tuple(chosen.cameras), *sizes)
        raise ConversionError(f"no file of {self.root} can be converted; {fault}")


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One recording of T steps.

    Attributes:
      images: uint8 `[T, H, W, 3]` by camera, the main camera first.
      states: float32 `[T, state_size]`, or None.
      actions: float32 `[T, action_size]`, or None.
      language: instruction or instructions, empty if there is none.
      language_changes: whether other steps have other instructions than the first one that has any.
      without_last: whether a last image was left off since no action belongs to it.
    """

    images: Mapping[str, np.ndarray]
    states: np.ndarray | None = None
    actions: np.ndarray | None = None
    language: str | tuple[str, ...] = ()
    language_changes: bool = False
    without_last: bool = False

    def to_episode(self, name: str, source_file: str, control_rate: float, image_size: int) -> Episode:
        """Encodes the images, with a shorter side of at most `image_size` pixels."""
        frames = {
            camera: [images.make_frame(image, image_size) for image in stack] for camera, stack in self.images.items()
        }
        return images.make_episode(name, source_file, control_rate, frames, self.states, self.actions, self.language)


def read_trajectories(path: epath.PathLike, selection: Selection) -> Iterator[Trajectory]:
    """Yields the trajectories of a file; one trajectory of a batch is in memory at a time.

    Raises:
      ValueError, OSError: the file is damaged, or does not hold what is selected.
    """
    keys = tuple(dict.fromkeys((*selection.cameras.values(), *selection.states, *selection.actions)))
    with NpzArchive(path) as archive:
        steps = check(archive.headers, selection)
        values = [archive.rows(key) if len(steps) > 1 else iter([archive.read(key)]) for key in keys]
        texts = _texts(archive, selection.language, steps)
        for arrays, text in zip(zip(*values, strict=True), texts, strict=True):
            by_key = dict(zip(keys, arrays, strict=True))
            length = steps[-1]
            yield Trajectory(
                {name: by_key[key][:length] for name, key in selection.cameras.items()},
                _join(by_key, selection.states, length),
                _join(by_key, selection.actions, length),
                *text,
                any(len(by_key[key]) > length for key in selection.cameras.values()),
            )


def select(
    headers: Headers,
    cameras: Sequence[str],
    actions: Sequence[str] | None,
    states: Sequence[str] | None,
    language: str | None,
) -> Selection:
    """Chooses arrays by the keys that were asked for, or by the usual ones; see `NpzSettings` for the keys.

    Raises:
      ValueError: an array is missing, or of another type.
    """
    texts = [key for key in _LANGUAGE_KEYS if key in headers and headers[key].dtype.kind in _TEXT_KINDS]
    keys = cameras or _only_camera(headers)
    names = {as_identifier(key): key for key in keys}
    if len(names) < len(keys):
        raise ValueError(f"cameras {', '.join(keys)} do not have different names")
    selection = Selection(
        names,
        tuple(key for key in _ACTION_KEYS if key in headers)[:1] if actions is None else tuple(actions),
        tuple(key for key in _STATE_KEYS if key in headers)[:1] if states is None else tuple(states),
        next(iter(texts), None) if language is None else language or None,
    )
    check(headers, selection)
    return selection


def check(headers: Headers, selection: Selection) -> tuple[int, ...]:
    """Checks the arrays of a file against a selection.

    Returns:
      `(T,)` for one trajectory of T steps with an action, or `(N, T)` for a batch of N.

    Raises:
      ValueError: an array is missing, of another type, or does not have as many steps as the others.
    """
    cameras, numbers = selection.cameras.values(), (*selection.states, *selection.actions)
    for key in (*cameras, *numbers, *([] if selection.language is None else [selection.language])):
        if key not in headers:
            raise ValueError(f"there is no array {key!r}; there are: {_describe(headers)}")
        if headers[key].dtype.hasobject:
            raise ValueError(f"array {key!r} holds Python objects, which are not read since they may run code")
    for key in cameras:
        if not _is_camera(headers[key]):
            raise ValueError(f"array {key!r} is {headers[key]}, but images are uint8 [T, H, W, 3] or [N, T, H, W, 3]")
    for key in numbers:
        if headers[key].dtype.kind not in _NUMBER_KINDS:
            raise ValueError(f"array {key!r} is {headers[key]}, which are not numbers")
    if selection.language is not None and headers[selection.language].dtype.kind not in _TEXT_KINDS:
        raise ValueError(f"array {selection.language!r} is {headers[selection.language]}, which is not text")
    return _check_lengths(headers, selection)


def _check_lengths(headers: Headers, selection: Selection) -> tuple[int, ...]:
    """All arrays must have as many steps as the main camera, but the last step needs no action."""
    main = next(iter(selection.cameras.values()))
    steps = headers[main].shape[:-3]
    without_last = (*steps[:-1], steps[-1] - 1)
    lengths = {}
    for key in (*selection.cameras.values(), *selection.states, *selection.actions):
        length = headers[key].shape[: len(steps)]
        if length != steps and not (key in selection.actions and length == without_last):
            raise ValueError(f"array {key!r} is {headers[key]}, but {main!r} is {headers[main]}")
        lengths[key] = length
    return without_last if without_last in lengths.values() else steps


def _only_camera(headers: Headers) -> list[str]:
    found = [key for key, header in headers.items() if _is_camera(header)]
    if len(found) != 1:
        what = "no array" if not found else "more than one array"
        raise ValueError(
            f"{what} is uint8 [T, H, W, 3] or [N, T, H, W, 3]; choose with `camera` from: {_describe(headers)}"
        )
    return found


def _is_camera(header: ArrayHeader) -> bool:
    return header.dtype == "uint8" and len(header.shape) in (4, 5) and header.shape[-1] == 3


def _describe(headers: Headers) -> str:
    return ", ".join(f"{key} {header}" for key, header in headers.items()) or "none"


def _vector_size(headers: Headers, keys: Sequence[str], num_leading: int) -> int | None:
    """Number of values that the joined arrays have in a step, or None without keys."""
    return sum(math.prod(headers[key].shape[num_leading:]) for key in keys) if keys else None


def _join(arrays: Mapping[str, np.ndarray], keys: Sequence[str], length: int) -> np.ndarray | None:
    """Joins arrays `[T, ...]` to float32 `[T, size]`."""
    if not keys:
        return None
    # Numbers too large for float32 become infinite, and are found with the others that are not finite.
    with np.errstate(over="ignore"):
        return np.concatenate([arrays[key][:length].reshape(length, -1).astype(np.float32) for key in keys], axis=1)


def _texts(archive: NpzArchive, key: str | None, steps: tuple[int, ...]) -> list[tuple[tuple[str, ...], bool]]:
    """Returns the texts of each trajectory, and whether they change from step to step.

    The array may hold one text for all, or for each trajectory one text, several, or those of each step, of which the
    first count.
    """
    count = steps[0] if len(steps) > 1 else 1
    if key is None:
        return [((), False)] * count
    values = archive.read(key)
    if values.ndim and len(steps) > 1 and len(values) != count:
        raise ValueError(f"array {key!r} has {len(values)} texts for {count} trajectories")
    of_trajectories = values if values.ndim and len(steps) > 1 else [values] * count
    return [_texts_of_trajectory(np.asarray(each), steps[-1]) for each in of_trajectories]


def _texts_of_trajectory(values: np.ndarray, length: int) -> tuple[tuple[str, ...], bool]:
    # A last image that was left off may have a text too.
    of_steps = values if values.ndim and len(values) in (length, length + 1) else values[None]
    found = [texts for texts in map(_as_texts, of_steps) if texts]
    return found[0] if found else (), any(texts != found[0] for texts in found)


def _as_texts(values: np.ndarray) -> tuple[str, ...]:
    """Returns the texts that are not empty."""
    stored = np.ravel(values).tolist()
    texts = [(each.decode() if isinstance(each, bytes) else str(each)).strip() for each in stored]
    return tuple(dict.fromkeys(text for text in texts if text))
