"""Where arrays live: parameter path -> logical axes -> mesh axes, in one table.

Models know nothing of this. Batches are split over `data` and `fsdp`, parameters and optimiser moments over `fsdp`
and `tensor`.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from como_jax.errors import MeshError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_SPEC = PartitionSpec(("data", "fsdp"))

# The first pattern that ends the path wins. Axes name the trailing dimensions, so that stacked layers, with one
# more leading axis, need no entry of their own.
LOGICAL_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"attn/qkv/kernel", ("embed", None, "heads", None)),
    (r"attn/qkv/bias", (None, "heads", None)),
    (r"attn/q/kernel", ("embed", "heads", None)),
    (r"attn/kv/kernel", ("embed", None, "heads", None)),
    (r"attn/proj/kernel", ("heads", None, "embed")),
    (r"mlp/fc1/kernel", ("embed", "mlp")),
    (r"mlp/fc1/bias", ("mlp",)),
    (r"mlp/fc2/kernel", ("mlp", "embed")),
    (r"kernel", ("embed", None)),
)
MESH_AXIS_OF: dict[str, str] = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor"}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes what the others leave.

    Raises:
      MeshError: the sizes do not multiply to the number of devices.
    """
    sizes, devices = [data, fsdp, tensor], jax.device_count()
    shape = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise MeshError(f"mesh {shape}: sizes must be positive, and one at most may be -1.")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        raise MeshError(f"mesh {shape} does not fit {devices} devices; set one axis to -1 to fill.")
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(mesh: Mesh, batch_size: int, accumulation: int) -> None:
    """Raises MeshError unless every device gets the same number of elements of every microbatch."""
    parts = batch_shards(mesh) * accumulation
    if batch_size % parts or batch_size % jax.process_count():
        fits = max(1, batch_size // parts) * parts
        raise MeshError(
            f"batch size {batch_size} is not divisible by {batch_shards(mesh)} devices x {accumulation} "
            f"accumulation steps; the nearest sizes that fit are {fits} and {fits + parts}."
        )


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The sharding of one parameter, or of a moment that carries its path; uneven dimensions stay whole."""
    for pattern, axes in LOGICAL_AXES:
        if re.search(rf"(^|/){pattern}$", path) and len(shape) >= len(axes):
            break
    else:
        return PartitionSpec()
    padded = (None,) * (len(shape) - len(axes)) + axes
    spec = []
    for size, axis in zip(shape, padded, strict=True):
        mesh_axis = MESH_AXIS_OF.get(axis) if axis else None
        fits = mesh_axis is not None and mesh.shape[mesh_axis] > 1 and size % mesh.shape[mesh_axis] == 0
        spec.append(mesh_axis if fits else None)
    return PartitionSpec(*spec)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for every leaf of a state tree (arrays or shapes), by its path."""

    def leaf(path: tuple[Any, ...], value: Any) -> NamedSharding:
        return NamedSharding(mesh, param_spec(path_name(path), value.shape, mesh))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def path_name(path: tuple[Any, ...]) -> str:
    """`encoder/blocks/.../kernel` of a key path."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds everything."""
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this host's part of a batch of NumPy arrays on its devices, as parts of global arrays."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.ascontiguousarray(x)), batch)
