"""Reads the object array that `np.save` pickles, without trusting it.

A pickle is a program that calls what it names. Here it can name three things of NumPy, and gets stand-ins for them:
NumPy's own functions cannot run anything either, but crash on damaged states.
"""

from __future__ import annotations

import pickle
import re
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from como_jax.errors import ConversionError

_MAX_REASON = 200


def read_pickled_object(path: epath.Path) -> Any:
    """The only element of an object array in a .npy file; arrays and numbers in it become lists, int and float.

    Raises:
      ConversionError: the file is damaged, or its pickle names anything but arrays and numbers of NumPy.
    """
    try:
        with path.open("rb") as file:
            _skip_header(file)
            elements = _plain(_Unpickler(file).load())
        if len(elements) != 1:
            raise ValueError(f"it holds {len(elements)} objects instead of one")
    except ConversionError as error:
        raise ConversionError(f"{path} is refused: {error}") from error
    except Exception as error:  # A damaged pickle may raise anything.
        reason = " ".join(str(error).split())[:_MAX_REASON] or type(error).__name__
        raise ConversionError(f"{path} cannot be read: {reason}") from error
    return elements[0]


class _Dtype:
    """What a pickle gives for `numpy.dtype`."""

    def __init__(self, name: str, *_: Any):
        self._name = name
        self._byte_order = "="

    def __setstate__(self, state: tuple) -> None:
        self._byte_order = state[1]

    def numbers(self, data: bytes) -> np.ndarray:
        """The numbers that some bytes stand for."""
        if not re.fullmatch(r"[iuf][1248]", self._name) or self._byte_order not in ("<", ">", "=", "|"):
            raise ValueError(f"it holds numbers of an unknown type {self._name!r}")
        return np.frombuffer(data, self._byte_order + self._name)


class _Array:
    """What a pickle gives for an array: the arguments are for an empty one, and the state fills it."""

    def __init__(self, *_: Any):
        self._state: tuple | None = None

    def __setstate__(self, state: tuple) -> None:
        self._state = state

    def plain(self) -> list:
        """The elements, in the order of memory; nested lists for axes after the first."""
        if self._state is None:
            raise ValueError("it holds an array without content")
        _, shape, dtype, _, data = self._state
        if isinstance(data, list):
            return [_plain(value) for value in data]
        return dtype.numbers(data).reshape(shape).tolist()


class _Scalar:
    """What a pickle gives for a number of NumPy's types."""

    def __init__(self, dtype: _Dtype, data: bytes):
        self.value = dtype.numbers(data).item()

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it holds a damaged number")


# Every one of them takes a state, so that a pickle can set no attribute of the class itself.
_STAND_INS: dict[tuple[str, str], type] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    # The names of NumPy 1 and 2.
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _Scalar,
    ("numpy._core.multiarray", "scalar"): _Scalar,
}


# The one written in Python: that in C reserves whatever memory a damaged index asks for.
class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Loads containers, text and numbers, and refuses everything else."""

    def find_class(self, module: str, name: str) -> type:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise ConversionError(f"its pickle asks for {module}.{name}, and may hold arrays and text only") from None


def _plain(value: Any) -> Any:
    """A loaded value without stand-ins."""
    if isinstance(value, _Array):
        return value.plain()
    if isinstance(value, _Scalar):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _skip_header(file: BinaryIO) -> None:
    """Reads up to the pickle of an array of objects."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    dtype = read_header(file)[2]
    if dtype != np.dtype(object):
        raise ConversionError(f"it holds numbers of type {dtype}, not annotations")
