"""Transformer building blocks shared by all models.

Axes: B batch, N tokens, D width, H heads, K head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from como_jax.errors import ConfigError
from como_jax.nn.attention import FusableAttention, attend
from como_jax.nn.mixed_precision import project

# Statistics of ImageNet RGB in [0, 1], with which MAE and CoMo normalise pixels.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

xavier_uniform = nnx.initializers.xavier_uniform()


def normalize_frames(frames: jax.Array) -> jax.Array:
    """uint8 RGB `[..., 3]` to ImageNet-normalised float32."""
    scale = 1.0 / (255.0 * np.asarray(IMAGENET_STD, np.float32))
    shift = np.asarray(IMAGENET_MEAN, np.float32) / np.asarray(IMAGENET_STD, np.float32)
    return frames.astype(jnp.float32) * scale - shift


def denormalize_frames(frames: jax.Array) -> jax.Array:
    """ImageNet-normalised RGB `[..., 3]` to float32 in [0, 1], clipped."""
    mean, std = np.asarray(IMAGENET_MEAN, np.float32), np.asarray(IMAGENET_STD, np.float32)
    return jnp.clip(frames * std + mean, 0.0, 1.0)


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """`[B, H, W, C]` to row-major patches `[B, (H/p)(W/p), p * p * C]`, each in (row, column, channel) order."""
    batch, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    x = images.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, patch_size * patch_size * channels)


def unpatchify(patches: jax.Array, patch_size: int, height: int, width: int) -> jax.Array:
    """Inverse of `patchify` (a pixel shuffle): `[B, N, p * p * C]` to `[B, height, width, C]`."""
    rows, columns = height // patch_size, width // patch_size
    x = patches.reshape(-1, rows, columns, patch_size, patch_size, patches.shape[-1] // patch_size**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, x.shape[-1])


def sincos_position_embedding(rows: int, columns: int, width: int) -> np.ndarray:
    """Fixed 2-D sine-cosine positions `[rows * columns, width]` as in MAE (arXiv 2111.06377, appendix A)."""
    if width % 4:
        raise ConfigError(f"width {width} must be divisible by 4 for 2-D sine-cosine positions.")
    frequencies = 1.0 / 10000.0 ** (np.arange(width // 4) / (width / 4))

    def encode(positions: np.ndarray) -> np.ndarray:
        angles = positions.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    return np.concatenate([encode(column), encode(row)], axis=1).astype(np.float32)


class LayerNorm(nnx.LayerNorm):
    """Layer norm with the epsilon of ViT and MAE, in float32; only what it gives is of the compute dtype."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(width, epsilon=1e-6, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)
        self.output_dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` to `[..., D]`."""
        return super().__call__(x).astype(self.output_dtype)


class Linear(nnx.Linear):
    """A linear layer over the last axis."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        dtype: jnp.dtype,
        kernel_init: nnx.Initializer = xavier_uniform,
        rngs: nnx.Rngs,
    ):
        super().__init__(inputs, outputs, kernel_init=kernel_init, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., inputs]` to `[..., outputs]`."""
        return project(x.astype(self.dtype), self.kernel[...], self.bias[...])


class Attention(FusableAttention):
    """Multi-head self-attention, optionally computed for the first tokens only."""

    def __init__(self, width: int, num_heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        if width % num_heads:
            raise ConfigError(f"width {width} must be divisible by num_heads {num_heads}.")
        self.dtype, self.head_size = dtype, width // num_heads
        # The head axis is one of its own, so that tensor parallelism can split it.
        self.qkv = nnx.LinearGeneral(width, (3, num_heads, self.head_size), kernel_init=xavier_uniform, rngs=rngs)
        self.proj = nnx.LinearGeneral(
            (num_heads, self.head_size), width, axis=(-2, -1), kernel_init=xavier_uniform, rngs=rngs
        )

    def __call__(self, x: jax.Array, num_outputs: int | None = None, mask: jax.Array | None = None) -> jax.Array:
        """`[B, N, D]` to `[B, num_outputs or N, D]`; every output attends to all N tokens, or to those of the mask.

        Args:
          x: tokens.
          num_outputs: when set, only the first so many are computed.
          mask: bool, broadcast to `[B, outputs, N]`; a row without any True attends to all alike.
        """
        x = x.astype(self.dtype)
        query, key, value = self._heads(x[:, :num_outputs], 0), self._heads(x, 1), self._heads(x, 2)
        mixed = attend(query, key, value, mask, implementation=self.implementation)
        return project(mixed, self.proj.kernel[...], self.proj.bias[...], num_inputs=2)

    def _heads(self, x: jax.Array, part: int) -> jax.Array:
        """Query (0), key (1) or value (2) `[B, N, H, K]` of tokens `[B, N, D]`."""
        return project(x, self.qkv.kernel[...][:, part], self.qkv.bias[...][part])


class CrossAttention(FusableAttention):
    """Multi-head attention from tokens to a context of any width."""

    def __init__(self, width: int, context_width: int, num_heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        if width % num_heads:
            raise ConfigError(f"width {width} must be divisible by num_heads {num_heads}.")
        self.dtype, self.head_size = dtype, width // num_heads
        heads = (num_heads, self.head_size)
        self.q = nnx.LinearGeneral(width, heads, kernel_init=xavier_uniform, rngs=rngs)
        self.kv = nnx.LinearGeneral(context_width, (2, *heads), kernel_init=xavier_uniform, rngs=rngs)
        self.proj = nnx.LinearGeneral(heads, width, axis=(-2, -1), kernel_init=xavier_uniform, rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """`[B, N, D]` to `[B, N, D]`; `mask`, bool, is broadcast to `[B, N, M]` for a context `[B, M, C]`."""
        x, context = x.astype(self.dtype), context.astype(self.dtype)
        query = project(x, self.q.kernel[...], self.q.bias[...])
        key, value = (project(context, self.kv.kernel[...][:, part], self.kv.bias[...][part]) for part in (0, 1))
        mixed = attend(query, key, value, mask, implementation=self.implementation)
        return project(mixed, self.proj.kernel[...], self.proj.bias[...], num_inputs=2)


class Mlp(nnx.Module):
    """Two layers with a GELU between them, exact or by its tanh approximation."""

    def __init__(self, width: int, hidden: int, *, tanh_gelu: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.tanh_gelu = tanh_gelu
        self.fc1 = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=self.tanh_gelu))


class Block(nnx.Module):
    """Pre-norm transformer block; an `mlp_width` of 0 is four times the width."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_width: int = 0,
        tanh_gelu: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.norm1 = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attn = Attention(width, num_heads, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(width, mlp_width or 4 * width, tanh_gelu=tanh_gelu, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, num_outputs: int | None = None) -> jax.Array:
        """`[B, N, D]` to `[B, num_outputs or N, D]`."""
        x = x[:, :num_outputs] + self.attn(self.norm1(x), num_outputs)
        return x + self.mlp(self.norm2(x))


class MaskedBlock(Block):
    """Pre-norm transformer block whose tokens attend as a mask says."""

    def __call__(self, x: jax.Array, mask: jax.Array, num_outputs: int | None = None) -> jax.Array:
        """`[B, N, D]` to `[B, num_outputs or N, D]`; see `Attention`."""
        x = x[:, :num_outputs] + self.attn(self.norm1(x), num_outputs, mask)
        return x + self.mlp(self.norm2(x))
