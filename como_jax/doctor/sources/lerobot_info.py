"""What `info.json` of a LeRobot dataset says, against the files that there are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from como_jax.convert.lerobot.metadata import INFO_PATH, Metadata
from como_jax.doctor.findings import Finding, Severity, name_dimensions, name_some

_MEND = f"Conversion does without it; mend {INFO_PATH} before other programs read it."
_BY_NAME = "path templates"
_DEFAULT_CHUNK_SIZE = 1000


def check_info(root: epath.Path, metadata: Metadata) -> Iterator[Finding]:
    """Everything in `info.json` that the files contradict."""
    info = json.loads((root / INFO_PATH).read_text())
    yield from _check_cameras(metadata)
    yield from _check_totals(info, metadata)
    yield from _check_templates(info, metadata)
    yield from _check_numbers(metadata)
    for warning in metadata.warnings:
        if _BY_NAME not in warning:
            yield Finding(Severity.WARNING, "metadata", f"{warning}.", "Conversion copes with it; mend the metadata.")


def cameras_without_files(metadata: Metadata) -> list[str]:
    """Keys of the video cameras none of whose files is there."""
    return [
        key
        for key, feature in metadata.features.items()
        if feature.dtype == "video"
        and not any(entry.videos[key].path in metadata.files for entry in metadata.episodes if key in entry.videos)
    ]


def _check_cameras(metadata: Metadata) -> Iterator[Finding]:
    missing = cameras_without_files(metadata)
    if missing:
        yield Finding(
            Severity.WARNING,
            "camera-without-files",
            f"{INFO_PATH} lists {'cameras' if len(missing) > 1 else 'a camera'} without files: {name_some(missing)}.",
            "Conversion leaves it out; remove it from the list, or fetch its files if they should be there.",
        )


def _check_totals(info: dict[str, Any], metadata: Metadata) -> Iterator[Finding]:
    counted: dict[str, int] = {
        "total_episodes": len(metadata.episodes),
        "total_tasks": len(metadata.tasks),
        "total_videos": len(metadata.files.below("videos", ".mp4")),
        "total_chunks": len({path.rpartition("/")[0] for path in metadata.files.below("data", ".parquet")}),
    }
    lengths = [entry.length for entry in metadata.episodes]
    if None not in lengths:
        counted["total_frames"] = sum(length or 0 for length in lengths)
    wrong = [
        f"{name} is {info[name]}, and there are {count}"
        for name, count in counted.items()
        if name in info and info[name] != count
    ]
    if wrong:
        yield Finding(Severity.WARNING, "wrong-totals", f"{INFO_PATH} counts wrongly: {'; '.join(wrong)}.", _MEND)


def _check_templates(info: dict[str, Any], metadata: Metadata) -> Iterator[Finding]:
    """Path templates of the versions with one file an episode that lead to no file."""
    if info.get("codebase_version") == "v3.0":
        return
    chunk_size = info.get("chunks_size")
    size = chunk_size if isinstance(chunk_size, int) and chunk_size > 0 else _DEFAULT_CHUNK_SIZE
    for name, key in [("data_path", ""), *(("video_path", key) for key in _stored_cameras(metadata))]:
        if not isinstance(info.get(name), str):
            continue
        astray = []
        for entry in metadata.episodes:
            actual = entry.videos[key].path if key else entry.table
            fields = {"episode_index": entry.index, "episode_chunk": entry.index // size, "video_key": key}
            led = _fill(info[name], fields)
            if led != actual and actual in metadata.files:
                astray.append((led, actual))
        if astray:
            led, actual = astray[0]
            yield Finding(
                Severity.WARNING,
                "wrong-template",
                f"{name} of {INFO_PATH} ({info[name]}) leads to {led or 'nowhere'}, but the file is {actual}; "
                f"{len(astray)} of {len(metadata.episodes)} files lie elsewhere than it says.",
                f"The template is keyed on the wrong index or folder: {_MEND[0].lower()}{_MEND[1:]}",
            )


def _stored_cameras(metadata: Metadata) -> list[str]:
    missing = cameras_without_files(metadata)
    return [key for key, feature in metadata.features.items() if feature.dtype == "video" and key not in missing]


def _fill(template: str, fields: dict[str, Any]) -> str:
    try:
        return template.format(**fields)
    except (AttributeError, LookupError, TypeError, ValueError):
        return ""


def _check_numbers(metadata: Metadata) -> Iterator[Finding]:
    numbers = [entry.index for entry in metadata.episodes]
    if numbers != list(range(len(numbers))):
        yield Finding(
            Severity.WARNING,
            "episode-numbers",
            f"Episode numbers are not contiguous from 0: {_shorten(name_dimensions(numbers))}.",
            "Conversion takes the episodes that there are; splits and indices of other programs may mean others.",
        )


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[:limit].rpartition(',')[0]}, …"
