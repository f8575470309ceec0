"""A GPT over language, observations, latent motion and action queries, for robot steps and labelled videos alike.

After Moto-GPT (arXiv 2412.04445, section 3.2) and the autoregressive policy of CoMo (arXiv 2505.17006), with continuous
latents beside discrete codes. Axes: B batch, T instants, W steps, Q latent tokens of an instant, L latent size of one,
H steps of a chunk, A action, N all tokens, D width.
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
from como_jax.nn.layers import LayerNorm, Linear, MaskedBlock
from como_jax.nn.mixed_precision import broadcast_param
from como_jax.nn.stack import Stack
from como_jax.policies.autoregressive_mask import attention_mask, make_layout
from como_jax.policies.latent_heads import CodeEmbedding, CodeHead, DiffusionHead, RegressionHead, masked_mean
from como_jax.policies.observation import ObservationEncoder, ObservationFeatures
from como_jax.spec.policies import AutoregressiveConfig, DiffusionConfig, ObservationConfig
from como_jax.types import LossOutput, Observation, PolicyBatch

# Latents are normalised, so that larger estimates can only come from nearly pure noise.
_LARGEST_LATENT = 5.0


class Motion(NamedTuple):
    """Latents of all instants, `[B, T, Q, L]` or codes `[B, T, Q]`, and where they are known, bool `[B, T]`.

    What stands where they are unknown is finite and read by nobody.
    """

    values: jax.Array
    known: jax.Array


class Outputs(NamedTuple):
    """What the transformer makes of latent tokens `[B, T, Q + 1, D]` and of action queries `[B, T, H, D]`."""

    latents: jax.Array
    actions: jax.Array


class AutoregressivePolicy(nnx.Module):
    """See the module's docstring; `como_jax.policies.autoregressive_mask` says who reads whom."""

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

        def embedding(*shape: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), (*shape, width)))

        self.observation = ObservationEncoder(observation, width, dtype=dtype, remat=remat, rngs=rngs)
        self.blocks = Stack(
            lambda rngs: MaskedBlock(width, config.num_heads, dtype=dtype, rngs=rngs),
            config.depth,
            remat=remat,
            rngs=rngs,
        )
        self.norm = LayerNorm(width, dtype=jnp.float32, rngs=rngs)
        self.instant_embed = embedding(observation.instants)
        if config.action_size:
            self.action_queries = embedding(config.chunk)
            self.action_head = Linear(width, config.action_size, dtype=jnp.float32, rngs=rngs)
        # Last, so that with equal seeds all of the above is the same with and without latents.
        if config.latent_dim:
            self.latent_start = embedding()
            self.latent_pos = embedding(config.latent_tokens)
            self.latent_in, self.latent_head = _make_latent_ends(config, dtype, rngs)

    def frozen_paths(self) -> tuple[str, ...]:
        """What the optimiser leaves alone."""
        return tuple(f"observation/{path}" for path in self.observation.frozen_paths())

    def __call__(self, features: ObservationFeatures, motion: Motion, use_latents: jax.Array) -> Outputs:
        """Runs the transformer over the whole sequence.

        Args:
          features: of the observations, from `self.observation`.
          motion: latents that the sequence holds; each output at a latent token is for the one after it.
          use_latents: bool `[B]`, whether the action queries read the latents.
        """
        config = self.config
        batch, instants, observations, width = features.tokens.shape
        layout = make_layout(
            instants,
            language=features.text.tokens.shape[1],
            observations=observations,
            latents=config.latent_tokens,
            actions=config.action_tokens,
        )
        # The encoder has placed its tokens in picture, camera, instant and text.
        tokens = [features.text.tokens, features.tokens, self._latent_tokens(motion), self._action_queries(batch)]
        tokens = [part.reshape(batch, -1, width).astype(self.dtype) for part in tokens]
        known = jnp.repeat(motion.known, config.latent_tokens, axis=1)
        queries = jnp.ones((batch, instants * config.action_tokens), bool)
        present = jnp.concatenate([features.text.mask, features.mask.reshape(batch, -1), known, queries], axis=1)
        x = self.blocks(jnp.concatenate(tokens, axis=1), attention_mask(layout, present, use_latents))
        # Nothing is learned from what comes out at language and observations.
        ends = np.cumsum([part.shape[1] for part in tokens])
        _, _, *outputs = jnp.split(x, ends[:-1], axis=1)
        return Outputs(*(self.norm(part).reshape(batch, instants, -1, width) for part in outputs))

    def loss(self, batch: PolicyBatch, key: jax.Array) -> LossOutput:
        """Errors of actions and of latent motion at every instant of the history, each where it is known."""
        config = self.config
        drop_key, latent_key = jax.random.split(key)
        motion = self._true_motion(batch)
        use_latents = ~jax.random.bernoulli(drop_key, config.latent_dropout, (len(batch.action),))
        outputs = self(self._see(batch.observation), motion, use_latents)
        total, terms = jnp.zeros(()), {}
        if config.action_size:
            action, action_terms = self._action_loss(outputs.actions, batch)
            total, terms = total + config.action_weight * action, terms | action_terms
        if config.latent_dim:
            latent, latent_terms = self._latent_loss(outputs.latents, motion, latent_key)
            total, terms = total + config.latent_weight * latent, terms | latent_terms
        return LossOutput(total, terms)

    def sample_actions(self, observation: Observation, keys: jax.Array) -> jax.Array:
        """Normalised actions `[B, H, A]` from now on; see `Policy`. Latents of earlier instants are unknown.

        Raises:
          ConfigError: the policy has no actions.
        """
        if not self.config.action_size:
            raise ConfigError("This policy was trained on latent motion alone; finetune it on robot data first.")
        features = self._see(observation)
        generate_latents = self.config.generate_latents and self.config.latent_dim > 0
        motion = self._generate(features, keys) if generate_latents else self._no_motion(len(keys))
        outputs = self(features, motion, jnp.ones(len(keys), bool))
        actions = self.action_head(outputs.actions[:, -1])
        if self.config.gripper_dim < 0:
            return actions
        gripper = jnp.where(actions[..., self.config.gripper_dim] > 0, 1.0, -1.0)
        return actions.at[..., self.config.gripper_dim].set(gripper)

    def predict_latents(self, observation: Observation, keys: jax.Array) -> jax.Array:
        """The latent motion from now on, normalised float32 `[B, Q * L]`, or its codes, int32 `[B, Q]`.

        Raises:
          ConfigError: the policy has no latents.
        """
        if not self.config.latent_dim:
            raise ConfigError("This policy was trained without latent motion, so it has none to predict.")
        values = self._generate(self._see(observation), keys).values[:, -1]
        return values.reshape(len(values), -1)

    def _see(self, observation: Observation) -> ObservationFeatures:
        """Tokens of what is seen."""
        chex.assert_axis_dimension(observation.images, 1, self.instants)
        return self.observation(observation)

    def _no_motion(self, batch: int) -> Motion:
        """Latents that are nowhere known."""
        config, shape = self.config, (batch, self.instants, self.config.latent_queries)
        empty = jnp.zeros(shape, jnp.int32) if config.codebook_size else jnp.zeros((*shape, config.latent_dim))
        return Motion(empty, jnp.zeros(shape[:2], bool))

    def _true_motion(self, batch: PolicyBatch) -> Motion:
        """The labels of a batch at the instants of the history."""
        config = self.config
        motion = self._no_motion(len(batch.action))
        labels = batch.codes if config.codebook_size else batch.latent
        if not config.latent_dim or batch.has_latent is None:
            return motion
        if labels is None:
            raise DatasetError("model.codebook_size is set, but the labels of the data are not discrete; set it to 0.")
        known = self._at_instants(batch.has_latent) > 0
        values = self._at_instants(labels).reshape(motion.values.shape)
        # Unknown labels may be anything, NaN too, which would pass through a mask.
        is_known = known.reshape(*known.shape, *(1,) * (values.ndim - 2))
        return Motion(jnp.where(is_known, values, motion.values), known)

    def _at_instants(self, steps: jax.Array) -> jax.Array:
        """`[B, W, ...]` to what belongs to the first step of every instant, `[B, T, ...]`."""
        return jnp.asarray(steps)[:, : (self.instants - 1) * self.config.stride + 1 : self.config.stride]

    def _chunks(self, steps: jax.Array) -> jax.Array:
        """`[B, W, A]` to the chunk that starts at every instant, `[B, T, H, A]`."""
        config = self.config
        chex.assert_axis_dimension(steps, 1, (self.instants - 1) * config.stride + config.chunk)
        starts = [instant * config.stride for instant in range(self.instants)]
        return jnp.stack([steps[:, start : start + config.chunk] for start in starts], axis=1)

    def _action_loss(self, features: jax.Array, batch: PolicyBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Huber loss of what moves and cross entropy of the gripper's sign, weighted."""
        config = self.config
        mask = self._chunks(batch.has_action)
        target = jnp.where(mask > 0, self._chunks(batch.action), 0.0)
        prediction = self.action_head(features)
        error, gripper = optax.losses.huber_loss(prediction, target, delta=1.0), config.gripper_dim
        moves = jnp.arange(config.action_size) != gripper
        action = masked_mean(error, mask * moves)
        terms = {"action_loss": action, "action_share": jnp.mean(jnp.any(mask > 0, axis=(1, 2, 3)))}
        if gripper >= 0:
            sign = (target[..., gripper] > 0).astype(jnp.float32)
            error = optax.losses.sigmoid_binary_cross_entropy(prediction[..., gripper], sign)
            terms["gripper_loss"] = masked_mean(error, mask[..., gripper])
            action = action + config.gripper_weight * terms["gripper_loss"]
        return action, terms

    def _latent_loss(
        self, features: jax.Array, motion: Motion, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Error of every latent token, of which those before it are known (teacher forcing)."""
        known = motion.known.astype(jnp.float32)
        mask = jnp.broadcast_to(known[..., None], motion.values.shape[:3])
        loss, terms = self.latent_head.loss(features[:, :, :-1], motion.values, mask, key)
        terms = {f"latent_{name}": value for name, value in terms.items()}
        return loss, {"latent_loss": loss, "latent_share": jnp.mean(known.max(axis=1)), **terms}

    def _action_queries(self, batch: int) -> jax.Array:
        """`[B, T, H, D]`."""
        if not self.config.action_size:
            return jnp.zeros((batch, self.instants, 0, self.config.width))
        queries = self.action_queries[...] + self.instant_embed[...][:, None]
        return jnp.broadcast_to(queries, (batch, *queries.shape))

    def _latent_tokens(self, motion: Motion) -> jax.Array:
        """`[B, T, Q + 1, D]`: a start token and the latents, so that the output of each predicts the next."""
        if not self.config.latent_dim:
            return jnp.zeros((*motion.known.shape, 0, self.config.width))
        latents = self.latent_in(motion.values)
        start = broadcast_param(self.latent_start[...], latents[:, :, :1].shape, latents.dtype)
        placed = self.latent_pos[...] + self.instant_embed[...][:, None]
        return jnp.concatenate([start, latents], axis=2) + placed

    def _generate(self, features: ObservationFeatures, keys: jax.Array) -> Motion:
        """Latents of the last instant, token after token."""
        empty = self._no_motion(len(keys))
        known = empty.known.at[:, -1].set(True)
        use_latents = jnp.ones(len(keys), bool)

        def extend(token: jax.Array, values: jax.Array) -> jax.Array:
            # What is not yet generated stands in the sequence, but no earlier token reads it.
            output = self(features, Motion(values, known), use_latents).latents[:, -1, token]
            token_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, token)
            return values.at[:, -1, token].set(self.latent_head.sample(output, token_keys))

        return Motion(jax.lax.fori_loop(0, self.config.latent_queries, extend, empty.values), known)


def _make_latent_ends(config: AutoregressiveConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> tuple[Any, Any]:
    """What makes tokens of latents, and the head that predicts latents."""
    width, latent_dim = config.width, config.latent_dim
    if config.codebook_size:
        head = CodeHead(width, config.codebook_size, config.temperature, rngs=rngs)
        return CodeEmbedding(config.codebook_size, width, rngs=rngs), head
    latent_in = Linear(latent_dim, width, dtype=dtype, rngs=rngs)
    if config.latent_head == "regression":
        return latent_in, RegressionHead(width, latent_dim, rngs=rngs)
    steps, sizes = config.diffusion_steps, {"hidden": config.head_width, "depth": config.head_depth}
    # With all of its noise at every step, DDIM is DDPM (arXiv 2006.11239, algorithm 2).
    diffusion = DiffusionConfig("ddpm", steps, steps, "epsilon", eta=1.0, clip=_LARGEST_LATENT)
    return latent_in, DiffusionHead(width, latent_dim, diffusion, **sizes, rngs=rngs)
