"""From a config to the batches that a policy is trained on."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from como_jax.data.chunks import ChunkConfig, PolicyPart, PolicyTrainingSamples, find_cameras, make_samples
from como_jax.data.instructions import InstructionReader, InstructionTable
from como_jax.data.label_info import LabelInfo
from como_jax.data.language import read_embeddings
from como_jax.data.mixture import MixtureEntry, parse_mixture
from como_jax.data.normalization import load_normalizer
from como_jax.data.pipeline import train_batches
from como_jax.data.policy_reader import PolicyReader
from como_jax.data.samples import ALL_ROWS, Augmentation, Rows
from como_jax.data.sources import EpisodeSource
from como_jax.errors import DatasetError, closest
from como_jax.policies.spec import PolicySpec, Scales


class PolicyData(NamedTuple):
    """What a policy is trained on.

    Attributes:
      parts: the datasets.
      reader: makes batches of them.
      chunks: the window of steps around a sample.
      labels: of the latent motion, or None when there is none.
      left_out: directories of videos that `data.videos` leaves out.
    """

    parts: tuple[PolicyPart, ...]
    reader: PolicyReader
    chunks: ChunkConfig
    labels: LabelInfo | None
    left_out: tuple[str, ...]

    def describe(self) -> list[str]:
        """One line a dataset."""
        weights = np.array([part.entry.weight for part in self.parts])
        lines = [part.describe(share) for part, share in zip(self.parts, weights / weights.sum(), strict=True)]
        return lines + [f"{directory}: left out by data.videos" for directory in self.left_out]

    def embeddings(self) -> dict[str, np.ndarray]:
        """All that the datasets hold, of instructions of other episodes too, where the text tower takes them."""
        parts = [part for part in self.parts if part.instructions.key == "text_embedding"]
        return {text: vector for part in parts for text, vector in read_embeddings(part.source.directory).items()}

    def sizes(self) -> dict[str, int]:
        """Sizes of the config that follow from the data, by the field's full name."""
        queries, latent_dim = self.labels.latent_shape if self.labels else (0, 0)
        found = {
            "model.action_size": self.reader.action_size,
            "model.latent_queries": queries,
            "model.latent_dim": latent_dim,
            "model.codebook_size": self.labels.codebook_size if self.labels else 0,
            "data.state_size": self.reader.state_size,
        }
        if self.parts[0].instructions.key == "text_embedding":
            found["text.embedding_size"] = self.parts[0].instructions.rows.shape[1]
        return found

    @property
    def robots(self) -> list[PolicyPart]:
        """The datasets with true actions."""
        return [part for part in self.parts if part.action is not None]


def open_policy_data(config: ConfigDict, split: str = "train") -> PolicyData:
    """Opens one split of the datasets of a policy's config; of "val" only datasets that have it.

    Raises:
      DatasetError: a dataset is missing or damaged, gives neither actions nor labels, or does not fit the others.
    """
    data = config.data
    chunks = ChunkConfig(data.instants, data.stride, data.chunk)
    entries = parse_mixture(data.mixture)
    if split != "train":
        entries = tuple(entry for entry in entries if entry.has_split(split))
    _check_names(entries)
    parts: list[PolicyPart] = []
    left_out: list[str] = []
    for entry in entries:
        part = _open_part(entry, split, config)
        if part is None:
            left_out.append(entry.directory)
        else:
            parts.append(part)
    if split == "train" and not any(part.action for part in parts) and not config.data.latent_only:
        raise DatasetError(
            "No dataset of the mixture has actions, so the policy would not learn to act; add robot data to --data, or "
            "pretrain on labels alone with --config.data.latent_only=True."
        )
    if not parts and split == "train":
        raise DatasetError("data.videos leaves out every dataset of the mixture.")
    if split == "train":
        _check_cameras(parts, tuple(data.cameras))
    _check_embeddings(parts)
    labels = _common_labels(parts)
    # Held-out episodes may lack the largest robot.
    sizes = {"action_size": config.model.action_size, "state_size": data.state_size}
    reader = PolicyReader(parts, chunks, data.image_size, **sizes, num_threads=data.num_threads, fit=data.fit)
    return PolicyData(tuple(parts), reader, chunks, labels, tuple(left_out))


def policy_train_batches(data: PolicyData, config: ConfigDict, rows: Rows = ALL_ROWS) -> grain.IterDataset:
    """The endless stream of batches, or of some of their rows."""
    samples = PolicyTrainingSamples(
        data.parts,
        Augmentation(config.data.random_shift, config.data.min_crop_fraction),
        batch_size=config.data.batch_size,
        seed=config.seed,
        rows=rows,
    )
    return train_batches(samples, data.reader, num_workers=config.data.num_workers)


def policy_evaluation_batches(
    data: PolicyData, dataset: int, num_samples: int, batch_size: int, rows: Rows = ALL_ROWS
) -> Iterator[tuple[dict[str, Any], int]]:
    """Some rows of batches over steps spread evenly over one dataset, and each batch's count of true samples.

    Samples that only fill up the last batch have no targets: `has_action` and `has_latent` are 0.
    """
    available = len(data.parts[dataset].steps)
    chosen = np.unique(np.linspace(0, available - 1, min(num_samples, available)).astype(np.int64))
    crop, shift = Augmentation().draw(np.random.default_rng(0), batch_size)
    for begin in range(0, len(chosen), batch_size):
        steps = chosen[begin : begin + batch_size]
        padded = np.pad(steps, (0, batch_size - len(steps)), mode="edge")
        samples = make_samples(data.parts, np.full(batch_size, dataset), padded, crop, shift)
        found = data.reader.map(samples[rows])
        for name in found.keys() & {"has_action", "has_latent"}:
            found[name][np.arange(batch_size)[rows] >= len(steps)] = 0
        yield found, len(steps)


def make_spec(data: PolicyData, config: ConfigDict) -> PolicySpec:
    """What the trained policy needs to know to act."""
    robots = data.robots
    first = robots[0] if robots else data.parts[0]
    return PolicySpec(
        cameras=tuple(config.data.cameras) or first.cameras,
        image_size=config.data.image_size,
        fit=config.data.fit,
        instants=data.chunks.instants,
        stride=data.chunks.stride,
        chunk=data.chunks.chunk,
        action_size=data.reader.action_size,
        state_size=data.reader.state_size,
        control_rate=float(np.median(first.source.control_rate)),
        uses_text=True,
        scales={part.source.directory.name: Scales(part.action, part.state) for part in data.parts if part.action},
    )


def _open_part(entry: MixtureEntry, split: str, config: ConfigDict) -> PolicyPart | None:
    """One dataset; None where it is a video that `data.videos` leaves out, or held-out episodes are all too short."""
    data = config.data
    source = EpisodeSource(entry.directory, split, entry.camera)
    is_robot = source.action is not None and not data.latent_only
    if not is_robot and not _is_chosen(source, data.videos):
        return None
    labelled = source.latent_valid if not is_robot or data.robot_latents else None
    if not is_robot and labelled is None:
        lacks = "neither actions nor labels" if source.action is None else "actions, but no labels"
        raise DatasetError(
            f"{source.directory} has {lacks} of latent motion{' for data.latent_only' if data.latent_only else ''}; "
            "label it with `python -m experiments.extract_labels`, or leave it out of --data."
        )
    kind = entry.normalization or data.normalization
    episode = np.repeat(np.arange(len(source.length)), source.length)
    steps = np.arange(len(source)) if is_robot or labelled is None else np.flatnonzero(labelled)
    if not len(steps) and split != "train":
        return None
    if not len(steps):
        raise DatasetError(f"{source.directory} ({source.split}): no step has a label; all episodes are too short.")
    uses_state = data.proprioception and source.state is not None
    return PolicyPart(
        entry=entry,
        source=source,
        cameras=find_cameras(source, entry, tuple(data.cameras)),
        steps=steps,
        episode=episode,
        action=load_normalizer(source.directory, "action", kind) if is_robot else None,
        state=load_normalizer(source.directory, "state", kind) if uses_state else None,
        latent=(
            None if labelled is None else load_normalizer(source.directory, "latent_motion", data.latent_normalization)
        ),
        instructions=InstructionTable.read(
            source, InstructionReader.make(config.text, source.directory), data.missing_instructions
        ),
    )


def _check_names(entries: Sequence[MixtureEntry]) -> None:
    """Raises DatasetError where two datasets have one name, by which scales and metrics are told apart."""
    known: dict[str, str] = {}
    for entry in entries:
        name = epath.Path(entry.directory).name
        if name in known:
            raise DatasetError(f"{known[name]} and {entry.directory} have one name; rename one, or link to it.")
        known[name] = entry.directory


def _check_cameras(parts: Sequence[PolicyPart], wanted: tuple[str, ...]) -> None:
    """Raises DatasetError where no dataset has one of the pictures, which would be black for ever."""
    for slot, camera in enumerate(wanted):
        if not any(part.cameras[slot] for part in parts):
            known = sorted({name for part in parts for name in part.source.cameras})
            found = f"there are {', '.join(known)}{closest(camera, known)}"
            raise DatasetError(f"data.cameras: no dataset has a camera {camera!r}; {found}")


def _check_embeddings(parts: Sequence[PolicyPart]) -> None:
    """Raises DatasetError where embeddings of instructions differ in size; rows of token ids never do."""
    for part in parts[1:]:
        size, first = part.instructions.rows.shape[1], parts[0].instructions.rows.shape[1]
        if size != first:
            raise DatasetError(
                f"{part.source.directory} has embeddings of {size} numbers, {parts[0].source.directory} of {first}; "
                "make both with one tower of tools.embed_instructions."
            )


def _is_chosen(source: EpisodeSource, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(source.directory.name, pattern) for pattern in patterns)


def _common_labels(parts: Sequence[PolicyPart]) -> LabelInfo | None:
    """What all labelled datasets say of their labels, which must be of one model."""
    found = [(part, LabelInfo.read(part.source.directory)) for part in parts if part.latent]
    for part, labels in found:
        if labels.parameters != found[0][1].parameters:
            raise DatasetError(
                f"{part.source.directory} and {found[0][0].source.directory} hold labels of different models, which "
                "mean different things; label both with one run."
            )
        _check_codes(part, labels)
    return found[0][1] if found else None


def _check_codes(part: PolicyPart, labels: LabelInfo) -> None:
    """Raises DatasetError where a labelled step lacks a code, or has one that the codebook does not have."""
    if not labels.codebook_size:
        return
    where, remedy = f"{part.source.directory} ({part.source.split})", "label the dataset again."
    if part.codes is None or part.codes.shape[1] != labels.latent_shape[0]:
        raise DatasetError(
            f"{where}: not every episode has the {labels.latent_shape[0]} codes a step of which labels.json tells; "
            f"{remedy}"
        )
    wrong = np.argwhere(part.labelled[:, None] & ((part.codes < 0) | (part.codes >= labels.codebook_size)))
    if len(wrong):
        record, token = wrong[0]
        episode = part.episode[record]
        raise DatasetError(
            f"{where}: episode {part.source.episode_id[episode]!r} has at step {record - part.source.start[episode]} "
            f"the code {part.codes[record, token]}, but labels.json tells of {labels.codebook_size} codes, from 0; "
            f"{remedy}"
        )
