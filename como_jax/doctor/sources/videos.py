"""Folders of videos, and what the headers of video files say."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import av
import numpy as np
from etils import epath

from como_jax.convert.folder import list_files
from como_jax.convert.video import AV1_DECODERS, VIDEO_ERRORS, open_video
from como_jax.convert.video_folder.builder import GUESSED_RATE, VideoFolder, VideoFolderSettings
from como_jax.doctor.findings import Finding, Problem, count_of, error, info, name_some, share_of, warning
from como_jax.doctor.sources.base import DatasetView, SourceReader, spread
from como_jax.doctor.survey import Recording, record_episode

VIDEO_SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")
# Cameras and phones do not write these; OpenCV and imageio do, with any frame rate that they are told.
_CODECS_OF_PROGRAMS = ("mpeg4", "mjpeg")
_SHORT_SECONDS = 5.0
_MIN_VIDEOS = 2


@dataclasses.dataclass(frozen=True)
class VideoHeader:
    """What the header of a video file says; see `VideoReader` for the fields."""

    codec: str
    height: int
    width: int
    frame_rate: float | None


def find_videos(folder: epath.Path) -> list[str]:
    """Returns the files in a folder and below whose names are those of videos, relative to the folder."""
    return [name for name in list_files(folder).files if name.lower().endswith(VIDEO_SUFFIXES)]


def read_header(path: epath.PathLike) -> VideoHeader | None:
    """Reads the header of a video file; None if that fails, which is reported when the frames are read."""
    try:
        with open_video(path) as reader:
            return VideoHeader(reader.codec, reader.height, reader.width, reader.frame_rate)
    except VIDEO_ERRORS:
        return None


def describe_codecs(headers: Iterable[VideoHeader]) -> str:
    """Lists codecs and how many files have each."""
    counts = Counter(header.codec for header in headers)
    return ", ".join(f"{codec} ({count_of(count, 'file')})" for codec, count in counts.most_common())


def check_decoder(headers: Sequence[VideoHeader], available: Iterable[str] = av.codecs_available) -> list[Finding]:
    """Finds videos that not every decoder can read."""
    num_av1 = sum(header.codec == "av1" for header in headers)
    if not num_av1:
        return []
    decoders = [name for name in AV1_DECODERS if name in set(available)]
    here = f"this PyAV has {name_some(decoders)}" if decoders else "this PyAV has none"
    return [
        (info if decoders else error)(
            "av1",
            f"AV1, the codec of {share_of(num_av1, len(headers), 'video')}, needs a decoder such as dav1d: {here}.",
            "Convert on a machine whose PyAV has it: the wheels from PyPI do; a system's FFmpeg or OpenCV may not.",
        )
    ]


class VideosView(DatasetView):
    """A folder of videos; long ones count as several episodes."""

    kind = "folder of videos"
    unit = "video"

    def __init__(self, directory: epath.Path, control_rate: float | None = None):
        super().__init__(directory)
        self._control_rate = control_rate
        settings = VideoFolderSettings(source=str(directory), control_rate=control_rate)
        self._reader = SourceReader(VideoFolder, settings, re.compile(re.escape(GUESSED_RATE)))
        self._sources = self._reader.builder.sources()
        self._headers: dict[str, VideoHeader] = {}
        self._lengths: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return len(self._sources)

    def facts(self) -> dict[str, str]:
        return {
            "Codecs": describe_codecs(self._headers.values()),
            "Frame rates of the containers": f"{self._rates()} Hz",
        }

    def recordings(self, limit: int) -> Iterator[Recording | Problem]:
        """Clips of the files, about as many of each."""
        chosen = spread(len(self._sources), limit)
        clips = max(1, limit // len(chosen)) if limit else None
        for source in (self._sources[index] for index in chosen):
            header = read_header(self.directory / source.path)
            resolution = {}
            if header is not None:
                self._headers[source.path] = header
                resolution = {camera: (header.height, header.width) for camera in self._reader.builder.layout.cameras}
            for item in itertools.islice(self._reader.read(source), clips):
                if isinstance(item, Problem):
                    yield item
                    continue
                self._lengths[source.path] += len(item.steps)
                yield record_episode(item, item.control_rate, resolution)

    def findings(self) -> list[Finding]:
        """Frame rates that are not control rates, codecs, and sidecars that were not understood."""
        found = check_decoder(list(self._headers.values()))
        if self._control_rate is None:
            found.append(self._check_frame_rates())
        advice = "Name files as they lie in the folder, in JSON or in CSV with a header."
        found += [warning("sidecar", f"{message}.", advice) for message in self._reader.builder.warnings()]
        return found + self._reader.findings()

    def _rates(self) -> str:
        rates = sorted({header.frame_rate for header in self._headers.values() if header.frame_rate})
        return ", ".join(f"{rate:g}" for rate in rates)

    def _check_frame_rates(self) -> Finding:
        """Looks for signs that the frame rate of the containers is only what a program was told to write."""
        signs = []
        by_program = sum(header.codec in _CODECS_OF_PROGRAMS for header in self._headers.values())
        if by_program:
            signs.append(f"a program, not a camera, encoded {share_of(by_program, len(self._headers), 'video')}")
        rates = {path: header.frame_rate for path, header in self._headers.items() if header.frame_rate}
        seconds = [length / rates[path] for path, length in self._lengths.items() if path in rates]
        if len(seconds) >= _MIN_VIDEOS and np.median(seconds) < _SHORT_SECONDS:
            signs.append(f"half of them last less than {np.median(seconds):.1f} s by it")
        verdict = f"is probably not the control rate: {' and '.join(signs)}" if signs else "counts as control rate"
        return (warning if signs else info)(
            "suspicious-frame-rate" if signs else "guessed-rate",
            f"The frame rate of the containers, {self._rates()} Hz, {verdict}.",
            "Gaps in seconds depend on it: find out how many steps a second the robot had and pass "
            "`control_rate`, here and when converting; videos from a camera have the right one.",
        )
