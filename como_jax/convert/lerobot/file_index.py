"""The files of a LeRobot dataset, and where its path templates say that they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath

from como_jax.convert.walking import walk

_FOLDERS = ("data", "meta", "videos")
_DEFAULT_CHUNK_SIZE = 1000


class FileIndex:
    """All files of a dataset, listed once.

    Attributes:
      paths: paths relative to the dataset.
      chunk_size: number of episodes in a folder, which some path templates need.
      found_by_name: number of files that `find` found although the path template led elsewhere.
      not_followed: links that lead to a folder which they lie in.
    """

    def __init__(self, root: epath.Path, chunk_size: int | None = None):
        self.paths: set[str] = set()
        self.chunk_size = chunk_size if chunk_size is not None and chunk_size >= 1 else _DEFAULT_CHUNK_SIZE
        self.found_by_name = 0
        self.not_followed: list[str] = []
        self._by_name: dict[str, list[str]] = {}
        for top in _FOLDERS:
            for folder, files, not_followed in walk(root / top):
                self.not_followed += [(folder / name).relative_to(root).as_posix() for name in not_followed]
                for name in files:
                    path = (folder / name).relative_to(root).as_posix()
                    self.paths.add(path)
                    self._by_name.setdefault(name, []).append(path)

    def __contains__(self, path: str) -> bool:
        return path in self.paths

    def below(self, folder: str, suffix: str) -> list[str]:
        """Returns the files with a suffix in a folder and below, sorted."""
        return sorted(path for path in self.paths if path.startswith(f"{folder}/") and path.endswith(suffix))

    def fields(self, index: int, camera: str = "") -> dict[str, Any]:
        """Returns the values for the path templates of an episode (v2.0 and v2.1)."""
        return {"episode_index": index, "episode_chunk": index // self.chunk_size, "video_key": camera}

    def find(self, template: Any, standard: str, part: str, fields: Mapping[str, Any]) -> str:
        """Finds a file by its path template, or by its name if the template leads to no file.

        The file name of the `standard` template is unique among the files whose path goes through the folder `part`.
        """
        path = fill(template, standard, fields)
        if path in self:
            return path
        name = standard.format(**fields).rpartition("/")[2]
        matches = [match for match in self._by_name.get(name, ()) if part in match.split("/")[:-1]]
        if len(matches) != 1:
            return path
        self.found_by_name += 1
        return matches[0]


def fill(template: Any, standard: str, fields: Mapping[str, Any]) -> str:
    """Fills in a path template, or the standard one if that is not possible."""
    if isinstance(template, str):
        try:
            return template.format(**fields)
        except (AttributeError, LookupError, TypeError, ValueError):
            pass
    return standard.format(**fields)
