"""What RLDS records say about themselves, against what is in them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from google.protobuf.message import DecodeError

from como_jax.convert.builder import LeftOut, SourceError
from como_jax.convert.rlds.records import read_records
from como_jax.convert.sources import Source
from como_jax.doctor.checks.cameras import BLACK
from como_jax.doctor.findings import Finding, Severity, share_of
from como_jax.doctor.recording import Recording

_STEP_FLAGS = ("is_first", "is_last", "reward")
_METADATA = "episode_metadata"
_HAS = "has_"
_LANGUAGE = f"{_HAS}language"


@dataclasses.dataclass(frozen=True)
class EpisodeFlags:
    """Flags of one episode.

    Attributes:
      steps: values of every step, by flag.
      has: what the episode is said to have, by the name of the flag.
    """

    steps: Mapping[str, np.ndarray]
    has: Mapping[str, bool]


class FlagReader:
    """Reads the flags of records and counts those that are wrong."""

    def __init__(self, features: tfds.features.FeaturesDict, directory: epath.Path):
        """Chooses the flags that the dataset has."""
        self._directory = directory
        # A features dict of TFDS is no mapping, but becomes one.
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
        """Flags of some records of one file, by episode; damage shows when the episodes are read."""
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
        length = len(recording.motion)
        for name, values in flags.steps.items():
            if len(values) == length:
                self._count_step_flag(name, values)
        for name, said in flags.has.items():
            present = _has(recording, name)
            if present is not None and present != said:
                (self._claimed if said else self._denied)[name] += 1

    def findings(self) -> list[Finding]:
        """What was counted."""
        return [*self._bounds_findings(), *self._has_findings()]

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
            self._counts["no reward"] += not values.any()
        elif name == "is_first":
            self._counts[name] += not values[0] or bool(values[1:].any())
        else:
            self._counts["not last"] += not values[-1]
            self._counts["last within"] += bool(values[:-1].any())

    def _bounds_findings(self) -> list[Finding]:
        total, found = self._counts["episodes"], []

        def add(name: str, count: str, message: str, advice: str) -> None:
            if self._counts[count]:
                share = share_of(self._counts[count], total, "episode")
                found.append(Finding(Severity.WARNING, name, message.format(share), advice))

        cut = "They may have been cut short: expect no end of a task there; conversion goes by records and ignores it."
        add("is-first", "is_first", "is_first is not True at just the first step in {}.", "Conversion ignores it.")
        add("is-last", "not last", "is_last is False at the last step of {}.", cut)
        add("is-last-early", "last within", "is_last is True before the last step of {}.", "Conversion ignores it.")
        add(
            "no-reward",
            "no reward",
            "The reward is 0 at every step, the last one too, of {}.",
            "Do not take it for success or failure: it was not recorded, or the end of the episode is missing.",
        )
        return found

    def _has_findings(self) -> list[Finding]:
        found, total = [], self._counts["episodes"]
        for counts, name, said, truth in (
            (self._denied, "denied", "False", "there is a real one"),
            (self._claimed, "claimed", "True", "there is none"),
        ):
            groups: dict[int, list[str]] = {}
            for flag, count in sorted(counts.items()):
                groups.setdefault(count, []).append(flag)
            for count, flags in groups.items():
                found.append(
                    Finding(
                        Severity.WARNING,
                        f"has-flag-{name}",
                        f"{', '.join(flags)} {'are' if len(flags) > 1 else 'is'} {said} although {truth} in "
                        f"{share_of(count, total, 'episode')}.",
                        "Do not choose episodes by these flags; go by the pictures and texts themselves.",
                    )
                )
        return found


def _has(recording: Recording, flag: str) -> bool | None:
    """Whether the episode has what a flag such as `has_image_0` speaks of; None if that is not known."""
    if flag == _LANGUAGE:
        return bool(recording.instruction.strip())
    pictures = recording.pictures.get(flag.removeprefix(_HAS))
    return None if pictures is None else any(picture.max() >= BLACK for picture in pictures)
