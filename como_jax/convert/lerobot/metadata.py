"""What the folder `meta` of a LeRobot dataset says, in one form for all format versions.

The formats are those of https://github.com/huggingface/lerobot: v2.0 and v2.1 have one table and one video of
each camera for every episode, v3.0 joins several episodes in one file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from como_jax.convert.lerobot import episode_lists
from como_jax.convert.lerobot.episode_lists import EpisodeEntry
from como_jax.convert.lerobot.files import FileIndex
from como_jax.convert.lerobot.values import finite_float, parse_json, whole
from como_jax.convert.listing import check_file
from como_jax.convert.rlds.builder import VALIDATION_SPLITS
from como_jax.errors import ConversionError

INFO_PATH = "meta/info.json"
_VERSIONS = ("v2.0", "v2.1", "v3.0")
_DEPTH_FLAGS = ("video.is_depth_map", "is_depth_map")


@dataclasses.dataclass(frozen=True)
class Feature:
    """One column of the steps, or one camera.

    Attributes:
      dtype: a type of NumPy, `video`, `image` or `string`.
      shape: without the time axis, or None when the dataset does not say.
      is_depth: whether the pictures of a camera are distances.
    """

    dtype: str
    shape: tuple[int, ...] | None
    is_depth: bool = False

    @property
    def is_camera(self) -> bool:
        """Whether it is a camera, by video or by pictures in the table."""
        return self.dtype in ("video", "image")


@dataclasses.dataclass(frozen=True)
class Metadata:
    """A LeRobot dataset without its data.

    Attributes:
      root: the folder.
      fps: control steps per second, or None when the dataset does not say.
      features: what the steps hold, by key.
      validation: positions among the episodes that info.json calls a validation split; empty without any.
      episodes: in order of their numbers, which may have gaps.
      tasks: instruction by task index.
      files: everything that lies in the folder.
      warnings: what looks wrong in the metadata.
    """

    root: epath.Path
    fps: float | None
    features: Mapping[str, Feature]
    validation: tuple[range, ...]
    episodes: tuple[EpisodeEntry, ...]
    tasks: Mapping[int, str]
    files: FileIndex
    warnings: tuple[str, ...]


def read_metadata(folder: epath.PathLike) -> Metadata:
    """Reads the metadata of a dataset.

    Raises:
      ConversionError: not a LeRobot dataset, of an unknown version, or its metadata cannot be read.
    """
    root = epath.Path(folder)
    info = _read_info(root)
    version = info.get("codebase_version")
    if version not in _VERSIONS:
        raise ConversionError(
            f"{root / INFO_PATH}: codebase_version {version!r} is not known; there are {', '.join(_VERSIONS)}"
        )
    features = {key: _feature(value) for key, value in _mapping(root, info, "features").items()}
    videos = [key for key, feature in features.items() if feature.dtype == "video"]
    files = FileIndex(root)
    warnings: list[str] = []
    read_list, read_tasks = (
        (episode_lists.read_v3, episode_lists.read_v3_tasks)
        if version == "v3.0"
        else (episode_lists.read_v2, episode_lists.read_v2_tasks)
    )
    episodes = read_list(root, info, videos, files, warnings)
    if not episodes:
        raise ConversionError(f"{root} is a LeRobot dataset without episodes")
    tasks = read_tasks(root, files, warnings)
    return Metadata(
        root=root,
        fps=_fps(info),
        features=features,
        validation=_validation(root, info),
        episodes=tuple(sorted(episodes, key=lambda episode: episode.index)),
        tasks=tasks,
        files=files,
        warnings=tuple(warnings),
    )


def _read_info(root: epath.Path) -> dict[str, Any]:
    if not root.is_dir():
        raise ConversionError(f"source folder {root} does not exist")
    path = root / INFO_PATH
    if not path.exists():
        raise ConversionError(f"source folder {root} holds no LeRobot dataset (no {INFO_PATH})")
    try:
        check_file(path)
        info = parse_json(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if not isinstance(info, dict):
        raise ConversionError(f"{path} must hold a JSON object")
    return info


def _mapping(root: epath.Path, info: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = info.get(key)
    if not isinstance(value, dict):
        raise ConversionError(f"{root / INFO_PATH}: {key} must be an object, got {value!r}")
    return value


def _fps(info: Mapping[str, Any]) -> float | None:
    fps = finite_float(info.get("fps"))
    return fps if fps and fps > 0 else None


def _validation(root: epath.Path, info: Mapping[str, Any]) -> tuple[range, ...]:
    """The ranges of splits such as `{"train": "0:90", "val": "90:100"}` that are for validation."""
    splits = _mapping(root, info, "splits") if info.get("splits") else {}
    ranges = []
    for name, text in splits.items():
        if name in VALIDATION_SPLITS:
            bounds = re.fullmatch(r"(\d+):(\d+)", str(text))
            if bounds is None:
                raise ConversionError(f"{root / INFO_PATH}: split {name!r} must be START:STOP, got {text!r}")
            ranges.append(range(int(bounds[1]), int(bounds[2])))
    return tuple(ranges)


def _feature(value: Any) -> Feature:
    """A feature as `info.json` describes it; what is missing is found out with the data."""
    value = value if isinstance(value, dict) else {}
    shape = value.get("shape")
    sizes = tuple(whole(size) or 0 for size in shape) if isinstance(shape, list) else (0,)
    # v2.0 calls it `video_info`, later versions `info`.
    details = [value.get(key) for key in ("info", "video_info")]
    flags = [entry.get(key) for entry in details if isinstance(entry, dict) for key in _DEPTH_FLAGS]
    return Feature(str(value.get("dtype", "")), sizes if all(size > 0 for size in sizes) else None, any(flags))
