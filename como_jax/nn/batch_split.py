"""How models keep their batch where it is, on a mesh of which they know the names of two axes alone."""

from __future__ import annotations

import math

import jax
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp")
BATCH_SPEC = PartitionSpec(BATCH_AXES)


def keep_batch_split(x: jax.Array) -> jax.Array:
    """`x`, whose leading axis is that of the batch, split like a batch over the mesh in use; without one just `x`.

    Left to itself, the partitioner splits the width of activations over `fsdp`, as that of the parameters is, and then
    every device computes the whole batch. Axes but the first stay free, so that `tensor` can split heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or len(x) % math.prod(mesh.shape[axis] for axis in BATCH_AXES):
        return x
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*BATCH_SPEC, *free))
