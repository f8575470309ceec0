"""What a run reports about itself while it trains: metrics and pictures on training and held-out episodes."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from como_jax.data.clips import ClipConfig, ClipIndex
from como_jax.data.pipeline import ClipLoader, MixtureEntry, evaluation_batches, has_split, open_mixture
from como_jax.data.sources import EpisodeSource
from como_jax.errors import NoClipsError
from como_jax.evaluation.probes import linear_probe
from como_jax.evaluation.reconstruction import comparison_grid, error_map, psnr
from como_jax.evaluation.similarity import past_future_similarity
from como_jax.training import sharding
from como_jax.training.train_state import ModelDef, Params
from como_jax.training.writers import MetricWriter, NullWriter
from como_jax.types import FramePairs

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Sizes of the in-loop evaluation.

    Attributes:
      num_clips: of every dataset and split; each gives two transitions.
      num_pictures: rows of the picture of predictions, of every dataset.
      batch_size: clips at once.
    """

    num_clips: int = 256
    num_pictures: int = 6
    batch_size: int = 64


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """Clips of three instants, past, current and future, of one dataset and split."""

    name: str
    split: str
    source: EpisodeSource
    index: ClipIndex
    loader: ClipLoader

    @classmethod
    def open_all(
        cls,
        entries: tuple[MixtureEntry, ...],
        *,
        gap_seconds: float,
        image_size: int,
        camera: str,
    ) -> list[EvaluationSet]:
        """Every dataset's training episodes and, where it has them, held-out ones."""
        config = ClipConfig(gap_seconds, instants=3, offset_frames=False)
        found = []
        for number, entry in enumerate(entries):
            for split in ("train", "val"):
                if not has_split(entry, split):
                    logger.warning("Not evaluated: %s has no split %s.", entry.directory, split)
                    continue
                try:
                    mixture = open_mixture([entry], split, config, camera)
                except NoClipsError as error:
                    logger.warning("Not evaluated: %s", error)
                    continue
                loader = ClipLoader(mixture.sources, mixture.indices, config, image_size, actions=True)
                source = mixture.sources[0]
                name = source.name if len(entries) == 1 else f"{number}_{source.name}"
                found.append(cls(name, split, source, mixture.indices[0], loader))
        return found


@dataclasses.dataclass(frozen=True)
class Transitions:
    """What one pass over an evaluation set gives. Axes: N clips, D latent size, A action."""

    past_to_current: np.ndarray  # [N, D]
    current_to_future: np.ndarray  # [N, D]
    future_to_current: np.ndarray  # [N, D]
    mse: np.ndarray  # [N], of the predicted future frame
    copy_mse: np.ndarray  # [N], of the current frame in its place
    episode: np.ndarray  # [N]
    action: np.ndarray | None  # [N, 2, A], of past to current and current to future
    pictures: list[list[np.ndarray]]  # current, predicted, true, error

    @property
    def probe_data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Latents `[2N, D]`, actions `[2N, A]` and episodes `[2N]` of all forward transitions."""
        latent = np.concatenate([self.past_to_current, self.current_to_future])
        action = np.concatenate([self.action[:, 0], self.action[:, 1]])
        return latent, action, np.concatenate([self.episode, self.episode])


class MotionEvaluator:
    """PSNR beside copying, LP-MSE beside the mean action, and S-PCFC, for a latent-motion model of any family."""

    def __init__(self, model: ModelDef, sets: list[EvaluationSet], mesh: Mesh, config: EvaluationConfig):
        self._sets, self._mesh, self._config = sets, mesh, config
        self._batch_size = fit_batch(config.batch_size, mesh)
        self._analyze = jax.jit(_make_analysis(model), out_shardings=sharding.replicated(mesh))

    def __call__(self, params: Params, step: int, writer: MetricWriter | NullWriter) -> dict[str, float]:
        """Evaluates, writes and returns `eval_<split>/<metric>`, and the same by dataset where there are several."""
        metrics: dict[str, float] = {}
        fitted: dict[str, Transitions] = {}
        for item in self._sets:
            found = self._run(params, item)
            prefix = f"eval_{item.split}/{item.name}"
            values = _scene_metrics(found)
            if item.split == "train":
                fitted[item.name] = found
            elif found.action is not None and item.name in fitted:
                values |= _probe_metrics(item.name, fitted[item.name], found)
            metrics |= {f"{prefix}/{name}": value for name, value in values.items()}
            if found.pictures:
                writer.picture(step, f"{prefix}/current_predicted_true_error", comparison_grid(found.pictures))
        metrics = _summarize(metrics)
        writer.scalars(step, metrics)
        return metrics

    def _run(self, params: Params, item: EvaluationSet) -> Transitions:
        columns: dict[str, list[np.ndarray]] = {}
        pictures: list[list[np.ndarray]] = []
        num_clips = min(self._config.num_clips, len(item.index))
        shown = set(np.linspace(0, num_clips - 1, self._config.num_pictures).astype(int))
        first = 0
        for batch, count in self._batches(item):
            found = jax.tree.map(np.asarray, self._analyze(params, sharding.shard_batch(batch, self._mesh)))
            predicted, frames = found.pop("predicted"), found.pop("frames")
            for row in sorted(shown.intersection(range(first, first + count))):
                current, future = frames[row - first, 1:] / 255.0
                guess = predicted[row - first]
                pictures.append([current, guess, future, error_map(guess, future)])
            for key, value in found.items():
                columns.setdefault(key, []).append(value[:count])
            first += count
        data = {key: np.concatenate(values) for key, values in columns.items()}
        latents = data.pop("latents")
        return Transitions(
            past_to_current=latents[:, 0],
            current_to_future=latents[:, 1],
            future_to_current=latents[:, 2],
            action=data.pop("action", None),
            pictures=pictures,
            **data,
        )

    def _batches(self, item: EvaluationSet) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        batches = evaluation_batches(
            item.index,
            item.loader,
            num_clips=self._config.num_clips,
            batch_size=self._batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        for batch, count in batches:
            yield {key: batch[key] for key in ("frames", "episode", "action") if key in batch}, count


class MaeEvaluator:
    """Masked-patch error and pictures of reconstructions."""

    def __init__(self, model: ModelDef, sets: list[EvaluationSet], mesh: Mesh, config: EvaluationConfig):
        self._sets, self._mesh, self._config = sets, mesh, config
        self._batch_size = fit_batch(config.batch_size, mesh)

        def analyze(params: Params, frames: jax.Array) -> dict[str, jax.Array]:
            mae, key = model.bind(params), jax.random.key(0)
            empty = jnp.zeros(len(frames), jnp.int32)
            loss, _ = mae.loss(FramePairs(frames, None, None, empty, empty), key)
            masked, filled = mae.reconstruct(frames[:, 1], key)
            return {"loss": loss, "masked": masked, "filled": filled}

        self._analyze = jax.jit(analyze, out_shardings=sharding.replicated(mesh))

    def __call__(self, params: Params, step: int, writer: MetricWriter | NullWriter) -> dict[str, float]:
        """Evaluates the first batch of every set, writes and returns `eval_<split>/masked_patch_mse`."""
        metrics = {}
        for item in self._sets:
            batch, count = next(
                evaluation_batches(
                    item.index,
                    item.loader,
                    num_clips=self._batch_size,
                    batch_size=self._batch_size,
                    process_index=jax.process_index(),
                    process_count=jax.process_count(),
                )
            )
            frames = sharding.shard_batch(batch["frames"], self._mesh)
            found = jax.tree.map(np.asarray, self._analyze(params, frames))
            prefix = f"eval_{item.split}/{item.name}"
            metrics[f"{prefix}/masked_patch_mse"] = float(found["loss"])
            true = batch["frames"][:, 1] / 255.0
            shown = np.linspace(0, min(count, len(true)) - 1, self._config.num_pictures).astype(int)
            rows = [[found["masked"][row], found["filled"][row], true[row]] for row in shown]
            writer.picture(step, f"{prefix}/masked_filled_true", comparison_grid(rows))
        metrics = _summarize(metrics)
        writer.scalars(step, metrics)
        return metrics


def fit_batch(batch_size: int, mesh: Mesh) -> int:
    """The batch size rounded up to what the mesh and the hosts divide."""
    parts = math.lcm(sharding.batch_shards(mesh), jax.process_count())
    return -(-batch_size // parts) * parts


def _make_analysis(model: ModelDef) -> Callable[[Params, dict[str, jax.Array]], dict[str, jax.Array]]:
    def analyze(params: Params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        motion, frames = model.bind(params), batch["frames"]
        # Past, current, future, current: consecutive pairs are the three transitions that the metrics need.
        latents = motion.encode(frames[:, jnp.array([0, 1, 2, 1])])
        predicted = motion.predict(frames[:, 1], latents[:, 1])
        current, future = (frames[:, k].astype(jnp.float32) / 255.0 for k in (1, 2))

        def error(guess: jax.Array) -> jax.Array:
            return jnp.mean(jnp.square(guess - future), axis=(1, 2, 3))

        return {
            "latents": latents.reshape(*latents.shape[:2], -1),
            "predicted": predicted,
            "mse": error(predicted),
            "copy_mse": error(current),
            **batch,
        }

    return analyze


def _scene_metrics(found: Transitions) -> dict[str, float]:
    return {
        "psnr": psnr(found.mse),
        "psnr_copy": psnr(found.copy_mse),
        "psnr_gain": psnr(found.mse) - psnr(found.copy_mse),
        "s_pcfc": past_future_similarity(found.past_to_current, found.future_to_current),
    }


def _probe_metrics(name: str, fitted: Transitions, held_out: Transitions) -> dict[str, float]:
    latent, action, episode = fitted.probe_data
    if len(np.unique(episode)) < 2:
        logger.warning("%s: no linear probe, which needs two training episodes.", name)
        return {}
    test_latent, test_action, _ = held_out.probe_data
    probe = linear_probe(latent, action, episode, test_latent, test_action)
    return {"lp_mse": probe.lp_mse, "lp_mse_mean_action": probe.lp_mse_mean_action}


def _summarize(metrics: dict[str, float]) -> dict[str, float]:
    """Adds `eval_<split>/<metric>`, the mean over datasets, and drops the datasets' own when there is only one."""
    groups: dict[str, list[float]] = {}
    for key, value in metrics.items():
        split, _, name = key.split("/")
        groups.setdefault(f"{split}/{name}", []).append(value)
    means = {key: float(np.mean(values)) for key, values in groups.items()}
    return means if len(means) == len(metrics) else metrics | means
