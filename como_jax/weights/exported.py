"""Reads back what `tools.export_torch` wrote, as parameters of the JAX model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from etils import epath
from flax import traverse_util

from como_jax.spec.exported import WEIGHTS_NAME, Exported, read_description
from como_jax.weights.tables import DeepTable, make_parameters
from como_jax.weights.tensors import Tensors


def read_exported(
    directory: epath.PathLike, kind: type[Exported], make_table: Callable[[Exported], DeepTable]
) -> tuple[Exported, dict[str, Any]]:
    """What config.json says of an exported model, and its parameters, nested by module name.

    Args:
      directory: of the export.
      kind: of model that it holds.
      make_table: where the parameters lie, from what config.json says.

    Raises:
      RunError: a file is missing or damaged, or they do not fit each other.
    """
    described, _ = read_description(directory, kind)
    tensors = Tensors(epath.Path(directory) / WEIGHTS_NAME)
    params = make_parameters(make_table(described), tensors)
    tensors.check_unread()
    return described, traverse_util.unflatten_dict(params, sep="/")
