"""Which files this project made: a list in every folder that it writes, so that it never replaces anything else.

Every folder with output has a file `.como_jax.json`. It names the files that were written there, with their sizes where
the folder was written as a whole. What it does not name belongs to the user.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from como_jax.errors import OutputError
from como_jax.files import write_json

MARK = ".como_jax.json"
# What desktops leave in folders that are looked at.
_LITTER = (".DS_Store", "Thumbs.db")
_MAX_SHOWN = 3


def mark_all(folder: epath.Path) -> None:
    """Notes that this project made everything that is in a folder."""
    sizes = {name: _size(folder / name) for name in _files(folder) if name != MARK}
    _write(folder, {**sizes, **dict.fromkeys(_empty_folders(folder))})


def is_made_here(folder: epath.Path) -> bool:
    """Whether this project has written into a folder."""
    return _read(folder) is not None


def strangers(folder: epath.Path) -> list[str]:
    """Names of what lies in a folder and was not made by this project, or was changed since; folders end with "/"."""
    made = _read(folder) or {}
    found = []
    for name in _files(folder):
        if name == MARK or name.rpartition("/")[2] in _LITTER:
            continue
        if name not in made or made[name] not in (None, _size(folder / name)) or _is_link(folder / name):
            found.append(name)
    known = {f"{parent.as_posix()}/" for name in made for parent in epath.Path(name).parents}
    found += [name for name in _empty_folders(folder) if name not in made and name not in known]
    return sorted(found)


def claim(folder: epath.Path, names: Sequence[str]) -> None:
    """Makes a folder, unless it is there, and notes that this project is about to write some files into it.

    Raises:
      OutputError: one of them exists and was not made by this project, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder, names)
    except OSError as error:
        raise OutputError(f"`out` {folder} cannot be written: {error}") from error


def _claim(folder: epath.Path, names: Sequence[str]) -> None:
    made = _read(folder) or {}
    for name in names:
        if name not in made and (folder / name).exists():
            raise OutputError(
                f"{folder / name} was not made by this project, and is not replaced; choose another folder, or move "
                "the file away."
            )
    if any(made.get(name, 0) is not None for name in names):
        _write(folder, {**made, **dict.fromkeys(names)})


def listing(names: list[str]) -> str:
    """The first few of some names."""
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return f"{', '.join(names[:_MAX_SHOWN])}{more}"


def _files(folder: epath.Path) -> list[str]:
    """All files below a folder and all links, which are not followed."""
    found = []
    for here, folders, files in folder.walk():
        names = [*files, *(name for name in folders if _is_link(here / name))]
        found += [(here / name).relative_to(folder).as_posix() for name in names]
    return sorted(set(found))


def _empty_folders(folder: epath.Path) -> list[str]:
    """Folders below that hold nothing."""
    found = [here for here, folders, files in folder.walk() if not folders and not files and here != folder]
    return [f"{here.relative_to(folder).as_posix()}/" for here in found]


def _is_link(path: epath.Path) -> bool:
    return "://" not in os.fspath(path) and os.path.islink(path)


def _size(path: epath.Path) -> int | None:
    try:
        return path.stat().length
    except OSError:
        return None


def _read(folder: epath.Path) -> dict[str, int | None] | None:
    """Sizes of the files that this project made; None for a folder into which it has not written."""
    try:
        content: Any = json.loads((folder / MARK).read_text())
        return dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: epath.Path, files: dict[str, int | None]) -> None:
    write_json(folder / MARK, {"made_by": "como_jax", "files": files})
