"""What the towers of public text models share.

`Observation.text` holds, as for bytes, the number of a token plus one, and 0 after the text has ended: token 0, which
CLIP has for a text, stays a token, and what a model's own padding is does not matter. Texts come with the tokens that
these models put around them, so that the last one is the end-of-text token.

Axes: B batch, M tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from como_jax.errors import ConfigError, closest
from como_jax.spec.towers import TextConfig

Activation = Callable[[jax.Array], jax.Array]

# As config.json of public weights names them.
ACTIVATIONS: dict[str, Activation] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
GATED = "gated-"


def activation(name: str) -> Activation:
    """The activation that config.json calls so; raises ConfigError for an unknown one."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"text.activation {name!r} is none of {', '.join(ACTIVATIONS)}{closest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def split_text(text: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numbers of tokens `[B, M]` and which of them are there; the first always is, so that no text is without any."""
    chex.assert_rank(text, 2)
    mask = (text != 0) | (jnp.arange(text.shape[1]) == 0)
    return jnp.maximum(text - 1, 0), mask


def check_sizes(config: TextConfig) -> None:
    """Raises ConfigError unless the config has the sizes that only weights give."""
    if not (config.vocabulary_size and config.mlp_width):
        raise ConfigError(
            f"text.tower={config.tower} has no vocabulary_size or mlp_width: these are the sizes of its weights, which "
            "como_jax.weights.text.text_config_of reads."
        )


def embedding_table(rows: int, width: int, *, rngs: nnx.Rngs) -> nnx.Param:
    """Random vectors `[rows, width]`."""
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, width)))
