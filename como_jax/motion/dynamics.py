"""The inverse and the forward dynamics model of CoMo (arXiv 2505.17006), and the head that reads flow from the second.

Axes: B batch, H and W pixels, N tokens of one frame, M patches of one frame, D width, Q queries, L numbers of a latent
token, h and w cells of a flow map.
"""

from __future__ import annotations

import functools
import math

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from como_jax.errors import ConfigError
from como_jax.nn.layers import Block, LayerNorm, Linear, patchify, sincos_position_embedding, unpatchify
from como_jax.nn.primitives import broadcast_param, embedding, keep_batch_split, xavier_uniform
from como_jax.nn.stack import Stack
from como_jax.types import FLOW_STRIDE


class InverseDynamics(nnx.Module):
    """The inverse dynamics model (ME-IDM, a motion Q-former): learned queries read what changes between two frames.

    Its sequence is: the queries; the features of the current frame and a separator, unless `conditioned` is False; the
    motion. The outputs of the queries become the latent motion.
    """

    def __init__(
        self,
        num_tokens: int,
        feature_width: int,
        latent_dim: int,
        *,
        num_queries: int,
        width: int,
        depth: int,
        num_heads: int,
        conditioned: bool = True,
        dtype: jnp.dtype,
        remat: str,
        rngs: nnx.Rngs,
    ):
        self.num_queries, self.conditioned = num_queries, conditioned
        linear = functools.partial(Linear, dtype=dtype, rngs=rngs)
        self.input_proj = linear(feature_width, width)
        self.queries = embedding(1, num_queries, width, rngs=rngs)
        self.motion_type = embedding(1, 1, width, rngs=rngs)
        if conditioned:
            self.separator = embedding(1, 1, width, rngs=rngs)
            self.condition_type = embedding(1, 1, width, rngs=rngs)
        length = num_queries + (2 * num_tokens + 1 if conditioned else num_tokens)
        self.pos_embed = embedding(1, length, width, rngs=rngs)
        self.blocks = Stack(lambda rngs: Block(width, num_heads, dtype=dtype, rngs=rngs), depth, remat=remat, rngs=rngs)
        self.norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.latent_hidden = linear(width, width)
        self.latent_out = Linear(width, latent_dim, dtype=jnp.float32, rngs=rngs)

    def __call__(self, condition: jax.Array, motion: jax.Array) -> jax.Array:
        """Latent motion `[B, Q, L]`, float32, from features `[B, N, D]` of the current frame and of its motion."""
        chex.assert_rank(motion, 3)
        chex.assert_equal_shape([condition, motion])
        motion = self.input_proj(motion)

        def expand(token: nnx.Param) -> jax.Array:
            return broadcast_param(token[...], (len(motion), *token[...].shape[1:]), motion.dtype)

        tokens = [expand(self.queries)]
        if self.conditioned:
            tokens += [self.input_proj(condition) + expand(self.condition_type), expand(self.separator)]
        tokens.append(motion + expand(self.motion_type))
        x = jnp.concatenate(tokens, axis=1)
        x = x + broadcast_param(self.pos_embed[...], x.shape, x.dtype)
        # So few tokens are cheaper to exchange than the layers' kernels, which XLA does unless it is told otherwise.
        x = keep_batch_split(self.norm(self.blocks(x, num_outputs=self.num_queries)))
        hidden = keep_batch_split(jnp.tanh(self.latent_hidden(x)))
        return keep_batch_split(self.latent_out(hidden))


class ForwardDynamics(nnx.Module):
    """The forward dynamics model (FDM): a ViT on the current frame's pixels; the latent motion is added to each patch.

    With `residual` it predicts the change of the current frame, which starts at none.
    """

    def __init__(
        self,
        image_size: int,
        latent_shape: tuple[int, int],
        *,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        residual: bool,
        dtype: jnp.dtype,
        remat: str,
        rngs: nnx.Rngs,
    ):
        if image_size % patch_size:
            raise ConfigError(f"data.image_size {image_size} must be a multiple of model.fdm_patch_size {patch_size}.")
        grid, pixels = image_size // patch_size, patch_size**2 * 3
        num_queries, latent_dim = latent_shape
        linear = functools.partial(Linear, dtype=dtype, rngs=rngs)
        self.image_size, self.latent_shape = image_size, latent_shape
        self.patch_size, self.residual = patch_size, residual
        self.patch_embed = linear(pixels, width)
        self.pos_embed = nnx.Param(jnp.asarray(sincos_position_embedding(grid, grid, width))[None])
        self.latent_up = linear(latent_dim, width)
        self.latent_pool = linear(num_queries * width, width)
        self.blocks = Stack(lambda rngs: Block(width, num_heads, dtype=dtype, rngs=rngs), depth, remat=remat, rngs=rngs)
        self.norm = LayerNorm(width, dtype=jnp.float32, rngs=rngs)
        head_init = nnx.initializers.zeros if residual else xavier_uniform
        self.head = Linear(width, pixels, kernel_init=head_init, dtype=jnp.float32, rngs=rngs)

    def __call__(self, images: jax.Array, latent: jax.Array) -> jax.Array:
        """The next images `[B, H, W, 3]` from `images`, both normalised, and latent motion `[B, Q, L]`."""
        return self.pixels(self.tokens(images, latent), images)

    def tokens(self, images: jax.Array, latent: jax.Array) -> jax.Array:
        """Features of the next frame's patches, float32 `[B, M, D]`, from which heads read pixels, features or flow."""
        chex.assert_shape(images, (len(latent), self.image_size, self.image_size, 3))
        chex.assert_shape(latent, (None, *self.latent_shape))
        queries = self.latent_up(keep_batch_split(latent)).reshape(len(latent), -1)
        motion = keep_batch_split(self.latent_pool(keep_batch_split(queries)))
        x = self.patch_embed(patchify(images, self.patch_size))
        x = x + broadcast_param(self.pos_embed[...], x.shape, x.dtype) + motion[:, None]
        return self.norm(self.blocks(x))

    def pixels(self, tokens: jax.Array, images: jax.Array) -> jax.Array:
        """The next images `[B, H, W, 3]` from `tokens` of the current `images`."""
        output = unpatchify(self.head(tokens), self.patch_size, *images.shape[1:3])
        return images + output if self.residual else output


class FlowHead(nnx.Module):
    """Optical flow from the tokens of the forward dynamics model."""

    def __init__(self, width: int, patch_size: int, *, rngs: nnx.Rngs):
        if patch_size % FLOW_STRIDE:
            raise ConfigError(
                f"model.flow_weight needs model.fdm_patch_size to be a multiple of {FLOW_STRIDE}, not {patch_size}."
            )
        self.cells = patch_size // FLOW_STRIDE
        self.out = Linear(width, self.cells**2 * 2, dtype=jnp.float32, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Displacements `[B, h, w, 2]`, in cells of the flow map, from tokens `[B, M, D]` of a square image."""
        chex.assert_rank(tokens, 3)
        side = math.isqrt(tokens.shape[1]) * self.cells
        return unpatchify(self.out(tokens), self.cells, side, side)
