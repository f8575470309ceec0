"""A page that shows what a latent-motion model learned: numbers and what is good, images, and the latents."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from sklearn.metrics.pairwise import cosine_similarity

from como_jax.errors import NoClipsError
from como_jax.evaluation import figures
from como_jax.evaluation.latents.domains import TransferMatrix, transfer_figure
from como_jax.evaluation.latents.measures import (
    comparison_grid,
    past_future_similarities,
    principal_components,
    transfer_motion,
)
from como_jax.evaluation.latents.transitions import DatasetResult, EvaluationSet, set_batches
from como_jax.nn.model_def import ModelDef, Params
from como_jax.pages import figure_uri, image_uri, render_page

STRIP_INSTANTS = 5
MAX_DIMENSIONS = 4
MAX_EPISODES = 60

# Metric: its title, and what good is.
METRICS = {
    "psnr": ("PSNR of the prediction, dB", "Higher is better. It must beat copying the current frame, below."),
    "psnr_copy": ("PSNR of copying, dB", "The score of predicting no motion; high where little moves."),
    "psnr_gain": ("PSNR gain over copying, dB", "Above 0 the latent says what moved; at 0 or below it is of no use."),
    "ssim": ("SSIM of the prediction", "Up to 1, higher is better. It must beat copying, below."),
    "ssim_copy": ("SSIM of copying", "The score of predicting no motion."),
    "s_pcfc": (
        "S-PCFC",
        "Lower is better: near 1 the latent describes the scene, whichever way it was reached. Noise scores low too, "
        "so a low value means something only beside a good LP-MSE.",
    ),
    "s_pcfc_by_token": ("S-PCFC, token by token", "The same for every latent token alone, then averaged."),
    "effective_rank": (
        "Effective rank of the latents",
        "How many directions the latents use; at most the numbers of a latent, and at most the number of transitions. "
        "Near 1 the latents have collapsed.",
    ),
    "lp_mse": (
        "LP-MSE",
        "Error of a linear layer that reads the action from the latent, on held-out episodes. Lower is better; it "
        "must beat the mean action, below.",
    ),
    "lp_mse_mean_action": ("LP-MSE of the mean action", "The score of knowing nothing of the transition."),
    "lp_r2": (
        "R² of the probe",
        "Share of the action's variance that it explains: 1 is all, 0 or less is nothing.",
    ),
    "lp_accuracy": (
        "Accuracy of the probe",
        "Where actions are choices. It must beat the most frequent one, below.",
    ),
    "lp_accuracy_majority": ("Accuracy of the most frequent action", "The score of always guessing it."),
    "transitions": (
        "Transitions",
        "Pairs of frames that were measured, each once. More make the numbers more certain.",
    ),
}


@dataclasses.dataclass(frozen=True)
class TransferStrip:
    """The motion of one clip, played from a frame of another.

    Attributes:
      caption: which motion was played in which scene.
      source: uint8 `[T, H, W, 3]`, the clip whose motion it is.
      rollout: float `[T, H, W, 3]` in [0, 1], the other frame and the frames predicted from it.
    """

    caption: str
    source: np.ndarray
    rollout: np.ndarray


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that a page shows.

    Attributes:
      title: of the page.
      facts: what was evaluated, by the name of the fact.
      notes: what was left out and why.
      metrics: means over datasets.
      results: of every dataset.
      transfer: strips of motion transfer.
      domains: comparison of labelled datasets, if there are any.
    """

    title: str
    facts: Mapping[str, str]
    notes: Sequence[str]
    metrics: Mapping[str, float]
    results: Sequence[DatasetResult]
    transfer: Sequence[TransferStrip]
    domains: TransferMatrix | None = None


class Image(NamedTuple):
    """An image on the page: title, data, and whether its pixels stay sharp when it is enlarged."""

    title: str
    uri: str
    pixelated: bool = False


def write_report(path: epath.PathLike, report: Report) -> None:
    """Writes the page as one HTML file that refers to nothing outside it."""
    render_page(
        path,
        epath.Path(__file__).with_name("report.html.jinja"),
        report=report,
        metrics=METRICS,
        number=format_number,
        reconstructions=[reconstruction_image(result) for result in report.results if result.found.images],
        transfers=[transfer_image(strip) for strip in report.transfer],
        components=component_images(report.results),
        similarity=similarity_image(report.results),
        histogram=histogram_image(report.results),
        domains=report.domains and domain_image(report.domains),
    )


def transfer_strips(
    model: ModelDef, params: Params, items: Sequence[EvaluationSet], count: int, notes: list[str]
) -> list[TransferStrip]:
    """Plays the motion of clips from the first frames of other clips: of the next dataset, or of the only one.

    Args:
      model: any that is a `LatentMotionModel`.
      params: its parameters.
      items: one set of episodes per dataset, to take clips from.
      count: least number of strips, of all datasets together.
      notes: gets a line where episodes are too short for a whole strip.
    """
    count = max(2, -(-count // len(items))) if len(items) == 1 else -(-count // len(items))
    clips = [_strip_clips(item, count, notes) for item in items]
    play = jax.jit(lambda params, frames, first: transfer_motion(model.bind(params), frames, first))
    strips = []
    for number, (frames, captions) in enumerate(clips):
        targets, target_captions = clips[(number + 1) % len(items)]
        # A clip of the only dataset is played from the start of the clip after it.
        rows = (np.arange(len(frames)) + (len(items) == 1)) % len(targets)
        rollouts = np.asarray(play(params, frames, targets[rows, 0]))
        strips += [
            TransferStrip(f"{captions[k]}, played in the scene of {target_captions[row]}", frames[k], rollouts[k])
            for k, row in enumerate(rows)
            if len(items) > 1 or row != k
        ]
    return strips


def _strip_clips(item: EvaluationSet, count: int, notes: list[str]) -> tuple[np.ndarray, list[str]]:
    """Frames uint8 `[K, T, H, W, 3]` of clips spread over a set, as long as there are any, and a caption of each."""
    for instants in range(STRIP_INSTANTS, 1, -1):
        try:
            clips = item.recut(instants)
        except NoClipsError:
            continue
        break
    if instants < STRIP_INSTANTS:
        notes.append(f"{item.name}: motion transfer over {instants} frames, since its episodes are short.")
    batch, found = next(iter(set_batches(clips, count, count)))
    captions = [f"{item.name}, {_episode_label(item, row)}" for row in batch["episode"][:found]]
    return batch["frames"][:found], captions


def describe_measurements(results: Sequence[DatasetResult]) -> dict[str, str]:
    """Facts about what was measured, and the date."""
    queries, size = results[0].found.past_to_current.shape[1:]
    return {
        "Latent": f"{queries} tokens of {size} numbers",
        "Gap between frames": f"{results[0].item.part.clips.gap_seconds:g} s",
        **{f"Data {result.item.name}": _describe_data(result) for result in results},
        "Date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
    }


def _describe_data(result: DatasetResult) -> str:
    item, found, fitted = result.item, result.found, result.fitted
    text = f"{item.source.directory}, split {item.split}: {len(found.latent)} transitions"
    text += f" from {len(np.unique(found.episode))} of {len(item.source.length)} episodes"
    if item.index.short_episodes:
        text += f", {item.index.short_episodes} of which are too short"
    if fitted is not None:
        text += f"; probe fitted on {len(fitted.latent)} from {len(np.unique(fitted.episode))} training episodes"
    return text


def format_number(value: float) -> str:
    """Integers as they are, other numbers with four digits, a dash for NaN."""
    return str(value) if isinstance(value, int) else "–" if np.isnan(value) else f"{value:.4g}"


def reconstruction_image(result: DatasetResult) -> Image:
    """Rows of current frame, predicted frame, true frame and error."""
    return Image(result.item.name, image_uri(comparison_grid(result.found.images)), pixelated=True)


def transfer_image(strip: TransferStrip) -> Image:
    """The source clip above the rollout."""
    rows = [strip.source / 255.0, strip.rollout]
    return Image(strip.caption, image_uri(comparison_grid(rows, min_side=96)), pixelated=True)


def component_images(results: Sequence[DatasetResult]) -> list[Image]:
    """Principal components of the latents, coloured by the best-read dimensions of the action, and by dataset."""
    images = []
    for result in results:
        if result.probe is not None:
            r2 = result.probe.per_dimension_r2
            order = np.argsort(-r2, kind="stable")[:MAX_DIMENSIONS]
            titles = [f"action {dimension}, R² {format_number(r2[dimension])}" for dimension in order]
            coordinates, shares = principal_components(result.found.latent, 2)
            figure = figures.action_figure(coordinates, shares, result.found.latent_action[:, order], titles)
            images.append(Image(f"{result.item.name}, by action", figure_uri(figure)))
    if len(results) > 1:
        latent = np.concatenate([result.found.latent for result in results])
        dataset = np.repeat(np.arange(len(results)), [len(result.found.latent) for result in results])
        coordinates, shares = principal_components(latent, 2)
        figure = figures.dataset_figure(coordinates, shares, dataset, [result.item.name for result in results])
        images.append(Image("All datasets together, by dataset", figure_uri(figure)))
    return images


def similarity_image(results: Sequence[DatasetResult]) -> Image:
    """Cosine similarity between the mean latents of episodes, ordered by dataset and instruction."""
    groups, labels, means = [], [], []
    for result in results:
        latent, episode = result.found.latent, result.found.latent_episode
        for row in sorted(np.unique(episode), key=lambda row: (result.item.source.instruction[row], row)):
            groups.append(result.item.name)
            labels.append(_episode_label(result.item, row))
            means.append(latent[episode == row].mean(axis=0))
    shown = np.unique(np.linspace(0, len(means) - 1, MAX_EPISODES).astype(int))
    several = len(results) > 1
    figure = figures.similarity_figure(
        cosine_similarity(np.stack(means)[shown]),
        [f"{groups[row]}: {labels[row]}" if several else labels[row] for row in shown],
        [groups[row] for row in shown],
    )
    return Image(f"{len(shown)} of {len(means)} episodes", figure_uri(figure))


def histogram_image(results: Sequence[DatasetResult]) -> Image:
    """S-PCFC of single clips."""
    similarities = {
        result.item.name: past_future_similarities(result.found.past_to_current, result.found.future_to_current)
        for result in results
    }
    return Image("S-PCFC of single clips", figure_uri(figures.similarity_histogram(similarities)))


def domain_image(matrix: TransferMatrix) -> Image:
    """Cosines between the segments of labelled datasets."""
    return Image(f"Labels of {', '.join(matrix.names)}", figure_uri(transfer_figure(matrix)))


def _episode_label(item: EvaluationSet, row: int) -> str:
    return item.source.instruction[row] or f"episode {row}"
