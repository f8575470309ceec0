"""Multi-head attention, computed by XLA or by the fused kernels of cuDNN (FlashAttention-2, arXiv 2307.08691).

Axes: B batch, Q queries, N keys, D width, C width of a context, H heads, K head size.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from como_jax.errors import ConfigError
from como_jax.nn.primitives import keep_batch_split, project, xavier_uniform

IMPLEMENTATIONS = ("xla", "cudnn")
# Head sizes whose gradient cuDNN computes on every GPU that it supports.
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
        """Whether cuDNN has a kernel for this dtype and head size."""
        return self.dtype == jnp.bfloat16 and self.head_size in CUDNN_HEAD_SIZES


class Attention(FusableAttention):
    """Multi-head self-attention; its output can be computed for the first tokens only."""

    def __init__(self, width: int, num_heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dtype, self.head_size = dtype, _head_size(width, num_heads)
        # Heads have an axis of their own, so that tensor parallelism can split it.
        heads = (num_heads, self.head_size)
        self.qkv = nnx.LinearGeneral(width, (3, *heads), kernel_init=xavier_uniform, rngs=rngs)
        self.proj = nnx.LinearGeneral(heads, width, axis=(-2, -1), kernel_init=xavier_uniform, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None, *, num_outputs: int | None = None) -> jax.Array:
        """`[B, N, D]` to `[B, Q, D]`, where Q is `num_outputs` or, without it, N.

        Args:
          x: tokens.
          mask: bool, broadcast to `[B, Q, N]`, which token reads which; None lets every token read all.
          num_outputs: how many of the first tokens are computed; None computes all.
        """
        x = x.astype(self.dtype)
        # XLA would exchange so few tokens, or their gradients, between devices in place of the kernel.
        asked = x if num_outputs is None else keep_batch_split(x[:, :num_outputs])
        query, key, value = self._heads(asked, 0), self._heads(x, 1), self._heads(x, 2)
        mixed = attend(query, key, value, mask, implementation=self.implementation)
        return project(mixed, self.proj.kernel[...], self.proj.bias[...], num_inputs=2)

    def _heads(self, x: jax.Array, part: int) -> jax.Array:
        """Query (0), key (1) or value (2) `[B, N, H, K]` of tokens `[B, N, D]`."""
        return project(x, self.qkv.kernel[...][:, part], self.qkv.bias[...][part])


class CrossAttention(FusableAttention):
    """Multi-head attention from tokens to a context, which may have another width."""

    def __init__(self, width: int, context_width: int, num_heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dtype, self.head_size = dtype, _head_size(width, num_heads)
        heads = (num_heads, self.head_size)
        self.q = nnx.LinearGeneral(width, heads, kernel_init=xavier_uniform, rngs=rngs)
        self.kv = nnx.LinearGeneral(context_width, (2, *heads), kernel_init=xavier_uniform, rngs=rngs)
        self.proj = nnx.LinearGeneral(heads, width, axis=(-2, -1), kernel_init=xavier_uniform, rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """`[B, Q, D]` to `[B, Q, D]`; `mask`, bool, is broadcast to `[B, Q, N]` for a context `[B, N, C]`."""
        x, context = x.astype(self.dtype), context.astype(self.dtype)
        query = project(x, self.q.kernel[...], self.q.bias[...])
        key, value = (project(context, self.kv.kernel[...][:, part], self.kv.bias[...][part]) for part in (0, 1))
        mixed = attend(query, key, value, mask, implementation=self.implementation)
        return project(mixed, self.proj.kernel[...], self.proj.bias[...], num_inputs=2)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    implementation: str = "xla",
) -> jax.Array:
    """Scaled dot-product attention: `[B, Q, H, K]` over `[B, N, H, K]` to `[B, Q, H, K]`, with a float32 softmax.

    A bool mask is broadcast to `[B, Q, N]`. A query whose mask is False everywhere weighs all keys equally.
    """
    chex.assert_rank([query, key, value], 4)
    chex.assert_equal_shape([key, value])
    if implementation == "cudnn":
        return attend_by_cudnn(query, key, value, mask)
    query, key, value = (jnp.moveaxis(x, 2, 1) for x in (query, key, value))
    logits = jnp.einsum("bhqk,bhnk->bhqn", query * query.shape[-1] ** -0.5, key).astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits).astype(query.dtype)
    return jnp.einsum("bhqn,bhnk->bqhk", weights, value)


def attend_by_cudnn(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """As `attend`, on a GPU and without the weights in memory; for modules with `FusableAttention.fits_cudnn`."""
    num_queries, num_keys = query.shape[1], key.shape[1]
    # JAX 0.10 refuses the gradient of odd lengths, even without a mask.
    query, key, value = (keep_batch_split(_pad_to_even(x, 1)) for x in (query, key, value))
    if mask is not None:
        # cuDNN broadcasts a mask over batch and heads only.
        mask = _pad_to_even(jnp.broadcast_to(mask, (len(mask), num_queries, num_keys)), 1, 2)[:, None]
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


def _head_size(width: int, num_heads: int) -> int:
    if width % num_heads:
        raise ConfigError(f"width {width} must be divisible by num_heads {num_heads}.")
    return width // num_heads


def _pad_to_even(x: jax.Array, *axes: int) -> jax.Array:
    """`x` with a zero at the end of those axes whose length is odd."""
    return jnp.pad(x, [(0, x.shape[axis] % 2 if axis in axes else 0) for axis in range(x.ndim)])
