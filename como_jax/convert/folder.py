"""Source folders: their files, the instructions that lie beside them, and the base of the builders that read them."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterable
from typing import ClassVar

from etils import epath

from como_jax.convert.builder import EpisodeBuilder, SourceError
from como_jax.convert.instructions import Instructions, read_instructions
from como_jax.convert.settings import Settings, setting
from como_jax.convert.sources import Source
from como_jax.errors import ConversionError

# With a number, as in `train_01`, but not with a word: `test_tube` may be what a clip shows.
_SPLIT = re.compile(r"(train|training|validation|valid|dev|val|test|testing|eval|evaluation)[-._ 0-9]*")
SPLIT_FOLDERS = "folders called train, validation, test and the like are splits: all but train became `val`"


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
    """Lists all files below a folder. Links to folders are followed, unless to what holds it or was read before."""
    names: list[epath.Path] = []
    links: list[epath.Path] = []
    again: list[str] = []
    errors: list[OSError] = []
    seen: set[str] = set()
    # All that lies in the folder itself comes before what is reached by a link.
    waiting = [root]
    while waiting:
        for folder, folders, files in waiting.pop(0).walk(on_error=errors.append):
            if (real := os.path.realpath(folder)) in seen:
                folders.clear()
                continue
            seen.add(real)
            # Versions of Python differ in where they put links to folders.
            linked = {name for name in (*folders, *files) if os.path.islink(folder / name) and (folder / name).is_dir()}
            names += [(folder / file).relative_to(root) for file in files if file not in linked]
            links += [folder / name for name in sorted(linked) if not _is_hidden((folder / name).relative_to(root))]
        while links and not waiting:
            link = links.pop(0)
            if (real := os.path.realpath(link)) in seen or epath.Path(os.path.realpath(root)).is_relative_to(real):
                again.append(_as_text(link.relative_to(root).as_posix()))
            else:
                waiting.append(link)
    found = [path.as_posix() for path in names if not _is_hidden(path)]
    # A name that is not valid UTF-8 could not be written to the report.
    readable = {name: _as_text(name) for name in found}
    warnings = [f"a folder cannot be read: {_as_text(str(error))}" for error in errors]
    if again:
        warnings.append(
            f"{len(again)} links lead to folders that are read already or hold this one, such as {min(again)!r}"
        )
    return Listing(
        files=sorted(readable.values()),
        unreadable=frozenset(text for name, text in readable.items() if text != name),
        warnings=warnings,
    )


def find_splits(files: Iterable[str]) -> dict[str, str]:
    """Returns the split of every file, if there are folders of training data and others, as Hugging Face names them.

    They are `train`, and for example `validation` or `test`, which become `val`; a file beside such folders is in
    `train`. Without both kinds nothing is returned, and the split is drawn.
    """
    found: dict[str, str | None] = {}
    for file in files:
        names = [match[1] for match in map(_SPLIT.fullmatch, file.lower().split("/")[:-1]) if match]
        found[file] = None if not names else "train" if names[0].startswith("train") else "val"
    if not {"train", "val"} <= set(found.values()):
        return {}
    return {file: split or "train" for file, split in found.items()}


def num_bytes(path: epath.Path) -> int:
    """Returns the size of a file, or 0 if there is none; the error comes when the file is read."""
    try:
        return path.stat().length
    except OSError:
        return 0


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
        """Language instructions from the label files of the folder."""
        others = [name for name in self.listing.files if not self.is_wanted(name)]
        return read_instructions(self.root, others, [source.path for source in self.sources()], self.language_field)

    @property
    def language_field(self) -> str | None:
        """The field of label files that holds the text, '' to read none, or None for the first of the usual ones."""
        return None

    def is_wanted(self, name: str) -> bool:
        """Whether a file is to be converted, by its name."""
        return name.lower().endswith(self.suffixes)

    def sources(self) -> list[Source]:
        """One source a file."""
        splits = self.splits
        return [Source(name, splits.get(name), num_bytes=num_bytes(self.root / name)) for name in self.names]

    @functools.cached_property
    def splits(self) -> dict[str, str]:
        """The split of every file, if the folders in the source are called so."""
        return find_splits(self.listing.files)

    def warnings(self) -> list[str]:
        """Folders that were not looked into, and those that are splits."""
        return [*self.listing.warnings, *([SPLIT_FOLDERS] if self.splits else [])]

    def path(self, source: Source) -> epath.Path:
        """The file of a source; raises SourceError if its name makes it unreadable."""
        if source.path in self.listing.unreadable:
            raise SourceError("its name is not valid UTF-8; rename it")
        return self.root / source.path


def _is_hidden(path: epath.Path) -> bool:
    return any(part[0] == "." for part in path.parts)


def _as_text(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")
