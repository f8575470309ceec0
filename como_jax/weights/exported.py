"""Reads back what `tools.export_torch` wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from etils import epath
from flax import traverse_util

from como_jax.errors import RunError
from como_jax.weights.tables import DeepTable, make_parameters
from como_jax.weights.tensors import CONFIG_NAME, Tensors, read_json

WEIGHTS_NAME = "model.safetensors"


def read_exported(
    directory: epath.PathLike, make_table: Callable[[Mapping[str, Any]], DeepTable], kind: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What config.json says of an exported model, and its parameters, nested by module name.

    Args:
      directory: of the export.
      make_table: where the parameters lie, from what config.json says.
      kind: of the model, for messages.

    Raises:
      RunError: a file is missing or damaged, or they do not fit each other.
    """
    path = epath.Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise RunError(f"{path} does not exist; {directory} is no exported {kind}.")
    described = read_json(path)
    try:
        table = make_table(described)
    except (AttributeError, LookupError, TypeError) as error:
        raise RunError(f"{path} describes no {kind} of this version: {error}") from error
    tensors = Tensors(path.parent / WEIGHTS_NAME)
    params = make_parameters(table, tensors)
    tensors.check_unread()
    return described, traverse_util.unflatten_dict(params, sep="/")
