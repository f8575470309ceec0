"""Reads arrays of .npz files, one trajectory at a time, and never unpickles them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO

import numpy as np
from etils import epath

from como_jax.convert.sources import check_file

_SUFFIX = ".npy"
_CHUNK = 2**20
# What `zipfile`, its decompressors and NumPy's parser of headers raise on damaged bytes, beside ValueError and OSError.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,
    EOFError,
    KeyError,
    OverflowError,
    # An unknown kind of compression, or a password.
    RuntimeError,
    SyntaxError,
    TypeError,
)


@dataclasses.dataclass(frozen=True)
class ArrayHeader:
    """What the header of an array in the file says.

    Attributes:
      shape: shape of the whole array.
      dtype: type of its values.
      fortran_order: whether the first axis varies fastest.
      offset: number of bytes before the values.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool = False
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class NpzArchive:
    """One .npz file; use it in a `with` statement.

    All methods raise ValueError or OSError for a file that is damaged.
    """

    def __init__(self, path: epath.PathLike):
        check_file(path)
        with contextlib.ExitStack() as stack, _damage_as_value_error():
            file = stack.enter_context(epath.Path(path).open("rb"))
            self._archive = stack.enter_context(zipfile.ZipFile(file))
            self._close = stack.pop_all().close

    def __enter__(self) -> NpzArchive:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    @functools.cached_property
    def headers(self) -> dict[str, ArrayHeader]:
        """The header of every array, by key."""
        with _damage_as_value_error():
            names = [name for name in self._archive.namelist() if name.endswith(_SUFFIX)]
            return {name.removesuffix(_SUFFIX): self._read_header(name) for name in names}

    def read(self, key: str) -> np.ndarray:
        """Reads a whole array."""
        return next(self._read_parts(key, whole=True))

    def rows(self, key: str) -> Iterator[np.ndarray]:
        """Yields the parts of an array along its first axis, one at a time."""
        return self._read_parts(key, whole=False)

    def _read_parts(self, key: str, whole: bool) -> Iterator[np.ndarray]:
        header = self.headers[key]
        self._check(key, header)
        shape = header.shape if whole else header.shape[1:]
        size = math.prod(shape) * header.dtype.itemsize
        with _damage_as_value_error(), self._archive.open(key + _SUFFIX) as stream:
            stream.read(header.offset)
            if header.fortran_order:
                # The values of one row are spread over the whole file.
                array = np.frombuffer(stream.read(), header.dtype).reshape(header.shape, order="F")
                yield from [array] if whole else array
                return
            for _ in range(1 if whole else header.shape[0]):
                yield np.frombuffer(stream.read(size), header.dtype).reshape(shape)

    def _check(self, key: str, header: ArrayHeader) -> None:
        """Raises ValueError for an array that must not be read, or whose bytes are damaged."""
        if header.dtype.hasobject:
            raise ValueError(
                f"array {key!r} holds Python objects, which are not read since they may run code; save numbers or text"
            )
        if 0 in header.shape:
            raise ValueError(f"array {key!r} is empty: {header}")
        with _damage_as_value_error():
            info = self._archive.getinfo(key + _SUFFIX)
            if header.offset + math.prod(header.shape) * header.dtype.itemsize != info.file_size:
                raise ValueError(f"array {key!r} does not have the number of bytes of {header}")
            with self._archive.open(info) as stream:
                # The checksum is compared at the end. Damage must be known before the first row is returned.
                while stream.read(_CHUNK):
                    pass

    def _read_header(self, name: str) -> ArrayHeader:
        with self._archive.open(name) as stream:
            shape, fortran_order, dtype = _parse_header(stream)
            if any(size < 0 for size in shape):
                raise ValueError(f"array {name.removesuffix(_SUFFIX)!r} has the shape {list(shape)}")
            return ArrayHeader(shape, dtype, fortran_order, stream.tell())


def _parse_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"arrays of version {version} are not known")


@contextlib.contextmanager
def _damage_as_value_error() -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(f"the file is damaged: {error or type(error).__name__}") from error
