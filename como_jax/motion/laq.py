"""LAQ, latent action quantisation: stage 1 of LAPA (arXiv 2410.11758).

A video transformer encodes both frames of a pair, the change of their pooled tokens is quantised to a few codes (NSVQ),
and a decoder draws the second frame from the first and the codes:

    e_t     = pool(temporal(spatial(patches(O_t, O_{t+n})))), and e_{t+n} in the same way
    latent  = nearest code to e_{t+n} - e_t
    loss    = |decoder(patches(O_t), latent) - O_{t+n}|^2

The model comes first, then the layers of its video transformer (C-ViViT of Phenaki, arXiv 2210.02399).

Axes: B batch, T instants, P pairs, H and W pixels, I and J rows and columns of patches, N tokens, M context tokens,
D width, Q latent actions of a pair, L numbers of one. In the layers, H stands for heads and K for the size of a head.
"""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from como_jax.errors import ConfigError
from como_jax.motion import losses
from como_jax.motion.bottlenecks import make_bottleneck
from como_jax.nn.layers import LayerNorm, Linear, patchify, unpatchify
from como_jax.nn.primitives import broadcast_param, keep_batch_split, merge_leading, project, xavier_uniform
from como_jax.nn.stack import Stack
from como_jax.spec.motion import LAQ_POOLING, BottleneckConfig, LaqConfig
from como_jax.types import EncodedPair, FramePairs, LossOutput

# Factor of the logits of cosine attention, which is not learned.
ATTENTION_SCALE = 8.0
NUM_NULL_TOKENS = 2


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
        """Codes of the latent actions, `[B, T - 1, Q, L]`, between consecutive frames of uint8 `[B, T, H, W, 3]`."""
        return self.bottleneck(self._infer(frames)).latent

    def codes(self, frames: jax.Array) -> jax.Array:
        """The numbers of these codes, int32 `[B, T - 1, Q]`."""
        return self.bottleneck.codes(self._infer(frames))

    def encode_frame(self, frames: jax.Array) -> jax.Array:
        """Patch tokens `[B, I, J, D]` of uint8 frames `[B, H, W, 3]`; all later layers see both frames of a pair."""
        return self._embed(_pixels(frames)[:, None])[:, 0]

    def encode_pair(self, source: jax.Array, target: jax.Array) -> EncodedPair:
        """The motion from each source to its target, both as `encode_frame` gives them."""
        return self.bottleneck.latent_motion(self._change(jnp.stack([source, target], axis=1)))

    def predict(self, frame: jax.Array, latent: jax.Array) -> jax.Array:
        """The frame, float32 in [0, 1] `[B, H, W, 3]`, that follows uint8 `frame` under `latent` `[B, Q, L]`."""
        return jnp.clip(self._draw(_pixels(frame), latent), 0.0, 1.0)

    def loss(self, batch: FramePairs, key: jax.Array) -> LossOutput:
        """Mean squared pixel error of the second frame of every pair."""
        passed = self.bottleneck(self._infer(batch.frames), key)
        images = _pixels(batch.frames)
        drawn = self._draw(merge_leading(images[:, :-1]), merge_leading(passed.latent))
        mse = losses.mean_squared_error(drawn, merge_leading(images[:, 1:]))
        return LossOutput(mse + passed.loss, {"mse": mse, **passed.terms}, {"bottleneck": passed.statistics})

    def update_codebook(
        self, statistics: dict[str, Any], step: jax.Array, key: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """New codes in place of those that are hardly used, after an update; see `LatentMotionModel`."""
        params, metrics = self.bottleneck.update_codebook(statistics["bottleneck"], step, key)
        return {"bottleneck": params}, metrics

    def _infer(self, frames: jax.Array) -> jax.Array:
        """The change of pooled tokens from the first to the second frame of each pair, `[B, P, Q, L]`."""
        size = self.grid * self.config.patch_size
        chex.assert_shape(frames, (None, None, size, size, 3))
        batch, pairs = frames.shape[0], frames.shape[1] - 1
        images = _pixels(jnp.stack([merge_leading(frames[:, :-1]), merge_leading(frames[:, 1:])], axis=1))
        change = self._change(self._embed(images))
        return change.reshape(batch, pairs, *change.shape[1:])

    def _change(self, tokens: jax.Array) -> jax.Array:
        """The same, `[B, Q, L]`, from patch tokens `[B, 2, I, J, D]` of both frames."""
        tokens = self.spatial_norm(self.spatial(tokens, self.position_bias(self.grid, self.grid)))
        tokens = self.temporal_norm(self.temporal(tokens))
        grid = keep_batch_split(merge_leading(self.latent_in(tokens)))
        pooled = keep_batch_split(self.pool2(jax.nn.relu(keep_batch_split(self.pool1(grid)))))
        pooled = pooled.reshape(len(tokens), 2, -1, self.config.latent_dim)
        return pooled[:, 1] - pooled[:, 0]

    def _draw(self, images: jax.Array, latent: jax.Array) -> jax.Array:
        """The next images `[B, H, W, 3]` from `images` and `latent` `[B, Q, L]`."""
        chex.assert_rank([images, latent], [4, 3])
        # The patch embedding belongs to the encoder, as in LAPA, so that the decoder does not train it.
        tokens = jax.lax.stop_gradient(self._embed(images[:, None]))
        bias = self.position_bias(self.grid, self.grid)
        tokens = self.decoder_norm(self.decoder(tokens, bias, self.latent_out(latent)))
        patches = self.head(tokens).reshape(len(images), self.grid**2, -1)
        return unpatchify(patches, self.config.patch_size, *images.shape[1:3])

    def _embed(self, images: jax.Array) -> jax.Array:
        """Patch tokens `[B, T, I, J, D]` of images `[B, T, H, W, 3]`."""
        patches = patchify(merge_leading(images), self.config.patch_size)
        tokens = self.embed_norm(self.patch_embed(self.patch_norm(patches)))
        return tokens.reshape(*images.shape[:2], self.grid, self.grid, -1)


def _pixels(frames: jax.Array) -> jax.Array:
    """uint8 to float32 in [0, 1], the range of LAPA's released model."""
    return frames.astype(jnp.float32) / 255.0


class CosineAttention(nnx.Module):
    """Attention between queries and keys of unit length, each of whose numbers has a learned scale."""

    def __init__(
        self, width: int, num_heads: int, head_size: int, *, num_null: int = 0, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        general = functools.partial(nnx.LinearGeneral, kernel_init=xavier_uniform, use_bias=False, rngs=rngs)
        self.dtype = dtype
        self.q = general(width, (num_heads, head_size))
        self.kv = general(width, (2, num_heads, head_size))
        self.proj = general((num_heads, head_size), width, axis=(-2, -1))
        self.q_scale = nnx.Param(jnp.ones(head_size))
        self.k_scale = nnx.Param(jnp.ones(head_size))
        if num_null:
            # Learned keys and values to read when no context token matters.
            self.null_kv = nnx.Param(jax.random.normal(rngs.params(), (2, num_null, num_heads, head_size)))

    def __call__(self, x: jax.Array, context: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """Tokens `[B, N, D]` read a context `[B, M, D]`; `bias` `[H, N, M]` is added to the logits."""
        x, context = x.astype(self.dtype), context.astype(self.dtype)
        query, (key, value) = project(x, self.q.kernel[...]), jnp.moveaxis(project(context, self.kv.kernel[...]), 2, 0)
        if hasattr(self, "null_kv"):
            shape = self.null_kv[...].shape
            null = broadcast_param(self.null_kv[...][:, None], (shape[0], len(x), *shape[1:]), self.dtype)
            key, value = (jnp.concatenate([null[part], own], axis=1) for part, own in enumerate((key, value)))
        query, key = unit(query) * self.q_scale[...], unit(key) * self.k_scale[...]
        logits = ATTENTION_SCALE * jnp.einsum("bnhk,bmhk->bhnm", query, key)
        if bias is not None:
            logits = logits + bias
        weights = jax.nn.softmax(logits).astype(self.dtype)
        return project(jnp.einsum("bhnm,bmhk->bnhk", weights, value), self.proj.kernel[...], num_inputs=2)


class GatedMlp(nnx.Module):
    """GEGLU (arXiv 2002.05202): one half of the hidden layer gates the other. It has the parameters of a plain MLP."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        hidden = int(width * 4 * 2 / 3)
        self.fc1 = Linear(width, 2 * hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` to `[..., D]`."""
        value, gate = jnp.split(self.fc1(x), 2, axis=-1)
        return self.fc2(value * jax.nn.gelu(gate, approximate=False))


class PositionGenerator(nnx.Module):
    """PEG (arXiv 2102.10882): a depthwise 3 x 3 x 3 convolution over time, rows and columns.

    For every channel it is computed as one matrix over the few places of a clip, because compilers are slow at
    depthwise convolutions in three dimensions: on a CPU both passes of 32 clips of 2 x 8 x 8 x 96 take 8 ms instead of
    360. LAPA's released code reshapes the tokens in another order than they have, which mixes the axes; this class does
    not.
    """

    def __init__(self, width: int, *, causal: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.causal, self.dtype = causal, dtype
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (3, 3, 3, width)) / np.sqrt(27))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, I, J, D]` to the same shape; a causal one reads the frame and the two before it."""
        chex.assert_rank(x, 5)
        # In float32, because the gradient of the few taps is a sum over all clips and places.
        taps = self.kernel[...].reshape(27, -1)
        nowhere = jnp.zeros((1, taps.shape[1]))
        matrix = jnp.concatenate([taps, nowhere])[_taps(*x.shape[1:4], self.causal)]
        tokens = x.astype(jnp.float32).reshape(len(x), -1, x.shape[-1])
        mixed = jnp.einsum("nmd,bmd->bnd", matrix, tokens).reshape(x.shape)
        return (mixed + self.bias[...]).astype(self.dtype)


def _taps(frames: int, rows: int, columns: int, causal: bool) -> np.ndarray:
    """The number of the tap that connects each output place to each input place, `[N, N]`; 27 where none does."""
    axes = [np.arange(size) for size in (frames, rows, columns)]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    offset = places[None] - places[:, None] + np.array([2 if causal else 1, 1, 1])
    inside = np.all((offset >= 0) & (offset < 3), axis=-1)
    return np.where(inside, offset @ np.array([9, 3, 1]), 27)


class PositionBias(nnx.Module):
    """Continuous position bias (Swin v2, arXiv 2111.09883): an MLP over the logarithms of relative positions."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        linear = functools.partial(Linear, dtype=jnp.float32, rngs=rngs)
        self.fc1, self.fc2, self.out = linear(2, width), linear(width, width), linear(width, num_heads)

    def __call__(self, rows: int, columns: int) -> jax.Array:
        """Bias on the logits `[H, rows * columns, rows * columns]`, float32."""
        grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2)
        offset = (grid[:, None] - grid[None]).astype(np.float32)
        x = jnp.asarray(np.sign(offset) * np.log1p(np.abs(offset)))
        x = jax.nn.leaky_relu(self.fc1(x), 0.1)
        x = jax.nn.leaky_relu(self.fc2(x), 0.1)
        return jnp.moveaxis(self.out(x), -1, 0)


class _VideoBlock(nnx.Module):
    """Base of spatial and temporal blocks: position generator, pre-norm attention over some axes, gated MLP."""

    def __init__(self, width: int, num_heads: int, head_size: int, *, causal: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.peg = PositionGenerator(width, causal=causal, dtype=dtype, rngs=rngs)
        self.norm1 = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attn = CosineAttention(width, num_heads, head_size, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.mlp = GatedMlp(width, dtype=dtype, rngs=rngs)


class SpatialBlock(_VideoBlock):
    """Every patch attends to all patches of its frame and then, with `cross`, to context tokens."""

    def __init__(
        self, width: int, num_heads: int, head_size: int, *, cross: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        super().__init__(width, num_heads, head_size, causal=False, dtype=dtype, rngs=rngs)
        if cross:
            self.cross_norm = LayerNorm(width, dtype=dtype, rngs=rngs)
            self.cross = nnx.Dict(
                attn=CosineAttention(width, num_heads, head_size, num_null=NUM_NULL_TOKENS, dtype=dtype, rngs=rngs)
            )

    def __call__(self, x: jax.Array, bias: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """`[B, T, I, J, D]` to the same shape, with `bias` `[H, I * J, I * J]` and `context` `[B * T, M, D]`."""
        chex.assert_rank(x, 5)
        x = x + self.peg(x)
        tokens = x.reshape(x.shape[0] * x.shape[1], -1, x.shape[-1])
        normed = self.norm1(tokens)
        tokens = tokens + self.attn(normed, normed, bias)
        if context is not None:
            tokens = tokens + self.cross["attn"](self.cross_norm(tokens), context)
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens.reshape(x.shape)


class TemporalBlock(_VideoBlock):
    """Every patch attends to the patches at its own place in its frame and in earlier ones."""

    def __init__(self, width: int, num_heads: int, head_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(width, num_heads, head_size, causal=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, I, J, D]` to the same shape."""
        batch, frames, rows, columns, width = x.shape
        x = x + self.peg(x)
        tokens = jnp.moveaxis(x, 1, 3).reshape(-1, frames, width)
        normed = self.norm1(tokens)
        future = jnp.where(np.tril(np.ones((frames, frames), bool)), 0.0, jnp.finfo(jnp.float32).min)
        tokens = tokens + self.attn(normed, normed, future[None])
        tokens = tokens + self.mlp(self.norm2(tokens))
        return jnp.moveaxis(tokens.reshape(batch, rows, columns, frames, width), 3, 1)


def unit(x: jax.Array) -> jax.Array:
    """Float32 vectors of unit length along the last axis; 0 stays 0, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-12))
