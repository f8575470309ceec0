"""LeRobot datasets."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from etils import epath

from como_jax.convert.builder import SourceError
from como_jax.convert.lerobot.builder import NO_TASK, LeRobot, LeRobotSettings
from como_jax.convert.lerobot.episode_lists import EpisodeEntry
from como_jax.convert.lerobot.features import select_cameras
from como_jax.convert.lerobot.metadata import Metadata, read_metadata
from como_jax.convert.lerobot.rows import read_rows
from como_jax.doctor.findings import Finding, Problem, Severity, name_some, share_of
from como_jax.doctor.recording import Recording, record_episode
from como_jax.doctor.sources.base import DatasetView, SourceReader, spread
from como_jax.doctor.sources.lerobot_info import cameras_without_files, check_info
from como_jax.doctor.sources.video_files import VideoHeader, check_decoder, describe_codecs, read_header

_TIMESTAMP = "timestamp"
_RATE_TOLERANCE = 0.05
_LOST_FRAME = 1.5


class LeRobotView(DatasetView):
    """A folder with `meta/info.json`."""

    kind = "LeRobot dataset"

    def __init__(self, directory: epath.Path, control_rate: float | None = None):
        """Reads the metadata.

        Raises:
          ConversionError: they cannot be read, or there is no picture.
        """
        super().__init__(directory)
        self._metadata: Metadata = read_metadata(directory)
        settings = LeRobotSettings(source=str(directory), control_rate=control_rate)
        self._reader = SourceReader(LeRobot, settings, re.compile(re.escape(NO_TASK)))
        self._sources = self._reader.builder.sources()
        self._entries = {entry.name: entry for entry in self._metadata.episodes}
        self._headers: dict[str, VideoHeader] = {}
        self._other_clock: list[str] = []
        self._lost_frames: list[str] = []

    @property
    def total(self) -> int:
        """Episodes that the metadata list or that have a table."""
        return len(self._sources)

    def facts(self) -> dict[str, str]:
        """Rate and codecs."""
        codecs = {"Codecs": describe_codecs(self._headers.values())} if self._headers else {}
        return {"Rate in info.json": f"{self._metadata.fps:g} Hz" if self._metadata.fps else "none"} | codecs

    def recordings(self, limit: int) -> Iterator[Recording | Problem]:
        """Episodes in order of their numbers."""
        for index in spread(len(self._sources), limit):
            source = self._sources[index]
            entry = self._entries[source.path]
            resolution = self._read_headers(entry)
            for item in self._reader.read(source):
                if isinstance(item, Problem):
                    yield item
                    continue
                self._check_clock(entry)
                try:
                    yield record_episode(item, item.control_rate, resolution)
                except ValueError as error:
                    yield Problem(item.episode_id, str(error))

    def findings(self) -> list[Finding]:
        """What info.json and timestamps have wrong, and what the conversion would warn of."""
        return [
            *check_info(self.directory, self._metadata),
            *self._check_headers(),
            *check_decoder(list(self._headers.values())),
            *self._clock_findings(),
            *self._reader.findings(),
        ]

    def _read_headers(self, entry: EpisodeEntry) -> dict[str, tuple[int, int]]:
        """Sizes of the pictures as they are stored, by the cameras whose videos can be read."""
        metadata, resolution = self._metadata, {}
        missing = cameras_without_files(metadata)
        keys = [key for key, f in metadata.features.items() if f.is_camera and not f.is_depth and key not in missing]
        for name, key in select_cameras(keys, ()).items():
            video = entry.videos.get(key)
            if video is None or video.path not in metadata.files or name not in self._reader.builder.layout.cameras:
                continue
            if video.path not in self._headers:
                header = read_header(self.directory / video.path)
                if header is None:
                    continue
                self._headers[video.path] = header
            resolution[name] = (self._headers[video.path].height, self._headers[video.path].width)
        return resolution

    def _check_headers(self) -> list[Finding]:
        fps, rates = self._metadata.fps, {header.frame_rate for header in self._headers.values() if header.frame_rate}
        other = sorted(rate for rate in rates if fps and abs(rate - fps) > _RATE_TOLERANCE * fps)
        if not other:
            return []
        return [
            Finding(
                Severity.WARNING,
                "other-frame-rate",
                f"info.json says {fps:g} Hz, but there are videos with {', '.join(f'{rate:g}' for rate in other)} "
                "frames a second.",
                "Find out which one is the robot's and pass it with --control_rate.",
            )
        ]

    def _check_clock(self, entry: EpisodeEntry) -> None:
        """Notes whether the timestamps of an episode run at the rate of info.json."""
        fps = self._metadata.fps
        if fps is None or _TIMESTAMP not in self._metadata.features:
            return
        try:
            table = read_rows(self.directory / entry.table, (_TIMESTAMP,), entry.index if entry.shares_table else None)
            seconds = np.asarray(table[_TIMESTAMP].to_pylist(), np.float64).ravel()
        except (SourceError, OSError, ValueError, TypeError, pa.ArrowException):
            return
        steps = np.diff(seconds)
        if len(steps) and abs(np.median(steps) * fps - 1) > _RATE_TOLERANCE:
            self._other_clock.append(entry.name)
        elif len(steps) and steps.max() * fps > _LOST_FRAME:
            self._lost_frames.append(entry.name)

    def _clock_findings(self) -> list[Finding]:
        found = []
        for name, episodes, what, advice in (
            (
                "other-clock",
                self._other_clock,
                f"run at another rate than the {self._metadata.fps or 0:g} Hz of info.json",
                "Find out which one is the robot's and pass it with --control_rate.",
            ),
            (
                "lost-frames",
                self._lost_frames,
                "jump by more than one step",
                "Frames were lost while recording: gaps in seconds are not exact there.",
            ),
        ):
            if episodes:
                share = share_of(len(episodes), self.total, "episode")
                message = f"The timestamps of {share} {what}, such as {name_some(episodes)}."
                found.append(Finding(Severity.WARNING, name, message, advice))
        return found
