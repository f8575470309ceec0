"""Messages of msgpack with arrays, as clients of openpi and of vla-eval send them.

| of | is the map |
|---|---|
| openpi: array | `{b"__ndarray__": True, b"data": bytes in C order, b"dtype": as in "<f4", b"shape": [...]}` |
| openpi: NumPy number | `{b"__npgeneric__": True, b"data": value, b"dtype": ...}` |
| vla-eval: array | as openpi's, with text in place of bytes as its keys |
| vla-eval: image | `{"__image__": True, "format": ..., "data": bytes, "shape": [...]}`, of a file or an array |

See `openpi_client.msgpack_numpy` of https://github.com/Physical-Intelligence/openpi and `vla_eval.protocol` of
https://github.com/allenai/vla-evaluation-harness. Arrays hold numbers, booleans or text, never Python objects, so that
reading a message cannot run code.
"""

from __future__ import annotations

import functools
import io
import math
import re
import struct
from typing import Any

import msgpack
import numpy as np
from PIL import Image, UnidentifiedImageError

from como_jax.errors import UsageError

# Booleans, integers, floats and text, with their width; no objects, records, dates or complex numbers.
_DTYPE = re.compile(r"[<>|=]?[biufSU]\d{1,9}")
# Of an image, so that a small message cannot fill the memory.
_MAX_PIXELS = 2**25
_ARRAY, _NUMBER, _IMAGE = "__ndarray__", "__npgeneric__", "__image__"
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class RequestError(UsageError):
    """A message that cannot be answered; the text is sent to the client."""


def pack(content: Any, *, text_keys: bool = False) -> bytes:
    """Packs maps, lists, numbers, text and arrays into a message.

    Args:
      content: to pack.
      text_keys: whether arrays have keys of text, as vla-eval's have, and not of bytes, as openpi's have.

    Raises:
      TypeError: the protocol has no form for a value, such as an array of objects.
    """
    return msgpack.packb(content, default=functools.partial(_encode, text_keys=text_keys))


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
        raise RequestError(f"The message is no msgpack of this protocol: {reason}.") from error


def _encode(value: Any, text_keys: bool) -> dict[Any, Any]:
    if not isinstance(value, np.ndarray | np.generic) or not _DTYPE.fullmatch(value.dtype.str):
        kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray | np.generic) else type(value).__name__
        raise TypeError(f"The protocol has no form for {kind}.")
    if isinstance(value, np.ndarray):
        fields = {_ARRAY: True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": list(value.shape)}
    else:
        fields = {_NUMBER: True, "data": value.item(), "dtype": value.dtype.str}
    return fields if text_keys else {name.encode(): field for name, field in fields.items()}


def _decode(fields: dict[Any, Any]) -> Any:
    for marker, decode in ((_ARRAY, _decode_array), (_NUMBER, _decode_number), (_IMAGE, _decode_image)):
        if marker in fields:
            return decode(fields)
        if marker.encode() in fields:
            return decode({key.decode(): value for key, value in fields.items() if isinstance(key, bytes)})
    return fields


def _decode_array(fields: dict[str, Any]) -> np.ndarray:
    dtype, data, shape = _decode_dtype(fields), fields.get("data"), _decode_shape(fields)
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        found = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise RequestError(f"An array of shape {_shorten(shape)} and dtype {dtype} has {found} of data.")
    try:
        return np.ndarray(shape, dtype, buffer=data)
    except ValueError as error:
        raise RequestError(f"An array's shape {_shorten(shape)} cannot be made: {error}.") from error


def _decode_number(fields: dict[str, Any]) -> np.generic:
    dtype, value = _decode_dtype(fields), fields.get("data")
    if not isinstance(value, bool | int | float | str | bytes):
        raise RequestError(f"A number's data must be one value, not {type(value).__name__}.")
    try:
        return dtype.type(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise RequestError(f"{_shorten(value)} is no {dtype}.") from error


def _decode_image(fields: dict[str, Any]) -> np.ndarray:
    coding, data, shape = fields.get("format"), fields.get("data"), _decode_shape(fields)
    if coding == "raw":
        return _decode_array(fields)
    if coding not in ("png", "jpeg") or not isinstance(data, bytes):
        raise RequestError(f"An image must be bytes of raw, png or jpeg, not {_shorten(coding)}.")
    if len(shape) != 3 or shape[2] not in _MODES or math.prod(shape[:2]) > _MAX_PIXELS:
        raise RequestError(
            f"An image's shape must be [H, W, C] of at most {_MAX_PIXELS} pixels, not {_shorten(shape)}."
        )
    try:
        # Only the header is read here; the rest is when the size is known to be as declared.
        with Image.open(io.BytesIO(data), formats=[coding]) as image:
            if [image.height, image.width] != shape[:2] or image.mode != _MODES[shape[2]]:
                found = f"{[image.height, image.width]} and mode {image.mode}"
                raise RequestError(f"An image of shape {_shorten(shape)} has {found}.")
            return np.asarray(image).reshape(shape)
    # Pillow raises these, which share no base class, for images that are damaged.
    except (
        OSError,
        SyntaxError,
        ValueError,
        struct.error,
        UnidentifiedImageError,
        Image.DecompressionBombError,
    ) as error:
        raise RequestError(f"An image cannot be read as {coding}: {error}.") from error


def _decode_shape(fields: dict[str, Any]) -> list[int]:
    shape = fields.get("shape")
    if not isinstance(shape, list) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise RequestError(f"An array's shape must be a list of sizes, not {_shorten(shape)}.")
    return shape


def _decode_dtype(fields: dict[str, Any]) -> np.dtype:
    name = fields.get("dtype")
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise RequestError(f"An array's dtype must be of numbers or text, as in <f4, not {_shorten(name)}.")
    try:
        return np.dtype(name)
    except (TypeError, ValueError) as error:
        raise RequestError(f"An array's dtype {name} is unknown.") from error


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
