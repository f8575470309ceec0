"""What lies beneath all layers: matrix products in mixed precision, and activations that stay split over the batch.

Parameters are float32 and activations may be of another dtype. A kernel that is cast to bfloat16 before the product
gets a bfloat16 gradient: first of every chip's samples, then of the samples of all chips, a sum that loses a small term
beside a large one. Here the product that computes the gradient gives float32, which is also what the chips exchange.

Axes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

# The mesh axes over which a batch is split: all that models know of a mesh.
BATCH_AXES = ("data", "fsdp")
BATCH_SPEC = PartitionSpec(BATCH_AXES)

xavier_uniform = nnx.initializers.xavier_uniform()


def embedding(*shape: int, rngs: nnx.Rngs) -> nnx.Param:
    """A float32 parameter of learned vectors, `[..., D]`, drawn from a normal distribution of deviation 0.02."""
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))


def project(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, *, num_inputs: int = 1) -> jax.Array:
    """`[..., *inputs]` to `[..., *outputs]` by one matrix product, in the dtype of `x`.

    Leading axes are merged first: XLA:CPU is slow at weight gradients that contract two of them (8 % of the step of
    `pretrain_como.py:tiny`, see tools/benchmarks/RESULTS.md).

    Args:
      x: activations.
      kernel: float32 `[*inputs, *outputs]`.
      bias: float32 `[*outputs]`, or None.
      num_inputs: how many leading axes of the kernel are inputs.
    """
    leading, outputs = x.shape[: x.ndim - num_inputs], kernel.shape[num_inputs:]
    inputs = math.prod(kernel.shape[:num_inputs])
    out = matmul(x.reshape(math.prod(leading), inputs), kernel.reshape(inputs, math.prod(outputs)))
    if bias is not None:
        out = out + broadcast_param(bias.reshape(-1), out.shape, out.dtype)
    return out.reshape(*leading, *outputs)


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[M, K]` times a float32 kernel `[K, N]`, in the dtype of `x`; the kernel's gradient is float32."""
    return x @ kernel.astype(x.dtype)


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return matmul(x, kernel), (x, kernel)


def _matmul_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    kernel_grad = jnp.matmul(x.T, grad, preferred_element_type=jnp.float32)
    return grad @ kernel.astype(x.dtype).T, kernel_grad.astype(kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def broadcast_param(parameter: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """A float32 parameter repeated to `shape`, in `dtype`; the sum over repetitions in its gradient is float32."""
    # The cast comes last, so that its transpose comes before the sum.
    return jnp.broadcast_to(parameter, shape).astype(dtype)


def keep_batch_split(x: jax.Array) -> jax.Array:
    """`x`, whose first axis is the batch, split over the devices of the mesh in use; without a mesh just `x`.

    Left to itself, XLA's partitioner splits the width of activations over `fsdp`, as it does that of the parameters,
    and then every device computes the whole batch. The other axes stay free, so that `tensor` can split heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or len(x) % math.prod(mesh.shape[axis] for axis in BATCH_AXES):
        return x
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*BATCH_SPEC, *free))


def merge_leading(x: jax.Array) -> jax.Array:
    """`[A, B, ...]` to `[A * B, ...]`."""
    return x.reshape(-1, *x.shape[2:])
