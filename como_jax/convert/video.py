"""Decoding of video files with PyAV, which carries its own FFmpeg."""

from collections.abc import Iterator

import av
import numpy as np
from etils import epath

from como_jax.convert.listing import check_file

VIDEO_ERRORS: tuple[type[Exception], ...] = (av.error.FFmpegError, OSError, ValueError)
# Twice the pixels of 8K video; a header can claim any size, and a decoder holds several pictures of it at once.
MAX_PIXELS = 2**26
_COMPLETE_SHARE = 0.95


class VideoReader:
    """The frames of one video file, in order.

    Attributes:
      frame_rate: average frames per second by the container, or None when it does not say.
    """

    def __init__(self, path: epath.PathLike):
        """Opens the file; close it, or use the reader in a `with` statement.

        Raises:
          ValueError: the file has no pictures, or larger ones than `MAX_PIXELS`.
          av.error.FFmpegError, OSError: the file cannot be read or is of an unknown format.
        """
        check_file(epath.Path(path))
        # A file of Python's also reads from buckets. Playlists must not make FFmpeg open what they name.
        self._file = epath.Path(path).open("rb")
        try:
            # FFmpeg decodes the first pictures while it opens a file. Titles are not read, whatever their encoding.
            options = {"protocol_whitelist": "none", "max_pixels": str(MAX_PIXELS)}
            self._container = av.open(self._file, options=options, metadata_errors="replace")
            self._stream = self._first_video()
        except BaseException:
            self._file.close()
            raise
        # How many frames come out before a damaged one depends on the number of threads, and what a conversion
        # writes must not depend on the machine. The cores are for several processes.
        self._stream.thread_count = 1
        self._stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        self._size: tuple[int, int] | None = None
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
          ValueError: a frame is damaged or of another size, or the file ends before its container says.
          av.error.FFmpegError: the decoder gave up.
        """
        count, first, last = 0, None, None
        try:
            for frame in self._decoded():
                image = self._picture(frame, f"frame {count}")
                first = frame.time if first is None else first
                last = frame.time
                count += 1
                yield image
        except av.error.InvalidDataError as error:
            announced = f", although {self._stream.frames} frames were announced" if self._stream.frames else ""
            raise ValueError(f"cannot be decoded after {count} frames{announced}") from error
        if count == 0:
            raise ValueError("no frame could be decoded")
        seconds = None if first is None or last is None else last - first
        self._check_complete(count, seconds)

    def _first_video(self) -> av.VideoStream:
        """The first stream with pictures; raises ValueError if there is none that can be decoded."""
        if not self._container.streams.video:
            raise ValueError("no video stream")
        stream = self._container.streams.video[0]
        if stream.codec_context is None:
            raise ValueError("the codec of its video is not known")
        if stream.width * stream.height > MAX_PIXELS:
            raise ValueError(f"{stream.width}x{stream.height} pixels are more than the {MAX_PIXELS} that are read")
        return stream

    def _decoded(self) -> Iterator[av.VideoFrame]:
        try:
            yield from self._container.decode(self._stream)
        except av.error.ArgumentError as error:
            # All that a decoder says of a size that its container was silent about.
            raise ValueError(f"{error}; pictures of more than {MAX_PIXELS} pixels are not read") from error

    def _picture(self, frame: av.VideoFrame, name: str) -> np.ndarray:
        """The RGB picture of a frame, upright; raises ValueError if it cannot be used."""
        if frame.is_corrupt:
            raise ValueError(f"{name} is damaged")
        size = frame.width, frame.height
        if self._size not in (None, size):
            before = "x".join(map(str, self._size))
            raise ValueError(f"{name} has {size[0]}x{size[1]} pixels, and those before it have {before}")
        self._size = size
        image = frame.to_ndarray(format="rgb24")
        # Phones store portrait video lying on its side.
        return np.rot90(image, round(frame.rotation / 90)) if frame.rotation else image

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
