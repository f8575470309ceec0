"""Opens the datasets of a policy's config, robot data and labelled videos, and checks that they fit together."""

from __future__ import annotations

import dataclasses
import fnmatch
import types
from collections.abc import Sequence

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from como_jax.data.chunks import ChunkConfig, ChunkFiller, PolicyPart, find_cameras
from como_jax.data.identity import Identity, digest_vectors, identify
from como_jax.data.instructions import InstructionReader, InstructionTable, read_embeddings
from como_jax.data.mixture import MixtureEntry, parse_mixture
from como_jax.data.reader import BatchReader, open_reader
from como_jax.data.schema import LabelInfo
from como_jax.data.sources import EpisodeSource, load_normalizer
from como_jax.errors import DatasetError, closest
from como_jax.spec.interface import NormStats, PolicySpec
from como_jax.spec.normalization import FAR, Normalizer, Scales, far_dimensions, lost_dimensions


@dataclasses.dataclass(frozen=True)
class PolicyData:
    """What a policy is trained on.

    Attributes:
      parts: the opened datasets.
      filler: says what a batch of them holds.
      reader: makes batches of them.
      labels: what all labelled datasets say of their latent motion; None when no dataset is labelled.
      left_out: directories of videos that `data.videos` leaves out.
    """

    parts: tuple[PolicyPart, ...]
    filler: ChunkFiller
    reader: BatchReader
    labels: LabelInfo | None
    left_out: tuple[str, ...]

    def describe(self) -> list[str]:
        """One line a dataset."""
        weights = np.array([part.entry.weight for part in self.parts])
        lines = [part.describe(share) for part, share in zip(self.parts, weights / weights.sum(), strict=True)]
        lines += [text for part in self.parts for text in _scale_warnings(part)]
        return lines + [f"{directory}: left out by data.videos" for directory in self.left_out]

    def identify(self) -> dict[str, Identity]:
        """The identity of every dataset, by its directory."""
        found = {str(part.source.directory): identify(part.source.directory, [part.source]) for part in self.parts}
        for part in self.parts:
            if part.instructions.key == "text_embedding":
                name = part.source.directory
                found[str(name)]["embeddings of instructions"] = digest_vectors(dict(read_embeddings(name).items()))
        return found

    def scales(self) -> dict[str, dict[str, Normalizer | None]]:
        """What normalises the numbers of every dataset, by its name."""
        return {
            part.source.directory.name: {"action": part.action, "state": part.state, "latent_motion": part.latent}
            for part in self.parts
        }

    def embeddings(self) -> dict[str, np.ndarray]:
        """All embeddings of instructions that lie beside the datasets; empty unless the text tower reads embeddings."""
        parts = [part for part in self.parts if part.instructions.key == "text_embedding"]
        return {text: vector for part in parts for text, vector in read_embeddings(part.source.directory).items()}

    def sizes(self) -> dict[str, int]:
        """Sizes of the config that follow from the data, by the field's full name."""
        tokens, latent_dim = self.labels.latent_shape if self.labels else (0, 0)
        found = {
            "model.action_size": self.filler.action_size,
            "model.latent_queries": tokens,
            "model.latent_dim": latent_dim,
            "model.codebook_size": self.labels.codebook_size if self.labels else 0,
            "data.state_size": self.filler.state_size,
        }
        if self.parts[0].instructions.key == "text_embedding":
            found["text.embedding_size"] = self.parts[0].instructions.rows.shape[1]
        return found

    @property
    def robots(self) -> list[PolicyPart]:
        """The datasets with true actions."""
        return [part for part in self.parts if part.action is not None]


def open_policy_data(
    config: ConfigDict, split: str = "train", scales: Scales = types.MappingProxyType({})
) -> PolicyData:
    """Opens one split of the datasets of a policy's config; of "val" only the datasets that have it.

    Args:
      config: of configs/policy_*.py.
      split: "train" or "val".
      scales: of the first start of a run, which stay; others follow from the statistics of the datasets.

    Raises:
      DatasetError: a dataset is missing or damaged, gives neither actions nor labels, or does not fit the others.
      ConfigError: a value of the config's section `data` makes no samples.
    """
    data = config.data
    entries = parse_mixture(data.mixture)
    if split != "train":
        entries = tuple(entry for entry in entries if split in entry.uses)
    _check_names(entries)
    opened = {entry.directory: _open_part(entry, split, config, scales) for entry in entries}
    parts = tuple(part for part in opened.values() if part is not None)
    if split == "train":
        _check_training(parts, data)
    _check_embeddings(parts)
    labels = _common_labels(parts)
    # Held-out episodes may lack the robot with the largest actions, so the sizes of the run are the least ones.
    sizes = {"action_size": config.model.action_size, "state_size": data.state_size}
    filler = ChunkFiller(parts, ChunkConfig(data.instants, data.stride, data.chunk), **sizes)
    reader = open_reader(filler, data)
    left_out = tuple(directory for directory, part in opened.items() if part is None)
    return PolicyData(parts, filler, reader, labels, left_out)


def make_spec(data: PolicyData, config: ConfigDict) -> PolicySpec:
    """The inputs, outputs and normalisation of the policy that a config trains on some data."""
    first, chunks = (data.robots or data.parts)[0], data.filler.chunks
    return PolicySpec(
        cameras=tuple(config.data.cameras) or first.cameras,
        image_size=config.data.image_size,
        fit=config.data.fit,
        instants=chunks.instants,
        stride=chunks.stride,
        chunk=chunks.chunk,
        action_size=data.filler.action_size,
        state_size=data.filler.state_size,
        control_rate=float(np.median(first.source.control_rate)),
        uses_text=True,
        robots={part.source.directory.name: NormStats(part.action, part.state) for part in data.parts if part.action},
        environments={
            part.source.directory.name: part.source.environment
            for part in data.parts
            if part.action and part.source.environment
        },
    )


def _open_part(entry: MixtureEntry, split: str, config: ConfigDict, scales: Scales) -> PolicyPart | None:
    """Opens one dataset; None for a video that `data.videos` leaves out, and where no held-out step has a label."""
    data = config.data
    source = EpisodeSource(entry.directory, entry.split_for(split), entry.camera)
    is_robot = source.action is not None and not data.latent_only
    if not is_robot and not any(fnmatch.fnmatch(source.directory.name, pattern) for pattern in data.videos):
        return None
    labelled = source.latent_valid if not is_robot or data.robot_latents else None
    if not is_robot and labelled is None:
        lacks = "neither actions nor labels" if source.action is None else "actions, but no labels"
        raise DatasetError(
            f"{source.directory} has {lacks} of latent motion{' for data.latent_only' if data.latent_only else ''}; "
            "label it with `python -m experiments.extract_labels`, or leave it out of data.mixture."
        )
    episode = np.repeat(np.arange(len(source.length)), source.length)
    steps = np.arange(len(source)) if is_robot or labelled is None else np.flatnonzero(labelled)
    if not len(steps):
        if split != "train":
            return None
        raise DatasetError(
            f"{source.directory} ({source.split}): no step has a label, since all episodes are too short; leave the "
            "dataset out."
        )
    uses_state = data.proprioception and source.state is not None
    kind = entry.normalization or data.normalization
    kinds = {"action": kind, "state": kind, "latent_motion": data.latent_normalization}

    def scale(field: str) -> Normalizer:
        known = scales.get(source.directory.name, {}).get(field)
        if known:
            return _known_scale(source, field, known)
        return load_normalizer(source.directory, field, kinds[field], entry.split)

    return PolicyPart(
        entry=entry,
        source=source,
        cameras=find_cameras(source, entry, tuple(data.cameras)),
        steps=steps,
        episode=episode,
        action=scale("action") if is_robot else None,
        state=scale("state") if uses_state else None,
        latent=None if labelled is None else scale("latent_motion"),
        instructions=InstructionTable.read(
            source, InstructionReader.make(config.text, source.directory), data.missing_instructions
        ),
    )


def _scale_warnings(part: PolicyPart) -> list[str]:
    """What normalisation takes away from a dataset, in sentences."""
    found = []
    for field, scale in (("action", part.action), ("state", part.state)):
        values = getattr(part.source, field)
        if scale is None or not len(values):
            continue
        low, high = values.min(axis=0), values.max(axis=0)
        where = f"warning: {part.source.directory.name}: {field}"
        for number in lost_dimensions(scale, low, high):
            found.append(
                f"{where} dimension {number} goes from {low[number]:g} to {high[number]:g}, but in so few steps that "
                "normalization makes it constant: the policy neither sees nor makes this motion. min_max keeps it."
            )
        for number in far_dimensions(scale, low, high):
            found.append(
                f"{where} dimension {number} goes from {low[number]:g} to {high[number]:g}, which is more than {FAR:g} "
                "times the scale that normalization gives it: few steps outweigh all others. min_max does not."
            )
    return found


def _known_scale(source: EpisodeSource, field: str, known: Normalizer) -> Normalizer:
    """The scale that a run was started with; raises DatasetError if the numbers have become more or fewer."""
    size = getattr(source, field).shape[1]
    if size != known.size:
        raise DatasetError(
            f"{source.directory}: {field} has {size} numbers, and the run was started with {known.size}; it cannot go "
            "on with this dataset."
        )
    return known


def _check_names(entries: Sequence[MixtureEntry]) -> None:
    """Raises DatasetError where two datasets have the same name, by which scales and metrics are told apart."""
    known: dict[str, str] = {}
    for entry in entries:
        name = epath.Path(entry.directory).name
        if name in known:
            raise DatasetError(f"{known[name]} and {entry.directory} have the same name; rename one, or link to it.")
        known[name] = entry.directory


def _check_training(parts: Sequence[PolicyPart], data: ConfigDict) -> None:
    """Raises DatasetError where nothing can be learned, or where no dataset has one of the cameras.

    The images of a camera that no dataset has would be black throughout training.
    """
    if not parts:
        raise DatasetError("data.videos leaves out every dataset of the mixture; name one of them, or add robot data.")
    if not data.latent_only and not any(part.action for part in parts):
        raise DatasetError(
            "No dataset of the mixture has actions, so the policy would not learn to act; add robot data to "
            "data.mixture, or pretrain on labels alone with data.latent_only=True."
        )
    for slot, camera in enumerate(data.cameras):
        if not any(part.cameras[slot] for part in parts):
            known = sorted({name for part in parts for name in part.source.cameras})
            raise DatasetError(
                f"data.cameras: no dataset has a camera {camera!r}; there are {', '.join(known)}"
                f"{closest(camera, known)}"
            )


def _check_embeddings(parts: Sequence[PolicyPart]) -> None:
    """Raises DatasetError where the embeddings of instructions differ in size; rows of token ids never do."""
    for part in parts[1:]:
        size, first = part.instructions.rows.shape[1], parts[0].instructions.rows.shape[1]
        if size != first:
            raise DatasetError(
                f"{part.source.directory} has embeddings of {size} numbers, {parts[0].source.directory} of {first}; "
                "make both with the same tower of tools.embed_instructions."
            )


def _common_labels(parts: Sequence[PolicyPart]) -> LabelInfo | None:
    """What all labelled datasets say of their labels; raises DatasetError unless one model made them all."""
    found = [(part, LabelInfo.read(part.source.directory)) for part in parts if part.latent]
    for part, labels in found:
        if labels.parameters != found[0][1].parameters:
            raise DatasetError(
                f"{part.source.directory} and {found[0][0].source.directory} hold labels of different models, which "
                "mean different things; label both with the same run."
            )
        _check_codes(part, labels)
    return found[0][1] if found else None


def _check_codes(part: PolicyPart, labels: LabelInfo) -> None:
    """Raises DatasetError where a labelled step lacks a code, or has one that the codebook lacks."""
    if not labels.codebook_size:
        return
    where, remedy = f"{part.source.directory} ({part.source.split})", "label the dataset again."
    if part.codes is None or part.codes.shape[1] != labels.latent_shape[0]:
        raise DatasetError(
            f"{where}: not every episode has the {labels.latent_shape[0]} codes a step that labels.json promises; "
            f"{remedy}"
        )
    wrong = np.argwhere(part.labelled[:, None] & ((part.codes < 0) | (part.codes >= labels.codebook_size)))
    if len(wrong):
        record, token = wrong[0]
        episode = part.episode[record]
        raise DatasetError(
            f"{where}: episode {part.source.episode_id[episode]!r} has at step {record - part.source.start[episode]} "
            f"the code {part.codes[record, token]}, but codes go from 0 to {labels.codebook_size - 1}; "
            f"{remedy}"
        )
