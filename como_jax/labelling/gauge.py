"""How far a dataset's latents are from those of the training run."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from como_jax.data.clips import ClipConfig
from como_jax.data.frames import FrameReader
from como_jax.data.mixture import Mixture, MixtureEntry, MixturePart, parse_mixture
from como_jax.data.pipeline import read_clips
from como_jax.errors import DatasetError, NoClipsError
from como_jax.evaluation.latents.drift import Drift, compare
from como_jax.evaluation.latents.drift_figure import drift_figure
from como_jax.evaluation.latents.similarity import past_future_similarity
from como_jax.evaluation.latents.statistics import LatentStatistics, LatentSums
from como_jax.files import write_atomic, write_text
from como_jax.labelling.shards import LabelShard, read_labels
from como_jax.labelling.streaming import READ_ERRORS
from como_jax.nn.model_def import ModelDef, Params
from como_jax.training.run import Run

FIGURE_NAME = "drift.png"
_REFERENCE_CLIPS, _SIMILARITY_CLIPS, _BATCH = 2048, 256, 32

logger = logging.getLogger(__name__)


class Sampled(NamedTuple):
    """Transitions spread evenly over some datasets."""

    sums: LatentSums
    s_pcfc: float


def reference_statistics(run: Run) -> LatentStatistics:
    """Statistics of the latents of a run's own training data, from its directory or measured and left there.

    Raises:
      DatasetError: they were never measured, and the training data is not here.
    """
    # Of one checkpoint: a run that is trained on has other latents.
    path = run.workdir / f"latent_statistics_{run.step}.json"
    if path.exists():
        return LatentStatistics.from_json(path.read_text())
    data = run.config.data
    sampled = sample_transitions(
        run, parse_mixture(data.mixture), data.gap_seconds, data.camera, data.fit, _REFERENCE_CLIPS
    )
    statistics = LatentStatistics.measure(sampled.sums, sampled.s_pcfc)
    try:
        write_text(path, statistics.to_json())
    except OSError as error:
        logger.warning("The training statistics are not kept and will be measured again next time: %s", error)
    return statistics


def sample_transitions(
    run: Run, entries: Sequence[MixtureEntry], gap_seconds: float, camera: str, fit: str, num_clips: int
) -> Sampled:
    """Runs a model over clips of the training episodes of some datasets, as many of each.

    Raises:
      DatasetError: a dataset is missing, or none has a clip.
    """
    params = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), run.params)
    past, reverse, sums = [], [], []
    clips = ClipConfig(gap_seconds, instants=3, offset_frames=False)
    for number, entry in enumerate(entries):
        try:
            part = MixturePart.open(entry, _first_split(entry), clips, camera)
        except NoClipsError as error:
            logger.warning("Not in the statistics: %s", error)
            continue
        reader = FrameReader(Mixture((part,)), run.config.data.image_size, fit=fit, num_threads=4)
        count = min(num_clips // len(entries), len(part.index))
        chosen = np.unique(np.linspace(0, len(part.index) - 1, count).astype(np.int64))
        latent = np.concatenate([_encode(run.model, params, part, reader, rows) for rows in _batches(chosen)])
        past.append(latent[: len(chosen), 0])
        reverse.append(latent[: len(chosen), 1])
        # Records and episodes of different datasets must not share a number.
        offset = number * 2**40
        flat = past[-1].reshape(len(chosen), -1)
        sums.append(LatentSums.of(flat, offset + part.index.first[chosen], offset + part.index.episode[chosen]))
    if not sums:
        raise DatasetError("No dataset has a clip of three frames to take latents from.")
    s_pcfc = past_future_similarity(np.concatenate(past), np.concatenate(reverse))
    return Sampled(LatentSums.combine(sums), s_pcfc)


def measure_drift(
    run: Run, labelled: epath.Path, shards: Sequence[LabelShard], gap_seconds: float, camera: str, fit: str
) -> tuple[LatentStatistics, LatentSums, Drift]:
    """Compares all valid latents of a labelled dataset with those of training.

    S-PCFC needs motions back in time, which are no labels, so it is taken over a few hundred clips.
    """
    sums, offset = [], 0
    for shard in shards:
        latent, records, episodes = read_labels(labelled, shard)
        # Both splits count records from 0.
        offset = 2**40 if shard.split == "val" else 0
        if len(latent):
            sums.append(LatentSums.of(latent, offset + records, offset + episodes))
    if not sums:
        raise DatasetError("no step has a label to compare, since no episode is longer than one gap.")
    new, reference = LatentSums.combine(sums), reference_statistics(run)
    try:
        entry = MixtureEntry(str(labelled))
        s_pcfc = sample_transitions(run, [entry], gap_seconds, camera, fit, _SIMILARITY_CLIPS).s_pcfc
    except READ_ERRORS as error:
        logger.warning("No S-PCFC: %s", error)
        s_pcfc = None
    return reference, new, compare(reference, new, s_pcfc)


def write_figure(path: epath.Path, reference: LatentStatistics, new: LatentSums, s_pcfc: float | None) -> None:
    """Draws both distributions."""
    figure = drift_figure(reference, new, s_pcfc)
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=110))


def drift_report(drift: Drift) -> dict[str, float | str | None]:
    """Numbers, verdict and advice, for a report."""
    return {**dataclasses.asdict(drift), "verdict": drift.verdict, "advice": drift.advice}


def _first_split(entry: MixtureEntry) -> str:
    return "train" if entry.has_split("train") or not entry.has_split("val") else "val"


def _batches(chosen: np.ndarray) -> list[np.ndarray]:
    """Batches of one size, the last filled up, so that the program is compiled once."""
    padded = np.pad(chosen, (0, -len(chosen) % _BATCH), mode="edge")
    return list(padded.reshape(-1, _BATCH))


def _encode(model: ModelDef, params: Params, part: MixturePart, reader: FrameReader, clips: np.ndarray) -> np.ndarray:
    """Latents `[B, 2, Q, L]` from past to current and from future to current."""
    frames = read_clips(part, reader, clips)["frames"]
    # Past, current, future, current: the middle transition is not needed.
    return np.asarray(_encode_frames(model, params, frames[:, [0, 1, 2, 1]]))[:, [0, 2]]


@functools.partial(jax.jit, static_argnums=0)
def _encode_frames(model: ModelDef, params: Params, frames: np.ndarray) -> jax.Array:
    return model.bind(params).encode(frames)
