"""LeRobot datasets, and what `info.json` says in contradiction to their files."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from etils import epath

from como_jax.convert.builder import SourceError
from como_jax.convert.lerobot.builder import NO_TASK, LeRobot, LeRobotSettings
from como_jax.convert.lerobot.file_index import fill
from como_jax.convert.lerobot.metadata import FOUND_BY_NAME, INFO_PATH, EpisodeEntry, Metadata
from como_jax.convert.lerobot.order import JUMPS, OTHER_VIDEO_RATE
from como_jax.convert.lerobot.reading import read_rows
from como_jax.doctor.findings import Finding, Problem, name_dimensions, name_some, share_of, warning
from como_jax.doctor.sources.base import DatasetView, SourceReader, spread
from como_jax.doctor.sources.videos import VideoHeader, check_decoder, describe_codecs, read_header
from como_jax.doctor.survey import Recording, record_episode

# A check of the doctor, of instructions or of clocks, says the same.
_COVERED = re.compile("|".join(map(re.escape, (NO_TASK, JUMPS, OTHER_VIDEO_RATE))))
_TIMESTAMP = "timestamp"
_RATE_TOLERANCE = 0.05
_MAX_NUMBERS = 60
_MEND = f"Conversion does without it; mend {INFO_PATH} before other programs read it."
_OTHER_RATE = "Find out which one is the robot's and pass it with `control_rate`."


class LeRobotView(DatasetView):
    """A folder with `meta/info.json`."""

    kind = "LeRobot dataset"

    def __init__(self, directory: epath.Path, control_rate: float | None = None):
        super().__init__(directory)
        settings = LeRobotSettings(source=str(directory), control_rate=control_rate)
        self._reader = SourceReader(LeRobot, settings, _COVERED)
        self._builder: LeRobot = self._reader.builder
        self._metadata = self._builder.metadata
        self._sources = self._builder.sources()
        self._entries = {entry.name: entry for entry in self._metadata.episodes}
        self._headers: dict[str, VideoHeader] = {}
        self._other_clock: list[str] = []
        self._cut: list[str] = []

    @property
    def total(self) -> int:
        """The number of episodes that the metadata list or that have a table."""
        return len(self._sources)

    def facts(self) -> dict[str, str]:
        codecs = {"Codecs": describe_codecs(self._headers.values())} if self._headers else {}
        return {"Rate in info.json": f"{self._metadata.fps:g} Hz" if self._metadata.fps else "none"} | codecs

    def recordings(self, limit: int) -> Iterator[Recording | Problem]:
        """Episodes in the order of their numbers."""
        for source in (self._sources[index] for index in spread(len(self._sources), limit)):
            entry = self._entries[source.path]
            resolution = self._read_headers(entry)
            self._check_clock(entry)
            for item in self._reader.read(source):
                if isinstance(item, Problem):
                    yield item
                    continue
                if item.episode_id != entry.name and entry.name not in self._cut:
                    self._cut.append(entry.name)
                try:
                    yield record_episode(item, item.control_rate, resolution)
                except ValueError as error:
                    yield Problem(item.episode_id, str(error))

    def findings(self) -> list[Finding]:
        """Faults of info.json and of the timestamps, and what a conversion would warn of."""
        return [
            *check_info(self._metadata),
            *self._check_headers(),
            *check_decoder(list(self._headers.values())),
            *self._clock_findings(),
            *self._reader.findings(),
        ]

    def _read_headers(self, entry: EpisodeEntry) -> dict[str, tuple[int, int]]:
        """Returns height and width of the stored images, by the cameras whose videos can be read."""
        resolution = {}
        for camera, key in self._builder.selection.cameras.items():
            video = entry.videos.get(key)
            if video is None or video.path not in self._metadata.files:
                continue
            header = self._headers.get(video.path) or read_header(self.directory / video.path)
            if header is not None:
                self._headers[video.path] = header
                resolution[camera] = (header.height, header.width)
        return resolution

    def _check_headers(self) -> Iterator[Finding]:
        fps, rates = self._metadata.fps, {header.frame_rate for header in self._headers.values() if header.frame_rate}
        other = sorted(rate for rate in rates if fps and abs(rate - fps) > _RATE_TOLERANCE * fps)
        if other:
            yield warning(
                "other-frame-rate",
                f"info.json says {fps:g} Hz, but there are videos with {', '.join(f'{rate:g}' for rate in other)} "
                "frames a second.",
                _OTHER_RATE,
            )

    def _check_clock(self, entry: EpisodeEntry) -> None:
        """Notes whether the timestamps of an episode run at the rate of info.json."""
        fps = self._metadata.fps
        if fps is None or _TIMESTAMP not in self._metadata.features:
            return
        try:
            table, _ = read_rows(
                self.directory / entry.table, (_TIMESTAMP,), entry.index if entry.shares_table else None
            )
            steps = np.diff(np.asarray(table[_TIMESTAMP].to_pylist(), np.float64).ravel())
        except (SourceError, OSError, ValueError, TypeError, pa.ArrowException):
            return
        if len(steps) and abs(np.median(steps) * fps - 1) > _RATE_TOLERANCE:
            self._other_clock.append(entry.name)

    def _clock_findings(self) -> Iterator[Finding]:
        other = f"The timestamps of {{}} run at another rate than the {self._metadata.fps or 0:g} Hz of info.json"
        cut = "Rows are missing or late within {}: a conversion makes several episodes of each, between them"
        lost = "Nothing needs to be done if these frames were lost while recording."
        for name, episodes, what, advice in (
            ("other-clock", self._other_clock, other, _OTHER_RATE),
            ("time-jumps", self._cut, cut, lost),
        ):
            if episodes:
                share = share_of(len(episodes), self.total, "episode")
                yield warning(name, f"{what.format(share)}, such as {name_some(episodes)}.", advice)


def check_info(metadata: Metadata) -> Iterator[Finding]:
    """Finds everything in `info.json` that contradicts the files."""
    missing = [key for key, each in metadata.features.items() if each.dtype == "video" and not metadata.has_video(key)]
    if missing:
        yield warning(
            "camera-without-files",
            f"{INFO_PATH} lists {'cameras' if len(missing) > 1 else 'a camera'} without files: {name_some(missing)}.",
            "Conversion leaves it out; remove it from the list, or fetch its files if they should be there.",
        )
    if wrong := metadata.wrong_totals():
        yield warning("wrong-totals", f"{wrong}.", _MEND)
    yield from _check_templates(metadata)
    numbers = [entry.index for entry in metadata.episodes]
    if numbers != list(range(len(numbers))):
        named = name_dimensions(numbers)
        named = named if len(named) <= _MAX_NUMBERS else f"{named[:_MAX_NUMBERS].rpartition(',')[0]}, …"
        yield warning(
            "episode-numbers",
            f"Episode numbers are not contiguous from 0: {named}.",
            "Conversion takes the episodes that there are; splits and indices of other programs may mean others.",
        )
    for message in metadata.warnings:
        if FOUND_BY_NAME not in message:
            yield warning("metadata", f"{message}.", "Conversion copes with it; mend the metadata.")


def _check_templates(metadata: Metadata) -> Iterator[Finding]:
    """Finds path templates of v2.0 and v2.1 that lead to no file."""
    info = metadata.info
    if info.get("codebase_version") == "v3.0":
        return
    cameras = [key for key, each in metadata.features.items() if each.dtype == "video" and metadata.has_video(key)]
    for name, key in [("data_path", ""), *(("video_path", key) for key in cameras)]:
        if not isinstance(info.get(name), str):
            continue
        astray = []
        for entry in metadata.episodes:
            actual = entry.videos[key].path if key else entry.table
            led = fill(info[name], "", metadata.files.fields(entry.index, key))
            if led != actual and actual in metadata.files:
                astray.append((led, actual))
        if astray:
            led, actual = astray[0]
            yield warning(
                "wrong-template",
                f"{name} of {INFO_PATH} ({info[name]}) leads to {led or 'nowhere'}, but the file is {actual}; "
                f"{len(astray)} of {len(metadata.episodes)} files lie elsewhere than it says.",
                f"The template is keyed on the wrong index or folder: {_MEND[0].lower()}{_MEND[1:]}",
            )
