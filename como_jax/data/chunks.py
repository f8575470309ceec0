"""What a policy is trained on: every step of every robot episode and every labelled step of every video."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from como_jax.data.instructions import InstructionTable
from como_jax.data.mixture import MixtureEntry
from como_jax.data.order import ClipOrder
from como_jax.data.samples import ALL_ROWS, Augmentation, Rows
from como_jax.data.sources import EpisodeSource
from como_jax.errors import ConfigError, DatasetError
from como_jax.spec.normalization import Normalizer


@dataclasses.dataclass(frozen=True)
class ChunkConfig:
    """The window of steps around a sample.

    Attributes:
      instants: pictures of each camera: now, and the history.
      stride: control steps between two of them.
      chunk: steps of the action chunk that starts now.
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
        """Steps from the first instant to now."""
        return (self.instants - 1) * self.stride

    @property
    def window(self) -> int:
        """Steps that have targets."""
        return self.history + self.chunk


@dataclasses.dataclass(frozen=True)
class PolicyPart:
    """One dataset of a policy's mixture, opened. What it does not give is None.

    Attributes:
      entry: of the mixture.
      source: its episodes.
      cameras: for every picture of the policy, the dataset's camera or "".
      steps: int64 `[N]`, the steps that may be now.
      episode: int64 `[S]`, the episode of every step.
      action, state, latent: normalizers of what is used.
      instructions: of its episodes.
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
        """Bool `[S]`, the steps whose latent motion is used."""
        valid = None if self.latent is None else self.source.latent_valid
        return np.zeros(len(self.source), np.bool_) if valid is None else valid

    @property
    def codes(self) -> np.ndarray | None:
        """int32 `[S, Q]`, the codes that are used where labels are discrete."""
        return None if self.latent is None else self.source.latent_codes

    def describe(self, share: float) -> str:
        """One line: what is in it, and what was left out."""
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


@dataclasses.dataclass(frozen=True)
class PolicySamples:
    """Samples to be read. Axes: B samples.

    Attributes:
      dataset, episode: int64 `[B]`.
      record: int64 `[B]`, the step that is now.
      crop: float64 `[B, 3]`, scale, top and left of a `transforms.View`.
      shift: int64 `[B, 2]`, down and right of it.
    """

    dataset: np.ndarray
    episode: np.ndarray
    record: np.ndarray
    crop: np.ndarray
    shift: np.ndarray

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, rows: Rows) -> PolicySamples:
        return PolicySamples(**{name: value[rows] for name, value in vars(self).items()})


class PolicyTrainingSamples:
    """The batches of an endless stream by their number; this host's rows of each.

    A batch is drawn as a whole by every host, so that it does not depend on how many hosts share it.
    """

    def __init__(
        self,
        parts: Sequence[PolicyPart],
        augmentation: Augmentation,
        *,
        batch_size: int,
        seed: int,
        rows: Rows = ALL_ROWS,
    ):
        """Takes the batch size of all hosts together, and the rows that are this host's."""
        self._parts, self._augmentation = tuple(parts), augmentation
        self._batch_size, self._seed, self._rows = batch_size, seed, rows
        weights = [part.entry.weight for part in parts]
        self._order = ClipOrder([len(part.steps) for part in parts], weights, seed)

    def __call__(self, number: int) -> PolicySamples:
        """Batch `number`."""
        datasets, steps = self._order(number * self._batch_size + np.arange(self._batch_size))
        crop, shift = self._augmentation.draw(np.random.default_rng((self._seed, number)), len(datasets))
        return make_samples(self._parts, datasets, steps, crop, shift)[self._rows]


def make_samples(
    parts: Sequence[PolicyPart], datasets: np.ndarray, steps: np.ndarray, crop: np.ndarray, shift: np.ndarray
) -> PolicySamples:
    """Samples of positions `[B]` in the `steps` of datasets `[B]`."""
    record, episode = np.empty_like(steps), np.empty_like(steps)
    for dataset in np.unique(datasets):
        part, rows = parts[dataset], datasets == dataset
        record[rows] = part.steps[steps[rows]]
        episode[rows] = part.episode[record[rows]]
    return PolicySamples(datasets, episode, record, crop, shift)


def find_cameras(source: EpisodeSource, entry: MixtureEntry, wanted: Sequence[str]) -> tuple[str, ...]:
    """For every picture of the policy the dataset's camera, or "" where it has none; the first may be renamed.

    Raises:
      DatasetError: it has none of them.
    """
    if not wanted:
        return (source.camera,)
    found = [camera if camera in source.cameras else "" for camera in wanted]
    if entry.camera:
        found[0] = entry.camera
    if not any(found):
        raise DatasetError(
            f"{source.directory} has none of the cameras {', '.join(wanted)}; it has {', '.join(source.cameras)}. "
            'Name the one to take as the first by camera = "..." in a mixture file.'
        )
    return tuple(found)
