"""A vision-language-action model: a decoder that reads pictures and an instruction and writes latent or true actions.

After LAPA (arXiv 2410.11758): latent pretraining writes the latent action of a video, as codes or, for CoMo, as
continuous vectors; action finetuning replaces that output by the actions of a robot, as bins or as vectors. With both
kinds of data at once it learns both outputs, which do not see each other. Axes: B batch, P tokens of the prefix, S of
an output, Q latent tokens, L numbers of one, H steps of a chunk, A action, D width.
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
from como_jax.policies.color_jitter import jitter_colors
from como_jax.policies.latent_heads import masked_mean
from como_jax.policies.observation import ObservationEncoder
from como_jax.policies.output_tokens import OutputTokens, bin_midpoints, code_tokens, to_bins, vector_tokens
from como_jax.spec.policies import ObservationConfig, VlaConfig
from como_jax.types import LossOutput, Observation, PolicyBatch


class Prefix(NamedTuple):
    """What the decoder reads before it writes.

    Attributes:
      tokens: `[B, P, D]`, of pictures first, of the instruction after.
      present: bool `[B, P]`.
      seen: how many tokens are of pictures and states.
    """

    tokens: jax.Array
    present: jax.Array
    seen: int

    @property
    def length(self) -> jax.Array:
        """int32 `[B]`, tokens that are there."""
        return jnp.sum(self.present, axis=1, dtype=jnp.int32)


class Target(NamedTuple):
    """Values of an output's tokens, `[B, S]` or `[B, S, L]`, and which are known, float32 of that shape."""

    values: jax.Array
    mask: jax.Array


class LatentVla(nnx.Module):
    """See the module's docstring."""

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
        # Last, so that with equal seeds all of the above is the same with and without latents.
        if config.codebook_size:
            sizes = (width, config.latent_queries, config.codebook_size)
            self.latent = code_tokens(*sizes, temperature=config.temperature, rngs=rngs)
        elif config.latent_dim:
            sizes = (width, config.latent_queries, config.latent_dim)
            self.latent = vector_tokens(*sizes, head=config.latent_head, **flow, rngs=rngs)

    def frozen_paths(self) -> tuple[str, ...]:
        """What the optimiser leaves alone."""
        return (
            *(f"observation/{path}" for path in self.observation.frozen_paths()),
            *(f"decoder/{path}" for path in self.decoder.frozen_paths()),
        )

    def loss(self, batch: PolicyBatch, key: jax.Array) -> LossOutput:
        """Errors of the chunk that starts now, of the latent motion from now on, and of the instruction's text."""
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
        """Normalised actions `[B, H, A]` from now on; see `Policy`.

        Raises:
          ConfigError: the policy has no actions.
        """
        config = self.config
        if not config.action_size:
            raise ConfigError("This policy was trained on latent motion alone; finetune it on robot data first.")
        values = self._generate(self.action, observation, keys)
        if config.action_head == "bins":
            values = bin_midpoints(values, config.num_bins)
        actions = values.reshape(-1, config.chunk, config.action_size)
        if config.gripper_dim < 0:
            return actions
        gripper = jnp.where(actions[..., config.gripper_dim] > 0, 1.0, -1.0)
        return actions.at[..., config.gripper_dim].set(gripper)

    def predict_latents(self, observation: Observation, keys: jax.Array) -> jax.Array:
        """The latent motion from now on, normalised float32 `[B, Q * L]`, or its codes, int32 `[B, Q]`.

        Raises:
          ConfigError: the policy has no latents.
        """
        if not self.config.latent_dim:
            raise ConfigError("This policy was trained without latent motion, so it has none to predict.")
        values = self._generate(self.latent, observation, keys)
        return values.reshape(len(values), -1)

    def _read(self, observation: Observation) -> Prefix:
        """The prefix of what is seen and said."""
        chex.assert_axis_dimension(observation.images, 1, self.instants)
        features = self.observation(observation)
        tokens, present = features.context()
        return Prefix(tokens, present, tokens.shape[1] - features.text.tokens.shape[1])

    def _decode(self, prefix: Prefix, written: Sequence[jax.Array]) -> list[jax.Array]:
        """What comes out at the prefix and at each output `[B, S, D]`, all of whose tokens are given."""
        lengths = [part.shape[1] for part in written]
        mask = attention_mask(prefix.present, prefix.seen, lengths, causal_text=self.config.causal_text)
        # An output starts where the prefix ends, whatever else is written.
        starts = [prefix.length[:, None] + jnp.arange(length) for length in lengths]
        positions = jnp.concatenate([_count(prefix.present), *starts], axis=1)
        tokens = [part.astype(self.decoder.dtype) for part in (prefix.tokens, *written)]
        out, _ = self.decoder(jnp.concatenate(tokens, axis=1), positions, mask)
        return jnp.split(out, np.cumsum([prefix.tokens.shape[1], *lengths])[:-1], axis=1)

    def _generate(self, output: OutputTokens, observation: Observation, keys: jax.Array) -> jax.Array:
        """The values of an output, token after token, with the keys and values of all before in a cache."""
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
        # Unknown actions may be anything, NaN too, which would pass through a mask.
        action = jnp.where(mask > 0, batch.action[:, now:], 0.0)
        if config.gripper_dim >= 0:
            gripper = jnp.where(action[..., config.gripper_dim] > 0, 1.0, -1.0)
            action = action.at[..., config.gripper_dim].set(gripper)
        if config.action_head != "bins":
            return Target(action, mask)
        return Target(to_bins(action, config.num_bins).reshape(len(mask), -1), mask.reshape(len(mask), -1))

    def _latent_target(self, batch: PolicyBatch) -> Target:
        """The latent motion from now on, or its codes."""
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
        """Cross entropy of every token of the instruction `[B, M]` but the first, of which those before are known."""
        table = self.observation.text.table[...].astype(features.dtype)
        logits = (features[:, :-1] @ table.T).astype(jnp.float32)
        error = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(text[:, 1:] - 1, 0))
        return masked_mean(error, (text[:, 1:] > 0).astype(jnp.float32))


def attention_mask(present: jax.Array, seen: int, lengths: Sequence[int], *, causal_text: bool) -> jax.Array:
    """Who reads whom, bool `[B, N, N]`: row i reads column j.

    All of the prefix reads each other, or with `causal_text` pictures read pictures, and text also the text before it.
    An output's tokens read the prefix and those before them, and nothing of other outputs.

    Args:
      present: bool `[B, P]`, tokens of the prefix that are there; others are read by none but themselves, which keeps
        every row of the softmax proper.
      seen: how many tokens of the prefix are of pictures and states.
      lengths: tokens of every output.
      causal_text: see above.
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
    """Positions, int32 `[B, P]`, that leave out what is not there."""
    return jnp.maximum(jnp.cumsum(present, axis=1, dtype=jnp.int32) - 1, 0)
