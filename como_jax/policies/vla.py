"""Vision-language-action model: a decoder reads images and an instruction and writes latent motion or actions.

After LAPA (arXiv 2410.11758). In latent pretraining it writes the latent motion of a video, as codes or, for CoMo, as
continuous vectors; in action finetuning it writes the actions of a robot, as bins or as vectors. With both kinds of
data at once it learns both outputs, which do not read each other.

Axes: B batch, P tokens of the prefix, S tokens of an output, N all tokens, M tokens of the instruction, Q latent
tokens, L numbers of one, H steps of a chunk, A action, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from como_jax.errors import ConfigError, DatasetError
from como_jax.nn.decoder import Decoder
from como_jax.policies.heads import (
    OutputTokens,
    bin_midpoints,
    code_tokens,
    masked_mean,
    round_gripper,
    to_bins,
    vector_tokens,
)
from como_jax.policies.observation import ObservationEncoder
from como_jax.spec.policies import ObservationConfig, VlaConfig
from como_jax.types import LossOutput, Observation, PolicyBatch

# Largest changes at strength 1, as policies on robot data are commonly trained (OpenVLA, arXiv 2406.09246, and LAPA).
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 0.2, 0.2, 0.2, 0.05
# NTSC's luma and two colour differences; turning the two differences changes the hue.
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)


class Prefix(NamedTuple):
    """What the decoder reads before it writes.

    Attributes:
      tokens: `[B, P, D]`: images and state first, then the instruction.
      present: bool `[B, P]`, False at missing cameras and at padding of the text.
      seen: the number of tokens of images and state.
    """

    tokens: jax.Array
    present: jax.Array
    seen: int

    @property
    def length(self) -> jax.Array:
        """The number of tokens that are present, int32 `[B]`."""
        return jnp.sum(self.present, axis=1, dtype=jnp.int32)


class Target(NamedTuple):
    """Values of an output's tokens, `[B, S]` or `[B, S, L]`, and a mask of that shape, 1 where they are known."""

    values: jax.Array
    mask: jax.Array


class LatentVla(nnx.Module):
    """The policy that this module's docstring describes."""

    def __init__(
        self,
        observation: ObservationConfig,
        config: VlaConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        if config.text_weight and observation.text.tower != "tokens":
            raise ConfigError("model.text_weight needs text.tower=tokens: no other tower's text can be predicted.")
        self.config, self.instants = config, observation.instants
        width = config.decoder.width
        self.observation = ObservationEncoder(observation, width, dtype=dtype, remat=remat, rngs=rngs)
        self.decoder = Decoder(config.decoder, dtype=dtype, remat=remat, rngs=rngs)
        flow = {"hidden": config.head_width, "depth": config.head_depth, "steps": config.flow_steps, "dtype": dtype}
        if config.action_size and config.action_head == "bins":
            length, temperature = config.chunk * config.action_size, config.temperature
            self.action = code_tokens(width, length, config.num_bins, temperature=temperature, rngs=rngs)
        elif config.action_size:
            sizes = (width, config.chunk, config.action_size)
            self.action = vector_tokens(*sizes, head=config.action_head, **flow, rngs=rngs)
        # Last, so that with the same seed all of the above is the same with and without latents.
        if config.codebook_size:
            sizes = (width, config.latent_queries, config.codebook_size)
            self.latent = code_tokens(*sizes, temperature=config.temperature, rngs=rngs)
        elif config.latent_dim:
            sizes = (width, config.latent_queries, config.latent_dim)
            self.latent = vector_tokens(*sizes, head=config.latent_head, **flow, rngs=rngs)

    def frozen_paths(self) -> tuple[str, ...]:
        """Paths of the parameters that the optimiser leaves alone."""
        return (
            *(f"observation/{path}" for path in self.observation.frozen_paths()),
            *(f"decoder/{path}" for path in self.decoder.frozen_paths()),
        )

    def loss(self, batch: PolicyBatch, key: jax.Array) -> LossOutput:
        """Errors of the actions and of the latent motion that start now, and of the instruction's text, weighted."""
        config, observation = self.config, batch.observation
        color_key, head_key = jax.random.split(key)
        if config.color_jitter:
            images = jitter_colors(observation.images, color_key, config.color_jitter)
            observation = dataclasses.replace(observation, images=images)
        prefix = self._read(observation)
        outputs: dict[str, tuple[OutputTokens, Target, float]] = {}
        if config.action_size:
            outputs["action"] = (self.action, self._action_target(batch), config.action_weight)
        if config.latent_dim:
            outputs["latent"] = (self.latent, self._latent_target(batch), config.latent_weight)
        written = [tokens.inputs(target.values) for tokens, target, _ in outputs.values()]
        read, *features = self._decode(prefix, written)
        total, terms = jnp.zeros(()), {}
        for (name, (tokens, target, weight)), out in zip(outputs.items(), features, strict=True):
            loss, found = tokens.head.loss(out, target.values, target.mask, head_key)
            total = total + weight * loss
            share = jnp.mean(jnp.any(target.mask.reshape(len(target.mask), -1) > 0, axis=1))
            terms |= {f"{name}_loss": loss, f"{name}_share": share}
            terms |= {f"{name}_{term}": value for term, value in found.items()}
        if config.text_weight:
            terms["text_loss"] = self._text_loss(read[:, prefix.seen :], batch.observation.text)
            total = total + config.text_weight * terms["text_loss"]
        return LossOutput(total, terms)

    def sample_actions(self, observation: Observation, keys: jax.Array) -> jax.Array:
        """Chunks of normalised actions `[B, H, A]`; see `Policy`.

        Raises:
          ConfigError: the policy has no actions.
        """
        config = self.config
        if not config.action_size:
            raise ConfigError("This policy was trained on latent motion alone; finetune it on robot data first.")
        values = self._generate(self.action, observation, keys)
        if config.action_head == "bins":
            values = bin_midpoints(values, config.num_bins)
        return round_gripper(values.reshape(-1, config.chunk, config.action_size), config.gripper_dim)

    def predict_latents(self, observation: Observation, keys: jax.Array) -> jax.Array:
        """The latent motion that starts now, normalised float32 `[B, Q * L]`, or its codes, int32 `[B, Q]`.

        Raises:
          ConfigError: the policy has no latents.
        """
        if not self.config.latent_dim:
            raise ConfigError("This policy was trained without latent motion, so it has none to predict.")
        values = self._generate(self.latent, observation, keys)
        return values.reshape(len(values), -1)

    def _read(self, observation: Observation) -> Prefix:
        """The prefix of an observation."""
        features = self.observation(observation)
        tokens, present = features.context()
        return Prefix(tokens, present, tokens.shape[1] - features.text.tokens.shape[1])

    def _decode(self, prefix: Prefix, written: Sequence[jax.Array]) -> list[jax.Array]:
        """What the decoder gives at the prefix, `[B, P, D]`, and at each sequence of `written`, `[B, S, D]`."""
        lengths = [part.shape[1] for part in written]
        mask = attention_mask(prefix.present, prefix.seen, lengths, causal_text=self.config.causal_text)
        # The positions of every output follow the prefix, as if it were the only one.
        starts = [prefix.length[:, None] + jnp.arange(length) for length in lengths]
        positions = jnp.concatenate([_count(prefix.present), *starts], axis=1)
        tokens = [part.astype(self.decoder.dtype) for part in (prefix.tokens, *written)]
        out, _ = self.decoder(jnp.concatenate(tokens, axis=1), positions, mask)
        return jnp.split(out, np.cumsum([prefix.tokens.shape[1], *lengths])[:-1], axis=1)

    def _generate(self, output: OutputTokens, observation: Observation, keys: jax.Array) -> jax.Array:
        """The values of an output, one token after another, with the keys and values of earlier tokens in a cache."""
        prefix = self._read(observation)
        batch, begin = prefix.present.shape
        places = jnp.arange(begin + output.length)
        mask = attention_mask(prefix.present, prefix.seen, [output.length], causal_text=self.config.causal_text)
        cache = self.decoder.empty_cache(batch, len(places))
        _, cache = self.decoder(prefix.tokens, _count(prefix.present), mask[:, :begin], cache, jnp.zeros((), jnp.int32))
        known = jnp.pad(prefix.present, ((0, 0), (0, output.length)))

        def write(token: jax.Array, carry: tuple) -> tuple:
            values, cache = carry
            x = output.input_at(values, token)[:, None]
            readable = known | ((places >= begin) & (places <= begin + token))
            out, cache = self.decoder(x, (prefix.length + token)[:, None], readable[:, None], cache, begin + token)
            token_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, token)
            return values.at[:, token].set(output.head.sample(out[:, 0], token_keys)), cache

        return jax.lax.fori_loop(0, output.length, write, (output.empty(batch), cache))[0]

    def _action_target(self, batch: PolicyBatch) -> Target:
        """The chunk that starts now."""
        config = self.config
        now = (self.instants - 1) * config.stride
        chex.assert_axis_dimension(batch.action, 1, now + config.chunk)
        mask = jnp.asarray(batch.has_action[:, now:])
        # Unknown actions may be NaN, which would pass through a mask.
        action = round_gripper(jnp.where(mask > 0, batch.action[:, now:], 0.0), config.gripper_dim)
        if config.action_head != "bins":
            return Target(action, mask)
        return Target(to_bins(action, config.num_bins).reshape(len(mask), -1), mask.reshape(len(mask), -1))

    def _latent_target(self, batch: PolicyBatch) -> Target:
        """The latent motion that starts now, or its codes."""
        config, now = self.config, (self.instants - 1) * self.config.stride
        empty = self.latent.empty(len(batch.action))
        if batch.has_latent is None:
            return Target(empty, jnp.zeros(empty.shape))
        labels = batch.codes if config.codebook_size else batch.latent
        if labels is None:
            raise DatasetError("model.codebook_size is set, but the labels of the data are not discrete; set it to 0.")
        known = (batch.has_latent[:, now] > 0).reshape(-1, *(1,) * (empty.ndim - 1))
        values = jnp.where(known, labels[:, now].reshape(empty.shape), empty)
        return Target(values, jnp.broadcast_to(known, empty.shape).astype(jnp.float32))

    def _text_loss(self, features: jax.Array, text: jax.Array) -> jax.Array:
        """Cross entropy of every token of the instruction `[B, M]` but the first, given the tokens before it."""
        table = self.observation.text.table[...].astype(features.dtype)
        logits = (features[:, :-1] @ table.T).astype(jnp.float32)
        error = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(text[:, 1:] - 1, 0))
        return masked_mean(error, (text[:, 1:] > 0).astype(jnp.float32))


def attention_mask(present: jax.Array, seen: int, lengths: Sequence[int], *, causal_text: bool) -> jax.Array:
    """Which token reads which, bool `[B, N, N]`: row i reads column j.

    The tokens of the prefix read each other; with `causal_text`, tokens of images and state read only each other, and
    the text reads them and the text before it. The tokens of an output read the prefix and the tokens before them in
    their own output.

    Args:
      present: bool `[B, P]`, which tokens of the prefix are there. Others are read only by themselves, which keeps
        every row of the softmax finite.
      seen: the number of tokens of images and state in the prefix.
      lengths: the number of tokens of every output.
      causal_text: whether the instruction is read from left to right.
    """
    prefix = present.shape[1]
    output = np.repeat(np.arange(len(lengths) + 1), [prefix, *lengths])
    number = np.arange(len(output))
    before = number <= number[:, None]
    is_prefix = output == 0
    read_prefix = is_prefix & (before | (number < seen) if causal_text else np.ones_like(before))
    allowed = read_prefix | (before & (output == output[:, None]))
    there = jnp.pad(present, ((0, 0), (0, sum(lengths))), constant_values=True)
    return (allowed & there[:, None]) | np.eye(len(output), dtype=bool)


def _count(present: jax.Array) -> jax.Array:
    """Positions, int32 `[B, P]`, that count only the tokens that are present."""
    return jnp.maximum(jnp.cumsum(present, axis=1, dtype=jnp.int32) - 1, 0)


def jitter_colors(images: jax.Array, key: jax.Array, strength: float) -> jax.Array:
    """Changes brightness, contrast, saturation and hue at random, in the same way for all images of a sample.

    Args:
      images: uint8 `[B, ..., H, W, 3]`.
      key: of the draws.
      strength: 1 for changes of up to 20 %, and of the hue by up to 5 % of the circle; 0 for none.
    """
    draws = strength * jax.random.uniform(key, (4, len(images)), minval=-1.0, maxval=1.0)
    draws = draws.reshape(4, len(images), *(1,) * (images.ndim - 1))
    brightness, contrast, saturation = _BRIGHTNESS * draws[0], 1 + _CONTRAST * draws[1], 1 + _SATURATION * draws[2]
    angle = 2 * np.pi * _HUE * draws[3, ..., 0]
    x = images.astype(jnp.float32) / 255 + brightness
    mean = x.mean(axis=(-3, -2), keepdims=True)
    x = (x - mean) * contrast + mean
    yiq = jnp.einsum("...c,dc->...d", x, _TO_YIQ, precision="highest")
    luma, first, second = yiq[..., 0], yiq[..., 1] * saturation[..., 0], yiq[..., 2] * saturation[..., 0]
    turned = (first * jnp.cos(angle) - second * jnp.sin(angle), first * jnp.sin(angle) + second * jnp.cos(angle))
    x = jnp.einsum("...c,dc->...d", jnp.stack([luma, *turned], axis=-1), np.linalg.inv(_TO_YIQ), precision="highest")
    return jnp.rint(jnp.clip(x, 0, 1) * 255).astype(jnp.uint8)
