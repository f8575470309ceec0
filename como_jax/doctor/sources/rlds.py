"""RLDS directories, and what their records and descriptions say in contradiction to their data."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from google.protobuf.message import DecodeError

from como_jax.convert.builder import LeftOut, SourceError
from como_jax.convert.rlds.builder import Rlds, RldsSettings
from como_jax.convert.rlds.dataset import open_dataset, step_features
from como_jax.convert.rlds.language import leaves
from como_jax.convert.rlds.records import read_records
from como_jax.convert.sources import Source
from como_jax.doctor.checks import BLACK
from como_jax.doctor.findings import Finding, Problem, count_of, name_some, share_of, warning
from como_jax.doctor.sources.base import DatasetView, SourceReader, spread_records
from como_jax.doctor.survey import Recording, record_episode

_OBSERVATION = "observation/"
# Larger than any image, so that stored images are not encoded again.
_UNSCALED = 2**20
_COVERED = re.compile("is black over a whole episode")
_STEP_FLAGS = ("is_first", "is_last", "reward")
_METADATA = "episode_metadata"
_HAS = "has_"
_LANGUAGE = f"{_HAS}language"
# The example of https://github.com/kpertsch/rlds_dataset_builder has this text, which is meant to be replaced.
_TEMPLATE = re.compile(r"TODO\(|Markdown description of your dataset", re.IGNORECASE)
_PART = re.compile(r"(\d+)x ")


class RldsView(DatasetView):
    """A TFDS directory with one record an episode; all its colour cameras are looked at."""

    kind = "RLDS dataset"

    def __init__(self, directory: epath.Path, control_rate: float | None = None):
        """Reads the features.

        Raises:
          ConversionError: the directory is not an RLDS dataset, or has no images.
        """
        super().__init__(directory)
        dataset = open_dataset(directory)
        self._info = dataset.info
        self._control_rate = control_rate
        self._steps: dict[str, Any] = dict(sorted(leaves(step_features(dataset))))
        settings = RldsSettings(
            source=str(directory),
            control_rate=1.0 if control_rate is None else control_rate,
            camera=_cameras(self._steps),
            action=_numbers(self._steps, "action"),
            state=_numbers(self._steps, "observation/state"),
            image_size=_UNSCALED,
            validation_fraction=0.0,
        )
        self._reader = SourceReader(Rlds, settings, _COVERED)
        self._sources = self._reader.builder.sources()
        self._flags = FlagReader(self._info.features, directory)

    @property
    def name(self) -> str:
        """The name in the files, since the folder is often named after the version."""
        return f"{self._info.name} {self._info.version}"

    @property
    def total(self) -> int:
        return sum(split.num_examples for split in self._info.splits.values())

    def facts(self) -> dict[str, str]:
        return {
            f"Split {name}": f"{count_of(split.num_examples, 'episode')} in {count_of(split.num_shards, 'file')}"
            for name, split in self._info.splits.items()
        }

    def recordings(self, limit: int) -> Iterator[Recording | Problem]:
        for source in spread_records(self._sources, limit):
            flags = self._flags.read(source)
            for item in self._reader.read(source):
                if isinstance(item, Problem):
                    yield item
                    continue
                try:
                    recording = record_episode(item, self._control_rate, split=source.split or "")
                except ValueError as error:
                    yield Problem(item.episode_id, str(error))
                    continue
                self._flags.compare(recording, flags.get(item.episode_id))
                yield recording

    def findings(self) -> list[Finding]:
        """Flags and descriptions that are wrong, and what a conversion would warn of."""
        description = self._info.description or ""
        return [*self._flags.findings(), *check_descriptions(description, self._steps), *self._reader.findings()]


def _cameras(steps: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the observations that are colour images."""
    return tuple(
        key
        for key, feature in steps.items()
        if key.startswith(_OBSERVATION) and _is_image(feature) and feature.shape[-1] in (3, None)
    )


def _is_image(feature: Any) -> bool:
    return feature.np_dtype == np.uint8 and len(feature.shape) == 3


def _numbers(steps: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Returns the key itself, or the keys of the group of this name, if they hold numbers of a fixed size."""
    return tuple(
        name
        for name, feature in steps.items()
        if (name == key or name.startswith(f"{key}/"))
        and None not in feature.shape
        and np.dtype(feature.np_dtype).kind in "biuf"
    )


@dataclasses.dataclass(frozen=True)
class EpisodeFlags:
    """Flags of one episode: the values of every step, and what the episode says that it has, by name of the flag."""

    steps: Mapping[str, np.ndarray]
    has: Mapping[str, bool]


class FlagReader:
    """Reads the flags of records, and counts the wrong ones."""

    def __init__(self, features: tfds.features.FeaturesDict, directory: epath.Path):
        """Finds the flags that the dataset has."""
        self._directory = directory
        # A features dict of TFDS is not a mapping, but can be turned into one.
        steps, metadata = features["steps"].feature, dict(features.items()).get(_METADATA, {})
        step_flags = {name: steps[name] for name in _STEP_FLAGS if name in steps and steps[name].shape == ()}
        has_flags = {name: metadata[name] for name in metadata if name.startswith(_HAS)}
        wanted: dict[str, Any] = {}
        if step_flags:
            wanted["steps"] = tfds.features.Dataset(tfds.features.FeaturesDict(step_flags))
        if has_flags:
            wanted[_METADATA] = tfds.features.FeaturesDict(has_flags)
        self._features = tfds.features.FeaturesDict(wanted) if wanted else None
        self._counts: Counter[str] = Counter()
        self._denied: Counter[str] = Counter()
        self._claimed: Counter[str] = Counter()

    def read(self, source: Source) -> dict[str, EpisodeFlags]:
        """Reads the flags of some records of one file, by episode; damage is reported when the episodes are read."""
        assert source.records is not None
        found: dict[str, EpisodeFlags] = {}
        if self._features is None:
            return found
        start, stop = source.records
        try:
            for index, record in enumerate(read_records(self._directory / source.path, start, stop), start):
                if not isinstance(record, LeftOut):
                    found[f"{source.path}/{index:06d}"] = self._parse(record)
        except (SourceError, OSError, ValueError, DecodeError):
            pass
        return found

    def compare(self, recording: Recording, flags: EpisodeFlags | None) -> None:
        """Counts the flags of one episode that are wrong."""
        if flags is None:
            return
        self._counts["episodes"] += 1
        for name, values in flags.steps.items():
            if len(values) == len(recording.motion):
                self._count_step_flag(name, values)
        for name, said in flags.has.items():
            present = _has(recording, name)
            if present is not None and present != said:
                (self._claimed if said else self._denied)[name] += 1

    def findings(self) -> Iterator[Finding]:
        """Yields what was counted."""
        cut = "They may have been cut short: expect no end of a task there; conversion goes by records and ignores it."
        unknown = "Do not take it for success or failure: it was not recorded, or the end of the episode is missing."
        ignored = "Conversion ignores it."
        total = self._counts["episodes"]
        for name, message, advice in (
            ("is-first", "is_first is not True at just the first step in {}.", ignored),
            ("is-last", "is_last is False at the last step of {}.", cut),
            ("is-last-early", "is_last is True before the last step of {}.", ignored),
            ("no-reward", "The reward is 0 at every step, the last one too, of {}.", unknown),
        ):
            if self._counts[name]:
                yield warning(name, message.format(share_of(self._counts[name], total, "episode")), advice)
        for counts, name, said, truth in (
            (self._denied, "denied", "False", "there is a real one"),
            (self._claimed, "claimed", "True", "there is none"),
        ):
            groups: dict[int, list[str]] = {}
            for flag, count in sorted(counts.items()):
                groups.setdefault(count, []).append(flag)
            for count, flags in groups.items():
                yield warning(
                    f"has-flag-{name}",
                    f"{', '.join(flags)} {'are' if len(flags) > 1 else 'is'} {said} although {truth} in "
                    f"{share_of(count, total, 'episode')}.",
                    "Do not choose episodes by these flags; go by the images and texts themselves.",
                )

    def _parse(self, record: bytes) -> EpisodeFlags:
        assert self._features is not None
        example = self._features.deserialize_example_np(record)
        steps: dict[str, list[Any]] = {}
        for step in example.get("steps", ()):
            for name, value in step.items():
                steps.setdefault(name, []).append(value)
        has = {name: bool(value) for name, value in example.get(_METADATA, {}).items()}
        return EpisodeFlags({name: np.asarray(values) for name, values in steps.items()}, has)

    def _count_step_flag(self, name: str, values: np.ndarray) -> None:
        if name == "reward":
            self._counts["no-reward"] += not values.any()
        elif name == "is_first":
            self._counts["is-first"] += not values[0] or bool(values[1:].any())
        else:
            self._counts["is-last"] += not values[-1]
            self._counts["is-last-early"] += bool(values[:-1].any())


def _has(recording: Recording, flag: str) -> bool | None:
    """Whether the episode has what a flag such as `has_image_0` speaks of; None if that is not known."""
    if flag == _LANGUAGE:
        return bool(recording.instruction.strip())
    frames = recording.frames.get(flag.removeprefix(_HAS))
    return None if frames is None else any(frame.max() >= BLACK for frame in frames)


def check_descriptions(description: str, steps: Mapping[str, Any]) -> Iterator[Finding]:
    """Finds descriptions, of the dataset and of the features of a step, that do not fit this dataset."""
    faults = []
    if _TEMPLATE.search(description):
        faults.append("the dataset's own is still to be written")
    texts = {key: feature.doc.desc for key, feature in steps.items() if feature.doc.desc}
    for key, text in texts.items():
        parts, shape = [int(count) for count in _PART.findall(text)], steps[key].shape
        size = math.prod(shape) if None not in shape else None
        if parts and size is not None and sum(parts) != size:
            faults.append(f"{key} is described as {sum(parts)} numbers and has {size}")
    cameras = [key for key in texts if _is_image(steps[key])]
    if len(cameras) > 1 and len({texts[key] for key in cameras}) == 1:
        faults.append(f"{len(cameras)} cameras share one, {texts[cameras[0]]!r}")
    if faults:
        yield warning(
            "template-descriptions",
            f"Descriptions seem to be leftovers of a template: {name_some(faults)}.",
            "Do not go by them: look at the statistics and sample strips to learn what actions and cameras are.",
        )
