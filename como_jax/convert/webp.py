"""Decodes animated WebP with Pillow, since FFmpeg decodes still WebP alone; and finds images that are animated."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator

import numpy as np
from etils import epath
from PIL import Image, ImageSequence

from como_jax.convert.images import MAX_PIXELS, to_rgb, turn_upright

_HEADER_BYTES = 30
# The chunk that makes a PNG an animation comes before its images.
_PNG_HEADER_BYTES = 2**13
_ANIMATED = 0x02
_FIRST_CHUNK = 12
# RIFF: the name of a chunk and its number of bytes, which is rounded up to an even one in the file.
_CHUNK = struct.Struct("<4sI")
# Of the chunk of a frame: place and size of the frame, and then its milliseconds.
_MILLISECONDS = slice(12, 15)


class AnimatedWebp:
    """The frames of an animated WebP file, in order, as those of a `VideoReader`; use it in a `with` statement.

    Attributes:
      codec, height, width, frame_rate, notes: see `VideoReader`.
    """

    codec = "webp"

    def __init__(self, path: epath.PathLike):
        """Opens the file.

        Raises:
          ValueError: its header is damaged, or it has more than `MAX_PIXELS` pixels.
        """
        stored = epath.Path(path).read_bytes()
        self._data, self._is_complete = _complete_chunks(stored)
        self.width, self.height = (1 + int.from_bytes(self._data[at : at + 3], "little") for at in (24, 27))
        if self.height * self.width > MAX_PIXELS:
            raise ValueError(f"{self.width}x{self.height} pixels are more than the {MAX_PIXELS} that are read")
        times = self.times()
        self.frame_rate = None if times is None else float((len(times) - 1) / (times[-1] - times[0]))
        self.notes: list[str] = []

    def __enter__(self) -> AnimatedWebp:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def times(self) -> np.ndarray | None:
        """Returns the times of all frames in seconds, `[N]` in order; None if the file does not say."""
        times = np.cumsum([0, *self._durations()])[:-1] / 1000
        return times if len(times) > 1 and times[-1] > times[0] else None

    def frames(self) -> Iterator[np.ndarray]:
        """Yields RGB images, uint8 `[H, W, 3]`, upright; raises like `timed_frames`."""
        for _, image in self.timed_frames():
            yield image

    def timed_frames(self) -> Iterator[tuple[float | None, np.ndarray]]:
        """Yields the time of every frame in seconds, or None, and its RGB image, uint8 `[H, W, 3]`, upright.

        Raises:
          ValueError: a frame is damaged, or the file ends too early.
        """
        times, count = self.times(), 0
        try:
            with warnings.catch_warnings(), Image.open(io.BytesIO(self._data), formats=["WEBP"]) as animation:
                warnings.simplefilter("ignore")
                for frame in ImageSequence.Iterator(animation):
                    decoded = to_rgb(np.asarray(frame.convert("RGBA" if "A" in frame.mode else "RGB")))
                    if decoded.note and decoded.note not in self.notes:
                        self.notes.append(decoded.note)
                    yield None if times is None else float(times[count]), turn_upright(decoded.image, self._data)
                    count += 1
        except (OSError, EOFError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"cannot be decoded after {count} frames") from error
        if not self._is_complete:
            raise ValueError(f"ends in the middle, after {count} frames")

    def _durations(self) -> Iterator[int]:
        """Yields the milliseconds for which every frame is shown."""
        for name, begin, end in _chunks(self._data):
            if name == b"ANMF":
                yield int.from_bytes(self._data[begin:end][_MILLISECONDS], "little")


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields the name of every chunk that is complete, and where its content begins and ends."""
    begin = _FIRST_CHUNK + _CHUNK.size
    while begin <= len(data):
        name, size = _CHUNK.unpack_from(data, begin - _CHUNK.size)
        end = begin + size
        if end > len(data):
            return
        yield name, begin, end
        begin = end + size % 2 + _CHUNK.size


def _complete_chunks(data: bytes) -> tuple[bytes, bool]:
    """Returns a file up to its last complete chunk, as a file that ends there, and whether that is all of it."""
    name, size = _CHUNK.unpack_from(data)
    if size + _CHUNK.size <= len(data):
        return data, True
    end = max((end for _, _, end in _chunks(data)), default=_FIRST_CHUNK)
    end = min(end + end % 2, len(data))
    return _CHUNK.pack(name, end - _CHUNK.size) + data[_CHUNK.size : end], False


def is_animated(path: epath.PathLike) -> bool:
    """Whether a file is an animated WebP or PNG, by its header."""
    with epath.Path(path).open("rb") as file:
        header = file.read(_PNG_HEADER_BYTES)
    return is_animated_webp(path) or (header.startswith(b"\x89PNG") and b"acTL" in header)


def is_animated_webp(path: epath.PathLike) -> bool:
    """Whether a file is an animated WebP, by its header."""
    with epath.Path(path).open("rb") as file:
        header = file.read(_HEADER_BYTES)
    is_extended = len(header) == _HEADER_BYTES and header[:4] == b"RIFF" and header[8:16] == b"WEBPVP8X"
    return is_extended and bool(header[20] & _ANIMATED)
