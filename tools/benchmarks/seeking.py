"""Loaders that seek in video files, as public ones do, to compare with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import simplejpeg

from como_jax.data.sources import EpisodeSource


def write_videos(folder: Path, source: EpisodeSource, key_frame_every: int) -> list[Path]:
    """Writes every episode of a dataset to an H.264 file."""
    folder.mkdir(parents=True)
    paths = []
    for episode, (start, length) in enumerate(zip(source.start, source.length, strict=True)):
        paths.append(folder / f"{episode:05d}.mp4")
        pictures = (simplejpeg.decode_jpeg(*source.read_jpegs([record])) for record in range(start, start + length))
        # H.264 in this format needs even sides.
        even = [picture[: len(picture) // 2 * 2, : picture.shape[1] // 2 * 2] for picture in pictures]
        with av.open(str(paths[-1]), "w") as container:
            rate = Fraction(source.control_rate[episode]).limit_denominator(1000)
            stream = container.add_stream("libx264", rate=rate)
            stream.height, stream.width = even[0].shape[:2]
            stream.pix_fmt, stream.options = "yuv420p", {"g": str(key_frame_every), "crf": "20"}
            for picture in even:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
            container.mux(stream.encode())
    return paths


class PyAvVideos:
    """Reads frames by number with PyAV; files stay open, and a frame soon after the last is decoded up to."""

    def __init__(self, paths: Sequence[Path]):
        self._containers = [av.open(str(path)) for path in paths]
        for container in self._containers:
            container.streams.video[0].thread_type = "NONE"

    def read(self, video: int, frames: Sequence[int]) -> Iterator[np.ndarray]:
        """Yields RGB pictures of ascending frame numbers."""
        container = self._containers[video]
        stream = container.streams.video[0]
        ticks = [round(frame / stream.average_rate / stream.time_base) for frame in frames]
        container.seek(ticks[0], stream=stream)
        wanted = iter(ticks)
        tick = next(wanted)
        for picture in container.decode(stream):
            while picture.pts >= tick:
                yield picture.to_ndarray(format="rgb24")
                following = next(wanted, None)
                if following is None:
                    return
                tick = following


class OpenCvVideos:
    """Reads frames by number with OpenCV; files stay open, every frame is sought."""

    def __init__(self, paths: Sequence[Path]):
        self._captures = [cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1]) for path in paths]

    def read(self, video: int, frames: Sequence[int]) -> Iterator[np.ndarray]:
        """Yields RGB pictures of frame numbers."""
        capture = self._captures[video]
        for frame in frames:
            capture.set(cv2.CAP_PROP_POS_FRAMES, frame)
            found, picture = capture.read()
            if not found:
                raise OSError(f"frame {frame} of video {video} cannot be read")
            yield cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
