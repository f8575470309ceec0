"""The training state and the one step function that all recipes share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding

from como_jax.nn.model_def import ModelDef, Params, merge_params
from como_jax.training import sharding
from como_jax.types import LossOutput

Metrics = dict[str, jax.Array]


class Trainable(Protocol):
    """What the step function needs of a model."""

    def loss(self, batch: Any, key: jax.Array) -> LossOutput:
        """What is minimised, its terms, and statistics for `update_codebook`."""

    def update_codebook(self, statistics: Any, step: jax.Array, key: jax.Array) -> tuple[Params, Metrics]:
        """Parameters to replace after an update; only called where the loss gave statistics."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step reads and writes; all of it is checkpointed.

    Attributes:
      step: int32 scalar, updates done.
      params: trained parameters, nested by module name.
      frozen: parameters that the optimiser does not touch.
      opt_state: of optax, over `params` alone.
      ema: moving average of `params`, or None.
    """

    step: jax.Array
    params: Params
    frozen: Params
    opt_state: Any
    ema: Params | None


def replace_params(state: TrainState, new: Params) -> TrainState:
    """The state with some parameters, trained or frozen, in place of its own; the moving average starts from them."""

    def replaced(old: Params | None, new: Params) -> Params | None:
        if old is None:
            return None
        flat_new = traverse_util.flatten_dict(new)
        flat = {path: flat_new.get(path, value) for path, value in traverse_util.flatten_dict(old).items()}
        return traverse_util.unflatten_dict(flat)

    return dataclasses.replace(
        state,
        params=replaced(state.params, new),
        frozen=replaced(state.frozen, new),
        # Copies, since a step gives away the memory of its state and can give no array away twice.
        ema=replaced(state.ema, jax.tree.map(jnp.copy, new)) if state.ema is not None else None,
    )


def evaluation_params(state: TrainState) -> Params:
    """All parameters, with the moving average in place of the trained ones where there is one."""
    return merge_params(state.params if state.ema is None else state.ema, state.frozen)


def init_state(
    model: ModelDef, optimizer: optax.GradientTransformation, key: jax.Array, *, use_ema: bool
) -> TrainState:
    """A fresh state; run it under `jax.jit` with `abstract_state`'s shardings, so that it is made in place."""
    # Weak types, which `jnp.full` gives, would be gone after the first step, and the second compile it anew.
    params, frozen = model.partition(jax.tree.map(lambda x: jnp.asarray(x, x.dtype), model.init(key)))
    ema = jax.tree.map(jnp.copy, params) if use_ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, frozen, optimizer.init(params), ema)


def abstract_state(
    model: ModelDef, optimizer: optax.GradientTransformation, mesh: Mesh, *, use_ema: bool
) -> TrainState:
    """Shapes, dtypes and shardings of the state, as `jax.ShapeDtypeStruct`."""
    shapes = jax.eval_shape(lambda key: init_state(model, optimizer, key, use_ema=use_ema), jax.random.key(0))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        sharding.tree_shardings(shapes, mesh),
    )


def create_state(
    model: ModelDef, optimizer: optax.GradientTransformation, abstract: TrainState, *, seed: int
) -> TrainState:
    """A fresh state with the shardings of `abstract`, never whole on one device."""
    init = functools.partial(init_state, model, optimizer, use_ema=abstract.ema is not None)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


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
