"""LAQ and CoMo as the released code of LAPA, Moto and CoMo computes them, only for weights that this code trained.

That code differs from the papers, and from the models of this package, in details that change the output of the same
weights. A run whose config has `released_code` uses these classes; `como_jax.weights` makes such runs.

Axes: B batch, T frames, I and J rows and columns of patches, H heads, M context tokens, D width, Q latent tokens of a
pair, L numbers of one.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from como_jax.motion.como import Como, EncodedFrames
from como_jax.motion.laq import Laq, SpatialBlock, TemporalBlock
from como_jax.nn.layers import LayerNorm, Linear
from como_jax.nn.stack import Stack
from como_jax.spec.motion import LaqConfig, MotionConfig
from como_jax.spec.towers import VitConfig
from como_jax.types import FramePairs

LAPA_EPSILON = 1e-5
MOTO_EPSILON = 1e-12
"""Epsilons of the layer norms: PyTorch's default in LAPA, that of the ViT in transformers in Moto and CoMo."""


class ReleasedSpatialBlock(SpatialBlock):
    """A spatial block whose position generator is causal, and whose keys and values come from tokens without a norm."""

    def __init__(
        self, width: int, num_heads: int, head_size: int, *, cross: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        super().__init__(width, num_heads, head_size, cross=cross, dtype=dtype, rngs=rngs)
        self.peg.causal = True
        if cross:
            self.context_norm = LayerNorm(width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """`[B, T, I, J, D]` to the same shape, with `bias` `[H, I * J, I * J]` and `context` `[B * T, M, D]`."""
        x = x + self.peg(x)
        tokens = x.reshape(x.shape[0] * x.shape[1], -1, x.shape[-1])
        tokens = tokens + self.attn(self.norm1(tokens), tokens, bias)
        if context is not None:
            tokens = tokens + self.cross["attn"](self.cross_norm(tokens), self.context_norm(context))
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens.reshape(x.shape)


class ReleasedTemporalBlock(TemporalBlock):
    """A temporal block that reads both frames, and whose position generator mixes up the axes.

    The tokens lie in the order (I, J, T) and are read as if it were (T, I, J).
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, I, J, D]` to the same shape."""
        batch, frames, rows, columns, width = x.shape
        last = jnp.moveaxis(x, 1, 3)
        last = last + self.peg(last.reshape(x.shape)).reshape(last.shape)
        tokens = last.reshape(-1, frames, width)
        tokens = tokens + self.attn(self.norm1(tokens), tokens)
        tokens = tokens + self.mlp(self.norm2(tokens))
        return jnp.moveaxis(tokens.reshape(batch, rows, columns, frames, width), 3, 1)


class ReleasedLaq(Laq):
    """LAQ of github.com/LatentActionPretraining/LAPA."""

    def __init__(
        self,
        image_size: int,
        config: LaqConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        super().__init__(image_size, config, dtype=dtype, remat=remat, rngs=rngs)
        sizes = (config.width, config.num_heads, config.head_size)

        def stack(block: Any, depth: int) -> Stack:
            return Stack(lambda rngs: block(*sizes, dtype=dtype, rngs=rngs), depth, remat=remat, rngs=rngs)

        self.spatial = stack(ReleasedSpatialBlock, config.spatial_depth)
        self.temporal = stack(ReleasedTemporalBlock, config.temporal_depth)
        self.decoder = stack(functools.partial(ReleasedSpatialBlock, cross=True), config.decoder_depth)
        # From 4 x 4 to 2 x 2 positions: without padding.
        self.pool2 = nnx.Conv(config.latent_dim, config.latent_dim, (3, 3), padding="VALID", rngs=rngs)
        _set_epsilon(self, LAPA_EPSILON)

    def _draw(self, images: jax.Array, latent: jax.Array) -> jax.Array:
        batch, queries, size = latent.shape
        # The memory of [Q, L] is read as [L, Q], so that every token gets numbers of all tokens.
        return super()._draw(images, latent.reshape(batch, size, queries).swapaxes(1, 2))


class ReleasedComo(Como):
    """The motion model of github.com/TencentARC/Moto and of CoMo's code, which extends it.

    The latent passes another layer and a tanh before the forward dynamics model.
    """

    def __init__(
        self,
        vit: VitConfig,
        config: MotionConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        super().__init__(vit, config, dtype=dtype, remat=remat, rngs=rngs)
        self.latent_hidden = Linear(config.latent_dim, config.latent_dim, dtype=dtype, rngs=rngs)
        _set_epsilon(self, MOTO_EPSILON)

    def predict(self, frame: jax.Array, latent: jax.Array) -> jax.Array:
        """The frame, float32 in [0, 1] `[B, H, W, 3]`, that follows uint8 `frame` under `latent` `[B, Q, L]`."""
        return super().predict(frame, self._hidden(latent))

    def _prediction_terms(
        self, current: EncodedFrames, future: EncodedFrames, latent: jax.Array, batch: FramePairs
    ) -> dict[str, jax.Array]:
        return super()._prediction_terms(current, future, self._hidden(latent), batch)

    def _hidden(self, latent: jax.Array) -> jax.Array:
        return jnp.tanh(self.latent_hidden(latent))


def _set_epsilon(module: nnx.Module, epsilon: float) -> None:
    for _, part in nnx.iter_modules(module):
        if isinstance(part, LayerNorm):
            part.epsilon = epsilon
