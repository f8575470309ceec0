"""Runs a latent-motion model of any family over transitions of a dataset, and measures what comes out."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from como_jax import hosts
from como_jax.data.clips import ClipConfig, ClipIndex, index_clips
from como_jax.data.mixture import Mixture, MixtureEntry, MixturePart, parse_mixture
from como_jax.data.motion_data import ClipFiller
from como_jax.data.pipeline import evaluation_batches
from como_jax.data.reader import BatchReader
from como_jax.data.sampler import ALL_ROWS, Rows
from como_jax.data.schema import SPLITS
from como_jax.data.sources import EpisodeSource
from como_jax.errors import DatasetError, NoClipsError, RunError
from como_jax.evaluation.latents.measures import (
    effective_rank,
    error_map,
    past_future_similarity,
    past_future_similarity_by_token,
    psnr,
    ssim,
)
from como_jax.evaluation.latents.probes import ProbeError, ProbeResult, linear_probe, linear_probe_accuracy
from como_jax.nn.model_def import ModelDef, Params
from como_jax.training import sharding

logger = logging.getLogger(__name__)

_THREADS = 4


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """Clips of three instants, past, current and future, of one dataset and split."""

    name: str
    part: MixturePart
    image_size: int
    fit: str = "crop"

    @property
    def source(self) -> EpisodeSource:
        """The dataset."""
        return self.part.source

    @property
    def index(self) -> ClipIndex:
        """Its clips."""
        return self.part.index

    @property
    def split(self) -> str:
        """ "train" for the episodes that were trained on, "val" for held-out ones."""
        return "train" if self.source.split == self.part.entry.split else "val"

    @functools.cached_property
    def reader(self) -> BatchReader:
        """Reads the clips, with actions where there are any."""
        filler = ClipFiller(Mixture((self.part,)), actions=True)
        return BatchReader(filler, self.image_size, fit=self.fit, num_threads=_THREADS)

    def read(self, clips: Sequence[int]) -> dict[str, np.ndarray]:
        """The arrays of some clips, by their numbers."""
        return self.reader.read(np.asarray(clips))

    def recut(self, instants: int) -> EvaluationSet:
        """The same episodes in clips of another length.

        Raises:
          NoClipsError: all episodes are shorter.
        """
        clips = dataclasses.replace(self.part.clips, instants=instants)
        part = dataclasses.replace(self.part, clips=clips, index=index_clips(self.source, clips))
        return dataclasses.replace(self, part=part)

    @classmethod
    def open_all(
        cls,
        entries: Sequence[MixtureEntry],
        *,
        gap_seconds: float,
        image_size: int,
        camera: str,
        fit: str = "crop",
        repeats: bool = True,
        warn: Callable[[str], None] = logger.warning,
    ) -> list[EvaluationSet]:
        """Opens the training episodes of every dataset and, where it has them, the held-out ones.

        Args:
          entries: datasets; where there are several, their names begin with their positions.
          gap_seconds, image_size, camera, fit: as in training, for entries that do not say themselves.
          repeats: whether two clips may share a transition.
          warn: called with a sentence for everything that is left out.

        Raises:
          DatasetError: a dataset is missing or damaged.
        """
        clips = ClipConfig(gap_seconds, instants=3, offset_frames=False)
        found = []
        for number, entry in enumerate(entries):
            # Metrics have the units of the data.
            entry = dataclasses.replace(entry, normalization="none")
            splits = entry.uses
            for split in splits or SPLITS[:1]:  # Opening a split that is missing says what is wrong.
                try:
                    part = MixturePart.open(entry, split, clips, camera)
                except NoClipsError as error:
                    warn(f"Not evaluated: {error}")
                    continue
                name = part.source.name if len(entries) == 1 else f"{number}_{part.source.name}"
                if not repeats:
                    part = dataclasses.replace(part, index=without_repeats(part.source, part.index))
                found.append(cls(name, part, image_size, fit))
            for split in sorted(set(SPLITS) - set(splits)):
                missing = f"no split {split}" if entry.split == "train" else "no held-out episodes"
                warn(f"Not evaluated: {entry.directory} has {missing}.")
        return found


def open_splits(data: ConfigDict, mixture: str | None, notes: list[str]) -> list[dict[str, EvaluationSet]]:
    """The sets of every dataset, by split, of which no two clips share a transition.

    Args:
      data: section `data` of a run's config.
      mixture: DIR,DIR; the datasets of the config by default.
      notes: gets a line for everything that is left out.

    Raises:
      DatasetError: no dataset can be evaluated.
    """
    entries = parse_mixture(data.mixture if mixture is None else mixture)
    found: dict[str, dict[str, EvaluationSet]] = {}
    for item in EvaluationSet.open_all(
        entries,
        gap_seconds=data.gap_seconds,
        image_size=data.image_size,
        camera=data.camera,
        fit=data.fit,
        repeats=False,
        warn=notes.append,
    ):
        found.setdefault(item.name, {})[item.split] = item
    if not found:
        raise DatasetError(" ".join(notes))
    return list(found.values())


def choose_splits(
    splits: Mapping[str, EvaluationSet], probe: bool, notes: list[str]
) -> tuple[EvaluationSet, EvaluationSet | None]:
    """The set of a dataset to measure, and the set to fit the probe on, or None for no probe.

    Args:
      splits: the sets of the dataset, by split.
      probe: whether to probe where there are actions.
      notes: gets a line where training episodes are measured, or where there is no probe.

    Raises:
      ProbeError: there are actions to probe, but not both training and held-out episodes.
    """
    item = splits.get("val") or splits["train"]
    if item.split == "train":
        notes.append(f"{item.name}: measured on training episodes, since it has no held-out ones that can be used.")
    silent = any(part.source.action is None for part in splits.values())
    if silent or not probe:
        reason = "the dataset has no actions" if silent else "it was not asked for"
        notes.append(f"No probe of {item.name}: {reason}.")
        return item, None
    missing = [split for split in SPLITS if split not in splits]
    if missing:
        raise ProbeError(
            f"{item.source.directory}: the linear probe needs training and held-out episodes, but no clip is of split "
            f"{missing[0]!r}. {' '.join(notes)}"
        )
    return item, splits["train"]


@dataclasses.dataclass(frozen=True)
class Transitions:
    """The result of one pass over a set. Axes: N clips, Q latent tokens of L numbers, A numbers of an action."""

    past_to_current: np.ndarray  # [N, Q, L]
    current_to_future: np.ndarray  # [N, Q, L]
    future_to_current: np.ndarray  # [N, Q, L]
    mse: np.ndarray  # [N], of the predicted future frame
    copy_mse: np.ndarray  # [N], of the current frame in its place
    ssim: np.ndarray | None  # [N], of the predicted future frame, when asked for
    copy_ssim: np.ndarray | None  # [N]
    episode: np.ndarray  # [N]
    action: np.ndarray | None  # [N, 2, A], of past to current and current to future
    images: list[list[np.ndarray]]  # current, predicted, true, error

    @property
    def latent(self) -> np.ndarray:
        """Latents `[2N, Q * L]` of all forward transitions."""
        forward = np.concatenate([self.past_to_current, self.current_to_future])
        return forward.reshape(len(forward), -1)

    @property
    def latent_action(self) -> np.ndarray:
        """True actions `[2N, A]`, in the order of `latent`."""
        return np.concatenate([self.action[:, 0], self.action[:, 1]])

    @property
    def latent_episode(self) -> np.ndarray:
        """Episodes `[2N]`, in the order of `latent`."""
        return np.tile(self.episode, 2)


class TransitionRunner:
    """Encodes and predicts in batches on all devices; compiled once for all sets."""

    def __init__(self, model: ModelDef, mesh: Mesh, batch_size: int, *, with_ssim: bool = False):
        """Prepares the pass.

        Args:
          model: any that is a `LatentMotionModel`.
          mesh: of devices.
          batch_size: clips per batch, rounded up to a multiple of the mesh's batch axes.
          with_ssim: whether to compute SSIM too.
        """
        self._mesh, self._batch_size = mesh, fit_batch(batch_size, mesh)
        self._rows = sharding.batch_rows(mesh, self._batch_size)
        self._analyze = sharding.jit_once(_analyze, mesh, model, with_ssim, out_shardings=sharding.replicated(mesh))

    def __call__(self, params: Params, item: EvaluationSet, num_clips: int, num_images: int = 0) -> Transitions:
        """One pass over clips that are spread evenly over the set."""
        columns: dict[str, list[np.ndarray]] = {}
        images: list[list[np.ndarray]] = []
        num_clips = min(num_clips, len(item.index))
        shown = set(np.linspace(0, num_clips - 1, num_images).astype(int))
        first = 0
        for batch, count in hosts.together(set_batches(item, num_clips, self._batch_size, self._rows)):
            batch = {key: batch[key] for key in ("frames", "episode", "action") if key in batch}
            found = jax.tree.map(np.asarray, self._analyze(params, sharding.shard_batch(batch, self._mesh)))
            predicted, frames = found.pop("predicted"), found.pop("frames")
            for row in sorted(shown.intersection(range(first, first + count))):
                current, future = frames[row - first, 1:] / 255.0
                guess = predicted[row - first]
                images.append([current, guess, future, error_map(guess, future)])
            for key, value in found.items():
                columns.setdefault(key, []).append(value[:count])
            first += count
        data = {key: np.concatenate(values) for key, values in columns.items()}
        latents = data.pop("latents")
        return Transitions(
            past_to_current=latents[:, 0],
            current_to_future=latents[:, 1],
            future_to_current=latents[:, 2],
            images=images,
            **{key: data.get(key) for key in ("mse", "copy_mse", "ssim", "copy_ssim", "episode", "action")},
        )


def without_repeats(source: EpisodeSource, index: ClipIndex) -> ClipIndex:
    """Clips of three instants of which no two share a transition: those that begin in every other gap."""
    first, episode = index.look_up(np.arange(len(index)))
    keep = (first - source.start[episode]) // index.gap[episode] % 2 == 0
    return dataclasses.replace(index, kept=index.candidates[keep])


def set_batches(
    item: EvaluationSet, num_clips: int, batch_size: int, rows: Rows = ALL_ROWS
) -> Iterable[tuple[dict[str, np.ndarray], int]]:
    """Some rows of the batches of a set, and the number of clips of each batch; see `evaluation_batches`."""
    return evaluation_batches(item.reader, num_samples=num_clips, batch_size=batch_size, rows=rows)


def fit_batch(batch_size: int, mesh: Mesh) -> int:
    """The batch size, rounded up to a multiple of the mesh's batch axes."""
    parts = sharding.batch_shards(mesh)
    return -(-batch_size // parts) * parts


@dataclasses.dataclass(frozen=True)
class DatasetResult:
    """What was measured on one dataset.

    Attributes:
      item: the measured episodes: held-out ones, or those of training where there are no others.
      found: their transitions.
      metrics: numbers by name, without those that are undefined for this data.
      fitted: transitions of the episodes that the probe was fitted on, or None.
      probe: its result; None where there was nothing to probe.
    """

    item: EvaluationSet
    found: Transitions
    metrics: Mapping[str, float]
    fitted: Transitions | None = None
    probe: ProbeResult | None = None


def measure(item: EvaluationSet, found: Transitions, fitted: Transitions | None) -> DatasetResult:
    """All metrics of one dataset.

    Args:
      item: the episodes that are measured.
      found: their transitions, with SSIM.
      fitted: transitions of other episodes to fit the probe on; None for no probe.

    Raises:
      ProbeError: too few episodes for the probe.
      RunError: the model gives numbers that are not finite.
    """
    if not (np.isfinite(found.latent).all() and np.isfinite(found.mse).all()):
        raise RunError(f"{item.name} ({item.split}): the model's latents or predictions are not finite.")
    metrics = scene_metrics(found) | {
        "ssim": float(np.mean(found.ssim)),
        "ssim_copy": float(np.mean(found.copy_ssim)),
        "s_pcfc_by_token": past_future_similarity_by_token(found.past_to_current, found.future_to_current),
        "transitions": len(found.latent),
    }
    if fitted is None:
        return DatasetResult(item, found, metrics)
    try:
        probe = probe_transitions(fitted, found)
    except ProbeError as error:
        raise ProbeError(f"{item.source.directory}: {error}") from error
    metrics |= probe_metrics(probe)
    metrics |= {f"lp_mse/{dimension}": float(value) for dimension, value in enumerate(probe.per_dimension)}
    labels = [_choices(part.latent_action) for part in (fitted, found)]
    if all(label is not None for label in labels):
        metrics |= _accuracy_metrics(fitted, found, *labels)
    metrics = {name: value for name, value in metrics.items() if np.isfinite(value)}
    return DatasetResult(item, found, metrics, fitted, probe)


def summarize(results: Sequence[DatasetResult]) -> dict[str, float]:
    """Means over the datasets that have a metric, the sum of transitions, and `DATASET/metric` of several.

    The means of `lp_mse/K` are left out, since dimension K of the action is something else in another dataset.
    """
    columns: dict[str, list[float]] = {}
    for name, value in (pair for result in results for pair in result.metrics.items()):
        columns.setdefault(name, []).append(value)
    probed = len(columns.get("lp_mse", ()))
    metrics = {
        name: float(np.mean(values))
        for name, values in columns.items()
        if probed == 1 or not name.startswith("lp_mse/")
    }
    metrics["transitions"] = sum(columns["transitions"])
    if len(results) > 1:
        metrics |= {f"{r.item.name}/{name}": value for r in results for name, value in r.metrics.items()}
    return metrics


def scene_metrics(found: Transitions) -> dict[str, float]:
    """Metrics that need no action: PSNR, also of copying the current frame, S-PCFC, and the rank of the latents."""
    return {
        "psnr": psnr(found.mse),
        "psnr_copy": psnr(found.copy_mse),
        "psnr_gain": psnr(found.mse) - psnr(found.copy_mse),
        "s_pcfc": past_future_similarity(found.past_to_current, found.future_to_current),
        "effective_rank": effective_rank(found.current_to_future.reshape(len(found.current_to_future), -1)),
    }


def probe_transitions(fitted: Transitions, held_out: Transitions) -> ProbeResult:
    """The linear probe from latent to action, fitted on some episodes and measured on others.

    Raises:
      ProbeError: too few episodes.
    """
    return linear_probe(
        fitted.latent, fitted.latent_action, fitted.latent_episode, held_out.latent, held_out.latent_action
    )


def probe_metrics(probe: ProbeResult) -> dict[str, float]:
    """The probe's numbers over all dimensions of the action."""
    return {"lp_mse": probe.lp_mse, "lp_mse_mean_action": probe.lp_mse_mean_action, "lp_r2": probe.r2}


def _choices(action: np.ndarray) -> np.ndarray | None:
    """Actions `[N, A]` that are choices, one-hot or as one number, as int64 `[N]`; None if they are not choices.

    They are choices only if the gap is one step: a mean of several different choices is not a choice.
    """
    if action.shape[1] == 1:
        whole = np.all((action == np.round(action)) & (action >= 0))
        return action[:, 0].astype(np.int64) if whole else None
    one_hot = np.all((action == 0) | (action == 1)) and np.all(action.sum(axis=1) == 1)
    return action.argmax(axis=1) if one_hot else None


def _accuracy_metrics(
    fitted: Transitions, held_out: Transitions, label: np.ndarray, test_label: np.ndarray
) -> dict[str, float]:
    """The probe as a classifier."""
    found = linear_probe_accuracy(fitted.latent, label, fitted.latent_episode, held_out.latent, test_label)
    return {"lp_accuracy": found.accuracy, "lp_accuracy_majority": found.majority_accuracy}


def _analyze(model: ModelDef, with_ssim: bool, params: Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Latents `[B, 3, Q, L]` of the three transitions that the metrics need, prediction, and its errors `[B]`."""
    motion, frames = model.bind(params), batch["frames"]
    # Past, current, future, current: consecutive pairs are the three transitions.
    latents = motion.encode(frames[:, jnp.array([0, 1, 2, 1])])
    predicted = motion.predict(frames[:, 1], latents[:, 1])
    current, future = (frames[:, k].astype(jnp.float32) / 255.0 for k in (1, 2))
    found = {
        "latents": latents,
        "predicted": predicted,
        "mse": jnp.mean(jnp.square(predicted - future), axis=(1, 2, 3)),
        "copy_mse": jnp.mean(jnp.square(current - future), axis=(1, 2, 3)),
    }
    if with_ssim:
        found |= {"ssim": ssim(predicted, future), "copy_ssim": ssim(current, future)}
    return found | batch
