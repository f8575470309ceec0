"""Pictures of one camera in one episode, from a video, from a part of a video, or from a table."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from etils import epath

from como_jax.convert import images
from como_jax.convert.builder import SourceError
from como_jax.convert.video import VideoReader

# H.264 and its successors hold at most so many frames back to reorder them.
_MAX_REORDERED = 16
# No video is as long, and FFmpeg counts time in 64 bits.
_MAX_SECONDS = 1e9


class VideoPartReader(VideoReader):
    """A video file that can be read from the middle."""

    def frames_between(self, begin: float, end: float) -> Iterator[np.ndarray]:
        """Yields the RGB pictures, uint8 `[H, W, 3]`, that are shown from `begin` to `end` seconds.

        Raises:
          ValueError: a frame is damaged or of another size, or the times are not in order.
          av.error.FFmpegError: the decoder gave up.
        """
        if not -_MAX_SECONDS < begin < end < _MAX_SECONDS:
            raise ValueError(f"the metadata let it run from {begin} to {end} seconds of its video")
        frame_seconds = 1 / self.frame_rate if self.frame_rate else 0.0
        # The bounds are sums of durations: half a frame keeps their rounding from moving a frame across.
        begin, end = begin - frame_seconds / 2, end - frame_seconds / 2
        # FFmpeg seeks by the time at which a frame is decoded, which is earlier than when it is shown.
        target = max(0.0, begin - _MAX_REORDERED * frame_seconds)
        assert self._stream.time_base is not None
        self._container.seek(math.floor(target / self._stream.time_base), stream=self._stream)
        for frame in self._decoded():
            if frame.time is None or frame.time < begin:
                continue
            if frame.time >= end:
                return
            yield self._picture(frame, f"the frame at {frame.time:.3f} s")


def video_frames(path: epath.PathLike, seconds: tuple[float, float] | None) -> Iterator[np.ndarray]:
    """Yields the RGB pictures of a video, or of a part of it."""
    reader = VideoPartReader(path)
    with reader:
        yield from reader.frames() if seconds is None else reader.frames_between(*seconds)


def stored_frames(column: pa.ChunkedArray) -> Iterator[np.ndarray]:
    """Yields the RGB pictures of a table's column of encoded pictures, or of structs with a field `bytes`.

    Raises:
      SourceError: a picture is not in the table.
      ValueError: a picture is damaged.
    """
    for row, value in enumerate(column):
        stored = value.as_py()
        data = stored.get("bytes") if isinstance(stored, dict) else stored
        if not isinstance(data, bytes):
            raise SourceError(f"the picture of row {row} is not in the table")
        yield images.decode_image(data)
