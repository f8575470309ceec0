"""Parameters in float32 among activations of another dtype, with gradients that are summed in float32.

A kernel that is cast to bfloat16 before the product gets a bfloat16 gradient: of every chip's samples first, then of
all chips' together, a sum that loses a small term beside a large one. Here the product that makes the gradient gives
float32, which is also what the chips exchange.

Axes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def project(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, *, num_inputs: int = 1) -> jax.Array:
    """`[..., *inputs]` to `[..., *outputs]` by one matrix product, in the dtype of `x`.

    Leading axes are merged first: XLA:CPU is slow at weight gradients that contract two of them (8 % of the step of
    `pretrain_como.py:tiny`, see tools/benchmarks/RESULTS.md).

    Args:
      x: activations.
      kernel: float32 `[*inputs, *outputs]`.
      bias: float32 `[*outputs]`, or None.
      num_inputs: axes of the kernel that are inputs.
    """
    leading, outputs = x.shape[: x.ndim - num_inputs], kernel.shape[num_inputs:]
    inputs = math.prod(kernel.shape[:num_inputs])
    out = matmul(x.reshape(math.prod(leading), inputs), kernel.reshape(inputs, math.prod(outputs)))
    if bias is not None:
        out = out + broadcast_param(bias.reshape(-1), out.shape, out.dtype)
    return out.reshape(*leading, *outputs)


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[M, K]` times a float32 kernel `[K, N]`, in the dtype of `x`."""
    return x @ kernel.astype(x.dtype)


def _matmul_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return matmul(x, kernel), (x, kernel)


def _matmul_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    of_kernel = jnp.matmul(x.T, grad, preferred_element_type=jnp.float32)
    return grad @ kernel.astype(x.dtype).T, of_kernel.astype(kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def broadcast_param(parameter: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """A float32 parameter repeated to `shape`, in the dtype of compute."""
    # Cast last, so that the sum over the repetitions, which is its gradient, is taken in float32.
    return jnp.broadcast_to(parameter, shape).astype(dtype)
