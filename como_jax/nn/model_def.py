"""A model without its parameters: what the builders of all families make, and what all that uses a model takes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from ml_collections import ConfigDict

from como_jax.errors import ConfigError

Params = dict[str, Any]
"""Parameters, nested by module name."""
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, eq=False)
class ModelDef:
    """A model without its parameters.

    Attributes:
      init: makes random parameters from a key. It is jitted, and traced only once however many functions call it.
      graphdef: the module's structure.
      frozen: paths of parameters, or of modules, that the optimiser leaves alone.
    """

    init: Callable[[jax.Array], Params]
    graphdef: nnx.GraphDef
    frozen: tuple[str, ...] = ()

    @classmethod
    def create(cls, build: Callable[[nnx.Rngs], nnx.Module]) -> ModelDef:
        """Traces `build` once, without computing anything; a module without `frozen_paths` is trained whole."""
        graphdef: nnx.GraphDef
        frozen: tuple[str, ...] = ()

        @jax.jit
        def init(key: jax.Array) -> Params:
            nonlocal graphdef, frozen
            module = build(nnx.Rngs(key))
            graphdef, params = nnx.split(module)
            frozen = getattr(module, "frozen_paths", tuple)()
            return nnx.to_pure_dict(params)

        jax.eval_shape(init, jax.random.key(0))
        return cls(init, graphdef, frozen)

    def bind(self, params: Params) -> Any:
        """The module with these parameters."""
        return nnx.merge(self.graphdef, params)

    def partition(self, params: Params) -> tuple[Params, Params]:
        """Splits parameters into trained and frozen ones."""
        trained, frozen = {}, {}
        for path, value in traverse_util.flatten_dict(params).items():
            name = "/".join(map(str, path))
            is_frozen = any(f"{name}/".startswith(f"{prefix}/") for prefix in self.frozen)
            (frozen if is_frozen else trained)[path] = value
        return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


@functools.lru_cache(maxsize=32)
def define(module_class: Callable[..., nnx.Module], *settings: Any, **options: Any) -> ModelDef:
    """The model that a class makes of hashable settings.

    Equal settings give the same object, for which jitted functions are kept. So several runs in one process, as in a
    notebook, compile only once.
    """
    return ModelDef.create(lambda rngs: module_class(*settings, **options, rngs=rngs))


def merge_params(first: Params, second: Params) -> Params:
    """Joins two disjoint nested dictionaries of parameters."""
    flat = {**traverse_util.flatten_dict(first), **traverse_util.flatten_dict(second)}
    return traverse_util.unflatten_dict(flat)


def compute_options(config: ConfigDict) -> dict[str, Any]:
    """The dtype and the rematerialisation of a config, as keyword arguments of a model; raises ConfigError."""
    if config.train.dtype not in DTYPES:
        raise ConfigError(f"config.train.dtype {config.train.dtype!r} must be one of {', '.join(DTYPES)}.")
    return {"dtype": DTYPES[config.train.dtype], "remat": config.train.remat}
