"""Writes files in such a way that a reader never sees a half-written one, and that nobody else's file is replaced."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from etils import epath

from como_jax.errors import OutputError

HLO_MARK = "// made_by: como_jax\n"
# The first lines of a page, of figures in JSON and of a compiled module say that this project made the file.
_MARKS = (b'<meta name="generator" content="como_jax">', b'"made_by": "como_jax"', HLO_MARK.encode())
_BEGINNING = 1000


def check_file_output(path: epath.PathLike) -> None:
    """Raises OutputError if there is anything at the path of a single file but a file of this project, or an empty one.

    Files in a folder of this project are known by its list, see `como_jax.ownership`.
    """
    path = epath.Path(path)
    if not path.exists():
        return
    # The `is_file` of epath is true of devices and pipes.
    if path.is_dir() or ("://" not in os.fspath(path) and not os.path.isfile(path)):
        raise OutputError(f"{path} is no file, and is not replaced; name a file.")
    with path.open("rb") as file:
        beginning = file.read(_BEGINNING)
    if beginning and not any(mark in beginning for mark in _MARKS):
        raise OutputError(f"{path} was not made by this project, and is not replaced; choose another file.")


def write_figures(path: epath.PathLike, content: Mapping[str, Any]) -> None:
    """Writes strict JSON as `write_json` does, to a file that `check_file_output` allows, with the folders above it."""
    check_file_output(path)
    epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"made_by": "como_jax", **content})


def names_in(folder: epath.PathLike) -> set[str]:
    """Names of what lies in a folder, which may be very much."""
    path = os.fspath(folder)
    return {entry.name for entry in epath.Path(path).iterdir()} if "://" in path else set(os.listdir(path))


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
