"""The files in a source folder, and what in it was not looked into."""

from __future__ import annotations

import dataclasses
import os

from etils import epath

from como_jax.staging import is_local

NOT_UTF8 = "its name is not valid UTF-8; rename it"


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of a folder and of those below.

    Attributes:
      files: paths below the folder, sorted, without hidden ones.
      unreadable: those among them that do not lead to their file, since its name is not valid UTF-8.
      warnings: what was not looked into.
    """

    files: list[str]
    unreadable: frozenset[str]
    warnings: list[str]


def list_files(root: epath.Path) -> Listing:
    """Lists all files below a folder, without following links to folders, which could lead in circles."""
    names: list[epath.Path] = []
    links: list[epath.Path] = []
    errors: list[OSError] = []
    for folder, folders, files in root.walk(on_error=errors.append):
        # Versions of Python differ in where they put links to folders.
        linked = {name for name in (*folders, *files) if os.path.islink(folder / name) and (folder / name).is_dir()}
        names += [(folder / file).relative_to(root) for file in files if file not in linked]
        links += [(folder / name).relative_to(root) for name in linked]
    links = [path for path in links if not _is_hidden(path)]
    found = [path.as_posix() for path in names if not _is_hidden(path)]
    # A name that is not valid UTF-8 could not be written to the report.
    readable = {name: _as_text(name) for name in found}
    warnings = [f"a folder cannot be read: {_as_text(str(error))}" for error in errors]
    if links:
        first = _as_text(min(path.as_posix() for path in links))
        warnings.append(f"{len(links)} links to folders are not followed, such as {first!r}")
    return Listing(
        files=sorted(readable.values()),
        unreadable=frozenset(text for name, text in readable.items() if text != name),
        warnings=warnings,
    )


def num_bytes(path: epath.Path) -> int:
    """Size of a file, or 0 where there is none, which reading it will say."""
    try:
        return path.stat().length
    except OSError:
        return 0


def check_file(path: epath.PathLike) -> None:
    """Raises ValueError for what is in the place of a file and would block, or could not be opened."""
    # The `is_file` of epath is true of pipes.
    if is_local(path) and not os.path.isfile(path):
        raise ValueError("is no file, or a link that leads nowhere")


def _is_hidden(path: epath.Path) -> bool:
    return any(part[0] == "." for part in path.parts)


def _as_text(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")
