"""Which data a run or a labelling was begun on: the identity of a dataset, by which it is known again.

The identity is made of what is in the dataset, not of where it lies: a dataset that was moved, or converted again with
the same result, is the same one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from como_jax.data import schema
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
    there = [split for split in schema.SPLITS if any(folder.glob(f"episodes-{split}-*.parquet"))]
    # Opening a split that is missing says what is wrong.
    sources = [known.get(split) or EpisodeSource(folder, split) for split in there or schema.SPLITS[:1]]
    labels, report = _read_json(folder / schema.LABELS_NAME), _read_json(folder / "conversion_report.json")
    settings = {name: value for name, value in report.get("settings", {}).items() if name not in _PLACES}
    return {
        **{f"episodes of {source.split}": len(source.length) for source in sources},
        **{f"steps of {source.split}": len(source) for source in sources},
        "instructions": _digest(part for source in sources for part in (source.instruction, source.other_instructions)),
        "episodes": _digest(part for source in sources for part in (source.episode_id, source.length)),
        "control rates": _digest(source.control_rate for source in sources),
        "images": _digest(part for source in sources for part in (source.motion, *_some_images(source))),
        "actions": _digest(source.action for source in sources),
        "states": _digest(source.state for source in sources),
        "labels": _digest(part for source in sources for part in _labels_of(source)),
        "model of the labels": labels.get("parameters"),
        "statistics": _digest([[json.dumps(_read_json(folder / "statistics.json"), sort_keys=True)]]),
        "builder": report.get("builder"),
        "conversion": settings,
    }


def digest_vectors(vectors: Mapping[str, np.ndarray]) -> str | None:
    """A digest of vectors by their names, in any order."""
    return _digest(part for name in sorted(vectors) for part in ([name], vectors[name]))


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


def _some_images(source: EpisodeSource) -> Iterator[np.ndarray]:
    """The bytes of a few images, evenly spread: reading all would take as long as training on them."""
    for record in np.unique(np.linspace(0, len(source) - 1, _IMAGES).astype(np.int64)).tolist():
        try:
            [images] = source.read_cameras([record], source.cameras)
        except READ_ERRORS:
            continue
        yield from (np.frombuffer(image, np.uint8) for image in images)


def _labels_of(source: EpisodeSource) -> list[np.ndarray | None]:
    return [source.latent_motion, source.latent_valid, source.latent_codes]


def _digest(parts: Iterable[np.ndarray | list[Any] | None]) -> str | None:
    """A digest of arrays and texts; None where there are none."""
    digest, is_empty = hashlib.blake2b(digest_size=12), True
    for part in parts:
        if part is None:
            digest.update(b"none")
            continue
        is_empty = False
        if isinstance(part, list):
            digest.update(json.dumps(part).encode())
        else:
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
    return None if is_empty else f"digest {digest.hexdigest()}"


def _read_json(path: epath.Path) -> dict[str, Any]:
    """An object of a JSON file; empty where there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
