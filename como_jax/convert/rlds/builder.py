"""Builder for RLDS datasets: TFDS directories with one record an episode."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from como_jax.convert.builder import EpisodeBuilder, Item, LeftOut, SourceError, StepLayout, Warned
from como_jax.convert.rlds.dataset import dataset_names, episode_features, locate, open_dataset, step_features
from como_jax.convert.rlds.entries import OPEN_X, Entry, find_entry, read_table
from como_jax.convert.rlds.episodes import EpisodeReader, select, vector_size
from como_jax.convert.rlds.language import leaves, text_keys, with_numbered
from como_jax.convert.rlds.records import count_records, read_records
from como_jax.convert.rlds.shards import Shards, compare_shards
from como_jax.convert.selection import Selection, missing_warnings, nearest
from como_jax.convert.settings import RATE, Settings, setting
from como_jax.convert.sources import VALIDATION_SPLITS, Source
from como_jax.errors import ConversionError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RldsSettings(Settings):
    """Settings of `Rlds`. What is not given is taken from the entry of the dataset, if there is one."""

    source: str = setting("TFDS directory, a folder that holds just one, up to two levels down, or a TFDS name")
    data_dir: str = setting("folder of datasets that are given by name [the folder of TFDS]", "")
    table: str = setting("TOML file of known datasets [that of Open X-Embodiment]", "")
    entry: str = setting("entry of the table [the name of the dataset]", "")
    control_rate: float | None = setting("steps per second (Hz), which RLDS does not record", None, RATE)
    camera: tuple[str, ...] = setting("observation keys, the main camera first [the only camera]", ())
    action: tuple[str, ...] | None = setting("step keys, joined in this order; '' for none [action]", None)
    state: tuple[str, ...] | None = setting("step keys, joined in this order; '' for none [observation/state]", None)
    language: str | None = setting(
        "keys of texts that mean the same, of steps or of `episode_metadata`; '' for none [the usual ones]", None
    )


class Rlds(EpisodeBuilder):
    """The episodes of an RLDS dataset. Each record is an episode, whatever `is_last` says."""

    settings_class = RldsSettings
    settings: RldsSettings

    def __init__(self, out: epath.PathLike, settings: RldsSettings, name: str | None = None):
        """Finds the dataset and what is known about it; for arguments and errors see `EpisodeBuilder`."""
        self._location = locate(settings.source, settings.data_dir)
        if self._location.is_named:
            settings = dataclasses.replace(settings, source=str(self._location.directory))
        self._dataset = open_dataset(self._location.directory)
        entry_name, entry = _known_entry(settings, dataset_names(self._dataset))
        if entry.language:
            language = with_numbered(entry.language, dict(leaves(step_features(self._dataset))))
            entry = dataclasses.replace(entry, language=language)
        self._entry = entry
        # The report shows the values that were used, and a stopped conversion goes on with the same values, wherever
        # they come from.
        super().__init__(out, _complete(settings, entry_name, self._entry), name)

    @functools.cached_property
    def layout(self) -> StepLayout:
        return StepLayout(
            cameras=tuple(self._selection.cameras),
            state_size=vector_size(self._steps, self._selection.states),
            action_size=vector_size(self._steps, self._selection.actions),
        )

    def sources(self) -> list[Source]:
        """One source a file; if there is no validation split and too few files to draw one, each file is cut in two."""
        splits = self._dataset.info.splits
        has_validation = any(split in VALIDATION_SPLITS for split in splits)
        fraction = self.settings.validation_fraction
        cut = not has_validation and fraction * sum(map(len, self._files.values())) < 1
        sources = []
        for split, info in sorted(splits.items()):
            # Of the mean record, since to look at every file takes long where they lie in a bucket.
            record_bytes = info.num_bytes / max(info.num_examples, 1)
            for name, length in self._files[split].items():
                target = _target_split(split) if has_validation else None
                whole = Source(name, target, (0, length), round(record_bytes * length))
                sources += _cut(whole, fraction) if cut else [whole]
        return sources

    def warnings(self) -> list[str]:
        """What was chosen without being asked for, and what is missing from the dataset."""
        selection = self._selection
        notes = [note for note in (self._location.note, self._entry.notes) if note] + self._shards.warnings()
        for split in self._shards.divided:
            count, announced = (sum(each[split].values()) for each in (self._files, self._announced))
            if count != announced:
                notes.append(f"split {split!r} has {count} records, and dataset_info.json says {announced}")
        return notes + missing_warnings(action=selection.actions, state=selection.states, language=selection.language)

    def label_files(self) -> list[str]:
        """The keys of texts, which may be instructions, unless the user wants none."""
        if self.settings.language == "":
            return []
        return text_keys(dict(leaves(self._steps)) | self._beside)

    def episodes(self, source: Source) -> Iterator[Item]:
        """The episodes in some records of one file; the last part of a file goes on to its end."""
        assert source.records is not None
        start, stop = source.records
        is_last = any(files.get(source.path) == stop for files in self._files.values())
        path = self._location.directory / self._shards.found.get(source.path, source.path)
        if not path.exists():
            raise SourceError(self._shards.missing)
        records = read_records(path, start, stop, to_end=is_last)
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
    def _announced(self) -> dict[str, dict[str, int]]:
        """The number of records of every file that the dataset announces, by split and file name."""
        return {
            split: {path.name: length for path, length in zip(info.filepaths, info.shard_lengths, strict=True)}
            for split, info in self._dataset.info.splits.items()
        }

    @functools.cached_property
    def _files(self) -> dict[str, dict[str, int]]:
        """The number of records of every file to convert, by split and file name."""
        divided = {
            split: {name: count_records(self._location.directory / name) for name in names}
            for split, names in self._shards.divided.items()
        }
        return self._announced | divided

    @functools.cached_property
    def _shards(self) -> Shards:
        """The files that dataset_info.json names, and those in the folder."""
        return compare_shards(self._announced, (path.name for path in self._location.directory.iterdir()))

    @functools.cached_property
    def _steps(self) -> Mapping[str, Any]:
        """The features of a step."""
        return step_features(self._dataset)

    @functools.cached_property
    def _beside(self) -> dict[str, Any]:
        """The features of a record beside its steps."""
        return episode_features(self._dataset)

    @functools.cached_property
    def _selection(self) -> Selection:
        settings = self.settings
        try:
            return select(
                self._steps, settings.camera, settings.action, settings.state, settings.language, self._beside
            )
        except ConversionError as error:
            if not settings.entry:
                raise
            hint = f"entry {settings.entry!r} of {settings.table or OPEN_X.name}; settings override it"
            raise ConversionError(f"{error} ({hint})") from error

    @functools.cached_property
    def _reader(self) -> EpisodeReader:
        settings = self.settings
        assert settings.control_rate is not None
        return EpisodeReader(self._steps, self._selection, settings.control_rate, settings.image_size, self._beside)

    def _info(self) -> tfds.core.DatasetInfo:
        info = super()._info()
        if self.settings.entry:
            info.metadata["entry"] = self.settings.entry
            info.metadata["action_meaning"] = self._entry.action_meaning
            info.metadata["documentation"] = list(self._entry.source or ())
        return info


def _known_entry(settings: RldsSettings, names: Sequence[str]) -> tuple[str, Entry]:
    """Returns name and content of the entry of a dataset; '' and an empty entry if nothing is known about it.

    `names` are possible names of the dataset, the best one first.

    Raises:
      ConversionError: the settings name an entry or a table that does not exist.
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
            f"{path} has no entry {' or '.join(names)}; `entry` chooses another{nearest(names[0], table)}"
        )
    return "", Entry()


def _complete(settings: RldsSettings, name: str, entry: Entry) -> RldsSettings:
    """Fills in the settings that were not given from the entry.

    Raises:
      ConversionError: the control rate is neither given nor known.
    """
    rate = entry.control_rate if settings.control_rate is None else settings.control_rate
    if rate is None:
        unknown = f", nor does the entry {name!r}" if name else ""
        raise ConversionError(f"rlds needs `control_rate`: RLDS does not record how many steps a second has{unknown}")
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


def _cut(file: Source, fraction: float) -> list[Source]:
    """Cuts a file into its first records for training and its last ones for validation."""
    assert file.records is not None
    _, length = file.records
    num_validation = max(1, round(fraction * length)) if length > 1 and fraction > 0 else 0
    bound = length - num_validation
    record_bytes = file.num_bytes / max(length, 1)
    parts = [
        dataclasses.replace(file, split=split, records=(start, stop), num_bytes=round(record_bytes * (stop - start)))
        for split, start, stop in (("train", 0, bound), ("val", bound, length))
    ]
    return parts if num_validation else parts[:1]
