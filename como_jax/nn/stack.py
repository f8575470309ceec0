"""A stack of equal layers: the only place that scans over depth and rematerialises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from como_jax.errors import ConfigError
from como_jax.nn.primitives import keep_batch_split

REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Stack(nnx.Module):
    """`depth` layers whose parameters have a leading layer axis, run by `jax.lax.scan`.

    So only one layer is traced and compiled, whatever the depth. A stack of depth 0 has no parameters and does nothing.
    """

    def __init__(
        self, make_layer: Callable[[nnx.Rngs], nnx.Module], depth: int, *, remat: str = "none", rngs: nnx.Rngs
    ):
        if remat not in REMAT_POLICIES:
            raise ConfigError(f"train.remat {remat!r} is unknown; choose one of {', '.join(REMAT_POLICIES)}.")
        self.depth = depth
        self.remat = remat
        if not depth:
            return
        graphdef = nnx.split(nnx.eval_shape(lambda: make_layer(nnx.Rngs(0))))[0]
        keys = jax.random.split(rngs.params(), depth)
        # One layer after the other: drawing the random numbers of all at once needs twice the memory of the parameters.
        params = jax.lax.map(lambda key: nnx.split(make_layer(nnx.Rngs(key)))[1], keys)
        self.layers = nnx.merge(graphdef, params)

    def __call__(self, x: jax.Array, *context: jax.Array, num_outputs: int | None = None) -> jax.Array:
        """Runs all layers on `x`, whose shape they keep.

        Args:
          x: input tokens, `[B, N, D]` or whatever the layers take.
          *context: further arguments, the same for every layer.
          num_outputs: if set, the last layer computes only its first `num_outputs` tokens.
        """
        if not self.depth:
            return x[:, :num_outputs]
        graphdef, params = nnx.split(self.layers)

        def body(x: jax.Array, layer_params: nnx.State) -> tuple[jax.Array, None]:
            x = nnx.merge(graphdef, layer_params)(keep_batch_split(x), *context).astype(x.dtype)
            return keep_batch_split(x), None

        def last(x: jax.Array, layer_params: nnx.State) -> jax.Array:
            return keep_batch_split(
                nnx.merge(graphdef, layer_params)(keep_batch_split(x), *context, num_outputs=num_outputs)
            )

        if self.remat != "none":
            policy = REMAT_POLICIES[self.remat]
            # Inside a scan XLA cannot merge the recomputation away, so the costly CSE barrier is not needed.
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
            last = jax.checkpoint(last, policy=policy)
        if num_outputs is None:
            return jax.lax.scan(body, x, params)[0]
        x = jax.lax.scan(body, x, jax.tree.map(lambda p: p[:-1], params))[0]
        return last(x, jax.tree.map(lambda p: p[-1], params))

    def carry(self, x: jax.Array, states: Any, *context: Any) -> tuple[jax.Array, Any]:
        """Runs layers that also have a state of their own, such as a cache of keys and values.

        Args:
          x: input tokens.
          states: of all layers, with a leading layer axis, or None where there are none yet.
          *context: further arguments, the same for every layer.

        Returns:
          The output of the last layer, and the new states of all layers.
        """
        graphdef, params = nnx.split(self.layers)

        def body(x: jax.Array, layer: tuple[nnx.State, Any]) -> tuple[jax.Array, Any]:
            layer_params, state = layer
            x, state = nnx.merge(graphdef, layer_params)(keep_batch_split(x), state, *context)
            return keep_batch_split(x), state

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        return jax.lax.scan(body, x, (params, states))
