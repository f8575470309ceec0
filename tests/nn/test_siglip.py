"""SigLIP's image tower; tests/weights/test_paligemma.py compares its features with an independent computation."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from como_jax.nn.vit import Siglip, Vit, scale_frames
from como_jax.spec.towers import VitConfig

CONFIG = VitConfig(image_size=14, patch_size=7, width=12, depth=1, num_heads=2, mlp_width=20)


def test_pixels_are_scaled_to_between_minus_one_and_one() -> None:
    np.testing.assert_allclose(scale_frames(np.array([0, 51, 255], np.uint8)), [-1, -0.6, 1], atol=1e-6)


def test_every_patch_is_a_token_that_knows_its_place() -> None:
    tower = nnx.eval_shape(lambda: Siglip(CONFIG, rngs=nnx.Rngs(0)))
    graphdef, shapes = nnx.split(tower)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape).astype(x.dtype), shapes)
    found = jax.jit(lambda params, images: nnx.merge(graphdef, params)(images))(params, np.zeros((2, 14, 14, 3)))
    assert found.shape == (2, 4, 12) and found.dtype == np.float32
    # Of an even image, patches differ by their positions alone.
    assert len(np.unique(np.asarray(found[0]).round(4), axis=0)) == 4


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(AssertionError):
        nnx.eval_shape(lambda: Siglip(CONFIG, rngs=nnx.Rngs(0))(np.zeros((1, 21, 14, 3))))


@pytest.mark.parametrize("tower", [Vit, Siglip])
@pytest.mark.parametrize(("mlp_width", "hidden"), [(20, 20), (0, 48)])
def test_the_width_of_the_mlp_is_the_config_s_or_four_times_that_of_the_tower(
    tower: type[nnx.Module], mlp_width: int, hidden: int
) -> None:
    config = VitConfig(image_size=14, patch_size=7, width=12, depth=3, num_heads=2, mlp_width=mlp_width)
    module = nnx.eval_shape(lambda: tower(config, rngs=nnx.Rngs(0)))
    assert module.blocks.layers.mlp.fc1.kernel.shape == (3, 12, hidden)
