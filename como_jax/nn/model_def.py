"""A model without its parameters: what the builders of all families give, and all that uses a model takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx, traverse_util

Params = dict[str, Any]
"""Parameters, nested by module name."""


@dataclasses.dataclass(frozen=True)
class ModelDef:
    """A model without its parameters.

    Attributes:
      build: makes the module from random streams.
      graphdef: the module's structure.
      frozen: paths of parameters, or of modules, that the optimiser leaves alone.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    graphdef: nnx.GraphDef
    frozen: tuple[str, ...] = ()

    @classmethod
    def create(cls, build: Callable[[nnx.Rngs], nnx.Module]) -> ModelDef:
        """Traces `build` once, without computing anything; a module without `frozen_paths` is trained whole."""
        module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        return cls(build, nnx.split(module)[0], getattr(module, "frozen_paths", tuple)())

    def init(self, key: jax.Array) -> Params:
        """Random parameters."""
        return nnx.to_pure_dict(nnx.split(self.build(nnx.Rngs(key)))[1])

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


def merge_params(first: Params, second: Params) -> Params:
    """Joins two disjoint nested dictionaries of parameters."""
    flat = {**traverse_util.flatten_dict(first), **traverse_util.flatten_dict(second)}
    return traverse_util.unflatten_dict(flat)
