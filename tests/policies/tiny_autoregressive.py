"""The smallest autoregressive policies, their data, and what runs them; every program is compiled once."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from como_jax import types
from como_jax.nn.model_def import ModelDef, Params
from como_jax.policies.autoregressive import AutoregressivePolicy
from como_jax.spec.policies import AutoregressiveConfig, ObservationConfig
from como_jax.spec.towers import TextConfig, VitConfig

BATCH, INSTANTS, STRIDE, CHUNK, ACTIONS, QUERIES, LATENT, CODES = 8, 2, 2, 3, 3, 2, 4, 5
SIZES = {"action_size": ACTIONS, "chunk": CHUNK, "stride": STRIDE, "width": 16, "depth": 2, "num_heads": 2}
CONTINUOUS = {"latent_queries": QUERIES, "latent_dim": LATENT}
SMALL_HEAD = {"head_width": 16, "head_depth": 1, "diffusion_steps": 20}
VARIANTS: dict[str, dict[str, Any]] = {
    "robot": {},
    "regression": CONTINUOUS,
    "diffusion": {**CONTINUOUS, **SMALL_HEAD, "latent_head": "diffusion"},
    "codes": {**CONTINUOUS, "codebook_size": CODES},
}
WITH_LATENTS = [name for name in VARIANTS if name != "robot"]
LATENT_PARAMS = {"latent_start", "latent_pos", "latent_in", "latent_head"}
ACTION_PARAMS = {"action_queries", "action_head"}
KEYS = jax.random.split(jax.random.key(5), BATCH)


def make_model(variant: str, dtype: Any = jnp.float32, freeze_images: bool = False, **changes: Any) -> ModelDef:
    observation = ObservationConfig(
        vit=VitConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2),
        text=TextConfig(max_length=16, width=16, depth=1, num_heads=2),
        freeze_images=freeze_images,
        cameras=2,
        instants=INSTANTS,
        state_size=2,
    )
    config = AutoregressiveConfig(**{**SIZES, **VARIANTS[variant], **changes})
    return ModelDef.create(lambda rngs: AutoregressivePolicy(observation, config, dtype=dtype, rngs=rngs))


@functools.cache
def init(variant: str) -> Params:
    return jax.jit(make_model(variant).init)(jax.random.key(0))


def make_batch(**changes: Any) -> types.PolicyBatch:
    """Robot steps first and labelled videos after them."""
    sizes = {"instants": INSTANTS, "stride": STRIDE, "cameras": 2, "chunk": CHUNK, "action_size": ACTIONS}
    batch = types.fake_policy_batch(BATCH, **sizes, latent_shape=(QUERIES, LATENT), codebook_size=CODES)
    return dataclasses.replace(batch, **changes)


def make_labelled_robot_batch() -> types.PolicyBatch:
    """Actions and latents at every step of every sample."""
    batch = make_batch()
    action = np.random.default_rng(1).uniform(-1, 1, batch.action.shape).astype(np.float32)
    known = {"has_action": np.ones_like(batch.has_action), "has_latent": np.ones_like(batch.has_latent)}
    return dataclasses.replace(batch, action=action, **known)


def robot_half(batch: types.PolicyBatch) -> types.PolicyBatch:
    return dataclasses.replace(batch, has_latent=np.zeros_like(batch.has_latent))


def video_half(batch: types.PolicyBatch) -> types.PolicyBatch:
    return dataclasses.replace(batch, has_action=np.zeros_like(batch.has_action))


@functools.cache
def sampler(variant: str, method: str, **changes: Any) -> Callable[..., jax.Array]:
    model = make_model(variant, **changes)
    return jax.jit(lambda params, observation, keys: getattr(model.bind(params), method)(observation, keys))


def sample(
    variant: str,
    observation: types.Observation,
    method: str = "sample_actions",
    keys: jax.Array = KEYS,
    params: Params | None = None,
    **changes: Any,
) -> np.ndarray:
    params = init(variant) if params is None else params
    return np.asarray(sampler(variant, method, **changes)(params, observation, keys))


@functools.cache
def loss_function(variant: str, **changes: Any) -> Callable[..., Any]:
    """Loss with its terms, and gradients, of parameters, a batch and a key."""
    model = make_model(variant, **changes)

    def loss(params: Params, batch: types.PolicyBatch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        output = model.bind(params).loss(batch, key)
        return output.total, output.terms

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def loss_of(variant: str, batch: types.PolicyBatch, **changes: Any) -> tuple[float, dict[str, jax.Array], Params]:
    (total, terms), gradients = loss_function(variant, **changes)(init(variant), batch, jax.random.key(3))
    return float(total), terms, gradients


def relative_error(prediction: np.ndarray, target: np.ndarray) -> float:
    return np.square(prediction - target).mean() / np.square(target).mean()


def trained_modules(gradients: Params) -> set[str]:
    return {name for name, part in gradients.items() if any(np.any(leaf) for leaf in jax.tree.leaves(part))}
