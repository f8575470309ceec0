"""What a pretraining run measures while it trains: metrics and images of training and held-out episodes."""

from __future__ import annotations

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from como_jax.evaluation.latents.measures import comparison_grid
from como_jax.evaluation.latents.probes import ProbeError
from como_jax.evaluation.latents.transitions import (
    EvaluationSet,
    TransitionRunner,
    Transitions,
    fit_batch,
    probe_metrics,
    probe_transitions,
    scene_metrics,
    set_batches,
)
from como_jax.nn.model_def import ModelDef, Params
from como_jax.training import sharding
from como_jax.training.writers import MetricWriter, NullWriter
from como_jax.types import FramePairs

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Sizes of the in-loop evaluation.

    Attributes:
      num_clips: clips of every dataset and split; each has two transitions.
      num_images: rows of predictions in the image of every dataset.
      batch_size: clips per batch.
    """

    num_clips: int = 1024
    num_images: int = 6
    batch_size: int = 64


class MotionEvaluator:
    """PSNR, LP-MSE and S-PCFC of a latent-motion model, beside the scores of copying and of the mean action."""

    def __init__(self, model: ModelDef, sets: list[EvaluationSet], mesh: Mesh, config: EvaluationConfig):
        self._sets, self._config = sets, config
        self._run = TransitionRunner(model, mesh, config.batch_size)

    def __call__(self, params: Params, step: int, writer: MetricWriter | NullWriter) -> dict[str, float]:
        """Evaluates, writes and returns `eval_<split>/<metric>`, and the same per dataset where there are several."""
        metrics: dict[str, float] = {}
        fitted: dict[str, Transitions] = {}
        for item in self._sets:
            found = self._run(params, item, self._config.num_clips, self._config.num_images)
            prefix = f"eval_{item.split}/{item.name}"
            values = scene_metrics(found)
            if item.split == "train":
                fitted[item.name] = found
            elif found.action is not None and item.name in fitted:
                values |= _probe(item.name, fitted[item.name], found)
            metrics |= {f"{prefix}/{name}": value for name, value in values.items()}
            if found.images:
                writer.image(step, f"{prefix}/current_predicted_true_error", comparison_grid(found.images))
        metrics = with_means(metrics)
        writer.scalars(step, metrics)
        return metrics


class MaeEvaluator:
    """Error of a masked autoencoder on masked patches, and images of its reconstructions."""

    def __init__(self, model: ModelDef, sets: list[EvaluationSet], mesh: Mesh, config: EvaluationConfig):
        self._sets, self._mesh, self._config = sets, mesh, config
        self._batch_size = fit_batch(config.batch_size, mesh)
        self._rows = sharding.batch_rows(mesh, self._batch_size)
        self._analyze = sharding.jit_once(_reconstruct, mesh, model, out_shardings=sharding.replicated(mesh))

    def __call__(self, params: Params, step: int, writer: MetricWriter | NullWriter) -> dict[str, float]:
        """Evaluates the first batch of every set, writes and returns `eval_<split>/masked_patch_mse`."""
        metrics = {}
        for item in self._sets:
            batch, count = next(iter(set_batches(item, self._batch_size, self._batch_size)))
            frames = sharding.shard_batch(batch["frames"][self._rows], self._mesh)
            found = jax.tree.map(np.asarray, self._analyze(params, frames))
            prefix = f"eval_{item.split}/{item.name}"
            metrics[f"{prefix}/masked_patch_mse"] = float(found["loss"])
            true = batch["frames"][:, 1] / 255.0
            shown = np.linspace(0, min(count, len(true)) - 1, self._config.num_images).astype(int)
            rows = [[found["masked"][row], found["filled"][row], true[row]] for row in shown]
            writer.image(step, f"{prefix}/masked_filled_true", comparison_grid(rows))
        metrics = with_means(metrics)
        writer.scalars(step, metrics)
        return metrics


def _reconstruct(model: ModelDef, params: Params, frames: jax.Array) -> dict[str, jax.Array]:
    """The loss of a batch, and the second frame of each clip: masked, and with its masked patches filled in."""
    mae, key = model.bind(params), jax.random.key(0)
    empty = jnp.zeros(len(frames), jnp.int32)
    loss = mae.loss(FramePairs(frames, empty, empty), key).total
    masked, filled = mae.reconstruct(frames[:, 1], key)
    return {"loss": loss, "masked": masked, "filled": filled}


def _probe(name: str, fitted: Transitions, held_out: Transitions) -> dict[str, float]:
    """The probe's numbers, or none where it cannot be fitted: that must not end a run."""
    try:
        return probe_metrics(probe_transitions(fitted, held_out))
    except ProbeError as error:
        logger.warning("%s: %s", name, error)
        return {}


def with_means(metrics: dict[str, float]) -> dict[str, float]:
    """Adds `eval_<split>/<metric>`, the mean over the datasets of `eval_<split>/<dataset>/<metric>`.

    Where every metric has one dataset only, the means replace the metrics of the datasets.
    """
    groups: dict[str, list[float]] = {}
    for key, value in metrics.items():
        split, _, name = key.split("/")
        groups.setdefault(f"{split}/{name}", []).append(value)
    means = {key: float(np.mean(values)) for key, values in groups.items()}
    return means if len(means) == len(metrics) else metrics | means
