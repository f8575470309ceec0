"""Which instructions belong to which recordings of a folder, as the label files beside them say."""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
from collections import Counter
from collections.abc import Sequence

from etils import epath

from como_jax.convert.labels import (
    LABEL_NAME,
    NAMED_SUFFIXES,
    READ_ERRORS,
    SIDECAR_SUFFIXES,
    TEXT_COLUMNS,
    Entry,
    LabelFile,
)
from como_jax.convert.sources import check_file
from como_jax.errors import one_line

_VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".gif", ".npz")
_MAX_LISTED = 20
_MAX_FAILURES = 5
_MAX_INDICES = 16


@dataclasses.dataclass(frozen=True)
class Instructions:
    """Language instructions of the recordings of a folder.

    Attributes:
      by_name: instructions by recording, as a path below the source folder.
      warnings: what could not be understood, for the report.
      label_files: the files that hold labels, or look as if they did.
    """

    by_name: dict[str, tuple[str, ...]]
    warnings: list[str]
    label_files: list[str]


def read_instructions(
    root: epath.Path, files: Sequence[str], recordings: Sequence[str], column: str | None = None
) -> Instructions:
    """Reads the instructions of recordings from the label files among `files`.

    A file speaks of the recordings in its own folder and below, or, if there are none, of those below the nearest
    folder above that has some: `labels/train.json` of `videos/1.mp4`. It names them by path, by file name or by stem.
    If two files speak of the same recording, the one in the deeper folder counts, and both if they lie equally deep.
    All paths are relative to the root.

    Args:
      root: the source folder.
      files: files that are no recordings.
      recordings: what may have instructions.
      column: the field that holds the text, None for the usual ones, '' to read none.
    """
    index = RecordingIndex(recordings)
    columns = TEXT_COLUMNS if column is None else (column.lower(),)
    found: dict[str, tuple[int, tuple[str, ...]]] = {}
    warnings, failures, label_files = [], [], []
    # Without a column, nothing is to be read, and so nothing can be lost.
    candidates = [] if column == "" else [name for name in files if index.is_candidate(name)]
    for name in sorted(candidates, key=lambda name: (name.count("/"), name)):
        label_files.append(name)
        depth, known = index.scope(name.rpartition("/")[0])
        try:
            if not name.lower().endswith((*SIDECAR_SUFFIXES, *NAMED_SUFFIXES)):
                raise ValueError("such files are not read; JSON, JSON Lines, CSV, TSV and Parquet are")
            check_file(root / name)
            entries = LabelFile(columns, lambda text, known=known: bool(known.find(text))).read(root / name)
        except READ_ERRORS as error:
            failures.append(f"{name}: not understood as language instructions: {one_line(error)}")
            continue
        matches = _without_parts([(entry, known.find(entry.name)) for entry in entries])
        warnings += [f"{name}: {message}" for message in _describe(matches)]
        for entry, named in matches:
            for recording in named if entry.texts else ():
                before_depth, before = found.get(recording, (depth, ()))
                texts = (*before, *entry.texts) if before_depth == depth else entry.texts
                found[recording] = depth, tuple(dict.fromkeys(texts))
    more = len(failures) - _MAX_FAILURES
    tail = [f"{more} more files were not understood as language instructions"] if more > 0 else []
    return Instructions(
        {recording: texts for recording, (_, texts) in found.items()},
        [*warnings, *failures[:_MAX_FAILURES], *tail],
        label_files,
    )


_Match = tuple[Entry, Sequence[str]]
"""An entry of a file, and the recordings that it names."""


def _without_parts(matches: Sequence[_Match]) -> list[_Match]:
    """Takes the texts from entries that are about parts of a recording, of which it has several."""
    parts = Counter(recording for entry, named in matches if entry.is_part for recording in named)
    fault = "it is about a part of the recording, which has several"
    return [
        (entry._replace(texts=(), fault=fault), named) if any(parts[each] > 1 for each in named) else (entry, named)
        for entry, named in matches
    ]


def _describe(matches: Sequence[_Match]) -> list[str]:
    """Returns what is wrong with the entries of a file, by name."""
    entries = [entry for entry, _ in matches]
    messages = []
    kinds = (
        ("hold no instruction", [entry for entry in entries if entry.fault and not entry.texts]),
        ("were taken only in part", [entry for entry in entries if entry.fault and entry.texts]),
    )
    for what, faulty in kinds:
        named = [f"{entry.name!r} ({entry.fault})" for entry in faulty[:_MAX_LISTED]]
        more = f" and {len(faulty) - len(named)} more" if len(faulty) > len(named) else ""
        if faulty:
            messages.append(f"{len(faulty)} of {len(entries)} entries {what}: {', '.join(named)}{more}")
    missing = [entry for entry, named in matches if entry.texts and not named]
    if missing:
        messages.append(f"{len(missing)} of {len(entries)} entries name no recording, such as {missing[0].name!r}")
    return messages


class RecordingIndex:
    """Finds the recordings that label files speak of."""

    def __init__(self, recordings: Sequence[str]):
        """Prepares for `recordings`, which are paths below the source folder."""
        self._by_folder: dict[str, list[str]] = {}
        for recording in recordings:
            folder = recording
            while folder:
                folder = folder.rpartition("/")[0]
                self._by_folder.setdefault(folder, []).append(recording)
        self._base_names = {_stem(normal(recording).rpartition("/")[2]) for recording in recordings}
        # Files of one folder are read one after the other.
        self._names = functools.lru_cache(maxsize=_MAX_INDICES)(self._names_below)

    def is_candidate(self, name: str) -> bool:
        """Whether a file holds labels, as far as its name tells."""
        lower = name.lower()
        if lower.endswith(SIDECAR_SUFFIXES):
            return True
        # Beside a recording, a text of the same name is its instruction.
        if lower.endswith(".txt") and _stem(normal(name).rpartition("/")[2]) in self._base_names:
            return True
        return LABEL_NAME.search(name.rpartition("/")[2]) is not None

    def scope(self, folder: str) -> tuple[int, _Names]:
        """Returns depth and names of the recordings that a label file in a folder speaks of."""
        while folder and folder not in self._by_folder:
            folder = folder.rpartition("/")[0]
        return folder.count("/") + bool(folder), self._names(folder)

    def _names_below(self, folder: str) -> _Names:
        start = len(folder) + 1 if folder else 0
        return _Names({recording: recording[start:] for recording in self._by_folder.get(folder, ())})


class _Names:
    """Finds recordings by what label files call them."""

    def __init__(self, recordings: dict[str, str]):
        """Prepares for recordings with their paths relative to the label file."""
        self._by_key: dict[str, list[str]] = {}
        # Some file systems do not tell capital letters from small ones.
        self._by_folded: dict[str, list[str]] = {}
        for recording, path in recordings.items():
            key = normal(path)
            name = key.rpartition("/")[2]
            keys = {key, _stem(key), name, _stem(name)}
            for each in keys:
                self._by_key.setdefault(each, []).append(recording)
            for each in {each.casefold() for each in keys}:
                self._by_folded.setdefault(each, []).append(recording)

    def find(self, name: str) -> Sequence[str]:
        """Returns the recordings that a name stands for: as it is or, if that is clear, by its last parts alone."""
        key = normal(name)
        if key in self._by_key:
            return self._by_key[key]
        parts = key.split("/")
        tails = ["/".join(parts[start:]) for start in range(len(parts))]
        # The labels may be of the same recordings in another format.
        candidates = [each for tail in tails for each in (tail, _stem(tail) if _is_video(tail) else tail)]
        tables = [(each, self._by_key) for each in candidates]
        tables += [(each.casefold(), self._by_folded) for each in candidates]
        found = (table.get(each, ()) for each, table in tables)
        return next((recordings for recordings in found if len(recordings) == 1), ())


def _is_video(name: str) -> bool:
    return name.lower().endswith(_VIDEO_SUFFIXES)


def normal(name: str) -> str:
    """Returns a path in one form: composed Unicode, slashes, and no `./` before it."""
    parts = unicodedata.normalize("NFC", name.strip()).replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def _stem(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    stem = name.rpartition(".")[0]
    return f"{folder}{slash}{stem or name}"
