"""Does an action have the same latents in every domain (CoMo, Figure 4)? What may transfer between domains follows.

A domain is a labelled dataset. Its steps are cut into segments of consecutive latents, and segments of the same
instruction are compared with segments of other instructions, within a domain and between two. A segment is the mean of
its latents: unlike a sequence of latents, a mean does not change when one robot begins the action a step later than
another. Axes: E episodes of a domain, D numbers of a latent, K domains.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from como_jax.data.mixture import MixtureEntry
from como_jax.data.schema import LABELS_NAME
from como_jax.data.sources import EpisodeSource
from como_jax.errors import ConfigError, DatasetError
from como_jax.files import write_atomic, write_json

MATRIX_NAME, FIGURE_NAME = "domains.json", "domains.png"
FILES = (MATRIX_NAME, FIGURE_NAME)


@dataclasses.dataclass(frozen=True)
class Domain:
    """The labelled episodes of one dataset that have an instruction and at least one segment.

    Attributes:
      name: of the domain.
      direction: float64 `[E, D]`, the mean of the unit vectors of an episode's segments. The scalar product of two
        episodes is therefore the mean cosine between their segments.
      action: one instruction, or class of instructions, per episode.
      notes: what was left out, and why.
    """

    name: str
    direction: np.ndarray
    action: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TransferMatrix:
    """Mean cosines between the segments of all pairs of domains, `[K, K]` each and symmetric.

    Attributes:
      names: of the domains.
      same: between segments of the same action; an episode is never compared with itself.
      other: between segments of different actions.
      p_value: one-sided; how likely a gap this large would be if the episodes had instructions at random.
      common: int64, the number of actions that both domains have.
      notes: why cells are nan, and what was left out.
    """

    names: tuple[str, ...]
    same: np.ndarray
    other: np.ndarray
    p_value: np.ndarray
    common: np.ndarray
    notes: tuple[str, ...]

    @property
    def gap(self) -> np.ndarray:
        """How much more alike the same action is than different ones; 0 where the domains share nothing."""
        return self.same - self.other


def transfer_matrix(
    sources: Mapping[str, EpisodeSource],
    *,
    steps: int = 8,
    action_classes: Mapping[str, str] | None = None,
    centered: bool = True,
    permutations: int = 999,
    seed: int = 0,
) -> TransferMatrix:
    """Compares the latents of all domains, which must have been labelled by the same model.

    Every action counts the same, and so does every episode of an action. The p-value permutes instructions among the
    episodes of a domain, not among segments, since the segments of one episode are not independent.

    Args:
      sources: labelled datasets by the name of their domain.
      steps: latents per segment; segments do not overlap, and all their latents are valid.
      action_classes: the action that an instruction stands for; an instruction without an entry stands for itself.
        Instructions that differ in case and spaces alone are the same.
      centered: whether to subtract the mean latent of every domain. What all actions of a domain have in common, its
        scene and camera, would otherwise make all its segments alike and hide how the actions differ.
      permutations: number of permutations of the test; the smallest p-value is 1 / (permutations + 1).
      seed: of the permutations.

    Raises:
      DatasetError: a dataset without labels, or labels of different sizes.
    """
    if not sources or steps < 1 or permutations < 1:
        raise DatasetError("a transfer matrix needs at least one dataset, and steps and permutations of at least 1.")
    classes = {_normalize(key): _normalize(value) for key, value in (action_classes or {}).items()}
    known = {_normalize(text) for source in sources.values() for text in source.instruction}
    notes = [f"no episode has the instruction {key!r} of action_classes." for key in sorted(classes.keys() - known)]
    domains = [_domain(name, source, steps, classes, centered) for name, source in sources.items()]
    sizes = {domain.name: domain.direction.shape[1] for domain in domains}
    if len(set(sizes.values())) > 1:
        raise DatasetError(f"latents have different sizes ({sizes}); label all datasets with the same model.")
    notes += [note for domain in domains for note in domain.notes]
    return _compare_all(domains, centered, permutations, np.random.default_rng(seed), notes)


def transfer_figure(matrix: TransferMatrix) -> Figure:
    """Two heat maps with numbers: cosines of the same action, and the gap to different ones with its p-value."""
    side = 1.6 + 0.9 * len(matrix.names)
    figure = Figure(figsize=(2 * side + 1.5, side), layout="constrained")
    left, right = figure.subplots(1, 2)
    _heat_map(left, matrix.names, matrix.same, [[f"{x:.2f}" for x in row] for row in matrix.same])
    left.set_title("cosine, same action", fontsize="medium")
    numbers = [
        [f"{gap:+.2f}\np {p:.3f}" for gap, p in zip(*rows, strict=True)]
        for rows in zip(matrix.gap, matrix.p_value, strict=True)
    ]
    _heat_map(right, matrix.names, matrix.gap, numbers)
    right.set_title("same less different action", fontsize="medium")
    return figure


def compare_labelled(
    directories: Sequence[epath.PathLike], action_classes: Mapping[str, str] | None, parameters: str, notes: list[str]
) -> TransferMatrix:
    """Compares the training episodes of labelled datasets, or the held-out ones of a dataset without others.

    Args:
      directories: the datasets, each a domain with the name of its directory.
      action_classes: see `transfer_matrix`.
      parameters: digest of the evaluated model's parameters, as labels.json has it.
      notes: gets a line where labels are of another model or their origin is unknown.

    Raises:
      DatasetError: fewer than two datasets, one without labels, or labels of different models or gaps.
    """
    directories = [epath.Path(directory) for directory in directories]
    if len(directories) < 2:
        raise DatasetError(
            f"{len(directories)} labelled dataset cannot be compared: transfer is measured between two or more."
        )
    names = [directory.name for directory in directories]
    if len(set(names)) < len(names):
        names = [f"{number}_{name}" for number, name in enumerate(names)]
    sources = {name: _open(directory) for name, directory in zip(names, directories, strict=True)}
    matrix = transfer_matrix(sources, action_classes=action_classes)
    _check_origins(directories, parameters, notes)
    return matrix


def read_action_classes(path: epath.PathLike) -> dict[str, str]:
    """The action that each instruction stands for, from a JSON file `{"INSTRUCTION": "ACTION"}`.

    Raises:
      ConfigError: the file cannot be read or holds something else.
    """
    try:
        classes = json.loads(epath.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"action classes {path} cannot be read: {error}") from error
    if not isinstance(classes, dict) or not all(isinstance(value, str) for value in classes.values()):
        raise ConfigError(f'action classes {path} must be an object of strings: {{"INSTRUCTION": "ACTION"}}.')
    return classes


def write_matrix(out: epath.Path, matrix: TransferMatrix) -> None:
    """Writes domains.json, with null where nothing is compared, and domains.png."""
    content: dict[str, Any] = {"names": matrix.names}
    for name in ("same", "other", "gap", "p_value", "common"):
        content[name] = [[None if np.isnan(x) else x.item() for x in row] for row in getattr(matrix, name)]
    write_json(out / MATRIX_NAME, {**content, "notes": matrix.notes})
    figure = transfer_figure(matrix)
    write_atomic(out / FIGURE_NAME, lambda file: figure.savefig(file, format="png", dpi=110))


def segment_means(latent: np.ndarray, valid: np.ndarray, steps: int) -> np.ndarray:
    """Means `[M, D]` of the disjoint runs of `steps` valid latents in one episode's latents `[S, D]`, valid `[S]`."""
    starts = list(_segment_starts(valid, steps))
    segments = np.asarray(starts, np.int64)[:, None] + np.arange(steps)
    return latent[segments].astype(np.float64).mean(axis=1)


def _segment_starts(valid: np.ndarray, steps: int) -> Iterator[int]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], valid.astype(np.int8), [0]])))
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        yield from range(begin, end - steps + 1, steps)


def _domain(name: str, source: EpisodeSource, steps: int, classes: Mapping[str, str], centered: bool) -> Domain:
    if source.latent_motion is None:
        raise DatasetError(f"{name} ({source.directory}) has no latents; label it before domains are compared.")
    segments, action, unnamed, short = [], [], 0, 0
    for start, length, instruction in zip(source.start, source.length, source.instruction, strict=True):
        text, span = _normalize(instruction), slice(start, start + length)
        means = segment_means(source.latent_motion[span], source.latent_valid[span], steps) if text else None
        if means is not None and len(means):
            segments.append(means)
            action.append(classes.get(text, text))
        unnamed += means is None
        short += means is not None and not len(means)
    notes = []
    if unnamed:
        notes.append(f"{name}: {unnamed} episodes without an instruction are left out.")
    if short:
        notes.append(f"{name}: {short} episodes without {steps} consecutive valid latents are left out.")
    size = source.latent_motion.shape[1]
    return Domain(name, _directions(segments, size, centered), tuple(action), tuple(notes))


def _directions(segments: list[np.ndarray], size: int, centered: bool) -> np.ndarray:
    """Mean unit vectors `[E, D]` of the episodes' segments, `[M_e, D]` each; a zero segment has none."""
    if not segments:
        return np.zeros((0, size))
    # The mean over episodes, whatever their actions: permuting the actions does not change it.
    center = np.mean([means.mean(axis=0) for means in segments], axis=0) if centered else np.zeros(size)
    return np.stack([_unit(means - center).mean(axis=0) for means in segments])


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _compare_all(
    domains: list[Domain], centered: bool, permutations: int, rng: np.random.Generator, notes: list[str]
) -> TransferMatrix:
    actions = sorted({action for domain in domains for action in domain.action})
    codes = [np.array([actions.index(action) for action in domain.action], np.int64) for domain in domains]
    same, other, p_value = (np.full((len(domains),) * 2, np.nan) for _ in range(3))
    common = np.array([[len(set(a.action) & set(b.action)) for b in domains] for a in domains], np.int64)
    lonely = {domain.name for domain in domains if len(set(domain.action)) < 2} if centered else set()
    for row, first in enumerate(domains):
        for column, second in enumerate(domains[: row + 1]):
            where = f"{second.name} and {first.name}" if row != column else f"{first.name} with itself"
            pair = _Pair(first.direction, second.direction, codes[row], codes[column], len(actions), row == column)
            if {first.name, second.name} & lonely:
                notes.append(f"{where}: not compared, since a domain of fewer than two actions is all mean.")
                continue
            if not common[row, column]:
                notes.append(f"{where}: not compared, since they have no instruction in common.")
                continue
            means = pair.means(codes[row], codes[column])
            if np.isnan(means).any():
                missing = "episodes of the same" if np.isnan(means[0]) else "different"
                notes.append(f"{where}: not compared, since they have no two {missing} action to compare.")
                continue
            same[row, column], other[row, column] = same[column, row], other[column, row] = means
            p_value[row, column] = p_value[column, row] = pair.p_value(permutations, rng)
    return TransferMatrix(tuple(domain.name for domain in domains), same, other, p_value, common, tuple(notes))


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Two domains' directions `[E, D]` and action codes `[E]`, or one domain against itself (`within`)."""

    first: np.ndarray
    second: np.ndarray
    first_action: np.ndarray
    second_action: np.ndarray
    actions: int
    within: bool

    def means(self, first_action: np.ndarray, second_action: np.ndarray) -> tuple[float, float]:
        """Mean cosines of the same and of different actions; nan where there is no pair."""
        sums, counts = _sums(self.first, first_action, self.actions)
        other_sums, other_counts = _sums(self.second, second_action, self.actions)
        cosines, pairs = sums @ other_sums.T, np.outer(counts, other_counts)
        if self.within:
            squares = np.square(np.linalg.norm(self.first, axis=1))
            cosines -= np.diag(np.bincount(first_action, squares, self.actions))
            pairs -= np.diag(counts)
        cosines = np.divide(cosines, pairs, out=np.zeros_like(cosines), where=pairs > 0)
        diagonal = np.eye(self.actions, dtype=bool)
        return tuple(
            float(cosines[chosen].mean()) if chosen.any() else float("nan")
            for chosen in ((pairs > 0) & diagonal, (pairs > 0) & ~diagonal)
        )

    def p_value(self, permutations: int, rng: np.random.Generator) -> float:
        gaps = []
        for _ in range(permutations):
            action = rng.permutation(self.second_action)
            same, other = self.means(action if self.within else self.first_action, action)
            gaps.append(same - other)
        same, other = self.means(self.first_action, self.second_action)
        # Permutations that change nothing must count in spite of rounding.
        return float((1 + np.sum(np.array(gaps) >= same - other - 1e-12)) / (1 + permutations))


def _sums(direction: np.ndarray, action: np.ndarray, actions: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums `[actions, D]` of the episodes' directions by action, and the numbers of episodes `[actions]`."""
    member = (np.arange(actions)[:, None] == action).astype(np.float64)
    return member @ direction, member.sum(axis=1)


def _normalize(instruction: str) -> str:
    return " ".join(instruction.casefold().split())


def _heat_map(axes: Axes, names: tuple[str, ...], values: np.ndarray, texts: list[list[str]]) -> None:
    limit = max(0.1, float(np.nanmax(np.abs(values), initial=0.0)))
    axes.imshow(values, vmin=-limit, vmax=limit, cmap="RdBu_r", interpolation="nearest")
    for (row, column), value in np.ndenumerate(values):
        text, dark = ("none", False) if np.isnan(value) else (texts[row][column], abs(value) > 0.6 * limit)
        axes.text(column, row, text, ha="center", va="center", fontsize="small", color="white" if dark else "black")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize="small")
    axes.set_yticks(range(len(names)), names, fontsize="small")


def _open(directory: epath.Path) -> EpisodeSource:
    entry = MixtureEntry(str(directory))
    return EpisodeSource(directory, "val" if entry.has_split("val") and not entry.has_split("train") else "train")


def _check_origins(directories: Sequence[epath.Path], parameters: str, notes: list[str]) -> None:
    """Refuses latents of two models or of two gaps: they lie in spaces that have nothing to do with each other."""
    origins = {directory: _origin(directory) for directory in directories}
    known = {directory: origin for directory, origin in origins.items() if origin is not None}
    notes += [
        f"{directory}: it has no {LABELS_NAME}, so it is unknown whether its labels are of the same model."
        for directory in origins.keys() - known.keys()
    ]
    for position, what in enumerate(("model", "gap_seconds")):
        values = {directory: origin[position] for directory, origin in known.items()}
        if len(set(values.values())) > 1:
            first, *rest = values
            other = next(directory for directory in rest if values[directory] != values[first])
            raise DatasetError(
                f"{first} and {other} are labelled with another {what} each; label all datasets with the same."
            )
    if any(origin[0] != parameters for origin in known.values()):
        notes.append("Transfer between domains is of labels that another model than this made.")


def _origin(directory: epath.Path) -> tuple[str, float] | None:
    """Digest of the parameters and gap in seconds of the labels; None where nothing is known of them."""
    try:
        origin = json.loads((directory / LABELS_NAME).read_text())
        return origin["parameters"], origin["settings"]["gap_seconds"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{directory / LABELS_NAME} is damaged: {error!r}; label the dataset again.") from error
