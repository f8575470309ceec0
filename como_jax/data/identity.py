"""Which data a run or a labelling was begun on: the identity of a dataset, by which it is known again.

The identity is made of what is in the dataset, not of where it lies: a dataset that was moved, or converted again with
the same result, is the same one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from como_jax.data import schema
from como_jax.data.episode_table import has_split
from como_jax.data.sources import READ_ERRORS, EpisodeSource

Identity = dict[str, Any]
"""Facts about a dataset and digests of its content, by name, as JSON can hold them."""

# Settings of a conversion that say where something lies, and not what becomes of it.
_PLACES = ("source", "data_dir", "table")
_IMAGES = 16
_MAX_SHOWN = 60


def identify(directory: epath.PathLike, opened: Iterable[EpisodeSource] = ()) -> Identity:
    """The identity of a dataset.

    Args:
      directory: of the dataset.
      opened: splits of it that are open already, which spares reading them again.

    Raises:
      DatasetError: the dataset is missing or damaged.
    """
    folder = epath.Path(directory)
    known = {source.split: source for source in opened}
    there = [split for split in schema.SPLITS if has_split(folder, split)]
    # Opening a split that is missing says what is wrong.
    sources = [known.get(split) or EpisodeSource(folder, split) for split in there or schema.SPLITS[:1]]
    labels, report = _read_json(folder / schema.LABELS_NAME), _read_json(folder / "conversion_report.json")
    settings = {name: value for name, value in report.get("settings", {}).items() if name not in _PLACES}
    return {
        **{f"episodes of {source.split}": len(source.length) for source in sources},
        **{f"steps of {source.split}": len(source) for source in sources},
        "instructions": _digest_columns(sources, "language_instruction", "other_instructions"),
        "episodes": _digest_columns(sources, "episode_id", "num_steps"),
        "control rates": _digest_columns(sources, "control_rate"),
        "images": _digest(_some_images(sources), _digest_columns(sources, "motion")),
        "actions": _digest_columns(sources, "action"),
        "states": _digest_columns(sources, "state"),
        "labels": _digest_columns(sources, "latent_motion", "latent_valid", "latent_codes"),
        "model of the labels": labels.get("parameters"),
        "statistics": _digest([_read_json(folder / "statistics.json")]),
        "builder": report.get("builder"),
        "conversion": settings,
    }


def digest_vectors(vectors: Mapping[str, np.ndarray]) -> str | None:
    """A digest of vectors by their names, in any order."""
    return _digest(part for name in sorted(vectors) for part in (name, vectors[name]))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, in words."""
    return [text for name in dict.fromkeys([*before, *now]) for text in _change(name, before.get(name), now.get(name))]


def _change(name: str, before: Any, now: Any) -> list[str]:
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        return changes(before, now)
    values = f"{name} {_shown(before)}, now {_shown(now)}"
    return [values if "digest" not in values and len(values) <= _MAX_SHOWN else f"other {name}"]


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _some_images(sources: Iterable[EpisodeSource]) -> Iterator[np.ndarray]:
    """The bytes of a few images, evenly spread: reading all would take as long as training on them."""
    for source in sources:
        for record in np.unique(np.linspace(0, len(source) - 1, _IMAGES).astype(np.int64)).tolist():
            try:
                [images] = source.read_cameras([record], source.cameras)
            except READ_ERRORS:
                continue
            yield from (np.frombuffer(image, np.uint8) for image in images)


def _digest_columns(sources: Iterable[EpisodeSource], *names: str) -> str | None:
    """A digest of columns of the episode tables, whatever their groups; None where all values are missing."""
    digest, is_empty = hashlib.blake2b(digest_size=12), True
    for source in sources:
        columns = {name: _ColumnDigest() for name in names}
        for table in source.table.read(names):
            for name, column in columns.items():
                for chunk in table[name].chunks:
                    column.add(chunk)
        for name, column in columns.items():
            digest.update(f"{name} {column.hexdigest()}".encode())
            is_empty &= column.is_empty
    return None if is_empty else f"digest {digest.hexdigest()}"


class _ColumnDigest:
    """A digest of a column that comes in pieces: of the lengths of its lists, and of the values in them."""

    def __init__(self) -> None:
        self.is_empty = True
        self._levels: list[hashlib.blake2b] = []

    def add(self, values: pa.Array) -> None:
        """Adds the next rows."""
        self.is_empty &= values.null_count == len(values)
        for level in itertools.count():
            if level == len(self._levels):
                self._levels.append(hashlib.blake2b(digest_size=12))
            if not pa.types.is_list(values.type):
                break
            self._levels[level].update(values.value_lengths().fill_null(-1).to_numpy().data)
            values = values.flatten()
        if pa.types.is_string(values.type):
            self._levels[level].update("".join(f"{json.dumps(text)}," for text in values.to_pylist()).encode())
        else:
            self._levels[level].update(np.ascontiguousarray(values.to_numpy(zero_copy_only=False)).data)

    def hexdigest(self) -> str:
        return " ".join(level.hexdigest() for level in self._levels)


def _digest(parts: Iterable[np.ndarray | Any], more: str | None = None) -> str | None:
    """A digest of arrays and what JSON can hold; None where there are none."""
    digest, is_empty = hashlib.blake2b(f"{more}".encode(), digest_size=12), more is None
    for part in parts:
        is_empty = False
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(json.dumps(part, sort_keys=True).encode())
    return None if is_empty else f"digest {digest.hexdigest()}"


def _read_json(path: epath.Path) -> dict[str, Any]:
    """An object of a JSON file; empty where there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
