"""Vision transformers: that of MAE and timm, and that of SigLIP.

Axes: B batch, H and W pixels, N patches, M some of the patches, D width.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from como_jax.nn.layers import Block, LayerNorm, Linear, patchify, sincos_position_embedding
from como_jax.nn.primitives import broadcast_param
from como_jax.nn.stack import Stack
from como_jax.spec.towers import VitConfig


class Vit(nnx.Module):
    """ViT with a class token and fixed positions, with the parameter names and shapes of MAE (arXiv 2111.06377).

    It masks and shuffles nothing, so that the tokens of two frames stand for the same places.
    """

    def __init__(self, config: VitConfig, *, dtype: jnp.dtype = jnp.float32, remat: str = "none", rngs: nnx.Rngs):
        self.config = config
        width, grid = config.width, config.grid
        self.patch_embed = Linear(config.patch_size**2 * 3, width, dtype=dtype, rngs=rngs)
        self.cls_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, width)))
        positions = sincos_position_embedding(grid, grid, width)
        self.pos_embed = nnx.Param(jnp.concatenate([jnp.zeros((1, width)), positions])[None])
        self.blocks = _blocks(config, tanh_gelu=False, dtype=dtype, remat=remat, rngs=rngs)
        self.norm = LayerNorm(width, dtype=jnp.float32, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features `[B, 1 + N, D]`, float32, of normalised images `[B, H, W, 3]`; the class token comes first."""
        return self.encode_tokens(self.embed_patches(images))

    def embed_patches(self, images: jax.Array) -> jax.Array:
        """Patch tokens with positions, `[B, N, D]`, of normalised images `[B, H, W, 3]`."""
        chex.assert_shape(images, (None, self.config.image_size, self.config.image_size, 3))
        return self.patch_embed(patchify(images, self.config.patch_size)) + self._positions()[:, 1:]

    def encode_tokens(self, tokens: jax.Array) -> jax.Array:
        """Features `[B, 1 + M, D]` of the class token and of all or some embedded patches, `[B, M, D]`."""
        cls = jnp.broadcast_to(self.cls_token[...] + self._positions()[:, :1], (len(tokens), 1, tokens.shape[-1]))
        return self.norm(self.blocks(jnp.concatenate([cls.astype(tokens.dtype), tokens], axis=1)))

    def _positions(self) -> jax.Array:
        # MAE keeps the sine-cosine positions fixed.
        return jax.lax.stop_gradient(self.pos_embed[...]).astype(self.patch_embed.dtype)


class Siglip(nnx.Module):
    """SigLIP's image encoder (arXiv 2303.15343), whose weights in PaliGemma `como_jax.weights.paligemma` reads.

    It has learned positions, GELU in its tanh approximation, and neither a class token nor the head that pools.
    """

    def __init__(self, config: VitConfig, *, dtype: jnp.dtype = jnp.float32, remat: str = "none", rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        width = config.width
        self.patch_embed = Linear(config.patch_size**2 * 3, width, dtype=dtype, rngs=rngs)
        self.pos_embed = nnx.Param(width**-0.5 * jax.random.normal(rngs.params(), (config.grid**2, width)))
        self.blocks = _blocks(config, tanh_gelu=True, dtype=dtype, remat=remat, rngs=rngs)
        self.norm = LayerNorm(width, dtype=jnp.float32, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features `[B, N, D]`, float32, of images `[B, H, W, 3]` that `scale_frames` made."""
        chex.assert_shape(images, (None, self.config.image_size, self.config.image_size, 3))
        x = self.patch_embed(patchify(images, self.config.patch_size))
        x = x + broadcast_param(self.pos_embed[...], x.shape, x.dtype)
        return self.norm(self.blocks(x))


def vit_config(config: ConfigDict) -> VitConfig:
    """The sizes of the image encoder of a config of any family."""
    encoder = config.encoder
    sizes = (encoder.patch_size, encoder.width, encoder.depth, encoder.num_heads)
    return VitConfig(config.data.image_size, *sizes, encoder.get("mlp_width", 0))


def scale_frames(frames: jax.Array) -> jax.Array:
    """uint8 RGB `[..., 3]` to float32 in [-1, 1], the range of SigLIP."""
    return frames.astype(jnp.float32) * (2.0 / 255.0) - 1.0


def _blocks(config: VitConfig, *, tanh_gelu: bool, dtype: jnp.dtype, remat: str, rngs: nnx.Rngs) -> Stack:
    def block(rngs: nnx.Rngs) -> Block:
        sizes = {"mlp_width": config.mlp_width, "tanh_gelu": tanh_gelu}
        return Block(config.width, config.num_heads, **sizes, dtype=dtype, rngs=rngs)

    return Stack(block, config.depth, remat=remat, rngs=rngs)
