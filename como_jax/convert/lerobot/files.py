"""The files of a LeRobot dataset, by path and by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath

_FOLDERS = ("data", "meta", "videos")


class FileIndex:
    """All files of a dataset, listed once.

    Attributes:
      paths: relative to the dataset.
      found_by_name: how many files `find` found although the path template led elsewhere.
    """

    def __init__(self, root: epath.Path):
        """Lists the files."""
        self.paths: set[str] = set()
        self.found_by_name = 0
        self._by_name: dict[str, list[str]] = {}
        for top in _FOLDERS:
            for folder, _, files in (root / top).walk():
                for name in files:
                    path = (folder / name).relative_to(root).as_posix()
                    self.paths.add(path)
                    self._by_name.setdefault(name, []).append(path)

    def __contains__(self, path: str) -> bool:
        """Whether there is such a file."""
        return path in self.paths

    def below(self, folder: str, suffix: str) -> list[str]:
        """The files with a suffix in a folder and below, sorted."""
        return sorted(path for path in self.paths if path.startswith(f"{folder}/") and path.endswith(suffix))

    def find(self, template: Any, standard: str, part: str, fields: Mapping[str, Any]) -> str:
        """Where a file lies by its template, or by its standard name if the template leads to no file.

        Args:
          template: path with fields in braces; whatever cannot be filled in is replaced by `standard`.
          standard: the template of the format, whose file name is unique within `part`.
          part: a folder that the path of the file goes through.
          fields: values for the templates.
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
    """Fills in a path template; takes the standard one if that is not possible."""
    if isinstance(template, str):
        try:
            return template.format(**fields)
        except (AttributeError, LookupError, TypeError, ValueError):
            pass
    return standard.format(**fields)
