"""Builder for RLDS datasets: TFDS directories with one record an episode."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from como_jax.convert.builder import (
    ConversionError,
    EpisodeBuilder,
    LeftOut,
    Settings,
    StepLayout,
    Warned,
    check_control_rate,
)
from como_jax.convert.rlds import features
from como_jax.convert.rlds.dataset import dataset_names, open_dataset, step_features
from como_jax.convert.rlds.entries import OPEN_X, Entry, find_entry, nearest, read_table
from como_jax.convert.rlds.episodes import EpisodeReader
from como_jax.convert.rlds.locate import locate
from como_jax.convert.rlds.records import read_records
from como_jax.convert.sources import Source
from como_jax.data.schema import Episode

VALIDATION_SPLITS = ("val", "valid", "validation", "eval", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RldsSettings(Settings):
    """Settings of `Rlds`. What is not given is taken from the entry of the dataset, if there is one.

    Attributes:
      source: TFDS directory, a folder that holds just one, up to two levels down, or a TFDS name.
      data_dir: where datasets lie that are given by name; '' for where TFDS keeps them.
      table: TOML file with entries; '' for the one of Open X-Embodiment.
      entry: name in the table; '' for the name of the dataset.
      control_rate: steps per second (Hz), which RLDS does not record.
      camera: observation keys, the main camera first; empty to take the only one.
      action: step keys, joined in this order; None for `action` if there is one, empty for none.
      state: step keys, joined in this order; None for `observation/state` if there is one, empty for none.
      language: step key; None for the first usual one, '' for none.
    """

    source: str
    data_dir: str = ""
    table: str = ""
    entry: str = ""
    control_rate: float | None = None
    camera: tuple[str, ...] = ()
    action: tuple[str, ...] | None = None
    state: tuple[str, ...] | None = None
    language: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.control_rate is not None:
            check_control_rate(self.control_rate)


class Rlds(EpisodeBuilder):
    """The episodes of an RLDS dataset. Their bounds are those of its records, whatever `is_last` says."""

    settings_class = RldsSettings
    settings: RldsSettings
    # The files of the source are large enough, and one file a shard converts in parallel.
    max_sources_per_shard = 1

    def __init__(self, out: epath.PathLike, settings: RldsSettings, name: str | None = None):
        """Finds the dataset and what is known about it; the rest is as in `EpisodeBuilder`."""
        self._location = locate(settings.source, settings.data_dir)
        if self._location.is_named:
            settings = dataclasses.replace(settings, source=str(self._location.directory))
        self._dataset = open_dataset(self._location.directory)
        entry_name, self._entry = _known_entry(settings, dataset_names(self._dataset))
        # The report shows the values that were used, and a stopped conversion goes on with the same, wherever they
        # come from.
        super().__init__(out, _complete(settings, entry_name, self._entry), name)

    @functools.cached_property
    def layout(self) -> StepLayout:
        """The chosen cameras, states and actions."""
        return StepLayout(
            cameras=tuple(features.camera_name(key) for key in self._selection.cameras),
            state_size=features.size(self._steps, self._selection.states),
            action_size=features.size(self._steps, self._selection.actions),
        )

    def sources(self) -> list[Source]:
        """One source a file; too few files without a validation split are cut in two by records."""
        splits = self._dataset.info.splits
        has_validation = any(split in VALIDATION_SPLITS for split in splits)
        fraction = self.settings.validation_fraction
        cut = not has_validation and fraction * len(self._num_records) < 1
        sources = []
        for split, info in sorted(splits.items()):
            for path in info.filepaths:
                length = self._num_records[path.name]
                if cut:
                    sources += _cut(path.name, length, fraction)
                elif has_validation:
                    sources.append(Source(path.name, _target_split(split), (0, length)))
                else:
                    sources.append(Source(path.name, None, (0, length)))
        return sources

    def warnings(self) -> list[str]:
        """What was chosen without being asked for, and what is missing from the dataset."""
        missing = {
            "action": not self._selection.actions,
            "state": not self._selection.states,
            "language": self._selection.language is None,
        }
        notes = [note for note in (self._location.note, self._entry.notes) if note]
        return notes + [f"no {kind} was converted" for kind, is_missing in missing.items() if is_missing]

    def episodes(self, source: Source) -> Iterator[Episode | LeftOut | Warned]:
        """The episodes of some records of one file; the last part of a file goes on to its end."""
        assert source.records is not None
        start, stop = source.records
        is_last = stop == self._num_records[source.path]
        records = read_records(self._location.directory / source.path, start, stop, to_end=is_last)
        for index, record in enumerate(records, start):
            if index == stop:
                yield Warned("a file holds more records than dataset_info.json says; they were converted as well")
            if isinstance(record, LeftOut):
                yield record
                continue
            try:
                episode, warnings = self._reader.read(record, source.path, index)
            except ValueError as error:
                yield LeftOut(f"record {index}: {error}")
                continue
            yield from map(Warned, warnings)
            yield episode

    @functools.cached_property
    def _num_records(self) -> dict[str, int]:
        """Number of records by file name, as the dataset announces them."""
        return {
            path.name: length
            for info in self._dataset.info.splits.values()
            for path, length in zip(info.filepaths, info.shard_lengths, strict=True)
        }

    @functools.cached_property
    def _steps(self) -> Mapping[str, Any]:
        """Features of a step."""
        return step_features(self._dataset)

    @functools.cached_property
    def _selection(self) -> features.Selection:
        settings = self.settings
        try:
            return features.select(self._steps, settings.camera, settings.action, settings.state, settings.language)
        except ConversionError as error:
            if not settings.entry:
                raise
            hint = f"entry {settings.entry!r} of {settings.table or OPEN_X.name}; flags override it"
            raise ConversionError(f"{error} ({hint})") from error

    @functools.cached_property
    def _reader(self) -> EpisodeReader:
        settings = self.settings
        assert settings.control_rate is not None
        return EpisodeReader(self._steps, self._selection, settings.control_rate, settings.image_size)

    def _info(self) -> tfds.core.DatasetInfo:
        info = super()._info()
        if self.settings.entry:
            info.metadata["entry"] = self.settings.entry
            info.metadata["action_meaning"] = self._entry.action_meaning
            info.metadata["documentation"] = list(self._entry.source or ())
        return info


def _known_entry(settings: RldsSettings, names: Sequence[str]) -> tuple[str, Entry]:
    """Name and content of the entry of a dataset; '' and nothing if the table of Open X-Embodiment has none.

    Args:
      settings: name the entry and the table, or leave both to the dataset.
      names: what the dataset is called, the best name first.

    Raises:
      ConversionError: an entry or table was asked for and cannot be had.
    """
    path = settings.table or OPEN_X
    table = read_table(path)
    if settings.entry:
        return settings.entry, find_entry(table, path, settings.entry)
    known = [name for name in names if name in table]
    if known:
        return known[0], table[known[0]]
    if settings.table:
        raise ConversionError(
            f"{path} has no entry {' or '.join(names)}; --entry chooses another{nearest(names[0], table)}"
        )
    return "", Entry()


def _complete(settings: RldsSettings, name: str, entry: Entry) -> RldsSettings:
    """The settings with what the entry knows in place of what was not given.

    Raises:
      ConversionError: nobody knows the control rate.
    """
    rate = entry.control_rate if settings.control_rate is None else settings.control_rate
    if rate is None:
        unknown = f", nor does the entry {name!r}" if name else ""
        raise ConversionError(f"rlds needs --control_rate: RLDS does not record how many steps a second has{unknown}")
    return dataclasses.replace(
        settings,
        entry=name,
        control_rate=float(rate),
        camera=settings.camera or entry.cameras or (),
        action=entry.action if settings.action is None else settings.action,
        state=entry.state if settings.state is None else settings.state,
        language=entry.language if settings.language is None else settings.language,
    )


def _target_split(split: str) -> str:
    return "val" if split in VALIDATION_SPLITS else "train"


def _cut(path: str, length: int, fraction: float) -> list[Source]:
    """A file as its first records for training and its last ones for validation."""
    num_validation = max(1, round(fraction * length)) if length > 1 and fraction > 0 else 0
    bound = length - num_validation
    parts = [Source(path, "train", (0, bound)), Source(path, "val", (bound, length))]
    return parts if num_validation else parts[:1]
