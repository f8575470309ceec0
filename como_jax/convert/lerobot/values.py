"""Values from files that may hold anything."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

_TINY, _HUGE = (float(limit) for limit in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


def parse_json(text: str) -> Any:
    """The content of a JSON text.

    Raises:
      ValueError: it is not JSON, nested too deeply, or has characters in it that are none.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    # JSON can write halves of characters, which no file can hold.
    if "\\u" in text:
        json.dumps(content, ensure_ascii=False).encode()
    return content


def whole(value: Any) -> int | None:
    """A whole number, also if something made a float of it, or None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) else None


def finite_float(value: Any) -> float | None:
    """A number of the range of float32, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if value == 0 or _TINY <= abs(value) <= _HUGE else None
