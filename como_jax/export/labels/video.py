"""Writes video files with PyAV, which comes with its own FFmpeg."""

from __future__ import annotations

from fractions import Fraction
from types import TracebackType

import av
import numpy as np
from etils import epath

from como_jax.errors import ConversionError

# The quality looks lossless; groups of two frames make it quick to seek any frame.
_ENCODERS = {
    "libx264": {"crf": "18", "g": "2", "bf": "0"},
    "libsvtav1": {"crf": "20", "g": "2", "preset": "8"},
}
# Larger denominators would overflow the 32-bit clock of MP4.
_MAX_DENOMINATOR = 10_000


class VideoWriter:
    """Writes an MP4 file in which frame t is shown from t / rate seconds on.

    Attributes:
      codec: name of the codec, such as `h264`.
      pix_fmt: FFmpeg's name of the pixel format.
      num_frames: number of frames written so far.
    """

    def __init__(self, path: epath.PathLike, rate: float, height: int, width: int):
        """Opens the file; the end of a `with` statement completes it.

        Args:
          path: a local file.
          rate: frames per second.
          height, width: of every frame.

        Raises:
          ConversionError: PyAV has no suitable encoder.
        """
        encoder = next((name for name in _ENCODERS if name in av.codecs_available), None)
        if encoder is None:
            raise ConversionError(
                f"this build of PyAV has none of the encoders {', '.join(_ENCODERS)}; install another"
            )
        exact = Fraction(rate).limit_denominator(_MAX_DENOMINATOR)
        self._path = path
        self._container = av.open(str(path), "w")
        self._stream = self._container.add_stream(encoder, rate=exact)
        self._stream.height, self._stream.width = height, width
        # yuv420p, with half the resolution of colour, needs an even number of pixels.
        self._stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        self._stream.options = _ENCODERS[encoder]
        self._time_base = 1 / exact
        self._stream.codec_context.time_base = self._time_base
        self.codec = self._stream.codec_context.codec.canonical_name
        self.pix_fmt = self._stream.pix_fmt
        self.num_frames = 0

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._container.mux(self._stream.encode())
        finally:
            self._container.close()
        if kind is None:
            self._check_count()

    def add(self, image: np.ndarray) -> None:
        """Appends an RGB image, uint8 `[height, width, 3]`."""
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts, frame.time_base = self.num_frames, self._time_base
        self._container.mux(self._stream.encode(frame))
        self.num_frames += 1

    def _check_count(self) -> None:
        with av.open(str(self._path)) as container:
            stored = container.streams.video[0].frames
        if stored != self.num_frames:
            raise OSError(f"{self._path} has {stored} frames after {self.num_frames} were written")
