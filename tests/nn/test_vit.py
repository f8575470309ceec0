"""The encoder against a forward pass written in NumPy, and the stack's options against its plain run."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from como_jax.errors import ConfigError
from como_jax.nn.layers import Block
from como_jax.nn.model_def import ModelDef, Params
from como_jax.nn.stack import Stack
from como_jax.nn.vit import Vit
from como_jax.spec.towers import VitConfig
from tests.everyday import mostly_slow

CONFIG = VitConfig(image_size=24, patch_size=8, width=16, depth=2, num_heads=2)


def randomized(model: ModelDef) -> Params:
    """Parameters that are all random, so that biases and norms count; positions stay as they are made."""
    rng = np.random.default_rng(0)

    def shake(path: Any, value: jax.Array) -> np.ndarray:
        noise = 0.0 if path[-1].key == "pos_embed" else rng.normal(scale=0.3, size=value.shape)
        return np.float32(value + noise)

    return jax.tree_util.tree_map_with_path(shake, jax.jit(model.init)(jax.random.key(0)))


def numpy_vit(params: Params, image: np.ndarray) -> np.ndarray:
    """Features `[1 + N, D]` of one image, patch by patch, token by token, head by head."""
    size, width, heads = CONFIG.patch_size, CONFIG.width, CONFIG.num_heads
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def dense(x: np.ndarray, p: Params) -> np.ndarray:
        return x @ p["kernel"] + p["bias"]

    def norm(x: np.ndarray, p: Params) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def position(row: int, column: int) -> np.ndarray:
        waves = [1 / 10000 ** (k / (width // 4)) for k in range(width // 4)]
        return np.array([f(at * w) for at in (column, row) for f in (np.sin, np.cos) for w in waves])

    def attention(x: np.ndarray, p: Params) -> np.ndarray:
        output = p["proj"]["bias"].copy()
        for head in range(heads):
            q, k, v = (x @ p["qkv"]["kernel"][:, i, head] + p["qkv"]["bias"][i, head] for i in range(3))
            scores = np.exp(q @ k.T / np.sqrt(width // heads))
            output = output + scores / scores.sum(-1, keepdims=True) @ v @ p["proj"]["kernel"][head]
        return output

    def mlp(x: np.ndarray, p: Params) -> np.ndarray:
        hidden = dense(x, p["fc1"])
        return dense(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, p["fc2"])

    kernel = params["patch_embed"]["kernel"].reshape(size, size, 3, width)
    tokens = [params["cls_token"][0, 0]]
    for row in range(CONFIG.grid):
        for column in range(CONFIG.grid):
            patch = image[row * size : (row + 1) * size, column * size : (column + 1) * size]
            embedded = np.einsum("ijc,ijcd->d", patch, kernel) + params["patch_embed"]["bias"]
            tokens.append(embedded + position(row, column))
    x = np.stack(tokens)
    for layer in range(CONFIG.depth):
        p = jax.tree.map(lambda value, layer=layer: value[layer], params["blocks"]["layers"])
        x = x + attention(norm(x, p["norm1"]), p["attn"])
        x = x + mlp(norm(x, p["norm2"]), p["mlp"])
    return norm(x, params["norm"])


def test_features_equal_a_forward_pass_in_numpy() -> None:
    model = ModelDef.create(lambda rngs: Vit(CONFIG, rngs=rngs))
    params = randomized(model)
    images = np.random.default_rng(1).normal(size=(2, 24, 24, 3)).astype(np.float32)
    features = jax.jit(lambda params, images: model.bind(params)(images))(params, images)
    expected = np.stack([numpy_vit(params, image) for image in images])
    np.testing.assert_allclose(features, expected, rtol=2e-5, atol=2e-5)


def make_stack(remat: str = "none") -> ModelDef:
    def layer(rngs: nnx.Rngs) -> Block:
        return Block(16, 2, dtype=jnp.float32, rngs=rngs)

    return ModelDef.create(lambda rngs: Stack(layer, 3, remat=remat, rngs=rngs))


def test_a_last_layer_for_some_outputs_equals_a_slice_of_all_outputs() -> None:
    model = make_stack()
    params = randomized(model)
    x = np.random.default_rng(1).normal(size=(2, 7, 16)).astype(np.float32)

    @jax.jit
    def both(params: Params) -> tuple[jax.Array, jax.Array]:
        stack = model.bind(params)
        return stack(x, num_outputs=3), stack(x)

    some, everything = both(params)
    assert some.shape == (2, 3, 16)
    np.testing.assert_allclose(some, everything[:, :3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_outputs", mostly_slow([None, 2], 2))
def test_rematerialisation_changes_neither_output_nor_gradients(num_outputs: int | None) -> None:
    params = randomized(make_stack())
    x = np.random.default_rng(1).normal(size=(2, 7, 16)).astype(np.float32)

    def run(remat: str) -> tuple[jax.Array, Params]:
        model = make_stack(remat)
        loss = lambda params: jnp.sum(jnp.square(model.bind(params)(x, num_outputs=num_outputs)))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    value, gradients = run("none")
    for remat in ("dots", "full"):
        other_value, other_gradients = run(remat)
        np.testing.assert_allclose(other_value, value, rtol=1e-5)
        chex.assert_trees_all_close(other_gradients, gradients, rtol=1e-4, atol=1e-3)


def test_layers_of_a_stack_start_different() -> None:
    kernel = jax.jit(make_stack().init)(jax.random.key(0))["layers"]["mlp"]["fc1"]["kernel"]
    assert kernel.shape == (3, 16, 64)
    assert not np.allclose(kernel[0], kernel[1])


def test_an_unknown_remat_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="'some' is unknown; choose one of none, dots, full"):
        make_stack("some")


def test_a_image_that_patches_cannot_tile_is_refused() -> None:
    with pytest.raises(ConfigError, match="image_size 20 must be a multiple of encoder.patch_size 8"):
        VitConfig(image_size=20, patch_size=8, width=16, depth=1, num_heads=1)
