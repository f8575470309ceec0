"""The observation of a policy as tokens of one width: images of all cameras, proprioceptive state and instruction.

Axes: B batch, T instants, C cameras, H and W pixels, N tokens of one instant, M tokens of the instruction, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from como_jax.nn.layers import LayerNorm, Linear, normalize_frames, patchify
from como_jax.nn.primitives import embedding, keep_batch_split
from como_jax.nn.text_towers import TextFeatures, make_text_tower
from como_jax.nn.vit import Siglip, Vit, scale_frames
from como_jax.spec.policies import COARSE_PATCH, FINE_PATCH, ObservationConfig
from como_jax.types import Observation


class ObservationFeatures(NamedTuple):
    """The tokens of an observation.

    Attributes:
      tokens: of the images and the state of every instant, `[B, T, N, D]`.
      mask: bool `[B, T, N]`, False at the tokens of missing cameras.
      text: of the instruction.
    """

    tokens: jax.Array
    mask: jax.Array
    text: TextFeatures

    def context(self) -> tuple[jax.Array, jax.Array]:
        """All tokens in one sequence, `[B, T * N + M, D]`, and their mask, bool `[B, T * N + M]`."""
        batch, instants, tokens, width = self.tokens.shape
        seen = self.tokens.reshape(batch, instants * tokens, width)
        return (
            jnp.concatenate([seen, self.text.tokens], axis=1),
            jnp.concatenate([self.mask.reshape(batch, -1), self.text.mask], axis=1),
        )


class PatchTower(nnx.Module):
    """Two linear layers over patches: of 8 x 8 pixels, and of 2 x 2 of what the first one makes of them.

    Each is followed by a layer norm and a SiLU. Both are matrix products over many channels, which CPUs do several
    times faster than convolutions over few.
    """

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.fine = Linear(FINE_PATCH**2 * 3, 2 * width, dtype=dtype, rngs=rngs)
        self.fine_norm = LayerNorm(2 * width, dtype=dtype, rngs=rngs)
        self.coarse = Linear(COARSE_PATCH**2 * 2 * width, width, dtype=dtype, rngs=rngs)
        self.coarse_norm = LayerNorm(width, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features `[B, N, D]` of the 16 x 16 patches of normalised images `[B, H, W, 3]`."""
        chex.assert_shape(images, (None, None, None, 3))
        batch, height, width, _ = images.shape
        fine = jax.nn.silu(self.fine_norm(keep_batch_split(self.fine(patchify(keep_batch_split(images), FINE_PATCH)))))
        cells = keep_batch_split(fine.reshape(batch, height // FINE_PATCH, width // FINE_PATCH, -1))
        return jax.nn.silu(self.coarse_norm(keep_batch_split(self.coarse(patchify(cells, COARSE_PATCH)))))


class ObservationEncoder(nnx.Module):
    """Makes tokens of an `Observation`. One image tower encodes the images of all cameras and instants."""

    def __init__(
        self,
        config: ObservationConfig,
        width: int,
        *,
        dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        self.config = config
        if config.image_tower == "patch":
            self.images = PatchTower(config.vit.width, dtype=dtype, rngs=rngs)
        else:
            tower = {"vit": Vit, "siglip": Siglip}[config.image_tower]
            self.images = tower(config.vit, dtype=dtype, remat="none" if config.freeze_images else remat, rngs=rngs)
        side = config.grid // config.pool
        self.image_proj = Linear(config.pooled_width, width, dtype=dtype, rngs=rngs)
        self.image_pos = embedding(side * side, width, rngs=rngs)
        self.camera_embed = embedding(config.cameras, width, rngs=rngs)
        self.instant_embed = embedding(config.instants, width, rngs=rngs)
        self.text = make_text_tower(config.text, dtype=dtype, rngs=rngs)
        if config.text.tower != "tokens":
            self.text_proj = Linear(self.text.width, width, dtype=dtype, rngs=rngs)
        if config.state_size:
            self.state_proj = Linear(config.state_size, width, dtype=dtype, rngs=rngs)
            self.no_state = embedding(width, rngs=rngs)

    def frozen_paths(self) -> tuple[str, ...]:
        """Paths of the parameters that the optimiser leaves alone."""
        images = ("images",) if self.config.freeze_images else ()
        return (*images, *(("text",) if self.config.text.is_frozen else ()))

    def __call__(self, observation: Observation) -> ObservationFeatures:
        """The tokens of an observation, which has the cameras and instants of the config."""
        config = self.config
        observation.check_shapes()
        size = config.vit.image_size
        chex.assert_shape(observation.images, (None, config.instants, config.cameras, size, size, 3))
        images = self._image_tokens(observation.images)
        batch, instants, cameras, per_camera, width = images.shape
        images = images + self.image_pos[...] + self.camera_embed[...][:, None]
        tokens = [images.reshape(batch, instants, cameras * per_camera, width)]
        seen = jnp.repeat(observation.has_camera > 0, per_camera, axis=1)
        masks = [jnp.broadcast_to(seen[:, None], (batch, instants, cameras * per_camera))]
        if config.state_size:
            has_state = observation.has_state[:, None, None] > 0
            state = jnp.where(has_state, self.state_proj(observation.state), self.no_state[...])
            tokens.append(state[:, :, None])
            masks.append(jnp.ones((batch, instants, 1), bool))
        everything = jnp.concatenate(tokens, axis=2) + self.instant_embed[...][:, None]
        return ObservationFeatures(everything, jnp.concatenate(masks, axis=2), self._read_text(observation))

    def _image_tokens(self, images: jax.Array) -> jax.Array:
        """`[B, T, C, H, W, 3]` to the tokens of each camera, `[B, T, C, tokens, D]`, after pooling."""
        config, leading = self.config, images.shape[:3]
        flat = images.reshape(-1, *images.shape[3:])
        features = self.images(scale_frames(flat) if config.image_tower == "siglip" else normalize_frames(flat))
        if config.image_tower == "vit":
            features = features[:, 1:]
        if config.freeze_images:
            features = jax.lax.stop_gradient(features)
        side, pool = config.grid // config.pool, config.pool
        cells = features.reshape(-1, side, pool, side, pool, config.vit.width)
        cells = jnp.moveaxis(cells, 3, 2) if config.image_tower == "patch" else cells.mean(axis=(2, 4))
        return self.image_proj(cells.reshape(-1, config.pooled_width)).reshape(*leading, side * side, -1)

    def _read_text(self, observation: Observation) -> TextFeatures:
        """The instruction's features, at the width of the policy."""
        found = self.text(observation)
        tokens, pooled = found.tokens, found.pooled
        if self.config.text.is_frozen:
            tokens, pooled = jax.lax.stop_gradient((tokens, pooled))
        if self.config.text.tower != "tokens":
            tokens, pooled = self.text_proj(tokens), self.text_proj(pooled)
        return TextFeatures(tokens, found.mask, pooled)
