"""Vision transformer with the parameter names and shapes of MAE (arXiv 2111.06377) and timm.

Axes: B batch, N patches, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from como_jax.nn.layers import Block, LayerNorm, Linear, patchify, sincos_position_embedding
from como_jax.nn.stack import Stack
from como_jax.spec.towers import VitConfig


class Vit(nnx.Module):
    """Plain ViT encoder with a class token: no masking and no shuffling, so tokens of two frames align."""

    def __init__(self, config: VitConfig, *, dtype: jnp.dtype = jnp.float32, remat: str = "none", rngs: nnx.Rngs):
        self.config = config
        width, grid = config.width, config.grid
        self.patch_embed = Linear(config.patch_size**2 * 3, width, dtype=dtype, rngs=rngs)
        self.cls_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, width)))
        positions = sincos_position_embedding(grid, grid, width)
        self.pos_embed = nnx.Param(jnp.concatenate([jnp.zeros((1, width)), positions])[None])
        self.blocks = Stack(
            lambda rngs: Block(width, config.num_heads, mlp_width=config.mlp_width, dtype=dtype, rngs=rngs),
            config.depth,
            remat=remat,
            rngs=rngs,
        )
        self.norm = LayerNorm(width, dtype=jnp.float32, rngs=rngs)

    def embed_patches(self, images: jax.Array) -> jax.Array:
        """Patch tokens with positions, `[B, N, D]`, of normalised images `[B, H, W, 3]`."""
        return self.patch_embed(patchify(images, self.config.patch_size)) + self._positions()[:, 1:]

    def encode_tokens(self, tokens: jax.Array) -> jax.Array:
        """`[B, 1 + M, D]` features of the class token and any subset of embedded patches `[B, M, D]`."""
        cls = jnp.broadcast_to(self.cls_token[...] + self._positions()[:, :1], (len(tokens), 1, tokens.shape[-1]))
        return self.norm(self.blocks(jnp.concatenate([cls.astype(tokens.dtype), tokens], axis=1)))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features `[B, 1 + N, D]`, float32, of normalised images `[B, H, W, 3]`; the class token comes first."""
        return self.encode_tokens(self.embed_patches(images))

    def _positions(self) -> jax.Array:
        # MAE keeps the sine-cosine positions fixed.
        return jax.lax.stop_gradient(self.pos_embed[...]).astype(self.patch_embed.dtype)
