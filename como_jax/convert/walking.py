"""Walks through folders and the folders that links in them lead to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from como_jax.staging import is_local


class Folder(NamedTuple):
    """One folder: its path, the names of its files, and the links to folders in it that were not followed."""

    path: epath.Path
    files: list[str]
    not_followed: list[str]


def walk(folder: epath.Path, above: frozenset[str] = frozenset()) -> Iterator[Folder]:
    """Yields a folder and all those below it, in a stable order; one that cannot be read is left out.

    Links to folders are followed, but for those that lead to a folder which they lie in themselves, or to one of
    `above`, the folders that led here: they would lead in circles, or out into the whole disk.
    """
    if not is_local(folder):
        for path, _, names in folder.walk():
            yield Folder(path, names, [])
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    here = os.path.realpath(folder)
    above |= {here}
    files, folders, not_followed = [], [], []
    for entry in entries:
        if not _is_folder(entry):
            files.append(entry.name)
        elif entry.is_symlink() and _leads_up(os.path.realpath(entry.path), above):
            not_followed.append(entry.name)
        else:
            folders.append(entry.name)
    yield Folder(epath.Path(folder), files, not_followed)
    for name in folders:
        yield from walk(folder / name, above)


def _leads_up(target: str, above: frozenset[str]) -> bool:
    return any(epath.Path(folder).is_relative_to(target) for folder in above)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link that leads to itself.
        return False
