"""Images as patches, and the layers of transformers that all models share.

Axes: B batch, H and W pixels, C channels, N tokens, D width, p pixels along the side of a patch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from como_jax.errors import ConfigError
from como_jax.nn.attention import Attention
from como_jax.nn.primitives import project, xavier_uniform
from como_jax.spec.images import IMAGENET_MEAN, IMAGENET_STD


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
    """Fixed 2-D sine-cosine positions, float32 `[rows * columns, width]`, as in MAE (arXiv 2111.06377, appendix A)."""
    if width % 4:
        raise ConfigError(f"width {width} must be divisible by 4 for 2-D sine-cosine positions.")
    frequencies = 1.0 / 10000.0 ** (np.arange(width // 4) / (width / 4))

    def encode(positions: np.ndarray) -> np.ndarray:
        angles = positions.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    return np.concatenate([encode(column), encode(row)], axis=1).astype(np.float32)


class LayerNorm(nnx.LayerNorm):
    """Layer norm with the epsilon of ViT and MAE; it computes in float32 and gives the compute dtype."""

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


class Mlp(nnx.Module):
    """Two layers with a GELU between them, either exact or in its tanh approximation."""

    def __init__(self, width: int, hidden: int, *, tanh_gelu: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.tanh_gelu = tanh_gelu
        self.fc1 = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` to `[..., D]`."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=self.tanh_gelu))


class Block(nnx.Module):
    """Pre-norm transformer block; an `mlp_width` of 0 stands for four times the width."""

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

    def __call__(self, x: jax.Array, mask: jax.Array | None = None, *, num_outputs: int | None = None) -> jax.Array:
        """`[B, N, D]` to `[B, num_outputs or N, D]`; see `Attention` for the arguments."""
        x = x[:, :num_outputs] + self.attn(self.norm1(x), mask, num_outputs=num_outputs)
        return x + self.mlp(self.norm2(x))
