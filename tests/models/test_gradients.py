"""Which parameters each loss term trains: a table."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from como_jax import losses, types
from como_jax.training.train_state import ModelDef, Params

MakeComo = Callable[..., ModelDef]

# Loss weights, options, and the modules that they train; all others get no gradient at all.
TABLE = [
    ("mse", {"freeze_encoder": True}, {"idm", "fdm"}),
    ("mse", {"freeze_encoder": False}, {"encoder", "idm", "fdm"}),
    ("tcl", {"freeze_encoder": True, "tcl_gradient_everywhere": False}, {"idm"}),
    ("tcl", {"freeze_encoder": True, "tcl_gradient_everywhere": True}, {"idm"}),
    ("tcl", {"freeze_encoder": False, "tcl_gradient_everywhere": False}, {"encoder", "idm"}),
    ("tcl", {"freeze_encoder": False, "tcl_gradient_everywhere": True}, {"encoder", "idm"}),
]
WEIGHTS = {"mse": {"mse_weight": 1.0, "tcl_weight": 0.0}, "tcl": {"mse_weight": 0.0, "tcl_weight": 1.0}}


@pytest.fixture(scope="module")
def loss_and_gradients(make_como: MakeComo, como_params: Params) -> Callable[..., tuple[float, Params]]:
    """Loss and gradients of all parameters, of the CoMo with the given options; each compiled once."""

    @functools.cache
    def run(**options: Any) -> tuple[float, Params]:
        model = make_como(**options)

        def loss(params: Params, batch: types.FramePairs) -> jax.Array:
            return model.bind(params).loss(batch, jax.random.key(0))[0]

        value, gradients = jax.jit(jax.value_and_grad(loss))(como_params, types.fake_frame_pairs())
        return float(value), jax.tree.map(np.asarray, gradients)

    return run


def names_with_gradient(gradients: Params) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    return {"/".join(key.key for key in path) for path, value in leaves if np.any(value)}


@pytest.mark.parametrize(("term", "options", "trained"), TABLE)
def test_a_loss_term_trains_all_of_its_modules_and_no_other(
    loss_and_gradients: Callable, term: str, options: dict[str, bool], trained: set[str]
) -> None:
    _, gradients = loss_and_gradients(**WEIGHTS[term], **options)
    everything = names_with_gradient(jax.tree.map(np.ones_like, gradients))
    # MAE's positions are fixed.
    expected = {name for name in everything if name.split("/")[0] in trained} - {"encoder/pos_embed"}
    assert names_with_gradient(gradients) == expected


def test_gradient_through_the_extra_branches_changes_the_gradient_but_not_the_loss(
    loss_and_gradients: Callable,
) -> None:
    stopped, everywhere = (
        loss_and_gradients(**WEIGHTS["tcl"], freeze_encoder=True, tcl_gradient_everywhere=flag)
        for flag in (False, True)
    )
    np.testing.assert_allclose(stopped[0], everywhere[0], rtol=1e-6)
    kernels = [gradients["idm"]["latent_out"]["kernel"] for _, gradients in (stopped, everywhere)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-2 * np.abs(kernels[0]).max()


@pytest.mark.parametrize("everywhere", [False, True])
def test_the_gradient_of_tcl_equals_that_of_three_encoded_pairs(
    loss_and_gradients: Callable, make_como: MakeComo, como_params: Params, everywhere: bool
) -> None:
    model, batch = make_como(freeze_encoder=False), types.fake_frame_pairs()
    now, future, offset = batch.frames[:, 0], batch.frames[:, 1], batch.offset_frames[:, 0]

    @jax.jit
    def reference(params: Params) -> Params:
        def loss(params: Params) -> jax.Array:
            como = model.bind(params)
            pairs = [np.stack(pair, axis=1) for pair in ((now, future), (now, offset), (future, now))]
            forward, *extra = (como.encode(frames).reshape(len(now), -1) for frames in pairs)
            return losses.temporal_contrastive(forward, *(extra if everywhere else jax.lax.stop_gradient(extra)), 0.1)

        return jax.grad(loss)(params)

    options = {**WEIGHTS["tcl"], "freeze_encoder": False, "tcl_gradient_everywhere": everywhere}
    _, gradients = loss_and_gradients(**options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradients, reference(como_params))


def test_rematerialisation_leaves_loss_and_gradients_of_the_model_as_they_are(loss_and_gradients: Callable) -> None:
    options = {**WEIGHTS["tcl"], "freeze_encoder": False, "tcl_gradient_everywhere": True}
    plain, full = loss_and_gradients(**options), loss_and_gradients(**options, remat="full")
    np.testing.assert_allclose(plain[0], full[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), plain[1], full[1])
