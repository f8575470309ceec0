"""Datasets that were made by a conversion."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
import tensorflow_datasets as tfds
from etils import epath

from como_jax.convert import images
from como_jax.convert.report import REPORT_NAME, STATISTICS_NAME
from como_jax.data.episode_table import has_split
from como_jax.data.schema import SPLITS
from como_jax.data.sources import EpisodeSource
from como_jax.doctor.findings import Finding, Problem, count_of, error, name_some, share_of, warning
from como_jax.doctor.sources.base import DatasetView, spread
from como_jax.doctor.survey import Recording, probe_steps
from como_jax.errors import DatasetError, one_line

# So that damage in the episode table is found before episodes are gone through.
_READ_AHEAD = ("episode_id", "instruction", "motion", "action", "state")
_READ_ERRORS = (OSError, ValueError, RuntimeError, IndexError, pa.ArrowException)


class ConvertedView(DatasetView):
    """A dataset directory in the schema of `como_jax.data.schema`."""

    kind = "converted dataset"

    def __init__(self, directory: epath.Path, control_rate: float | None = None):
        """Reads the episode tables of all splits that can be read.

        Raises:
          DatasetError: no split can be read, or a control rate is given although the dataset has its own.
        """
        super().__init__(directory)
        if control_rate is not None:
            raise DatasetError(f"{directory} is converted and has its control rate; `control_rate` is for sources.")
        self._damage: list[str] = []
        self._splits = [source for split in SPLITS if (source := self._open(split)) is not None]
        if not self._splits:
            raise DatasetError(f"{directory} has no split that can be read: {'; '.join(self._damage) or 'none at all'}")

    @property
    def total(self) -> int:
        return sum(len(source.length) for source in self._splits)

    def facts(self) -> dict[str, str]:
        return {
            f"Split {source.split}": f"{count_of(len(source.length), 'episode')}, {len(source)} steps"
            for source in self._splits
        }

    def recordings(self, limit: int) -> Iterator[Recording | Problem]:
        """Episodes of all splits; only the images that are looked at are read."""
        offset, chosen = 0, spread(self.total, limit)
        for source in self._splits:
            cameras = self._cameras(source)
            for index in chosen:
                if 0 <= index - offset < len(source.length):
                    yield _read_episode(cameras, index - offset)
            offset += len(source.length)

    def findings(self) -> list[Finding]:
        """Damaged or missing splits, and what the reports of the conversion say."""
        found = [error("damaged-split", f"{damage}.", "Convert the dataset again.") for damage in self._damage]
        if len(self._splits) == 1 and not self._damage:
            found.append(
                warning(
                    "one-split",
                    f"There is only the split {self._splits[0].split!r}.",
                    "Convert with `validation_fraction` above 0, so that there is something to evaluate on.",
                )
            )
        return found + self._check_files() + self._check_report() + self._check_statistics()

    def _check_files(self) -> list[Finding]:
        wrong = [problem for source in self._splits for problem in source.check_files()]
        if not wrong:
            return []
        return [
            error(
                "other-records",
                f"{count_of(len(wrong), 'file')} of records do not fit the episode table: {name_some(wrong)}.",
                "Files of several conversions lie together, or some were changed or lost; convert the dataset again.",
            )
        ]

    def _open(self, split: str) -> EpisodeSource | None:
        if not has_split(self.directory, split):
            return None
        try:
            source = EpisodeSource(self.directory, split)
            for field in _READ_AHEAD:
                getattr(source, field)
            return source
        except (KeyError, *_READ_ERRORS) as fault:
            self._damage.append(f"split {split!r} cannot be read: {one_line(fault).rstrip('.')}")
            return None

    def _cameras(self, source: EpisodeSource) -> dict[str, EpisodeSource]:
        """Returns a source for every camera, the main camera first; they share their tables."""
        metadata = tfds.builder_from_directory(self.directory).info.metadata or {}
        found = {source.camera: source}
        for camera in metadata.get("cameras", ()):
            if camera not in found:
                found[camera] = copy.copy(source)
                found[camera].camera = camera
        return found

    def _check_report(self) -> list[Finding]:
        report = self._read_json(REPORT_NAME)
        if isinstance(report, Finding):
            return [report]
        found, total = [], report.get("sources", {}).get("found", 0)
        for key, what in (("left_out", "left out"), ("partially_converted", "left out a part of")):
            entries = report.get(key, [])
            if entries:
                examples = [f"{entry['source']} ({entry['reasons'][0]})" for entry in entries]
                found.append(
                    warning(
                        key.replace("_", "-"),
                        f"The conversion {what} {share_of(len(entries), total, 'source')}: {name_some(examples)}.",
                        f"Read {REPORT_NAME}, mend the sources and convert again, if they matter.",
                    )
                )
        advice = f"Convert again with other settings if that is wrong; {REPORT_NAME} has the sources."
        return found + [
            warning("conversion-warning", f"The conversion warned: {each['message']} ({each['count']} times).", advice)
            for each in report.get("warnings", [])
        ]

    def _check_statistics(self) -> list[Finding]:
        statistics = self._read_json(STATISTICS_NAME)
        if isinstance(statistics, Finding):
            return [statistics]
        counted = {split: counts.get("num_steps") for split, counts in statistics.get("splits", {}).items()}
        wrong = [source.split for source in self._splits if counted.get(source.split) != len(source)]
        if not wrong:
            return []
        return [
            error(
                "stale-statistics",
                f"{STATISTICS_NAME} counts other steps than there are in {', '.join(wrong)}.",
                "Convert the dataset again, or normalization uses numbers of other data.",
            )
        ]

    def _read_json(self, name: str) -> dict[str, Any] | Finding:
        try:
            content = json.loads((self.directory / name).read_text())
            if isinstance(content, dict):
                return content
            reason = "it holds no object"
        except (OSError, ValueError) as fault:
            reason = "it is missing" if isinstance(fault, FileNotFoundError) else str(fault)
        return warning("unreadable-report", f"{name} cannot be read: {reason}.", "Convert the dataset again.")


def _read_episode(cameras: dict[str, EpisodeSource], index: int) -> Recording | Problem:
    source = next(iter(cameras.values()))
    begin, length = int(source.start[index]), int(source.length[index])
    steps = slice(begin, begin + length)
    try:
        frames, resolution = {}, {}
        for camera, records in cameras.items():
            jpegs = records.read_jpegs([begin + step for step in probe_steps(length)])
            resolution[camera] = simplejpeg.decode_jpeg_header(jpegs[0])[:2]
            frames[camera] = [images.decode_image(jpeg) for jpeg in jpegs]
    except _READ_ERRORS as fault:
        return Problem(f"{source.episode_id[index]} ({source.split})", one_line(fault))
    return Recording(
        episode_id=source.episode_id[index],
        control_rate=float(source.control_rate[index]),
        motion=source.motion[steps],
        frames=frames,
        resolution=resolution,
        action=None if source.action is None else np.asarray(source.action[steps]),
        state=None if source.state is None else np.asarray(source.state[steps]),
        instruction=source.instruction[index],
        split=source.split,
    )
