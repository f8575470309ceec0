"""Small heads that read other things than pixels from the forward dynamics model.

Axes: B batch, M patches, D width.
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from como_jax.errors import ConfigError
from como_jax.nn.layers import Linear, unpatchify
from como_jax.types import FLOW_STRIDE


class FlowHead(nnx.Module):
    """Optical flow from the tokens of a picture's patches."""

    def __init__(self, width: int, patch_size: int, *, rngs: nnx.Rngs):
        if patch_size % FLOW_STRIDE:
            raise ConfigError(
                f"model.flow_weight needs model.fdm_patch_size to be a multiple of {FLOW_STRIDE}, not {patch_size}."
            )
        self.cells = patch_size // FLOW_STRIDE
        self.out = Linear(width, self.cells**2 * 2, dtype=jnp.float32, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Displacements `[B, h, w, 2]`, in cells of the flow map, of a square picture's tokens `[B, M, D]`."""
        chex.assert_rank(tokens, 3)
        side = math.isqrt(tokens.shape[1]) * self.cells
        return unpatchify(self.out(tokens), self.cells, side, side)
