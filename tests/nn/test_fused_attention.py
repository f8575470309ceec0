"""cuDNN's attention without a GPU: what it is asked for, what that means, and that it can be lowered."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo

from como_jax.nn.attention import Attention, CrossAttention, attend
from tests.everyday import mostly_slow


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """XLA computes what cuDNN is asked for; the list gets an entry for each call."""
    implementations, dot_product_attention = [], jax.nn.dot_product_attention

    def by_xla(*args: Any, implementation: str, **kwargs: Any) -> jax.Array:
        implementations.append(implementation)
        return dot_product_attention(*args, **kwargs, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    return implementations


def allowed(*shape: int, nothing: bool = False) -> np.ndarray:
    """A mask, with a row that allows nothing where asked for."""
    mask = np.random.default_rng(1).random(shape) < 0.5
    mask[..., 0] = True
    mask[0, 0] &= not nothing
    return mask


# How models call their attention: on tokens `[2, 6, 16]` and a context of 4.
WAYS: dict[str, Callable[[Mapping[str, Any], jax.Array, jax.Array], jax.Array]] = {
    "all": lambda parts, x, _: parts["own"](x),
    "first of an odd number": lambda parts, x, _: parts["own"](x[:, :5], num_outputs=3),
    "masked": lambda parts, x, _: parts["own"](x, allowed(2, 6, 6, nothing=True)),
    "odd and masked": lambda parts, x, _: parts["own"](x[:, :5], allowed(2, 1, 5), num_outputs=4),
    "context with one mask": lambda parts, x, context: parts["cross"](x, context, allowed(1, 6, 4)),
}


def values_and_gradients(implementation: str) -> dict[str, Any]:
    """Of all ways, with equal parameters."""
    kinds = {"dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    parts = {"own": Attention(16, 2, **kinds), "cross": CrossAttention(16, 16, 2, **kinds)}
    for part in parts.values():
        part.implementation = implementation
    rng = np.random.default_rng(0)
    x, context, direction = (rng.normal(size=(2, tokens, 16)).astype(np.float32) for tokens in (6, 4, 6))

    def along(way: str, x: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = WAYS[way](parts, x, context).astype(jnp.float32)
        return jnp.vdot(out, direction[:, : out.shape[1]]), out

    return jax.jit(lambda *args: {way: jax.grad(along, (1, 2), has_aux=True)(way, *args) for way in WAYS})(x, context)


def test_cudnn_is_asked_for_what_xla_computes(asked: list[str]) -> None:
    expected = values_and_gradients("xla")
    assert not asked
    found = values_and_gradients("cudnn")
    assert asked == ["cudnn"] * len(WAYS)
    for way in WAYS:
        for one, other in zip(jax.tree.leaves(found[way]), jax.tree.leaves(expected[way]), strict=True):
            scale = np.abs(np.asarray(other, np.float32)).max()
            # What bfloat16 rounds: a wrong mask, scale or order is far off.
            np.testing.assert_allclose(one, other, rtol=0, atol=0.03 * scale, err_msg=way)


def lowered_for_cuda(
    queries: tuple[int, int], keys: tuple[int, int], head_size: int, *, mask: tuple[int, ...] | None = None
) -> str:
    """The gradient of attention as it would be compiled for a GPU; queries and keys are tokens and heads of 2."""
    arrays = [jax.ShapeDtypeStruct((2, *size, head_size), jnp.bfloat16) for size in (queries, keys, keys)]
    arrays += [] if mask is None else [jax.ShapeDtypeStruct(mask, jnp.bool_)]
    total = functools.partial(attend, implementation="cudnn")
    gradient = jax.jit(jax.grad(lambda *args: total(*args).astype(jnp.float32).sum(), (0, 1, 2)))
    return gradient.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def with_cudnn_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX asks the library for its version before it lowers a call of it."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


REAL_SHAPES: dict[str, dict[str, Any]] = {
    "encoder, ViT-L": {"queries": (197, 16), "keys": (197, 16), "head_size": 64},
    "last layer of the Q-former": {"queries": (8, 12), "keys": (403, 12), "head_size": 64},
    "forward dynamics": {"queries": (196, 12), "keys": (196, 12), "head_size": 64},
    "images and instruction": {"queries": (64, 12), "keys": (145, 12), "head_size": 64, "mask": (2, 1, 145)},
}


@pytest.mark.usefixtures("with_cudnn_library")
@pytest.mark.parametrize("name", mostly_slow(REAL_SHAPES, "images and instruction"))
def test_attention_of_the_recipes_is_lowered_to_cudnn_forwards_and_backwards(name: str) -> None:
    text, bias = lowered_for_cuda(**REAL_SHAPES[name]), "ScaleBias" if "mask" in REAL_SHAPES[name] else ""
    assert f"@__cudnn$fmha{bias}Softmax(" in text and f"@__cudnn$fmha{bias}SoftmaxBackward(" in text
    assert "stablehlo.exponential" not in text
