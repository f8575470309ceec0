"""The masked autoencoder: what is masked, what counts, and where the decoder puts it."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util

from como_jax.motion.mae import Mae
from como_jax.nn.layers import denormalize_frames, normalize_frames, patchify, sincos_position_embedding, unpatchify
from como_jax.nn.model_def import ModelDef, Params
from como_jax.spec.motion import MaeConfig
from como_jax.spec.towers import VitConfig
from como_jax.types import FramePairs

SIZE, PATCH, NUM_PATCHES, NUM_IMAGES = 16, 4, 16, 4
KEY = jax.random.key(3)


class Runner:
    """A tiny MAE, with its functions compiled once."""

    def __init__(self) -> None:
        vit = VitConfig(image_size=SIZE, patch_size=PATCH, width=16, depth=1, num_heads=2)
        config = MaeConfig(decoder_width=16, decoder_depth=1, decoder_heads=2, mask_ratio=0.75)
        self.model = ModelDef.create(lambda rngs: Mae(vit, config, rngs=rngs))
        self.params = jax.jit(self.model.init)(jax.random.key(0))
        self._loss = jax.jit(jax.value_and_grad(self._loss_of))
        self._reconstruct = jax.jit(lambda params, frames: self.model.bind(params).reconstruct(frames, KEY))

    def _loss_of(self, params: Params, frames: jax.Array) -> jax.Array:
        none = np.zeros(len(frames), np.int32)
        return self.model.bind(params).loss(FramePairs(frames, none, none), KEY)[0]

    def loss(self, params: Params, frames: np.ndarray) -> tuple[float, Params]:
        """Loss and gradients for uint8 frames `[NUM_IMAGES, H, W, 3]`, as clips of two."""
        value, gradients = self._loss(params, frames.reshape(-1, 2, SIZE, SIZE, 3))
        return float(value), jax.tree.map(np.asarray, gradients)

    def reconstruct(self, params: Params, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Patches `[NUM_IMAGES, N, p * p * 3]` of the masked input and of the reconstruction."""
        masked, filled = self._reconstruct(params, frames)
        return np.asarray(patchify(masked, PATCH)), np.asarray(patchify(filled, PATCH))

    def masked(self) -> np.ndarray:
        """Which patches the key masks, `[NUM_IMAGES, N]`: those of a white image that are not white."""
        white = np.full((NUM_IMAGES, SIZE, SIZE, 3), 255, np.uint8)
        return self.reconstruct(self.params, white)[0].min(axis=-1) < 0.9

    def with_zeros(self, *names: str) -> Params:
        """The parameters with those whose path ends in one of the names at zero."""
        flat = traverse_util.flatten_dict(self.params, sep="/")
        flat = {path: 0 * value if path.endswith(names) else value for path, value in flat.items()}
        return traverse_util.unflatten_dict(flat, sep="/")


@pytest.fixture(scope="module")
def mae() -> Runner:
    return Runner()


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(96, 160, (NUM_IMAGES, SIZE, SIZE, 3), dtype=np.uint8)


def test_the_mask_ratio_holds_for_every_image_and_masks_differ(mae: Runner) -> None:
    masked = mae.masked()
    np.testing.assert_array_equal(masked.sum(axis=1), 12)
    assert len(np.unique(masked, axis=0)) > 1


def test_masked_patches_have_the_mean_colour_and_visible_ones_their_own(mae: Runner, frames: np.ndarray) -> None:
    hidden, _ = mae.reconstruct(mae.params, frames)
    masked, true = mae.masked(), np.asarray(patchify(frames / np.float32(255), PATCH))
    np.testing.assert_allclose(hidden[~masked], true[~masked], atol=1e-6)
    np.testing.assert_allclose(hidden[masked].reshape(-1, 3), [[0.485, 0.456, 0.406]] * 12 * NUM_IMAGES * 16, atol=1e-6)


@pytest.mark.parametrize("textured", ["visible", "masked"])
def test_the_loss_counts_masked_patches_alone(mae: Runner, frames: np.ndarray, textured: str) -> None:
    # A model that predicts plain grey everywhere is wrong about textured patches alone.
    grey = np.asarray(normalize_frames(np.full((PATCH * PATCH, 3), 128, np.uint8))).reshape(-1)
    params = mae.with_zeros("decoder_pred/kernel")
    params["decoder_pred"]["bias"] = (grey - grey.mean()) / grey.std()
    texture = mae.masked() if textured == "masked" else ~mae.masked()
    patches = np.where(texture[..., None], patchify(frames, PATCH), 128)
    loss, _ = mae.loss(params, np.asarray(unpatchify(patches, PATCH, SIZE, SIZE), np.uint8))
    assert loss > 0.5 if textured == "masked" else loss < 1e-4


def test_visible_patches_are_copied_to_their_exact_places(mae: Runner, frames: np.ndarray) -> None:
    _, filled = mae.reconstruct(mae.params, frames)
    visible, true = ~mae.masked(), np.asarray(patchify(frames / np.float32(255), PATCH))
    np.testing.assert_allclose(filled[visible], true[visible], atol=1e-6)
    assert np.abs(filled - true)[~visible].max() > 0.01


def test_the_decoder_gets_mask_tokens_at_masked_places_with_the_position_of_each(
    mae: Runner, frames: np.ndarray
) -> None:
    # Without attention and MLP outputs the decoder treats every token alone, so its input shows in its output.
    blocks = [
        f"decoder_blocks/layers/{layer}/{leaf}" for layer in ("attn/proj", "mlp/fc2") for leaf in ("kernel", "bias")
    ]
    params: Any = mae.with_zeros(*blocks)
    tokens = params["mask_token"][0] + sincos_position_embedding(4, 4, 16)
    centred = tokens - tokens.mean(-1, keepdims=True)
    normalised = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-6)
    standardised = normalised @ params["decoder_pred"]["kernel"]
    patches = patchify(normalize_frames(frames), PATCH)
    expected = standardised * patches.std(-1, keepdims=True) + patches.mean(-1, keepdims=True)
    expected = np.asarray(denormalize_frames(expected.reshape(NUM_IMAGES, NUM_PATCHES, -1, 3))).reshape(patches.shape)
    _, filled = mae.reconstruct(params, frames)
    masked = mae.masked()
    np.testing.assert_allclose(filled[masked], expected[masked], atol=1e-4)


def test_gradients_reach_everything_but_the_fixed_positions(mae: Runner, frames: np.ndarray) -> None:
    _, gradients = mae.loss(mae.params, frames)
    without = {path for path, value in traverse_util.flatten_dict(gradients, sep="/").items() if not np.any(value)}
    assert without == {"encoder/pos_embed"}
