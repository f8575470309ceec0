"""Source folders: their files, the instructions that lie beside them, and the base of the builders that read them."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import itertools
import json
import os
from collections.abc import Sequence
from typing import ClassVar

from etils import epath

from como_jax.convert.builder import EpisodeBuilder, SourceError
from como_jax.convert.settings import Settings, setting
from como_jax.convert.sources import Source
from como_jax.errors import ConversionError
from como_jax.staging import is_local

SIDECAR_SUFFIXES = (".json", ".csv")
_FILE_COLUMNS = ("file", "file_name", "filename", "path", "video")
_INSTRUCTION_COLUMNS = ("instruction", "language_instruction", "text", "caption", "task")


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of a folder and of those below.

    Attributes:
      files: paths below the folder, sorted, without hidden ones.
      unreadable: those among them that cannot be opened, since their names are not valid UTF-8.
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
    """Returns the size of a file, or 0 if there is none; the error comes when the file is read."""
    try:
        return path.stat().length
    except OSError:
        return 0


def check_file(path: epath.PathLike) -> None:
    """Raises ValueError for a pipe, which would block, and for a link whose target does not exist."""
    # The `is_file` of epath is true of pipes.
    if is_local(path) and not os.path.isfile(path):
        raise ValueError("is not a file, or is a link without a target")


def check_folder(root: epath.Path) -> None:
    """Raises ConversionError if the source folder does not exist."""
    if not root.is_dir():
        raise ConversionError(f"source folder {root} does not exist")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderSettings(Settings):
    """Settings of a builder that reads a folder."""

    source: str = setting("folder that is searched for files, with all folders below")


class FolderBuilder(EpisodeBuilder):
    """Base of the builders that convert every file of a kind in a folder and the folders below.

    Attributes:
      suffixes: endings of the names of the files to convert, in lower case.
      contents: what such a file is called in messages.
    """

    settings: FolderSettings
    suffixes: ClassVar[tuple[str, ...]] = ()
    contents: ClassVar[str] = "file"

    @property
    def root(self) -> epath.Path:
        """The source folder."""
        return epath.Path(self.settings.source)

    @functools.cached_property
    def listing(self) -> Listing:
        """All files; raises ConversionError if the folder does not exist."""
        check_folder(self.root)
        return list_files(self.root)

    @functools.cached_property
    def names(self) -> list[str]:
        """The files to convert; raises ConversionError if there are none."""
        names = [name for name in self.listing.files if self.is_wanted(name)]
        if not names:
            message = f"source folder {self.root} holds no {self.contents}"
            raise ConversionError("; ".join([message, *self.listing.warnings]))
        return names

    @functools.cached_property
    def instructions(self) -> Instructions:
        """Language instructions from the JSON and CSV files of the folder."""
        sidecars = [name for name in self.listing.files if name.lower().endswith(SIDECAR_SUFFIXES)]
        return read_instructions(self.root, sidecars, self.names)

    def is_wanted(self, name: str) -> bool:
        """Whether a file is to be converted, by its name."""
        return name.lower().endswith(self.suffixes)

    def sources(self) -> list[Source]:
        """One source a file."""
        return [Source(name, num_bytes=num_bytes(self.root / name)) for name in self.names]

    def warnings(self) -> list[str]:
        """Folders that were not looked into."""
        return self.listing.warnings

    def path(self, source: Source) -> epath.Path:
        """The file of a source; raises SourceError if its name makes it unreadable."""
        if source.path in self.listing.unreadable:
            raise SourceError("its name is not valid UTF-8; rename it")
        return self.root / source.path


@dataclasses.dataclass(frozen=True)
class Instructions:
    """Language instructions of the files of a folder.

    Attributes:
      by_name: instruction by file, as a path below the source folder.
      warnings: what could not be understood, for the report.
    """

    by_name: dict[str, str]
    warnings: list[str]


def read_instructions(root: epath.Path, sidecars: Sequence[str], videos: Sequence[str]) -> Instructions:
    """Reads the instructions of videos, or of other files, from sidecar files.

    A sidecar speaks of videos in its own folder and below, by path from there, by file name or by stem. If
    two speak of the same video, the one in the deeper folder counts. All paths are relative to the root.
    """
    by_name: dict[str, str] = {}
    warnings = []
    for sidecar in sorted(sidecars, key=lambda name: (name.count("/"), name)):
        try:
            pairs, short = _read_pairs(root / sidecar)
        except (OSError, ValueError, csv.Error, RecursionError) as error:
            warnings.append(f"{sidecar}: not understood as language instructions: {error}")
            continue
        entries = dict(pairs)
        if short:
            warnings.append(f"{sidecar}: {short} of {short + len(pairs)} rows have too few columns")
        if len(entries) < len(pairs):
            repeated = f"{len(pairs) - len(entries)} of {len(pairs)} entries name a video again"
            warnings.append(f"{sidecar}: {repeated}, and the last one counts")
        keys = _keys_below(sidecar.rpartition("/")[0], videos)
        missing = [key for key in entries if key not in keys]
        if missing:
            warnings.append(
                f"{sidecar}: {len(missing)} of {len(entries)} entries name no video, such as {missing[0]!r}"
            )
        for key, instruction in entries.items():
            by_name.update((video, instruction) for video in keys.get(key, ()))
    return Instructions(by_name, warnings)


def _keys_below(folder: str, videos: Sequence[str]) -> dict[str, list[str]]:
    """Returns the videos in a folder and below, by every key that may stand for them."""
    prefix = f"{folder}/" if folder else ""
    keys: dict[str, list[str]] = {}
    for video in videos:
        if video.startswith(prefix):
            path = video[len(prefix) :]
            name = path.rpartition("/")[2]
            for key in {path, path.rpartition(".")[0], name, name.rpartition(".")[0]}:
                keys.setdefault(key, []).append(video)
    return keys


def _read_pairs(path: epath.Path) -> tuple[list[tuple[str, str]], int]:
    """Reads pairs of video and instruction, and counts the rows that are too short.

    Raises:
      ValueError: the file holds something else.
    """
    check_file(path)
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix.lower() == ".csv":
        return _read_csv(text)
    content = json.loads(text, object_pairs_hook=tuple)
    if not isinstance(content, tuple) or not all(isinstance(value, str) for _, value in content):
        raise ValueError("expected an object that maps file names to instructions")
    # JSON can hold surrogates, which are not characters and cannot be written as UTF-8.
    "".join(itertools.chain.from_iterable(content)).encode()
    return list(content), 0


def _read_csv(text: str) -> tuple[list[tuple[str, str]], int]:
    rows = csv.reader(io.StringIO(text, newline=""))
    header = [column.strip().lower() for column in next(rows, [])]
    files = [index for index, column in enumerate(header) if column in _FILE_COLUMNS]
    instructions = [index for index, column in enumerate(header) if column in _INSTRUCTION_COLUMNS]
    if not files or not instructions:
        raise ValueError(
            f"expected a column {' or '.join(_FILE_COLUMNS)} and a column {' or '.join(_INSTRUCTION_COLUMNS)}"
        )
    file, instruction = files[0], instructions[0]
    filled = [row for row in rows if any(row)]
    pairs = [(row[file], row[instruction]) for row in filled if len(row) > max(file, instruction)]
    return pairs, len(filled) - len(pairs)


def _is_hidden(path: epath.Path) -> bool:
    return any(part[0] == "." for part in path.parts)


def _as_text(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")
