"""Autoregressive policy: a GPT over instruction, observations, latent motion and action queries.

After Moto-GPT (arXiv 2412.04445, section 3.2) and the autoregressive policy of CoMo (arXiv 2505.17006), with latent
motion as continuous vectors or as codes. Robot data train its actions, and labelled videos and robot data its latent
motion; `autoregressive_mask.py` says which token reads which.

Axes: B batch, T instants, W steps of a batch, Q latent tokens of an instant, L numbers of one, H steps of a chunk,
A action, N all tokens, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from como_jax.errors import ConfigError, DatasetError
from como_jax.nn.layers import Block, LayerNorm, Linear
from como_jax.nn.primitives import broadcast_param, embedding
from como_jax.nn.stack import Stack
from como_jax.policies.heads import (
    CodeEmbedding,
    CodeHead,
    DiffusionHead,
    RegressionHead,
    masked_mean,
    round_gripper,
)
from como_jax.policies.observation import ObservationEncoder, ObservationFeatures
from como_jax.spec.autoregressive_mask import Layout, actions_read_latents, always_allowed, make_layout
from como_jax.spec.policies import AutoregressiveConfig, ObservationConfig
from como_jax.types import LossOutput, Observation, PolicyBatch


class KnownLatents(NamedTuple):
    """Latent motion of all instants, vectors `[B, T, Q, L]` or codes `[B, T, Q]`, and where it is known, bool `[B, T]`.

    Values that are not known must be finite; no other token reads them.
    """

    values: jax.Array
    known: jax.Array


class Outputs(NamedTuple):
    """Outputs of the transformer at the latent tokens `[B, T, Q + 1, D]` and the action queries `[B, T, H, D]`."""

    latents: jax.Array
    actions: jax.Array


class AutoregressivePolicy(nnx.Module):
    """The policy that this module's docstring describes."""

    def __init__(
        self,
        observation: ObservationConfig,
        config: AutoregressiveConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        self.config, self.instants, self.dtype = config, observation.instants, dtype
        width = config.width
        self.observation = ObservationEncoder(observation, width, dtype=dtype, remat=remat, rngs=rngs)
        self.blocks = Stack(
            lambda rngs: Block(width, config.num_heads, dtype=dtype, rngs=rngs),
            config.depth,
            remat=remat,
            rngs=rngs,
        )
        self.norm = LayerNorm(width, dtype=jnp.float32, rngs=rngs)
        self.instant_embed = embedding(observation.instants, width, rngs=rngs)
        if config.action_size:
            self.action_queries = embedding(config.chunk, width, rngs=rngs)
            self.action_head = Linear(width, config.action_size, dtype=jnp.float32, rngs=rngs)
        # Last, so that with the same seed all of the above is the same with and without latents.
        if config.latent_dim:
            self.latent_start = embedding(width, rngs=rngs)
            self.latent_pos = embedding(config.latent_tokens, width, rngs=rngs)
            self.latent_in, self.latent_head = _make_latent_ends(config, dtype, rngs)

    def frozen_paths(self) -> tuple[str, ...]:
        """Paths of the parameters that the optimiser leaves alone."""
        return tuple(f"observation/{path}" for path in self.observation.frozen_paths())

    def __call__(self, features: ObservationFeatures, latents: KnownLatents, use_latents: jax.Array) -> Outputs:
        """Runs the transformer over the whole sequence.

        Args:
          features: of the observations, from `self.observation`.
          latents: inputs of the latent tokens; the output at each latent token predicts the next one.
          use_latents: bool `[B]`, whether the action queries read the latents.
        """
        config = self.config
        chex.assert_shape(latents.known, features.tokens.shape[:2])
        chex.assert_shape(use_latents, features.tokens.shape[:1])
        batch, instants, observations, width = features.tokens.shape
        layout = make_layout(
            instants,
            language=features.text.tokens.shape[1],
            observations=observations,
            latents=config.latent_tokens,
            actions=config.action_tokens,
        )
        # The tokens of the observation already carry the embeddings of their place, camera and instant.
        tokens = [features.text.tokens, features.tokens, self._latent_tokens(latents), self._action_queries(batch)]
        tokens = [part.reshape(batch, -1, width).astype(self.dtype) for part in tokens]
        known = jnp.repeat(latents.known, config.latent_tokens, axis=1)
        queries = jnp.ones((batch, instants * config.action_tokens), bool)
        present = jnp.concatenate([features.text.mask, features.mask.reshape(batch, -1), known, queries], axis=1)
        x = self.blocks(jnp.concatenate(tokens, axis=1), attention_mask(layout, present, use_latents))
        # The outputs at language and observations are not used.
        ends = np.cumsum([part.shape[1] for part in tokens])
        _, _, *outputs = jnp.split(x, ends[:-1], axis=1)
        return Outputs(*(self.norm(part).reshape(batch, instants, -1, width) for part in outputs))

    def loss(self, batch: PolicyBatch, key: jax.Array) -> LossOutput:
        """Errors of actions and of latent motion at every instant of the history, each where it is known."""
        config = self.config
        drop_key, latent_key = jax.random.split(key)
        latents = self._labels(batch)
        use_latents = ~jax.random.bernoulli(drop_key, config.latent_dropout, (len(batch.action),))
        outputs = self(self.observation(batch.observation), latents, use_latents)
        total, terms = jnp.zeros(()), {}
        if config.action_size:
            action, action_terms = self._action_loss(outputs.actions, batch)
            total, terms = total + config.action_weight * action, terms | action_terms
        if config.latent_dim:
            latent, latent_terms = self._latent_loss(outputs.latents, latents, latent_key)
            total, terms = total + config.latent_weight * latent, terms | latent_terms
        return LossOutput(total, terms)

    def sample_actions(self, observation: Observation, keys: jax.Array) -> jax.Array:
        """Chunks of normalised actions `[B, H, A]`; see `Policy`. The latents of earlier instants are not known.

        Raises:
          ConfigError: the policy has no actions.
        """
        if not self.config.action_size:
            raise ConfigError("This policy was trained on latent motion alone; finetune it on robot data first.")
        features = self.observation(observation)
        generates = self.config.generate_latents and self.config.latent_dim > 0
        latents = self._generate(features, keys) if generates else self._no_latents(len(keys))
        outputs = self(features, latents, jnp.ones(len(keys), bool))
        return round_gripper(self.action_head(outputs.actions[:, -1]), self.config.gripper_dim)

    def predict_latents(self, observation: Observation, keys: jax.Array) -> jax.Array:
        """The latent motion that starts now, normalised float32 `[B, Q * L]`, or its codes, int32 `[B, Q]`.

        Raises:
          ConfigError: the policy has no latents.
        """
        if not self.config.latent_dim:
            raise ConfigError("This policy was trained without latent motion, so it has none to predict.")
        values = self._generate(self.observation(observation), keys).values[:, -1]
        return values.reshape(len(values), -1)

    def _no_latents(self, batch: int) -> KnownLatents:
        """Latents that are known nowhere."""
        config, shape = self.config, (batch, self.instants, self.config.latent_queries)
        empty = jnp.zeros(shape, jnp.int32) if config.codebook_size else jnp.zeros((*shape, config.latent_dim))
        return KnownLatents(empty, jnp.zeros(shape[:2], bool))

    def _labels(self, batch: PolicyBatch) -> KnownLatents:
        """The latent motion of a batch at the instants of the history."""
        config = self.config
        unknown = self._no_latents(len(batch.action))
        labels = batch.codes if config.codebook_size else batch.latent
        if not config.latent_dim or batch.has_latent is None:
            return unknown
        if labels is None:
            raise DatasetError("model.codebook_size is set, but the labels of the data are not discrete; set it to 0.")
        known = self._at_instants(batch.has_latent) > 0
        values = self._at_instants(labels).reshape(unknown.values.shape)
        # Unknown labels may be NaN, which would pass through a mask.
        is_known = known.reshape(*known.shape, *(1,) * (values.ndim - 2))
        return KnownLatents(jnp.where(is_known, values, unknown.values), known)

    def _at_instants(self, steps: jax.Array) -> jax.Array:
        """The steps of the history's instants, `[B, T, ...]`, out of all steps `[B, W, ...]`."""
        return jnp.asarray(steps)[:, : (self.instants - 1) * self.config.stride + 1 : self.config.stride]

    def _chunks(self, steps: jax.Array) -> jax.Array:
        """`[B, W, A]` to the chunk that starts at every instant, `[B, T, H, A]`."""
        config = self.config
        chex.assert_axis_dimension(steps, 1, (self.instants - 1) * config.stride + config.chunk)
        starts = [instant * config.stride for instant in range(self.instants)]
        return jnp.stack([steps[:, start : start + config.chunk] for start in starts], axis=1)

    def _action_loss(self, features: jax.Array, batch: PolicyBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Huber loss of the actions, and weighted cross entropy of the gripper's sign."""
        config = self.config
        mask = self._chunks(batch.has_action)
        target = jnp.where(mask > 0, self._chunks(batch.action), 0.0)
        prediction = self.action_head(features)
        error, gripper = optax.losses.huber_loss(prediction, target, delta=1.0), config.gripper_dim
        not_gripper = jnp.arange(config.action_size) != gripper
        action = masked_mean(error, mask * not_gripper)
        terms = {"action_loss": action, "action_share": jnp.mean(jnp.any(mask > 0, axis=(1, 2, 3)))}
        if gripper >= 0:
            sign = (target[..., gripper] > 0).astype(jnp.float32)
            error = optax.losses.sigmoid_binary_cross_entropy(prediction[..., gripper], sign)
            terms["gripper_loss"] = masked_mean(error, mask[..., gripper])
            action = action + config.gripper_weight * terms["gripper_loss"]
        return action, terms

    def _latent_loss(
        self, features: jax.Array, latents: KnownLatents, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Error of every latent token, given the true tokens before it (teacher forcing)."""
        known = latents.known.astype(jnp.float32)
        mask = jnp.broadcast_to(known[..., None], latents.values.shape[:3])
        loss, terms = self.latent_head.loss(features[:, :, :-1], latents.values, mask, key)
        terms = {f"latent_{name}": value for name, value in terms.items()}
        return loss, {"latent_loss": loss, "latent_share": jnp.mean(known.max(axis=1)), **terms}

    def _action_queries(self, batch: int) -> jax.Array:
        """`[B, T, H, D]`."""
        if not self.config.action_size:
            return jnp.zeros((batch, self.instants, 0, self.config.width))
        queries = self.action_queries[...] + self.instant_embed[...][:, None]
        return jnp.broadcast_to(queries, (batch, *queries.shape))

    def _latent_tokens(self, latents: KnownLatents) -> jax.Array:
        """`[B, T, Q + 1, D]`: a start token and the latents, so that the output at each predicts the next."""
        if not self.config.latent_dim:
            return jnp.zeros((*latents.known.shape, 0, self.config.width))
        embedded = self.latent_in(latents.values)
        start = broadcast_param(self.latent_start[...], embedded[:, :, :1].shape, embedded.dtype)
        positions = self.latent_pos[...] + self.instant_embed[...][:, None]
        return jnp.concatenate([start, embedded], axis=2) + positions

    def _generate(self, features: ObservationFeatures, keys: jax.Array) -> KnownLatents:
        """Generates the latents of the last instant, one token after another."""
        empty = self._no_latents(len(keys))
        known = empty.known.at[:, -1].set(True)
        use_latents = jnp.ones(len(keys), bool)

        def extend(token: jax.Array, values: jax.Array) -> jax.Array:
            # Tokens that are not generated yet are in the sequence too, but no earlier token reads them.
            output = self(features, KnownLatents(values, known), use_latents).latents[:, -1, token]
            token_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, token)
            return values.at[:, -1, token].set(self.latent_head.sample(output, token_keys))

        return KnownLatents(jax.lax.fori_loop(0, self.config.latent_queries, extend, empty.values), known)


def attention_mask(layout: Layout, present: jax.Array, use_latents: jax.Array) -> jax.Array:
    """The mask of a batch, bool `[B, N, N]`.

    Args:
      layout: of the sequence.
      present: bool `[B, N]`; a token that is not there (padding of text, a missing camera, an unknown latent) is read
        only by itself, which keeps every row of the softmax finite.
      use_latents: bool `[B]`; where it is False, the sample's action queries do not read the latents.
    """
    chex.assert_shape(present, (len(use_latents), len(layout.kind)))
    allowed = always_allowed(layout) | (actions_read_latents(layout) & use_latents[:, None, None])
    return (allowed & present[:, None]) | jnp.eye(len(layout.kind), dtype=bool)


def _make_latent_ends(config: AutoregressiveConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> tuple[Any, Any]:
    """The embedding of latents, and the head that predicts them."""
    width, latent_dim = config.width, config.latent_dim
    if config.codebook_size:
        head = CodeHead(width, config.codebook_size, config.temperature, rngs=rngs)
        return CodeEmbedding(config.codebook_size, width, rngs=rngs), head
    latent_in = Linear(latent_dim, width, dtype=dtype, rngs=rngs)
    if config.latent_head == "regression":
        return latent_in, RegressionHead(width, latent_dim, rngs=rngs)
    sizes = {"hidden": config.head_width, "depth": config.head_depth}
    return latent_in, DiffusionHead(width, latent_dim, config.head_diffusion, **sizes, rngs=rngs)
