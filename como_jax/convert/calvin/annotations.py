"""CALVIN's language annotations, and the reader of the pickle that they are stored in.

A pickle is a program that calls whatever it names, so a file from elsewhere must not be unpickled as it is. Here
`find_class` allows six names of NumPy, and each of them gets a stand-in written below instead of NumPy's own function.
NumPy's functions could not run anything harmful either, but they are no safe allow-list: on a damaged state they crash
the interpreter, or change a type that all arrays of the process share.
"""

from __future__ import annotations

import dataclasses
import operator
import pickle
import re
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from como_jax.errors import ConversionError, one_line

_PATHS = ("lang_annotations/auto_lang_ann.npy", "auto_lang_ann.npy")
_MAX_REASON = 200


@dataclasses.dataclass(frozen=True)
class Annotation:
    """One annotated window of steps.

    Attributes:
      start: number of the first step.
      end: number of the last step, which belongs to the window.
      instruction: what is done in the window.
    """

    start: int
    end: int
    instruction: str


def read_annotations(split: epath.Path) -> list[Annotation] | None:
    """Reads the annotations of a split folder such as `training`; None if it has no file of them.

    Raises:
      ConversionError: the file is damaged, or holds more than data.
    """
    path = next((split / name for name in _PATHS if (split / name).exists()), None)
    if path is None:
        return None
    content = read_pickled_object(path)
    try:
        texts, windows = list(content["language"]["ann"]), content["info"]["indx"]
        bounds = [(operator.index(start), operator.index(end)) for start, end in windows]
    except (TypeError, KeyError, ValueError, IndexError) as error:
        raise ConversionError(f"{path} does not hold the texts and windows of CALVIN's annotations") from error
    if len(texts) != len(bounds):
        raise ConversionError(f"{path} has {len(texts)} texts for {len(bounds)} windows")
    return [Annotation(start, end, _text(path, text)) for (start, end), text in zip(bounds, texts, strict=True)]


def read_pickled_object(path: epath.Path) -> Any:
    """Reads the only element of an object array in a .npy file.

    Arrays become lists, and numbers become int and float.

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
        raise ConversionError(f"{path} cannot be read: {one_line(error)[:_MAX_REASON]}") from error
    return elements[0]


def _text(path: epath.Path, text: Any) -> str:
    if not isinstance(text, str):
        raise ConversionError(f"{path} has an annotation that is not text: {str(text)[:50]!r}")
    return " ".join(text.encode("utf-8", "replace").decode().split())


class _Dtype:
    """Stands in for `numpy.dtype`."""

    def __init__(self, name: str, *_: Any):
        self._name = name
        self._byte_order = "="

    def __setstate__(self, state: tuple) -> None:
        self._byte_order = state[1]

    def numbers(self, data: bytes) -> np.ndarray:
        """Returns the numbers of this type that the bytes hold."""
        if not re.fullmatch(r"[iuf][1248]", self._name) or self._byte_order not in ("<", ">", "=", "|"):
            raise ValueError(f"it holds numbers of an unknown type {self._name!r}")
        return np.frombuffer(data, self._byte_order + self._name)


class _Array:
    """Stands in for an array: the arguments describe an empty one, and the state fills it."""

    def __init__(self, *_: Any):
        self._state: tuple | None = None

    def __setstate__(self, state: tuple) -> None:
        self._state = state

    def plain(self) -> list:
        """Returns the elements in the order of memory, as nested lists if there are several axes."""
        if self._state is None:
            raise ValueError("it holds an array without content")
        _, shape, dtype, _, data = self._state
        if isinstance(data, list):
            return [_plain(value) for value in data]
        return dtype.numbers(data).reshape(shape).tolist()


class _Scalar:
    """Stands in for a number of a NumPy type."""

    def __init__(self, dtype: _Dtype, data: bytes):
        self.value = dtype.numbers(data).item()

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it holds a damaged number")


# All of them have `__setstate__`, so that a pickle cannot set their attributes.
_STAND_INS: dict[tuple[str, str], type] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    # The names in NumPy 1 and NumPy 2.
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _Scalar,
    ("numpy._core.multiarray", "scalar"): _Scalar,
}


# The unpickler written in Python: the one in C reserves as much memory as a damaged index asks for.
class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Loads containers, text and numbers, and refuses everything else."""

    def find_class(self, module: str, name: str) -> type:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise ConversionError(f"its pickle asks for {module}.{name}, and may hold arrays and text only") from None


def _plain(value: Any) -> Any:
    """Replaces the stand-ins in a loaded value."""
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
