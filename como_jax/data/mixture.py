"""The datasets of a run, their shares of the samples, and the settings that differ between them."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from como_jax.data.clips import ClipConfig, ClipIndex, index_clips
from como_jax.data.episode_table import has_split
from como_jax.data.schema import SPLITS
from como_jax.data.sources import EpisodeSource
from como_jax.errors import DatasetError, closest
from como_jax.spec.images import FITS
from como_jax.spec.normalization import KINDS
from como_jax.staging import is_local


@dataclasses.dataclass(frozen=True)
class MixtureEntry:
    """One dataset of a mixture. Where a field is None or empty, the run's config decides.

    Attributes:
      directory: the dataset's directory.
      weight: share of the samples, relative to the other datasets' weights.
      camera: observation key of the images.
      gap_seconds, min_motion, max_motion: see `ClipConfig`.
      fit: how images become square, see `transforms`.
      normalization: how actions are normalised, see `normalization.KINDS`.
      split: the episodes that are trained on; a dataset that trains on "val" has no held-out ones.
    """

    directory: str
    weight: float = 1.0
    camera: str = ""
    gap_seconds: float | None = None
    min_motion: float | None = None
    max_motion: float | None = None
    fit: str = ""
    normalization: str = ""
    split: str = "train"

    def clip_config(self, default: ClipConfig) -> ClipConfig:
        """The run's settings for cutting clips, with those that this dataset changes."""
        own = {name: getattr(self, name) for name in ("gap_seconds", "min_motion", "max_motion")}
        return dataclasses.replace(default, **{name: value for name, value in own.items() if value is not None})

    def has_split(self, split: str) -> bool:
        """Whether the dataset has episodes in the split."""
        return has_split(self.directory, split)

    @property
    def uses(self) -> list[str]:
        """What there are episodes for: "train", and "val" where some are held out."""
        return [use for use in SPLITS if self.has_split(self.split_for(use)) and (use == "train" or use != self.split)]

    def split_for(self, use: str) -> str:
        """The split that is trained on for "train", and "val" for "val"."""
        return self.split if use == "train" else use


def parse_mixture(text: str) -> tuple[MixtureEntry, ...]:
    """Parses `DIR[:SPLIT][=WEIGHT],...`, or the name or the text of a TOML file.

    The file has one `[[dataset]]` section an entry, with the fields of `MixtureEntry`.

    Raises:
      DatasetError: no dataset is named, or a field is unknown or has a wrong value.
    """
    text = mixture_text(text)
    entries = _parse_toml(text) if "[[" in text else _parse_list(text)
    if not entries:
        raise DatasetError("The mixture names no dataset; it must be DIR[:SPLIT][=WEIGHT],... or MIXTURE.toml.")
    return entries


def mixture_text(text: str) -> str:
    """The mixture as a run should store it: the text of a TOML file in place of its name.

    Raises:
      DatasetError: there is no such file.
    """
    if not text.endswith(".toml"):
        return text
    try:
        return epath.Path(text).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"Mixture file {text} cannot be read: {error}") from error


def _parse_list(text: str) -> tuple[MixtureEntry, ...]:
    entries = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, weight = item.rpartition("=") if "=" in item else (item, "", "1")
        directory, _, split = name.rpartition(":")
        if not directory or split not in SPLITS:
            directory, split = name, "train"
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf") or (_names_folder(item) and not epath.Path(directory).exists()):
            raise DatasetError(
                f"{item!r}: what follows the last '=' is the weight of a dataset, its share of the samples beside the "
                f"others. It must be a positive number, and it is {weight!r}. If the '=' belongs to the name of the "
                f"folder, give a weight too: {item}=1"
            )
        entries.append(MixtureEntry(directory, weight=value, split=split))
    return tuple(entries)


def _names_folder(item: str) -> bool:
    """Whether an entry with a weight is as a whole the name of a folder."""
    return "=" in item and is_local(item) and epath.Path(item).is_dir()


def _parse_toml(text: str) -> tuple[MixtureEntry, ...]:
    try:
        sections = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DatasetError(f"The mixture is not valid TOML: {error}") from error
    if set(sections) != {"dataset"}:
        raise DatasetError(f"A mixture consists of [[dataset]] sections only, not of {', '.join(sorted(sections))}.")
    return tuple(_parse_section(number, section) for number, section in enumerate(sections["dataset"], 1))


def _parse_section(number: int, section: dict[str, Any]) -> MixtureEntry:
    defaults = {field.name: field.default for field in dataclasses.fields(MixtureEntry)}
    where = f"[[dataset]] number {number} of the mixture"
    for name, value in section.items():
        if name not in defaults:
            raise DatasetError(f"{where} has no field {name!r}{closest(name, defaults)}")
        is_text = isinstance(defaults[name], str) or name == "directory"
        if isinstance(value, bool) or not isinstance(value, str if is_text else int | float):
            raise DatasetError(f"{where}: {name} must be a {'string' if is_text else 'number'}, not {value!r}.")
    if not section.get("directory"):
        raise DatasetError(f"{where} lacks its directory.")
    entry = MixtureEntry(**section)
    if not 0 < entry.weight < float("inf"):
        raise DatasetError(f"{where}: weight must be a positive number, not {entry.weight}.")
    for name, choices in (("fit", FITS), ("normalization", KINDS), ("split", SPLITS)):
        value = getattr(entry, name)
        if value and value not in choices:
            raise DatasetError(f"{where}: {name} must be one of {', '.join(choices)}, not {value!r}.")
    return entry


@dataclasses.dataclass(frozen=True)
class MixturePart:
    """One opened dataset of a mixture, with the clips that it offers."""

    entry: MixtureEntry
    source: EpisodeSource
    clips: ClipConfig
    index: ClipIndex

    @classmethod
    def open(cls, entry: MixtureEntry, split: str, clips: ClipConfig, camera: str = "") -> MixturePart:
        """Opens the episodes of a dataset that are trained on (`split` "train") or those that are held out ("val").

        Raises:
          DatasetError: the dataset is missing, damaged or offers no clip.
        """
        own = entry.clip_config(clips)
        source = EpisodeSource(entry.directory, entry.split_for(split), entry.camera or camera)
        return cls(entry, source, own, index_clips(source, own))

    @property
    def cameras(self) -> tuple[str, ...]:
        """The one camera that frames are taken from."""
        return (self.source.camera,)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """All opened datasets of a run on clips."""

    parts: tuple[MixturePart, ...]

    @classmethod
    def open(cls, entries: Sequence[MixtureEntry], split: str, clips: ClipConfig, camera: str = "") -> Mixture:
        """Opens every dataset; see `MixturePart.open`."""
        return cls(tuple(MixturePart.open(entry, split, clips, camera) for entry in entries))

    @property
    def weights(self) -> np.ndarray:
        """Every dataset's share of the samples, float64 `[datasets]`; they add up to 1."""
        weights = np.array([part.entry.weight for part in self.parts], np.float64)
        return weights / weights.sum()

    @property
    def num_clips(self) -> int:
        """Clips of all datasets together."""
        return sum(len(part.index) for part in self.parts)

    def describe(self) -> list[str]:
        """One line a dataset: what is in it and what was left out."""
        return [_describe(part, share) for part, share in zip(self.parts, self.weights, strict=True)]


def _describe(part: MixturePart, share: float) -> str:
    source, index = part.source, part.index
    seconds = np.unique(np.round(part.clips.pair_span * index.gap / source.control_rate, 3))
    gaps = "-".join(f"{value:g}" for value in sorted({seconds[0], seconds[-1]}))
    return (
        f"{source.name} [{source.split}]: {share:.0%} of samples, {len(source.length)} episodes, "
        f"{len(source)} steps, {len(index)} clips, gap {gaps} s, camera {source.camera}; left out: "
        f"{index.short_episodes} short episodes, {index.filtered_clips} clips by motion"
    )
