"""Decoded frames in memory-mapped files, so that a machine decodes each frame once and not in every epoch and run.

The files lie in a folder of this user below the system's temporary folder (`TMPDIR`), and all processes share them.
Their names follow from place, size and time of the files of records, so that a dataset that was changed has other ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import tempfile
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from como_jax.data.sources import EpisodeSource
from como_jax.staging import is_local

_SUM = np.dtype(np.uint32)
_ENDING = ".frames"
_AT_ONCE = 2**20


class FrameCache:
    """Frames of one split of a dataset, uint8 RGB `[S, S, 3]`, by record and camera, as far as they were decoded.

    A frame counts if its checksum is right. So it does not matter in which order processes write, nor what a machine
    that lost its power has left.
    """

    def __init__(self, path: Path, records: int, cameras: int, size: int):
        """Maps a file of `num_bytes(records, cameras, size)`."""
        self._arguments = path, records, cameras, size
        sums = np.memmap(path, _SUM, "r+", shape=(records, cameras))
        frames = np.memmap(path, np.uint8, "r+", sums.nbytes, (records, cameras, size, size, 3))
        # To take a part of a plain array is quicker.
        self._sums, self._frames = np.asarray(sums), np.asarray(frames)

    def get(self, record: int, camera: int) -> np.ndarray | None:
        """A frame, or None if it was not decoded yet."""
        frame = self._frames[record, camera]
        return frame if self._sums[record, camera] == _checksum(frame) else None

    def put(self, record: int, camera: int, frame: np.ndarray) -> None:
        """Keeps a frame."""
        self._frames[record, camera] = frame
        self._sums[record, camera] = _checksum(frame)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the file itself.
        return FrameCache, self._arguments


def num_bytes(records: int, cameras: int, size: int) -> int:
    """Bytes of the file of a `FrameCache`."""
    return records * cameras * (_SUM.itemsize + size * size * 3)


def open_caches(
    sources: Sequence[EpisodeSource], cameras: Sequence[Sequence[str]], size: int, fits: Sequence[str], most_bytes: int
) -> list[FrameCache | None]:
    """A cache for every split of a dataset, in their order as long as there is room; None where there is none.

    Files of others that have not been used for longest are deleted where all files together would be more than
    `most_bytes`.

    Args:
      sources: the splits.
      cameras: of every split, those that are read.
      size: side of the frames, in pixels.
      fits: of every split, how images become square, see `como_jax.spec.images.FITS`.
      most_bytes: of all files together.
    """
    room, kept = most_bytes, set[Path]()
    caches: list[FrameCache | None] = []
    for source, names, fit in zip(sources, cameras, fits, strict=True):
        needed = num_bytes(len(source), len(names), size)
        if needed > room:
            caches.append(None)
            continue
        room -= needed
        try:
            path = _folder() / f"{_digest(source, [*names, fit, size])}{_ENDING}"
            kept.add(path)
            _make_room(path, kept, needed, most_bytes)
            caches.append(FrameCache(path, len(source), len(names), size))
        except OSError as error:
            logging.warning("Frames of %s are decoded every time, since they cannot be kept: %s", source.name, error)
            caches.append(None)
    return caches


def _digest(source: EpisodeSource, settings: list[str | int]) -> str:
    """Of the files of a split's records, and of what makes frames of them."""
    files = [(path, *_size_and_time(path)) for path in source.record_files]
    return hashlib.blake2b(json.dumps([files, settings]).encode(), digest_size=12).hexdigest()


def _size_and_time(path: str) -> tuple[int, int]:
    if is_local(path):
        state = os.stat(path)
        return state.st_size, state.st_mtime_ns
    # In a bucket, times are whole seconds.
    return epath.Path(path).stat().length, int(epath.Path(path).stat().mtime)


def _checksum(frame: np.ndarray) -> int:
    # Of a file that was just made, all sums are 0.
    return zlib.crc32(frame.data) or 1


def _folder() -> Path:
    """The folder of all caches, made if it is missing; raises OSError if it is not this user's alone."""
    folder = Path(tempfile.gettempdir()) / f"como_jax-frames-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    return folder


def _make_room(path: Path, kept: set[Path], needed: int, most_bytes: int) -> None:
    """Makes a file of zeros unless it is there already, after others were deleted for it.

    Raises:
      OSError: there is no room.
    """
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)
        if path.stat().st_size == needed:
            return
    _delete_oldest(path.parent, kept, most_bytes - needed)
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("wb") as file:
            _reserve(file, needed)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _reserve(file: BinaryIO, size: int) -> None:
    """Makes zeros that lie on the disk: who writes to memory of a file for which there is no room would be killed."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    # macOS.
    for begin in range(0, size, _AT_ONCE):
        file.write(bytes(min(_AT_ONCE, size - begin)))


def _delete_oldest(folder: Path, kept: set[Path], most_bytes: int) -> None:
    """Deletes caches that are not to be kept, the longest unused first, until the others fit. Who uses one keeps it."""
    found = sorted(_files(folder), key=lambda file: file[1].st_mtime)
    total = sum(state.st_size for _, state in found)
    for path, state in found:
        if total > most_bytes and path not in kept:
            path.unlink(missing_ok=True)
            total -= state.st_size


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.glob(f"*{_ENDING}*"):
        with contextlib.suppress(FileNotFoundError):
            yield path, path.stat()
