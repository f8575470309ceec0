"""Matrix products with gradients in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from como_jax.nn.primitives import broadcast_param, matmul, project


@pytest.mark.parametrize(
    ("shape", "kernel", "equation"),
    [((3, 4, 5), (5, 2, 6), "abi,ihk->abhk"), ((3, 4, 2, 6), (2, 6, 5), "abhk,hko->abo"), ((5,), (5, 7), "i,io->o")],
)
def test_projection_contracts_the_last_axes(shape: tuple[int, ...], kernel: tuple[int, ...], equation: str) -> None:
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=shape).astype(np.float32), rng.normal(size=kernel).astype(np.float32)
    num_inputs = 2 if "hk," in equation else 1
    bias = rng.normal(size=kernel[num_inputs:]).astype(np.float32)
    direction = rng.normal(size=np.einsum(equation, x, weights).shape)

    def along(x: jax.Array, weights: jax.Array, bias: jax.Array) -> jax.Array:
        return jnp.vdot(project(x, weights, bias, num_inputs=num_inputs), direction)

    value, grads = jax.jit(jax.value_and_grad(along, (0, 1, 2)))(x, weights, bias)
    expected = np.einsum(equation, x, weights) + bias
    np.testing.assert_allclose(value, np.vdot(expected, direction), rtol=1e-4)
    # A bilinear map's derivative along each argument is the map of the other.
    np.testing.assert_allclose(np.vdot(grads[0], x), np.vdot(expected - bias, direction), rtol=1e-4)
    np.testing.assert_allclose(np.vdot(grads[1], weights), np.vdot(expected - bias, direction), rtol=1e-4)
    np.testing.assert_allclose(grads[2], direction.reshape(-1, *bias.shape).sum(axis=0), rtol=1e-4)


def test_gradients_of_bfloat16_products_keep_small_terms() -> None:
    rows = 512
    x = jnp.ones((rows, 1), jnp.bfloat16)
    # In bfloat16, 256 + 1 is 256.
    direction = jnp.ones((rows, 1), jnp.bfloat16).at[0].set(256)

    def along(kernel: jax.Array, bias: jax.Array) -> jax.Array:
        out = matmul(x, kernel) + broadcast_param(bias, (rows, 1), jnp.bfloat16)
        assert out.dtype == jnp.bfloat16
        return (out * direction).astype(jnp.float32).sum()

    grads = jax.jit(jax.grad(along, (0, 1)))(jnp.ones((1, 1)), jnp.ones(1))
    for grad in grads:
        assert grad.dtype == jnp.float32
        np.testing.assert_array_equal(grad.ravel(), [256 + rows - 1])
