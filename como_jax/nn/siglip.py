"""SigLIP's image encoder (arXiv 2303.15343). Weights within PaliGemma are read by `como_jax.weights.paligemma`.

Axes: B batch, N patches, D width.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from como_jax.nn.layers import Block, LayerNorm, Linear, patchify
from como_jax.nn.mixed_precision import broadcast_param
from como_jax.nn.stack import Stack
from como_jax.spec.towers import VitConfig


class Siglip(nnx.Module):
    """A ViT without a class token and without the head that pools: learned positions and GELU by its tanh formula."""

    def __init__(self, config: VitConfig, *, dtype: jnp.dtype = jnp.float32, remat: str = "none", rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        width = config.width
        self.patch_embed = Linear(config.patch_size**2 * 3, width, dtype=dtype, rngs=rngs)
        self.pos_embed = nnx.Param(width**-0.5 * jax.random.normal(rngs.params(), (config.grid**2, width)))
        self.blocks = Stack(
            lambda rngs: Block(
                width, config.num_heads, mlp_width=config.mlp_width, tanh_gelu=True, dtype=dtype, rngs=rngs
            ),
            config.depth,
            remat=remat,
            rngs=rngs,
        )
        self.norm = LayerNorm(width, dtype=jnp.float32, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features `[B, N, D]`, float32, of images `[B, H, W, 3]` that `scale_frames` made."""
        size = self.config.image_size
        chex.assert_shape(images, (None, size, size, 3))
        x = self.patch_embed(patchify(images, self.config.patch_size))
        x = x + broadcast_param(self.pos_embed[...], x.shape, x.dtype)
        return self.norm(self.blocks(x))


def scale_frames(frames: jax.Array) -> jax.Array:
    """uint8 RGB `[..., 3]` to float32 in [-1, 1], as SigLIP reads them."""
    return frames.astype(jnp.float32) * (2.0 / 255.0) - 1.0
