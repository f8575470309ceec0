"""Where arrays live: parameter path -> logical axes -> mesh axes, in one table.

Models know of it what `como_jax.nn.primitives` says. Batches are split over `data` and `fsdp`, parameters and
optimiser moments over `fsdp` and `tensor`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from como_jax.errors import MeshError
from como_jax.nn.primitives import BATCH_AXES, BATCH_SPEC

MESH_AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """The `mesh` section of a recipe: devices along each axis; -1 on one axis takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


# The first pattern that ends the path wins. Axes name the trailing dimensions, so that stacked layers, with one
# more leading axis, need no entry of their own.
LOGICAL_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(cross_)?attn/qkv/kernel", ("embed", None, "heads", None)),
    (r"(cross_)?attn/qkv/bias", (None, "heads", None)),
    (r"(cross_)?attn/[qkv]/kernel", ("embed", "heads", None)),
    (r"(cross_)?attn/kv/kernel", ("embed", None, "heads", None)),
    (r"(cross_)?attn/proj/kernel", ("heads", None, "embed")),
    (r"mlp/(fc1|gate|up)/kernel", ("embed", "mlp")),
    (r"mlp/fc1/bias", ("mlp",)),
    (r"mlp/(fc2|down)/kernel", ("mlp", "embed")),
    (r"text/table", ("vocabulary", "embed")),
    (r"kernel", ("embed", None)),
)
MESH_AXIS_OF: dict[str, str] = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocabulary": "tensor"}


def make_mesh(
    data: int = MeshSettings.data,
    fsdp: int = MeshSettings.fsdp,
    tensor: int = MeshSettings.tensor,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over all devices, or over those given; one axis may be -1 and takes what the others leave.

    Over several TPU slices, `data` is split first, so that the network between them carries gradients alone.

    Raises:
      MeshError: the sizes do not multiply to the number of devices, or `data` to that of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _fill([data, fsdp, tensor], len(devices))
    types = (AxisType.Auto,) * len(MESH_AXES)
    # Only devices of several slices say which is theirs.
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1
    if sizes[0] % slices:
        raise MeshError(f"mesh {_shape_text(sizes)}: data must be a multiple of the {slices} slices.")
    # Otherwise a torus of 16 x 16 chips takes no axes but of 1, 16 and 256.
    options = {"allow_split_physical_axes": True}
    if slices < 2:
        placed = mesh_utils.create_device_mesh(sizes, devices, **options)
    else:
        of_slice = (sizes[0] // slices, *sizes[1:])
        placed = mesh_utils.create_hybrid_device_mesh(of_slice, (slices, 1, 1), devices, **options)
    return Mesh(placed, MESH_AXES, axis_types=types)


def _fill(sizes: list[int], devices: int) -> list[int]:
    """The sizes, with the number of remaining devices in place of -1."""
    shape = _shape_text(sizes)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise MeshError(f"mesh {shape}: sizes must be positive, and one at most may be -1.")
    known = math.prod(size for size in sizes if size != -1)
    filled = [devices // known if size == -1 else size for size in sizes]
    if math.prod(filled) != devices:
        raise MeshError(f"mesh {shape} does not fit {devices} devices; set one axis to -1 to fill.")
    return filled


def _shape_text(sizes: Sequence[int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))


def batch_shards(mesh: Mesh) -> int:
    """The number of parts into which a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


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
    """A sharding for every leaf of a tree of arrays or shapes, which follows from the path of the leaf."""

    def leaf(path: tuple[Any, ...], value: Any) -> NamedSharding:
        return NamedSharding(mesh, param_spec(path_name(path), value.shape, mesh))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def path_name(path: tuple[Any, ...]) -> str:
    """A key path as text, such as `encoder/blocks/.../kernel`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array of which every device holds all."""
    return NamedSharding(mesh, PartitionSpec())


def jit(function: Callable[..., Any], mesh: Mesh, **options: Any) -> jax.stages.Wrapped:
    """`jax.jit` of a function in which `mesh` is in use, so that models keep their batches split over it."""

    @functools.wraps(function)
    def on_mesh(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return jax.jit(on_mesh, **options)


@functools.lru_cache(maxsize=64)
def jit_once(function: Callable[..., Any], mesh: Mesh, *first: Any, **options: Any) -> jax.stages.Wrapped:
    """`jit` of a function whose first arguments are given, such as a model.

    Equal calls return the same function, so that what several runs or evaluations of one process do is compiled once.
    All arguments are hashable, and the function is one of a module.
    """
    return jit(functools.partial(function, *first), mesh, **options)


def batch_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Rows of a global batch that this host's devices hold, ascending; hosts that `tensor` spans hold the same."""
    places = NamedSharding(mesh, BATCH_SPEC).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[place] for place in places.values()]))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this host's rows of a batch of NumPy arrays, `batch_rows`, on its devices, as parts of global arrays."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.ascontiguousarray(x)), batch)
