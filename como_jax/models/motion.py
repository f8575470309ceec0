"""CoMo (arXiv 2505.17006): inverse and forward dynamics models around a continuous latent motion.

Axes: B batch, T instants, P pairs, N tokens of one frame, D width, Q queries, L latent size of one query.
"""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from como_jax import losses
from como_jax.errors import ConfigError
from como_jax.models.layers import (
    Block,
    LayerNorm,
    Linear,
    denormalize_frames,
    normalize_frames,
    patchify,
    sincos_position_embedding,
    unpatchify,
    xavier_uniform,
)
from como_jax.models.stack import Stack
from como_jax.models.vit import Vit, VitConfig
from como_jax.types import FramePairs

MOTION_INPUTS = ("difference", "future")


@dataclasses.dataclass(frozen=True)
class MotionConfig:
    """Everything of CoMo but its encoder.

    Attributes:
      num_queries: latent tokens of a transition (8 in the paper).
      latent_dim: numbers in each of them (16 in the paper).
      motion_input: what the inverse dynamics model sees beside `F_t`: "difference", the early temporal difference
        `F_{t+n} - F_t` (Td), or "future", `F_{t+n}` itself (the plain continuous variant).
      idm_width, idm_depth, idm_heads: the motion Q-former.
      fdm_width, fdm_depth, fdm_heads: the forward dynamics model.
      fdm_patch_size: its pixel patches.
      residual: predict the change of the current frame, starting from none; off in the paper.
      freeze_encoder: no gradient into the encoder.
      mse_weight, tcl_weight: loss weights; Tcl is off at 0.
      tcl_temperature: divides Tcl's similarities.
      tcl_gradient_everywhere: whether Tcl also trains through its two extra branches, `z(t, t+n+d)` and
        `z(t+n, t)`; the public code does not.
    """

    num_queries: int = 8
    latent_dim: int = 16
    motion_input: str = "difference"
    idm_width: int = 768
    idm_depth: int = 4
    idm_heads: int = 12
    fdm_width: int = 768
    fdm_depth: int = 12
    fdm_heads: int = 12
    fdm_patch_size: int = 16
    residual: bool = False
    freeze_encoder: bool = True
    mse_weight: float = 1.0
    tcl_weight: float = 0.004
    tcl_temperature: float = 0.1
    tcl_gradient_everywhere: bool = False

    def __post_init__(self) -> None:
        if self.motion_input not in MOTION_INPUTS:
            raise ConfigError(
                f"model.motion_input {self.motion_input!r} is unknown; choose one of {', '.join(MOTION_INPUTS)}."
            )


class InverseDynamics(nnx.Module):
    """ME-IDM, the motion Q-former: learned queries read the current frame's features and its motion."""

    def __init__(
        self,
        num_tokens: int,
        feature_width: int,
        config: MotionConfig,
        *,
        dtype: jnp.dtype,
        remat: str,
        rngs: nnx.Rngs,
    ):
        width, self.num_queries = config.idm_width, config.num_queries
        linear = functools.partial(Linear, dtype=dtype, rngs=rngs)

        def embedding(*shape: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), (*shape, width)))

        self.input_proj = linear(feature_width, width)
        self.queries = embedding(1, self.num_queries)
        self.separator = embedding(1, 1)
        self.condition_type = embedding(1, 1)
        self.motion_type = embedding(1, 1)
        self.pos_embed = embedding(1, self.num_queries + 2 * num_tokens + 1)
        self.blocks = Stack(
            lambda rngs: Block(width, config.idm_heads, dtype=dtype, rngs=rngs),
            config.idm_depth,
            remat=remat,
            rngs=rngs,
        )
        self.norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.latent_hidden = linear(width, width)
        self.latent_out = Linear(width, config.latent_dim, dtype=jnp.float32, rngs=rngs)

    def __call__(self, condition: jax.Array, motion: jax.Array) -> jax.Array:
        """Latent motion `[B, Q, L]`, float32, from features `[B, N, D]` of the current frame and of its motion."""
        chex.assert_equal_shape([condition, motion])
        condition = self.input_proj(condition) + self.condition_type[...].astype(self.input_proj.dtype)
        motion = self.input_proj(motion) + self.motion_type[...].astype(self.input_proj.dtype)

        def expand(token: nnx.Param) -> jax.Array:
            return jnp.broadcast_to(token[...].astype(condition.dtype), (len(condition), *token[...].shape[1:]))

        tokens = [expand(self.queries), condition, expand(self.separator), motion]
        x = jnp.concatenate(tokens, axis=1) + self.pos_embed[...].astype(condition.dtype)
        x = self.norm(self.blocks(x, num_outputs=self.num_queries))
        return self.latent_out(jnp.tanh(self.latent_hidden(x)))


class ForwardDynamics(nnx.Module):
    """FDM: a ViT on the current frame's pixels with the latent motion added to every patch."""

    def __init__(self, image_size: int, config: MotionConfig, *, dtype: jnp.dtype, remat: str, rngs: nnx.Rngs):
        width, self.patch_size = config.fdm_width, config.fdm_patch_size
        if image_size % self.patch_size:
            raise ConfigError(
                f"data.image_size {image_size} must be a multiple of model.fdm_patch_size {self.patch_size}."
            )
        grid, pixels = image_size // self.patch_size, self.patch_size**2 * 3
        linear = functools.partial(Linear, dtype=dtype, rngs=rngs)
        self.residual = config.residual
        self.patch_embed = linear(pixels, width)
        self.pos_embed = nnx.Param(jnp.asarray(sincos_position_embedding(grid, grid, width))[None])
        self.latent_up = linear(config.latent_dim, width)
        self.latent_pool = linear(config.num_queries * width, width)
        self.blocks = Stack(
            lambda rngs: Block(width, config.fdm_heads, dtype=dtype, rngs=rngs),
            config.fdm_depth,
            remat=remat,
            rngs=rngs,
        )
        self.norm = LayerNorm(width, dtype=jnp.float32, rngs=rngs)
        head_init = nnx.initializers.zeros if config.residual else xavier_uniform
        self.head = Linear(width, pixels, kernel_init=head_init, dtype=jnp.float32, rngs=rngs)

    def __call__(self, images: jax.Array, latent: jax.Array) -> jax.Array:
        """Normalised next images `[B, H, W, 3]` from normalised images and latent motion `[B, Q, L]`."""
        motion = self.latent_pool(self.latent_up(latent).reshape(len(latent), -1))
        x = self.patch_embed(patchify(images, self.patch_size))
        x = x + self.pos_embed[...].astype(x.dtype) + motion[:, None]
        pixels = self.head(self.norm(self.blocks(x)))
        output = unpatchify(pixels, self.patch_size, *images.shape[1:3])
        return images + output if self.residual else output


class Como(nnx.Module):
    """The motion model: frozen or trained encoder, inverse dynamics, forward dynamics."""

    def __init__(
        self,
        vit: VitConfig,
        config: MotionConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        self.config = config
        encoder_remat = "none" if config.freeze_encoder else remat
        self.encoder = Vit(vit, dtype=dtype, remat=encoder_remat, rngs=rngs)
        self.idm = InverseDynamics(vit.grid**2 + 1, vit.width, config, dtype=dtype, remat=remat, rngs=rngs)
        self.fdm = ForwardDynamics(vit.image_size, config, dtype=dtype, remat=remat, rngs=rngs)

    def encode(self, frames: jax.Array) -> jax.Array:
        """Latent motion `[B, T - 1, Q, L]` between consecutive frames of uint8 `[B, T, H, W, 3]`."""
        features = self._features(normalize_frames(frames))
        return self._latent(features[:, :-1], features[:, 1:])

    def predict(self, frame: jax.Array, latent: jax.Array) -> jax.Array:
        """The frame, float32 in [0, 1] `[B, H, W, 3]`, that follows uint8 `frame` under `latent` `[B, Q, L]`."""
        return denormalize_frames(self.fdm(normalize_frames(frame), latent))

    def loss(self, batch: FramePairs, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Pixel error of the predicted frames plus Tcl, averaged over all pairs of the batch."""
        del key  # Nothing is drawn at random.
        config = self.config
        images = normalize_frames(batch.frames)
        offsets = [] if batch.offset_frames is None else [normalize_frames(batch.offset_frames)]
        features = self._features(jnp.concatenate([images, *offsets], axis=1))
        instants = images.shape[1]
        current, future, offset = features[:, : instants - 1], features[:, 1:instants], features[:, instants:]

        latent = self._latent(current, future)
        prediction = self.fdm(_merge(images[:, :-1]), _merge(latent))
        terms = {"mse": losses.pixel_mse(prediction, _merge(images[:, 1:]))}
        total = config.mse_weight * terms["mse"]
        if config.tcl_weight:
            terms["tcl"] = self._contrast(latent, current, future, offset)
            total = total + config.tcl_weight * terms["tcl"]
        return total, terms

    def _features(self, images: jax.Array) -> jax.Array:
        """Token features `[B, T, N, D]` of normalised images `[B, T, H, W, 3]`, each encoded once."""
        chex.assert_rank(images, 5)
        features = self.encoder(_merge(images)).reshape(*images.shape[:2], -1, self.encoder.config.width)
        return jax.lax.stop_gradient(features) if self.config.freeze_encoder else features

    def _latent(self, current: jax.Array, future: jax.Array) -> jax.Array:
        """`z` `[B, P, Q, L]` of the transition from features `current` to `future`, each `[B, P, N, D]`."""
        motion = future - current if self.config.motion_input == "difference" else future
        latent = self.idm(_merge(current), _merge(motion))
        return latent.reshape(*current.shape[:2], *latent.shape[1:])

    def _contrast(self, latent: jax.Array, current: jax.Array, future: jax.Array, offset: jax.Array) -> jax.Array:
        if offset.shape != future.shape:
            raise ConfigError("Tcl needs offset frames in the batch: set data.offset_frames or tcl_weight to 0.")
        model, sources, targets = self, (current, future), (offset, current)
        if not self.config.tcl_gradient_everywhere:
            graphdef, params = nnx.split(self)
            model = nnx.merge(graphdef, jax.lax.stop_gradient(params))
            sources, targets = jax.lax.stop_gradient((sources, targets))
        extra = model._latent(jnp.concatenate(sources), jnp.concatenate(targets))
        shifted, reverse = jnp.split(extra, 2)

        def flat(z: jax.Array) -> jax.Array:
            return _merge(z).reshape(z.shape[0] * z.shape[1], -1)

        return losses.temporal_contrastive(flat(latent), flat(shifted), flat(reverse), self.config.tcl_temperature)


def _merge(x: jax.Array) -> jax.Array:
    """Merges the two leading axes."""
    return x.reshape(-1, *x.shape[2:])
