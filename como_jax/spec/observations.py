"""What a robot says, as a policy takes it: the same for the server and for exported policies.

Axes: H and W are height and width of an image, S numbers of a state.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from como_jax.errors import InputError

_MAX_INSTRUCTION = 4096
_TEXT_KINDS = "USO"
_NUMBER_KINDS = "biuf"


def check_image(name: str, value: Any) -> np.ndarray:
    """An image as uint8 RGB `[H, W, 3]`, also of one that has its channels first, as PyTorch has them.

    Raises:
      InputError: it is something else; the error says `name`.
    """
    image = _array(value)
    if image is None or image.dtype != np.uint8:
        raise InputError(f"{name} must be an array of uint8, RGB from 0 to 255, not {_describe(value)}.")
    if image.ndim == 3 and image.shape[0] == 3 != image.shape[2]:
        image = np.ascontiguousarray(np.moveaxis(image, 0, 2))
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InputError(f"{name} must have shape [H, W, 3], not {list(image.shape)}.")
    return image


def check_numbers(name: str, value: Any) -> np.ndarray:
    """Numbers as float32 `[S]`; a single number is a row of one, and truth values are 0 and 1.

    Raises:
      InputError: it is something else, or not finite; the error says `name`.
    """
    numbers = _array(value)
    if numbers is None or numbers.ndim > 1 or numbers.dtype.kind not in _NUMBER_KINDS:
        raise InputError(f"{name} must be a row of numbers, not {_describe(value)}.")
    with np.errstate(over="ignore"):
        numbers = np.atleast_1d(numbers).astype(np.float32)
    if not np.isfinite(numbers).all():
        raise InputError(f"{name} holds numbers that are not finite.")
    return numbers


def check_state(name: str, value: Any, size: int) -> np.ndarray:
    """A state of `size` numbers, see `check_numbers`."""
    state = check_numbers(name, value)
    if len(state) != size:
        raise InputError(f"{name} must be {size} numbers, not {len(state)}.")
    return state


def check_instruction(name: str, value: Any) -> str:
    """An instruction as text, also of bytes in UTF-8 and of an array that holds one text; it may be empty.

    Raises:
      InputError: it is something else, or too long; the error says `name`.
    """
    text = value
    if isinstance(text, np.ndarray) and text.size == 1 and text.dtype.kind in _TEXT_KINDS:
        text = text.item()
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError:
            raise InputError(f"{name} must be text; these bytes are not UTF-8.") from None
    if not isinstance(text, str):
        raise InputError(f"{name} must be text, not {_describe(value)}.")
    if len(text) > _MAX_INSTRUCTION:
        raise InputError(f"{name} has {len(text)} characters; {_MAX_INSTRUCTION} are the most.")
    return str(text)


def _array(value: Any) -> np.ndarray | None:
    """None for what is no array: lists of different lengths, integers of more than 64 bits, tensors on a GPU."""
    try:
        return np.asarray(value)
    except (ValueError, OverflowError, TypeError):
        return None


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
