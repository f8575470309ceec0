"""LAQ, latent action quantisation: stage 1 of LAPA (arXiv 2410.11758).

A video transformer encodes both frames, the change of their pooled tokens is quantised into a few codes, and a decoder
draws the second frame from the first and the codes. Axes: B batch, T instants, P pairs, I and J rows and columns of
patches, D width, Q latent actions of a pair, L latent size of one.
"""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from como_jax.errors import ConfigError
from como_jax.motion import losses
from como_jax.motion.bottlenecks import make_bottleneck
from como_jax.motion.laq_layers import PositionBias, SpatialBlock, TemporalBlock
from como_jax.nn.batch_split import keep_batch_split
from como_jax.nn.layers import LayerNorm, Linear, patchify, unpatchify
from como_jax.nn.stack import Stack
from como_jax.spec.motion import LAQ_POOLING, BottleneckConfig, LaqConfig
from como_jax.types import FramePairs, LatentMotion, LossOutput


class Laq(nnx.Module):
    """The quantised motion model of LAPA, trained from scratch."""

    def __init__(
        self,
        image_size: int,
        config: LaqConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        if image_size % (config.patch_size * LAQ_POOLING):
            raise ConfigError(
                f"data.image_size {image_size} must be a multiple of {LAQ_POOLING} patches of model.patch_size "
                f"{config.patch_size}, which are pooled into one latent action."
            )
        self.config, self.grid, width = config, image_size // config.patch_size, config.width
        linear = functools.partial(Linear, dtype=dtype, rngs=rngs)
        sizes = (width, config.num_heads, config.head_size)
        pixels = config.patch_size**2 * 3

        def stack(block: Any, depth: int) -> Stack:
            return Stack(lambda rngs: block(*sizes, dtype=dtype, rngs=rngs), depth, remat=remat, rngs=rngs)

        self.patch_norm = LayerNorm(pixels, dtype=dtype, rngs=rngs)
        self.patch_embed = linear(pixels, width)
        self.embed_norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.position_bias = PositionBias(width, config.num_heads, rngs=rngs)
        self.spatial = stack(SpatialBlock, config.spatial_depth)
        self.spatial_norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.temporal = stack(TemporalBlock, config.temporal_depth)
        self.temporal_norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.latent_in = Linear(width, config.latent_dim, dtype=jnp.float32, rngs=rngs)
        conv = functools.partial(
            nnx.Conv, config.latent_dim, config.latent_dim, (3, 3), strides=2, padding=1, rngs=rngs
        )
        self.pool1, self.pool2 = conv(), conv()
        bottleneck = BottleneckConfig("nsvq", codebook_size=config.codebook_size, replace_below=config.replace_below)
        self.bottleneck = make_bottleneck(bottleneck, config.latent_dim, rngs=rngs)
        self.latent_out = linear(config.latent_dim, width)
        self.decoder = stack(functools.partial(SpatialBlock, cross=True), config.decoder_depth)
        self.decoder_norm = LayerNorm(width, dtype=jnp.float32, rngs=rngs)
        self.head = Linear(width, pixels, dtype=jnp.float32, rngs=rngs)

    def frozen_paths(self) -> tuple[str, ...]:
        """Parameters that the optimiser leaves alone, as prefixes of their paths."""
        return tuple(f"bottleneck/{name}" for name in self.bottleneck.frozen)

    def encode(self, frames: jax.Array) -> jax.Array:
        """Quantised latent actions `[B, T - 1, Q, L]` between consecutive frames of uint8 `[B, T, H, W, 3]`."""
        return self.bottleneck(self._infer(frames)).latent

    def codes(self, frames: jax.Array) -> jax.Array:
        """Latent actions as numbers of codes, int32 `[B, T - 1, Q]`."""
        return self.bottleneck.codes(self._infer(frames))

    def encode_frame(self, frames: jax.Array) -> jax.Array:
        """Patch tokens `[B, I, J, D]` of uint8 frames `[B, H, W, 3]`; all later layers see both frames of a pair."""
        return self._embed(_pixels(frames)[:, None])[:, 0]

    def encode_pair(self, source: jax.Array, target: jax.Array) -> LatentMotion:
        """The motion from each source to its target, both as `encode_frame` gives them."""
        return self.bottleneck.latent_motion(self._change(jnp.stack([source, target], axis=1)))

    def predict(self, frame: jax.Array, latent: jax.Array) -> jax.Array:
        """The frame, float32 in [0, 1] `[B, H, W, 3]`, that follows uint8 `frame` under `latent` `[B, Q, L]`."""
        return jnp.clip(self._draw(_pixels(frame), latent), 0.0, 1.0)

    def loss(self, batch: FramePairs, key: jax.Array) -> LossOutput:
        """Pixel error of the second frame of every pair; the error of quantisation is noise (NSVQ)."""
        passed = self.bottleneck(self._infer(batch.frames), key)
        images = _pixels(batch.frames)
        drawn = self._draw(_merge(images[:, :-1]), _merge(passed.latent))
        mse = losses.mean_squared_error(drawn, _merge(images[:, 1:]))
        return LossOutput(mse + passed.loss, {"mse": mse, **passed.terms}, {"bottleneck": passed.statistics})

    def update_codebook(
        self, statistics: dict[str, Any], step: jax.Array, key: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Replacement of codes that are hardly used, after an update; see `LatentMotionModel`."""
        params, metrics = self.bottleneck.update_codebook(statistics["bottleneck"], step, key)
        return {"bottleneck": params}, metrics

    def _infer(self, frames: jax.Array) -> jax.Array:
        """What is quantised, `[B, P, Q, L]`: the change of the pooled tokens from the first to the second frame."""
        chex.assert_rank(frames, 5)
        batch, pairs = frames.shape[0], frames.shape[1] - 1
        images = _pixels(jnp.stack([_merge(frames[:, :-1]), _merge(frames[:, 1:])], axis=1))
        change = self._change(self._embed(images))
        return change.reshape(batch, pairs, *change.shape[1:])

    def _change(self, tokens: jax.Array) -> jax.Array:
        """The same `[B, Q, L]` from patch tokens `[B, 2, I, J, D]` of both frames."""
        tokens = self.spatial_norm(self.spatial(tokens, self.position_bias(self.grid, self.grid)))
        tokens = self.temporal_norm(self.temporal(tokens))
        grid = keep_batch_split(_merge(self.latent_in(tokens)))
        pooled = keep_batch_split(self.pool2(jax.nn.relu(keep_batch_split(self.pool1(grid)))))
        pooled = pooled.reshape(len(tokens), 2, -1, self.config.latent_dim)
        return pooled[:, 1] - pooled[:, 0]

    def _draw(self, images: jax.Array, latent: jax.Array) -> jax.Array:
        """The next images `[B, H, W, 3]` from `images` and `latent` `[B, Q, L]`."""
        chex.assert_rank([images, latent], [4, 3])
        # The patch embedding belongs to the encoder, as in the paper.
        tokens = jax.lax.stop_gradient(self._embed(images[:, None]))
        bias = self.position_bias(self.grid, self.grid)
        tokens = self.decoder_norm(self.decoder(tokens, bias, self.latent_out(latent)))
        patches = self.head(tokens).reshape(len(images), self.grid**2, -1)
        return unpatchify(patches, self.config.patch_size, *images.shape[1:3])

    def _embed(self, images: jax.Array) -> jax.Array:
        """Patch tokens `[B, T, I, J, D]` of images `[B, T, H, W, 3]`."""
        patches = patchify(_merge(images), self.config.patch_size)
        tokens = self.embed_norm(self.patch_embed(self.patch_norm(patches)))
        return tokens.reshape(*images.shape[:2], self.grid, self.grid, -1)


def _pixels(frames: jax.Array) -> jax.Array:
    """uint8 to float32 in [0, 1], the range of LAPA's released model."""
    return frames.astype(jnp.float32) / 255.0


def _merge(x: jax.Array) -> jax.Array:
    """Merges the two leading axes."""
    return x.reshape(-1, *x.shape[2:])
