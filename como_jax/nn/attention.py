"""Scaled dot-product attention, by XLA or by the fused kernels of cuDNN (FlashAttention-2, arXiv 2307.08691).

Axes: B batch, Q queries, N keys, H heads, K head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from como_jax.nn.batch_split import keep_batch_split

IMPLEMENTATIONS = ("xla", "cudnn")
# Whose gradient cuDNN knows on every GPU that it serves.
CUDNN_HEAD_SIZES = range(8, 129, 8)


class FusableAttention(nnx.Module):
    """Base of the modules whose attention cuDNN can compute: without learned biases or shared keys.

    Attributes:
      implementation: one of IMPLEMENTATIONS; `como_jax.training.train_step` sets it for a train step.
      head_size: numbers in a head.
      dtype: of queries, keys and values.
    """

    implementation: str = "xla"
    head_size: int
    dtype: jnp.dtype

    @property
    def fits_cudnn(self) -> bool:
        """Whether cuDNN has a kernel for it."""
        return self.dtype == jnp.bfloat16 and self.head_size in CUDNN_HEAD_SIZES


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    implementation: str = "xla",
) -> jax.Array:
    """Scaled dot-product attention: `[B, Q, H, K]` over `[B, N, H, K]` to `[B, Q, H, K]`, softmax in float32.

    A bool mask is broadcast to `[B, Q, N]`; a row without any True attends to all alike.
    """
    if implementation == "cudnn":
        return attend_by_cudnn(query, key, value, mask)
    query, key, value = (jnp.moveaxis(x, 2, 1) for x in (query, key, value))
    logits = jnp.einsum("bhqk,bhnk->bhqn", query * query.shape[-1] ** -0.5, key).astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits).astype(query.dtype)
    return jnp.einsum("bhqn,bhnk->bqhk", weights, value)


def attend_by_cudnn(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """As `attend`, without weights in memory, on a GPU; for modules with `FusableAttention.fits_cudnn`."""
    num_queries, num_keys = query.shape[1], key.shape[1]
    # JAX 0.10 refuses the gradient of odd lengths, also where there is no mask.
    query, key, value = (keep_batch_split(_even(x, 1)) for x in (query, key, value))
    if mask is not None:
        # cuDNN repeats a mask over batch and heads alone.
        mask = _even(jnp.broadcast_to(mask, (len(mask), num_queries, num_keys)), 1, 2)[:, None]
    query_lengths, key_lengths = (
        keep_batch_split(jnp.full(len(query), length, jnp.int32)) if num_keys % 2 else None
        for length in (query.shape[1], num_keys)
    )
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
        implementation="cudnn",
    )
    return out[:, :num_queries]


def _even(x: jax.Array, *axes: int) -> jax.Array:
    """`x` with zeros at the end of those axes whose length is odd."""
    return jnp.pad(x, [(0, x.shape[axis] % 2 if axis in axes else 0) for axis in range(x.ndim)])
