"""The training state: how it is made, already sharded, and how its parameters are replaced and read."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Mesh

from como_jax.nn.model_def import ModelDef, Params, merge_params
from como_jax.training import sharding

Metrics = dict[str, jax.Array]


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
    shardings, structure = jax.tree.flatten(jax.tree.map(lambda x: x.sharding, abstract))
    use_ema = abstract.ema is not None
    return _initialiser(model, optimizer, use_ema, tuple(shardings), structure)(jax.random.key(seed))


@functools.lru_cache(maxsize=8)
def _initialiser(
    model: ModelDef,
    optimizer: optax.GradientTransformation,
    use_ema: bool,
    shardings: tuple[jax.sharding.Sharding, ...],
    structure: jax.tree_util.PyTreeDef,
) -> jax.stages.Wrapped:
    init = functools.partial(init_state, model, optimizer, use_ema=use_ema)
    return jax.jit(init, out_shardings=jax.tree.unflatten(structure, shardings))
