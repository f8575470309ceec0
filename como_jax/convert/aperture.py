"""The clean aperture of MP4 and MOV videos: the part of the stored image that is to be shown (ISO 14496-12, `clap`)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import IO

# Boxes within boxes that lead from the file to the description of the images of a track.
_TO_IMAGES = (b"mdia", b"minf", b"stbl", b"stsd")
_BOX = struct.Struct(">I4s")
_LONG_SIZE = struct.Struct(">Q")
# Bytes before the boxes within `stsd`, and before those within its entry for images.
_BEFORE_ENTRIES, _BEFORE_BOXES = 8, 78
# Width, height, and the offset of the middle to the right and down, each as a numerator and a denominator.
_APERTURE = struct.Struct(">IIIIiIiI")
_MAX_BOXES = 1000

Crop = tuple[slice, slice]
"""The rows and the columns of a stored image that are shown."""


def find_aperture(file: IO[bytes], track: int, height: int, width: int) -> Crop | None:
    """Returns the part of the stored images that is shown, as FFmpeg rounds it; None if that is all, or not said well.

    Args:
      file: of a video of any format.
      track: number of the track in it.
      height, width: of the stored images.
    """
    place = file.tell()
    try:
        stored = _stored_aperture(file, track)
        return None if stored is None else _crop(stored, height, width)
    except (struct.error, ZeroDivisionError, OSError):
        return None
    finally:
        file.seek(place)


def _crop(stored: bytes, height: int, width: int) -> Crop | None:
    numbers = _APERTURE.unpack_from(stored)
    shown_width, shown_height, right, down = (Fraction(*numbers[at : at + 2]) for at in range(0, 8, 2))
    rows = _shown(height, shown_height, down)
    columns = _shown(width, shown_width, right)
    if rows is None or columns is None or (rows, columns) == (slice(0, height), slice(0, width)):
        return None
    return rows, columns


def _shown(length: int, shown: Fraction, offset: Fraction) -> slice | None:
    middle = Fraction(length - 1, 2) + offset
    first, last = int(middle - (shown - 1) / 2), int(middle + (shown - 1) / 2)
    return slice(first, last + 1) if 0 <= first <= last < length else None


def _stored_aperture(file: IO[bytes], track: int) -> bytes | None:
    """Returns the content of the box `clap` of a track."""
    end = file.seek(0, 2)
    for begin, stop in _boxes(file, 0, end, b"moov"):
        for part in _boxes(file, begin, stop, b"trak"):
            if _track_number(file, *part) == track:
                for name in _TO_IMAGES:
                    part = next(_boxes(file, *part, name), (0, 0))
                for _, (first, last) in _all_boxes(file, part[0] + _BEFORE_ENTRIES, part[1]):
                    for begin, stop in _boxes(file, first + _BEFORE_BOXES, last, b"clap"):
                        file.seek(begin)
                        return file.read(stop - begin)
    return None


def _track_number(file: IO[bytes], begin: int, stop: int) -> int | None:
    for start, _ in _boxes(file, begin, stop, b"tkhd"):
        file.seek(start)
        header = file.read(24)
        # The times before it have 8 bytes each in version 1.
        return int.from_bytes(header[20:24] if header[:1] == b"\1" else header[12:16], "big")
    return None


def _boxes(file: IO[bytes], begin: int, end: int, wanted: bytes) -> Iterator[tuple[int, int]]:
    """Yields where the content of every box of a name begins and ends."""
    return (place for name, place in _all_boxes(file, begin, end) if name == wanted)


def _all_boxes(file: IO[bytes], begin: int, end: int) -> Iterator[tuple[bytes, tuple[int, int]]]:
    for _ in range(_MAX_BOXES):
        if begin + _BOX.size > end:
            return
        file.seek(begin)
        size, name = _BOX.unpack(file.read(_BOX.size))
        content = begin + _BOX.size
        if size == 1:
            (size,) = _LONG_SIZE.unpack(file.read(_LONG_SIZE.size))
            content += _LONG_SIZE.size
        # The last box may go on to the end of the file.
        stop = end if size == 0 else min(begin + size, end)
        if stop < content:
            return
        yield name, (content, stop)
        begin = stop
