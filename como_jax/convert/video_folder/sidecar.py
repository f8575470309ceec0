"""Language instructions from files that lie beside the videos."""

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Sequence

from etils import epath

from como_jax.convert.listing import check_file

SIDECAR_SUFFIXES = (".json", ".csv")
FILE_COLUMNS = ("file", "file_name", "filename", "path", "video")
INSTRUCTION_COLUMNS = ("instruction", "language_instruction", "text", "caption", "task")


@dataclasses.dataclass(frozen=True)
class Instructions:
    """Instructions by video name, and what could not be understood.

    Attributes:
      by_name: video, as a path below the source folder, to its instruction.
      warnings: for the report.
    """

    by_name: dict[str, str]
    warnings: list[str]


def read_instructions(root: epath.Path, sidecars: Sequence[str], videos: Sequence[str]) -> Instructions:
    """Reads the instructions of the videos.

    A sidecar speaks of videos in its own folder and below, by path from there, by file name or by stem. Where
    two speak of the same video, the one in the deeper folder counts.

    Args:
      root: the source folder.
      sidecars: JSON and CSV files, as paths below the root.
      videos: the videos, likewise.
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
        folder = sidecar.rpartition("/")[0]
        keys = _keys_below(folder, videos)
        missing = [key for key in entries if key not in keys]
        if missing:
            warnings.append(
                f"{sidecar}: {len(missing)} of {len(entries)} entries name no video, such as {missing[0]!r}"
            )
        for key, instruction in entries.items():
            by_name.update((video, instruction) for video in keys.get(key, ()))
    return Instructions(by_name, warnings)


def _keys_below(folder: str, videos: Sequence[str]) -> dict[str, list[str]]:
    """The videos in a folder and below, by every key that may stand for them."""
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
    """Names of videos and their instructions, and how many rows are too short.

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
    # JSON can write characters that are none.
    "".join(itertools.chain.from_iterable(content)).encode()
    return list(content), 0


def _read_csv(text: str) -> tuple[list[tuple[str, str]], int]:
    rows = csv.reader(io.StringIO(text, newline=""))
    header = [column.strip().lower() for column in next(rows, [])]
    files = [index for index, column in enumerate(header) if column in FILE_COLUMNS]
    instructions = [index for index, column in enumerate(header) if column in INSTRUCTION_COLUMNS]
    if not files or not instructions:
        raise ValueError(
            f"expected a column {' or '.join(FILE_COLUMNS)} and a column {' or '.join(INSTRUCTION_COLUMNS)}"
        )
    file, instruction = files[0], instructions[0]
    filled = [row for row in rows if any(row)]
    pairs = [(row[file], row[instruction]) for row in filled if len(row) > max(file, instruction)]
    return pairs, len(filled) - len(pairs)
