"""What policies are trained on: every step of every robot episode and every labelled step of every video."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from como_jax.data.instructions import InstructionTable
from como_jax.data.mixture import MixtureEntry
from como_jax.data.reader import Batch
from como_jax.data.sampler import NO_AUGMENTATION, Augmentation, Samples
from como_jax.data.sources import EpisodeSource
from como_jax.errors import ConfigError, DatasetError
from como_jax.spec.normalization import Normalizer
from como_jax.types import Observation, PolicyBatch


@dataclasses.dataclass(frozen=True)
class ChunkConfig:
    """The window of steps around a sample.

    Attributes:
      instants: images of each camera: the current one and those of the history.
      stride: control steps between two instants.
      chunk: steps of the action chunk, which starts at the current step.
    """

    instants: int = 1
    stride: int = 1
    chunk: int = 16

    def __post_init__(self) -> None:
        for name in ("instants", "stride", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, not {getattr(self, name)}.")

    @property
    def history(self) -> int:
        """Steps from the first instant to the current step."""
        return (self.instants - 1) * self.stride

    @property
    def window(self) -> int:
        """Steps that have targets."""
        return self.history + self.chunk


@dataclasses.dataclass(frozen=True)
class PolicyPart:
    """One opened dataset of a policy's mixture.

    Attributes:
      entry: what the mixture says of it.
      source: its episodes.
      cameras: for every image of the policy, the dataset's camera, or "" where it has none.
      steps: int64 `[N]`, the records that are samples.
      episode: int64 `[S]`, the episode of every record.
      action, state, latent: normalizers of what is used of the dataset; None for what is not.
      instructions: the texts of all episodes, as numbers.
    """

    entry: MixtureEntry
    source: EpisodeSource
    cameras: tuple[str, ...]
    steps: np.ndarray
    episode: np.ndarray
    action: Normalizer | None
    state: Normalizer | None
    latent: Normalizer | None
    instructions: InstructionTable

    @property
    def labelled(self) -> np.ndarray:
        """The steps whose latent motion is used, bool `[S]`."""
        valid = None if self.latent is None else self.source.latent_valid
        return np.zeros(len(self.source), np.bool_) if valid is None else valid

    @property
    def codes(self) -> np.ndarray | None:
        """The codes of discrete labels, int32 `[S, Q]`; None where the labels are continuous or not used."""
        return None if self.latent is None else self.source.latent_codes

    def describe(self, share: float) -> str:
        """One line: what the dataset gives, and how many of its steps are samples."""
        targets = [
            *(["actions"] if self.action else []),
            *(["codes"] if self.codes is not None else ["latent motion"] if self.latent else []),
        ]
        source = self.source
        cameras = ", ".join(camera or "none" for camera in self.cameras)
        return (
            f"{source.directory.name} [{source.split}]: {share:.0%} of samples, {' and '.join(targets)}, "
            f"{len(source.length)} episodes, {len(self.steps)} of {len(source)} steps, cameras {cameras}"
        )


class ChunkFiller:
    """Samples are steps: the images of the current step and its history, and the chunk of actions that follows.

    Attributes:
      chunks: the window of steps around a sample.
      action_size, state_size, latent_size, num_codes: numbers of each, the largest of any dataset.
    """

    def __init__(self, parts: Sequence[PolicyPart], chunks: ChunkConfig, *, action_size: int = 0, state_size: int = 0):
        """Samples of some datasets; `action_size` and `state_size` are the least sizes."""
        self.parts, self.chunks = tuple(parts), chunks
        self.num_samples = [len(part.steps) for part in parts]
        self.weights = [part.entry.weight for part in parts]
        self.action_size = max([action_size, *(part.action.size for part in parts if part.action)])
        self.state_size = max([state_size, *(part.state.size for part in parts if part.state)])
        self.latent_size = max((part.latent.size for part in parts if part.latent), default=0)
        self.num_codes = max((part.codes.shape[1] for part in parts if part.codes is not None), default=0)
        self._tables = [_Tables.of(part) for part in parts]

    def draw(
        self,
        datasets: np.ndarray,
        numbers: np.ndarray,
        rng: np.random.Generator,
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> Samples:
        """Steps `numbers` `[B]` of datasets `[B]`; draws the augmentation.

        The instants of a sample end with its own step; before the start of the episode its first step is repeated.
        """
        crop, shift = augmentation.draw(rng, len(datasets))
        back = self.chunks.stride * np.arange(1 - self.chunks.instants, 1)
        episode, records = np.empty_like(numbers), np.empty((len(numbers), len(back)), np.int64)
        for dataset in np.unique(datasets):
            part, rows = self.parts[dataset], datasets == dataset
            steps = part.steps[numbers[rows]]
            episode[rows] = part.episode[steps]
            records[rows] = np.maximum(steps[:, None] + back, part.source.start[episode[rows]][:, None])
        gap = np.full(len(datasets), self.chunks.stride)
        has_choice = any(part.instructions.has_choice for part in self.parts)
        text = rng.random(len(datasets)) if has_choice else np.zeros(len(datasets))
        return Samples(datasets, episode, gap, records, records[:, :0], crop, shift, text)

    def fill(self, samples: Samples, images: np.ndarray, offset_images: np.ndarray) -> Batch:
        """The arrays of `Observation` and `PolicyBatch`; what no dataset has is absent."""
        del offset_images  # There are none.
        batch = self._make_arrays(len(samples)) | {
            "images": images,
            "dataset": samples.dataset.astype(np.int32),
            "episode": samples.episode.astype(np.int32),
        }
        for dataset in np.unique(samples.dataset):
            self._fill_rows(samples, int(dataset), np.flatnonzero(samples.dataset == dataset), batch)
        return batch

    def _make_arrays(self, batch: int) -> Batch:
        """Zeros for all numbers of a batch."""
        window, table = self.chunks.window, self.parts[0].instructions
        shapes: dict[str, tuple[int, ...]] = {
            "has_camera": (len(self.parts[0].cameras),),
            "action": (window, self.action_size),
            "has_action": (window, self.action_size),
        }
        if self.state_size:
            shapes |= {"state": (self.chunks.instants, self.state_size), "has_state": ()}
        if self.latent_size:
            shapes |= {"latent": (window, self.latent_size), "has_latent": (window,)}
        arrays = {name: np.zeros((batch, *shape), np.float32) for name, shape in shapes.items()}
        if self.num_codes:
            arrays["codes"] = np.zeros((batch, window, self.num_codes), np.int32)
        arrays[table.key] = np.zeros((batch, table.rows.shape[1]), table.rows.dtype)
        return arrays

    def _fill_rows(self, samples: Samples, dataset: int, rows: np.ndarray, batch: Batch) -> None:
        """Fills the rows `[R]` of one dataset in every array of numbers."""
        part, source, tables = self.parts[dataset], self.parts[dataset].source, self._tables[dataset]
        records, episode = samples.records[rows], samples.episode[rows]
        first = source.start[episode][:, None]
        window = records[:, -1:] + np.arange(-self.chunks.history, self.chunks.chunk)
        clipped = np.clip(window, first, first + source.length[episode][:, None] - 1)
        inside = (window == clipped).astype(np.float32)
        batch["has_camera"][rows] = [bool(camera) for camera in part.cameras]
        if tables.state is not None:
            batch["state"][rows, :, : tables.state.shape[1]] = tables.state[records]
            batch["has_state"][rows] = 1
        if tables.action is not None:
            size = tables.action.shape[1]
            batch["action"][rows, :, :size] = tables.action[clipped] * inside[..., None]
            batch["has_action"][rows, :, :size] = inside[..., None]
        if tables.latent is not None:
            valid = inside * part.labelled[clipped]
            batch["latent"][rows] = tables.latent[clipped] * valid[..., None]
            batch["has_latent"][rows] = valid
            if part.codes is not None:
                batch["codes"][rows] = np.where(valid[..., None] > 0, part.codes[clipped], 0)
        batch[part.instructions.key][rows] = part.instructions.choose(episode, samples.text[rows])


@dataclasses.dataclass(frozen=True)
class _Tables:
    """The normalised numbers of all steps of one dataset, float32 `[S, size]`; None for what is not used of it."""

    action: np.ndarray | None
    state: np.ndarray | None
    latent: np.ndarray | None

    @classmethod
    def of(cls, part: PolicyPart) -> _Tables:
        source = part.source
        pairs = (part.action, source.action), (part.state, source.state), (part.latent, source.latent_motion)
        return cls(*(None if scale is None or values is None else scale(values) for scale, values in pairs))


def to_policy_batch(batch: dict[str, Any]) -> PolicyBatch:
    """Names the arrays of a batch; what it does not hold is None."""
    seen: dict[str, Any] = {field.name: batch.get(field.name) for field in dataclasses.fields(Observation)}
    followed: dict[str, Any] = {field.name: batch.get(field.name) for field in dataclasses.fields(PolicyBatch)}
    return PolicyBatch(**followed | {"observation": Observation(**seen)})


def find_cameras(source: EpisodeSource, entry: MixtureEntry, wanted: Sequence[str]) -> tuple[str, ...]:
    """For every image of the policy the dataset's camera, or "" where it has none.

    Args:
      source: the dataset.
      entry: of the mixture; its camera, if named, takes the place of the first one.
      wanted: names of the policy's images; if empty, the dataset's first camera is the only one.

    Raises:
      DatasetError: the dataset has none of these cameras.
    """
    if not wanted:
        return (source.camera,)
    found = [camera if camera in source.cameras else "" for camera in wanted]
    if entry.camera:
        found[0] = entry.camera
    if not any(found):
        raise DatasetError(
            f"{source.directory} has none of the cameras {', '.join(wanted)}; it has {', '.join(source.cameras)}. "
            'Name the one that takes the place of the first by camera = "..." in a mixture file.'
        )
    return tuple(found)
