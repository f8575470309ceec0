"""Messages of openpi's websocket protocol: msgpack, with arrays as maps whose keys are bytes.

An array is `{b"__ndarray__": True, b"data": bytes in C order, b"dtype": as in "<f4", b"shape": [...]}`, a number of a
NumPy type is `{b"__npgeneric__": True, b"data": value, b"dtype": ...}`; see `openpi_client.msgpack_numpy` of
https://github.com/Physical-Intelligence/openpi. Arrays hold numbers, booleans or text, never Python objects, so that
reading a message cannot run code.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgpack
import numpy as np

from como_jax.errors import UsageError

# Booleans, integers, floats and text, with their width; no objects, records, dates or complex numbers.
_DTYPE = re.compile(r"[<>|=]?[biufSU]\d{1,9}")


class RequestError(UsageError):
    """A message that cannot be answered; the text is sent to the client."""


def pack(content: Any) -> bytes:
    """Packs maps, lists, numbers, text and arrays into a message.

    Raises:
      TypeError: the protocol has no form for a value, such as an array of objects.
    """
    return msgpack.packb(content, default=_encode)


def unpack(message: bytes) -> Any:
    """Returns the content of a message; its arrays are read-only views of the message.

    Raises:
      RequestError: the message is damaged, or holds something that the protocol does not allow.
    """
    try:
        return msgpack.unpackb(message, object_hook=_decode)
    except RequestError:
        raise
    # msgpack raises these, which share no base class, for messages that are cut off, nested too deep or not UTF-8, and
    # TypeError for a map that is the key of another.
    except (ValueError, TypeError, RecursionError, OverflowError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise RequestError(f"The message is no msgpack of openpi's protocol: {reason}.") from error


def _encode(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, np.ndarray | np.generic) or not _DTYPE.fullmatch(value.dtype.str):
        kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray | np.generic) else type(value).__name__
        raise TypeError(f"The protocol has no form for {kind}.")
    if isinstance(value, np.ndarray):
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": list(value.shape),
        }
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def _decode(fields: dict[Any, Any]) -> Any:
    if b"__ndarray__" in fields:
        return _decode_array(fields)
    if b"__npgeneric__" in fields:
        return _decode_number(fields)
    return fields


def _decode_array(fields: dict[Any, Any]) -> np.ndarray:
    dtype, data, shape = _decode_dtype(fields), fields.get(b"data"), fields.get(b"shape")
    if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise RequestError(f"An array's shape must be a list of sizes, not {_shorten(shape)}.")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        found = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise RequestError(f"An array of shape {_shorten(shape)} and dtype {dtype} has {found} of data.")
    try:
        return np.ndarray(shape, dtype, buffer=data)
    except ValueError as error:
        raise RequestError(f"An array's shape {_shorten(shape)} cannot be made: {error}.") from error


def _decode_number(fields: dict[Any, Any]) -> np.generic:
    dtype, value = _decode_dtype(fields), fields.get(b"data")
    if not isinstance(value, bool | int | float | str | bytes):
        raise RequestError(f"A number's data must be one value, not {type(value).__name__}.")
    try:
        return dtype.type(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise RequestError(f"{_shorten(value)} is no {dtype}.") from error


def _decode_dtype(fields: dict[Any, Any]) -> np.dtype:
    name = fields.get(b"dtype")
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise RequestError(f"An array's dtype must be of numbers or text, as in <f4, not {_shorten(name)}.")
    try:
        return np.dtype(name)
    except (TypeError, ValueError) as error:
        raise RequestError(f"An array's dtype {name} is unknown.") from error


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
