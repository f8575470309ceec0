"""RLDS directories."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from como_jax.convert.rlds.builder import Rlds, RldsSettings
from como_jax.convert.rlds.features import leaves
from como_jax.doctor.findings import Finding, Problem, count_of
from como_jax.doctor.recording import Recording, record_episode
from como_jax.doctor.sources.base import DatasetView, SourceReader, spread_records
from como_jax.doctor.sources.rlds_descriptions import check_descriptions
from como_jax.doctor.sources.rlds_flags import FlagReader
from como_jax.errors import DatasetError

_OBSERVATION = "observation/"
# Above any picture, so that stored ones are not encoded again.
_UNSCALED = 2**20
_COVERED = re.compile("is black over a whole episode")


class RldsView(DatasetView):
    """A TFDS directory with one record an episode; all its colour cameras are looked at."""

    kind = "RLDS dataset"

    def __init__(self, directory: epath.Path, control_rate: float | None = None):
        """Reads the features.

        Raises:
          UsageError: not an RLDS dataset, or one without pictures.
        """
        super().__init__(directory)
        try:
            self._info = tfds.builder_from_directory(directory).info
            steps = self._info.features["steps"].feature
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise DatasetError(f"{directory} cannot be read as an RLDS dataset: {error}") from error
        self._control_rate = control_rate
        self._steps: dict[str, Any] = dict(sorted(leaves(steps)))
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
        """Of the dataset, since its folder is often named after the version."""
        return f"{self._info.name} {self._info.version}"

    @property
    def total(self) -> int:
        """Records."""
        return sum(split.num_examples for split in self._info.splits.values())

    def facts(self) -> dict[str, str]:
        """Splits and files."""
        return {
            f"Split {name}": f"{count_of(split.num_examples, 'episode')} in {count_of(split.num_shards, 'file')}"
            for name, split in self._info.splits.items()
        }

    def recordings(self, limit: int) -> Iterator[Recording | Problem]:
        """Episodes of all files."""
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
        """Flags and descriptions that are wrong, and what the conversion would warn of."""
        return (
            self._flags.findings()
            + check_descriptions(self._info.description or "", self._steps)
            + self._reader.findings()
        )


def _cameras(steps: Mapping[str, Any]) -> tuple[str, ...]:
    """Observations that are colour pictures."""
    return tuple(
        key
        for key, feature in steps.items()
        if key.startswith(_OBSERVATION)
        and feature.np_dtype == np.uint8
        and len(feature.shape) == 3
        and feature.shape[-1] in (3, None)
    )


def _numbers(steps: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The key itself, or what the group of this name holds, as far as it is numbers of a fixed size."""
    return tuple(
        name
        for name, feature in steps.items()
        if (name == key or name.startswith(f"{key}/"))
        and None not in feature.shape
        and np.dtype(feature.np_dtype).kind in "biuf"
    )
