"""Masked autoencoder (arXiv 2111.06377): pretrains the encoder on the user's own videos.

Axes: B batch, N patches, M visible patches, D encoder width, E decoder width.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from como_jax.nn.layers import (
    Block,
    LayerNorm,
    Linear,
    denormalize_frames,
    normalize_frames,
    patchify,
    sincos_position_embedding,
    unpatchify,
)
from como_jax.nn.primitives import broadcast_param, merge_leading
from como_jax.nn.stack import Stack
from como_jax.nn.vit import Vit
from como_jax.spec.motion import MaeConfig
from como_jax.spec.towers import VitConfig
from como_jax.types import FramePairs, LossOutput


class Mae(nnx.Module):
    """An encoder reads the visible patches, a decoder all of them, and predicts the pixels of the masked ones."""

    def __init__(
        self,
        vit: VitConfig,
        config: MaeConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        self.config = config
        width = config.decoder_width
        self.encoder = Vit(vit, dtype=dtype, remat=remat, rngs=rngs)
        self.decoder_embed = Linear(vit.width, width, dtype=dtype, rngs=rngs)
        self.mask_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, width)))
        self.decoder_blocks = Stack(
            lambda rngs: Block(width, config.decoder_heads, dtype=dtype, rngs=rngs),
            config.decoder_depth,
            remat=remat,
            rngs=rngs,
        )
        self.decoder_norm = LayerNorm(width, dtype=jnp.float32, rngs=rngs)
        self.decoder_pred = Linear(width, vit.patch_size**2 * 3, dtype=jnp.float32, rngs=rngs)

    def loss(self, batch: FramePairs, key: jax.Array) -> LossOutput:
        """Mean squared error of the masked patches, each normalised by its own mean and standard deviation."""
        images = normalize_frames(merge_leading(batch.frames))
        target = _standardize_patches(patchify(images, self.encoder.config.patch_size))[0]
        prediction, masked = self._reconstruct(images, key)
        error = jnp.mean(jnp.square(prediction - target), axis=-1)
        loss = jnp.sum(error * masked) / jnp.sum(masked)
        return LossOutput(loss, {"masked_patch_mse": loss})

    def reconstruct(self, frames: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images to look at: what the encoder sees, and what the decoder makes of it.

        Args:
          frames: uint8 `[B, H, W, 3]`.
          key: draws the masks.

        Returns:
          The masked input, and the reconstruction with visible patches copied, float32 in [0, 1] `[B, H, W, 3]`.
        """
        size, patch = self.encoder.config.image_size, self.encoder.config.patch_size
        chex.assert_shape(frames, (None, size, size, 3))
        images = normalize_frames(frames)
        patches = patchify(images, patch)
        _, mean, std = _standardize_patches(patches)
        prediction, masked = self._reconstruct(images, key)
        masked = masked[..., None]
        filled = jnp.where(masked, prediction * std + mean, patches)
        hidden = jnp.where(masked, 0.0, patches)
        return tuple(denormalize_frames(unpatchify(x, patch, size, size)) for x in (hidden, filled))

    def _reconstruct(self, images: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Predicted standardised patches `[B, N, p * p * 3]`, and the mask, bool `[B, N]`, True at masked patches."""
        tokens = self.encoder.embed_patches(images)
        batch, num_patches, width = tokens.shape
        num_visible = max(1, round(num_patches * (1.0 - self.config.mask_ratio)))
        order = jnp.argsort(jax.random.uniform(key, (batch, num_patches)), axis=1)
        restore = jnp.argsort(order, axis=1)
        visible = jnp.take_along_axis(tokens, order[:, :num_visible, None], axis=1)
        features = self.decoder_embed(self.encoder.encode_tokens(visible))

        hidden_shape = (batch, num_patches - num_visible, features.shape[-1])
        mask_tokens = broadcast_param(self.mask_token[...], hidden_shape, features.dtype)
        patches = jnp.concatenate([features[:, 1:], mask_tokens], axis=1)
        patches = jnp.take_along_axis(patches, restore[..., None], axis=1)
        grid = self.encoder.config.grid
        patches = patches + sincos_position_embedding(grid, grid, features.shape[-1]).astype(features.dtype)
        decoded = self.decoder_blocks(jnp.concatenate([features[:, :1], patches], axis=1))
        return self.decoder_pred(self.decoder_norm(decoded)[:, 1:]), restore >= num_visible


def _standardize_patches(patches: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Patches `[B, N, P]` of mean 0 and deviation 1, and their means and deviations `[B, N, 1]`."""
    mean = jnp.mean(patches, axis=-1, keepdims=True)
    std = jnp.sqrt(jnp.var(patches, axis=-1, keepdims=True) + 1e-6)
    return (patches - mean) / std, mean, std
