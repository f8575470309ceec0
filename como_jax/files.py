"""Writes files in such a way that a reader never sees a half-written one."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any, BinaryIO

from etils import epath


def write_atomic(path: epath.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, and then renames it to `path`."""
    path = epath.Path(path)
    partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("wb") as file:
            write(file)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes UTF-8 text, atomically."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: epath.PathLike, content: Any) -> None:
    """Writes strict JSON atomically; raises ValueError for NaN and infinity."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
