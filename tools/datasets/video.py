"""Decoding of video files with PyAV, which carries its own FFmpeg."""

from collections.abc import Iterator

import av
import numpy as np
from etils import epath

VIDEO_ERRORS: tuple[type[Exception], ...] = (av.error.FFmpegError, OSError, ValueError)
_COMPLETE_SHARE = 0.95


class VideoReader:
    """The frames of one video file, in order.

    Attributes:
      frame_rate: average frames per second by the container, or None when it does not say.
    """

    def __init__(self, path: epath.PathLike):
        """Opens the file; close it, or use the reader in a `with` statement.

        Raises:
          ValueError: the file has no pictures.
          av.error.FFmpegError, OSError: the file cannot be read or is of an unknown format.
        """
        # A file of Python's also reads from buckets. Playlists must not make FFmpeg open what they name.
        self._file = epath.Path(path).open("rb")
        try:
            self._container = av.open(self._file, options={"protocol_whitelist": "none"})
            if not self._container.streams.video:
                raise ValueError("no video stream")
        except BaseException:
            self._file.close()
            raise
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.frame_rate = float(rate) if rate else None

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._container.close()
        self._file.close()

    def frames(self) -> Iterator[np.ndarray]:
        """Yields RGB pictures, uint8 `[H, W, 3]`, upright.

        Raises:
          ValueError: a frame is damaged, or the file ends before its container says.
          av.error.FFmpegError: the decoder gave up.
        """
        count, first, last = 0, None, None
        for frame in self._container.decode(self._stream):
            if frame.is_corrupt:
                raise ValueError(f"frame {count} is damaged")
            first = frame.time if first is None else first
            last = frame.time
            count += 1
            image = frame.to_ndarray(format="rgb24")
            # Phones store portrait video lying on its side.
            yield np.rot90(image, round(frame.rotation / 90)) if frame.rotation else image
        if count == 0:
            raise ValueError("no frame could be decoded")
        seconds = None if first is None or last is None else last - first
        self._check_complete(count, seconds)

    def _check_complete(self, count: int, seconds: float | None) -> None:
        """Raises ValueError if the stream ended noticeably before the end that its container announces."""
        expected = self._stream.frames
        duration = self._container.duration
        if self._stream.codec_context.name == "gif":
            self._check_gif_trailer(count)
        elif duration and seconds is not None and (expected or len(self._container.streams) == 1):
            # A trimmed video may keep hidden frames, and sound may outlast the picture, so that neither the
            # number of frames nor the duration is proof enough where both are known.
            frame_seconds = 1 / self.frame_rate if self.frame_rate else 0.0
            full_seconds = duration / av.time_base
            too_short = seconds + frame_seconds < _COMPLETE_SHARE * full_seconds
            if too_short and (not expected or count < _COMPLETE_SHARE * expected):
                announced = f"{expected} frames" if expected else f"{full_seconds:.1f} s"
                raise ValueError(f"ends after {count} frames, although {announced} were announced")

    def _check_gif_trailer(self, count: int) -> None:
        # A GIF does not say how many frames it has, but it has a last byte.
        self._file.seek(-min(64, self._file.seek(0, 2)), 2)
        if not self._file.read().rstrip(b"\0\r\n").endswith(b";"):
            raise ValueError(f"ends in the middle, after {count} frames")
