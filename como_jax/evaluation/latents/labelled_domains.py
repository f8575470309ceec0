"""Labelled datasets as the domains of a transfer matrix: opened, checked to be of one model, and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from como_jax.data.label_info import LABELS_NAME
from como_jax.data.mixture import MixtureEntry
from como_jax.data.sources import EpisodeSource
from como_jax.errors import ConfigError, DatasetError
from como_jax.evaluation.latents.domains import TransferMatrix, transfer_figure, transfer_matrix
from como_jax.files import write_atomic, write_json

MATRIX_NAME, FIGURE_NAME = "domains.json", "domains.png"


def compare_labelled(
    labelled: str, action_classes: epath.PathLike | None, parameters: str, notes: list[str]
) -> TransferMatrix:
    """Compares the training episodes of labelled datasets, or the held-out ones of datasets without others.

    Args:
      labelled: DIR,DIR, each a domain of its directory's name.
      action_classes: see `read_action_classes`.
      parameters: digest of the evaluated model's parameters, as labels.json has it.
      notes: is told where labels are of another model or cannot be traced.

    Raises:
      DatasetError: fewer than two datasets, one without labels, or labels of different models or gaps.
      ConfigError: `action_classes` holds no classes.
    """
    directories = [epath.Path(name.strip()) for name in labelled.split(",") if name.strip()]
    if len(directories) < 2:
        raise DatasetError(f"--labelled {labelled} names no two datasets; transfer is measured between domains.")
    classes = None if action_classes is None else read_action_classes(action_classes)
    sources = {name: _open(directory) for name, directory in _named(directories).items()}
    matrix = transfer_matrix(sources, action_classes=classes)
    _check_origins(directories, parameters, notes)
    return matrix


def read_action_classes(path: epath.PathLike) -> dict[str, str]:
    """The action that each instruction stands for, from a JSON object of strings."""
    try:
        classes = json.loads(epath.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--action_classes {path} cannot be read: {error}") from error
    if not isinstance(classes, dict) or not all(isinstance(value, str) for value in classes.values()):
        raise ConfigError(f'--action_classes {path} must be an object of strings: {{"INSTRUCTION": "ACTION"}}.')
    return classes


def write_matrix(out: epath.Path, matrix: TransferMatrix) -> None:
    """Writes domains.json, with null where nothing is compared, and domains.png."""
    tables = {name: getattr(matrix, name) for name in ("same", "other", "gap", "p_value", "common")}
    content = {"names": matrix.names, **{name: _rows(table) for name, table in tables.items()}, "notes": matrix.notes}
    write_json(out / MATRIX_NAME, content)
    figure = transfer_figure(matrix)
    write_atomic(out / FIGURE_NAME, lambda file: figure.savefig(file, format="png", dpi=110))


def _rows(table: np.ndarray) -> list[list[float | int | None]]:
    return [[None if np.isnan(value) else value.item() for value in row] for row in table]


def _named(directories: Sequence[epath.Path]) -> dict[str, epath.Path]:
    """By the names of the directories, with their position before it where two would be equal."""
    names = [directory.name for directory in directories]
    unique = len(set(names)) == len(names)
    return {
        name if unique else f"{number}_{name}": directory
        for number, (name, directory) in enumerate(zip(names, directories, strict=True))
    }


def _open(directory: epath.Path) -> EpisodeSource:
    entry = MixtureEntry(str(directory))
    return EpisodeSource(directory, "val" if entry.has_split("val") and not entry.has_split("train") else "train")


def _check_origins(directories: Sequence[epath.Path], parameters: str, notes: list[str]) -> None:
    """Latents of two models, or of two gaps, lie in spaces that have nothing to do with each other."""
    origins = {directory: _origin(directory) for directory in directories}
    known = {directory: origin for directory, origin in origins.items() if origin is not None}
    notes += [
        f"{directory}: it has no {LABELS_NAME}, so nothing tells whether its labels are of the same model."
        for directory in origins.keys() - known.keys()
    ]
    for what, values in (
        ("model", {directory: origin["parameters"] for directory, origin in known.items()}),
        ("gap_seconds", {directory: origin["settings"]["gap_seconds"] for directory, origin in known.items()}),
    ):
        if len(set(values.values())) > 1:
            first, *rest = values
            other = next(directory for directory in rest if values[directory] != values[first])
            raise DatasetError(
                f"--labelled {first} and {other} are labelled with another {what} each; label all with the same."
            )
    if any(origin["parameters"] != parameters for origin in known.values()):
        notes.append("Transfer between domains is of labels that another model than this made.")


def _origin(directory: epath.Path) -> Mapping[str, Any] | None:
    try:
        origin = json.loads((directory / LABELS_NAME).read_text())
        return {"parameters": origin["parameters"], "settings": {"gap_seconds": origin["settings"]["gap_seconds"]}}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{directory / LABELS_NAME} is damaged: {error!r}; label the dataset again.") from error
