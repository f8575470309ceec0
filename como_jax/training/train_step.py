"""The train step, which all recipes share: from a config and a model to one jitted update of the state."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from como_jax.errors import ConfigError
from como_jax.nn.attention import CUDNN_HEAD_SIZES, IMPLEMENTATIONS, FusableAttention
from como_jax.nn.model_def import ModelDef, Params, merge_params
from como_jax.training import sharding
from como_jax.training.optim import OptimConfig, make_optimizer
from como_jax.training.train_state import Metrics, TrainState, abstract_state, replace_params
from como_jax.types import LossOutput

logger = logging.getLogger(__name__)


class Trainable(Protocol):
    """What the step function needs of a model."""

    def loss(self, batch: Any, key: jax.Array) -> LossOutput:
        """What is minimised, its terms, and statistics for `update_codebook`."""

    def update_codebook(self, statistics: Any, step: jax.Array, key: jax.Array) -> tuple[Params, Metrics]:
        """Parameters to replace after an update; only called where the loss gave statistics."""


class Training(NamedTuple):
    """Optimiser, the state's shapes and shardings, and the jitted step, from state and batch to state and metrics."""

    optimizer: optax.GradientTransformation
    abstract: TrainState
    step: jax.stages.Wrapped


def build_training(config: ConfigDict, model: ModelDef, mesh: Mesh) -> Training:
    """The training that a config describes.

    Raises:
      ConfigError: `config.train.attention` does not fit model and devices.
    """
    model, optim, train = choose_attention(config, model, mesh), OptimConfig(**config.optim), config.train
    return _training(model, optim, train.num_steps, config.seed, train.accumulation, mesh)


@functools.lru_cache(maxsize=8)
def _training(
    model: ModelDef, optim: OptimConfig, num_steps: int, seed: int, accumulation: int, mesh: Mesh
) -> Training:
    optimizer = make_optimizer(optim, num_steps)
    abstract = abstract_state(model, optimizer, mesh, use_ema=optim.ema_decay > 0)
    step = make_train_step(
        model, optimizer, mesh, abstract, seed=seed, accumulation=accumulation, ema_decay=optim.ema_decay
    )
    return Training(optimizer, abstract, step)


def make_train_step(
    model: ModelDef,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    abstract: TrainState,
    *,
    seed: int,
    accumulation: int = 1,
    ema_decay: float = 0.0,
) -> jax.stages.Wrapped:
    """The jitted update. Randomness depends on seed and step alone, so that a resumed run repeats it.

    Args:
      model: what is trained.
      optimizer: made for `TrainState.params`.
      mesh: of devices.
      abstract: the state's shapes and shardings, which every step keeps.
      seed: of the model's randomness.
      accumulation: microbatches whose gradients are averaged before one update.
      ema_decay: of the moving average, when the state has one.
    """

    def loss_fn(params: Params, frozen: Params, batch: Any, key: jax.Array) -> tuple[jax.Array, tuple[Metrics, Any]]:
        output = model.bind(merge_params(params, frozen)).loss(batch, key)
        return output.total, (output.terms, output.statistics)

    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def update(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key, upkeep_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        if accumulation == 1:
            (loss, (terms, statistics)), grads = gradient(state.params, state.frozen, batch, key)
        else:
            (loss, (terms, statistics)), grads = _accumulate(gradient, state, batch, key, accumulation, mesh)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1.0 - ema_decay)
        metrics = {"loss": loss, **terms, "grad_norm": optax.global_norm(grads)}
        state = TrainState(state.step + 1, params, state.frozen, opt_state, ema)
        if statistics:
            # The whole batch's statistics, so that all hosts replace the same.
            module = model.bind(merge_params(state.params, state.frozen))
            replaced, upkeep_metrics = module.update_codebook(statistics, state.step, upkeep_key)
            state, metrics = replace_params(state, replaced), metrics | upkeep_metrics
        return state, metrics

    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return sharding.jit(update, mesh, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))


def _accumulate(
    gradient: Callable[..., Any], state: TrainState, batch: Any, key: jax.Array, count: int, mesh: Mesh
) -> tuple[tuple[jax.Array, Metrics], Params]:
    """Mean loss, terms, statistics and gradients over `count` microbatches, one in memory at a time."""
    batch_sharding = NamedSharding(mesh, jax.sharding.PartitionSpec(None, *sharding.BATCH_SPEC))

    def split(x: jax.Array) -> jax.Array:
        # Strided, so that every microbatch takes equally from every device.
        x = jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
        return jax.lax.with_sharding_constraint(x, batch_sharding)

    def run(microbatch: Any, number: jax.Array) -> Any:
        return gradient(state.params, state.frozen, microbatch, jax.random.fold_in(key, number))

    microbatches = jax.tree.map(split, batch)
    shapes = jax.eval_shape(run, jax.tree.map(lambda x: x[0], microbatches), jnp.zeros((), jnp.int32))
    total, _ = jax.lax.scan(
        lambda total, inputs: (jax.tree.map(jnp.add, total, run(*inputs)), None),
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
        (microbatches, jnp.arange(count)),
    )
    return jax.tree.map(lambda x: x / count, total)


def choose_attention(config: ConfigDict, model: ModelDef, mesh: Mesh) -> ModelDef:
    """The model of a config as it is trained on a mesh: with the implementation that `config.train.attention` names.

    Raises:
      ConfigError: there is none of that name, or it does not fit the model, its dtype or the devices.
    """
    implementation, dtype = config.train.attention, config.train.dtype
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"config.train.attention {implementation!r} must be one of {', '.join(IMPLEMENTATIONS)}.")
    if implementation == "xla":
        return model
    platform = mesh.devices.flat[0].platform
    if platform not in ("gpu", "cuda"):
        raise ConfigError(f"config.train.attention 'cudnn' needs a GPU, and training is on {platform}; choose 'xla'.")
    if dtype != "bfloat16":
        raise ConfigError(f"config.train.attention 'cudnn' needs config.train.dtype 'bfloat16', and not {dtype!r}.")
    return with_cudnn(model)


def with_cudnn(model: ModelDef) -> ModelDef:
    """The model, of the same parameters, with cuDNN's attention in all modules whose heads it takes.

    Raises:
      ConfigError: there are none.
    """
    module = model.bind(jax.eval_shape(model.init, jax.random.key(0)))
    parts = {path: part for path, part in nnx.iter_modules(module) if isinstance(part, FusableAttention)}
    fused = {path: part for path, part in parts.items() if part.fits_cudnn}
    if not fused:
        sizes = ", ".join(map(str, sorted({part.head_size for part in parts.values()}))) or "none without"
        raise ConfigError(
            "config.train.attention 'cudnn' fits no attention of this model: it takes heads of 8, 16, ... "
            f"{CUDNN_HEAD_SIZES[-1]} numbers without learned biases or shared keys, and this has {sizes}; choose 'xla'."
        )
    for part in fused.values():
        part.implementation = "cudnn"
    logger.info("Attention by cuDNN: %s", ", ".join("/".join(map(str, path)) for path in fused))
    return dataclasses.replace(model, graphdef=nnx.split(module)[0])
