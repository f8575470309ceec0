"""Folders of videos."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import numpy as np
from etils import epath

from como_jax.convert.video_folder.builder import GUESSED_RATE, VideoFolder, VideoFolderSettings
from como_jax.doctor.findings import Finding, Problem, Severity, share_of
from como_jax.doctor.recording import Recording, record_episode
from como_jax.doctor.sources.base import DatasetView, SourceReader, spread
from como_jax.doctor.sources.video_files import VideoHeader, check_decoder, describe_codecs, read_header

# Cameras and phones do not write it; OpenCV and imageio do, at whatever rate they are told.
_CODECS_OF_PROGRAMS = ("mpeg4", "mjpeg")
_SHORT_SECONDS = 5.0
_MIN_VIDEOS = 2


class VideosView(DatasetView):
    """A folder of videos; long ones count as several episodes."""

    kind = "folder of videos"
    unit = "video"

    def __init__(self, directory: epath.Path, control_rate: float | None = None):
        """Lists the files.

        Raises:
          ConversionError: there is no video, or the control rate is none.
        """
        super().__init__(directory)
        self._control_rate = control_rate
        settings = VideoFolderSettings(source=str(directory), control_rate=control_rate)
        self._reader = SourceReader(VideoFolder, settings, re.compile(re.escape(GUESSED_RATE)))
        self._sources = self._reader.builder.sources()
        self._headers: dict[str, VideoHeader] = {}
        self._lengths: dict[str, int] = {}

    @property
    def total(self) -> int:
        """Files."""
        return len(self._sources)

    def facts(self) -> dict[str, str]:
        """Codecs and rates of the files that were looked at."""
        rates = sorted({header.frame_rate for header in self._headers.values() if header.frame_rate})
        return {
            "Codecs": describe_codecs(self._headers.values()),
            "Frame rates of the containers": ", ".join(f"{rate:g}" for rate in rates) + " Hz",
        }

    def recordings(self, limit: int) -> Iterator[Recording | Problem]:
        """Clips of the files, about equally many of each."""
        chosen = spread(len(self._sources), limit)
        clips = max(1, limit // len(chosen)) if limit else None
        for index in chosen:
            source = self._sources[index]
            header = read_header(self.directory / source.path)
            resolution = {}
            if header is not None:
                self._headers[source.path] = header
                resolution = {camera: (header.height, header.width) for camera in self._reader.builder.layout.cameras}
            for item in itertools.islice(self._reader.read(source), clips):
                if isinstance(item, Problem):
                    yield item
                    continue
                self._lengths[source.path] = self._lengths.get(source.path, 0) + len(item.steps)
                yield record_episode(item, item.control_rate, resolution)

    def findings(self) -> list[Finding]:
        """Rates of containers that are no control rates, codecs, and sidecars that were not understood."""
        found = check_decoder(list(self._headers.values()))
        if self._control_rate is None:
            found += self._check_frame_rates()
        for warning in self._reader.builder.warnings():
            found.append(
                Finding(
                    Severity.WARNING,
                    "sidecar",
                    f"{warning}.",
                    "Name files as they lie in the folder, in JSON or in CSV with a header.",
                )
            )
        return found + self._reader.findings()

    def _check_frame_rates(self) -> list[Finding]:
        """Signs that the frame rate of the containers is only what a program was told to write."""
        signs, total = [], len(self._headers)
        by_program = sum(header.codec in _CODECS_OF_PROGRAMS for header in self._headers.values())
        if by_program:
            signs.append(f"a program, not a camera, encoded {share_of(by_program, total, 'video')}")
        seconds = [
            length / self._headers[path].frame_rate
            for path, length in self._lengths.items()
            if path in self._headers and self._headers[path].frame_rate
        ]
        if len(seconds) >= _MIN_VIDEOS and np.median(seconds) < _SHORT_SECONDS:
            signs.append(f"half of them last less than {np.median(seconds):.1f} s by it")
        rates = sorted({header.frame_rate for header in self._headers.values() if header.frame_rate})
        named = ", ".join(f"{rate:g}" for rate in rates)
        return [
            Finding(
                Severity.WARNING if signs else Severity.INFO,
                "suspicious-frame-rate" if signs else "guessed-rate",
                f"The frame rate of the containers, {named} Hz, "
                + (f"is probably not the control rate: {' and '.join(signs)}." if signs else "counts as control rate."),
                "Gaps in seconds depend on it: find out how many steps a second the robot had and pass "
                "--control_rate, here and when converting; videos from a camera have the right one.",
            )
        ]
