"""Which parameters each loss term trains: a table."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import numpy as np
import pytest

from como_jax import types
from como_jax.motion import losses
from como_jax.nn.model_def import ModelDef, Params
from como_jax.spec.motion import BottleneckConfig
from tests.everyday import mostly_slow

MakeComo = Callable[..., ModelDef]

OFF = {"mse_weight": 0.0, "tcl_weight": 0.0}
MSE, TCL = {**OFF, "mse_weight": 1.0}, {**OFF, "tcl_weight": 1.0}
TRAINED, FROZEN = {"freeze_encoder": False}, {"freeze_encoder": True}
BODY = {"idm", "fdm"}
# What is on, the modules that it trains, and parts of them that it does not; all others get no gradient at all.
TABLE = {
    "mse": (MSE, BODY, set()),
    "mse, encoder trained": ({**MSE, **TRAINED}, BODY | {"encoder"}, set()),
    "mse of the future alone": ({**MSE, "motion_input": "future_only"}, BODY, set()),
    "mse of the pixel difference": ({**MSE, **TRAINED, "motion_input": "rgb_difference"}, BODY | {"encoder"}, set()),
    "mse as a probe": ({**MSE, **TRAINED, "pixel_probe": True}, {"fdm/head"}, set()),
    "tcl": ({**TCL, **FROZEN}, {"idm"}, set()),
    "tcl everywhere": ({**TCL, "tcl_gradient_everywhere": True}, {"idm"}, set()),
    "tcl, encoder trained": ({**TCL, **TRAINED}, {"encoder", "idm"}, set()),
    "tcl everywhere, encoder trained": (
        {**TCL, **TRAINED, "tcl_gradient_everywhere": True},
        {"encoder", "idm"},
        set(),
    ),
    "perceptual, the encoder's": ({**OFF, "perceptual_weight": 1.0, "perceptual_space": "encoder"}, BODY, set()),
    "features": ({**OFF, "feature_weight": 1.0}, BODY | {"feature_head"}, {"fdm/head"}),
    "feature differences": (
        {**OFF, "feature_weight": 1.0, "feature_target": "difference"},
        BODY | {"feature_head"},
        {"fdm/head"},
    ),
    "flow": ({**OFF, "flow_weight": 1.0}, BODY | {"flow_head"}, {"fdm/head"}),
    "gap": ({**OFF, "gap_weight": 1.0}, {"idm", "gap_head"}, set()),
    "labels": ({**OFF, "label_weight": 1.0, "label_size": 5}, {"idm", "label_head"}, set()),
    "mse through vq": ({**MSE, "bottleneck": BottleneckConfig("vq", 8)}, BODY | {"bottleneck/codebook"}, set()),
    "vq alone": ({**OFF, "bottleneck": BottleneckConfig("vq", 8)}, {"idm", "bottleneck/codebook"}, set()),
    "mse through vq_ema": ({**MSE, "bottleneck": BottleneckConfig("vq_ema", 8)}, BODY, set()),
    "mse through nsvq": ({**MSE, "bottleneck": BottleneckConfig("nsvq", 8)}, BODY | {"bottleneck/codebook"}, set()),
    "mse through fsq": ({**MSE, "bottleneck": BottleneckConfig("fsq", fsq_levels=(8, 5, 5))}, BODY, set()),
    "mse through kl": ({**MSE, "bottleneck": BottleneckConfig("kl")}, BODY, set()),
    "kl alone": ({**OFF, "bottleneck": BottleneckConfig("kl", kl_weight=1.0)}, {"idm"}, set()),
}
EVERYDAY = (
    "mse",
    "mse, encoder trained",
    "tcl",
    "mse through vq",
)


@pytest.fixture(scope="module")
def loss_and_gradients(make_como: MakeComo) -> Callable[..., tuple[float, Params]]:
    """Loss and gradients of all parameters, of the CoMo with the given options; each compiled once."""

    @functools.cache
    def run(**options: Any) -> tuple[float, Params]:
        model = make_como(**options)
        params = jax.jit(model.init)(jax.random.key(0))
        batch = types.fake_frame_pairs(flow=True, label_size=5)

        def loss(params: Params) -> jax.Array:
            return model.bind(params).loss(batch, jax.random.key(0)).total

        value, gradients = jax.jit(jax.value_and_grad(loss))(params)
        return float(value), jax.tree.map(np.asarray, gradients)

    return run


def names_with_gradient(gradients: Params) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    return {"/".join(key.key for key in path) for path, value in leaves if np.any(value)}


@pytest.mark.parametrize("row", mostly_slow(TABLE, *EVERYDAY))
def test_a_loss_term_trains_all_of_its_modules_and_no_other(loss_and_gradients: Callable, row: str) -> None:
    options, trained, spared = TABLE[row]
    _, gradients = loss_and_gradients(**options)
    everything = names_with_gradient(jax.tree.map(np.ones_like, gradients))

    def inside(name: str, modules: set[str]) -> bool:
        return any(f"{name}/".startswith(f"{module}/") for module in modules)

    # MAE's positions are fixed.
    expected = {name for name in everything if inside(name, trained) and not inside(name, spared)}
    assert names_with_gradient(gradients) == expected - {"encoder/pos_embed"}


@pytest.mark.slow
def test_the_perceptual_network_trains_the_decoder_and_stays_as_it_is(make_como: MakeComo) -> None:
    model = make_como(**OFF, perceptual_weight=1.0, perceptual_space="vgg16")
    params = jax.jit(model.init)(jax.random.key(0))
    batch = types.fake_frame_pairs(image_size=16)

    def loss(params: Params) -> jax.Array:
        return model.bind(params).loss(batch, jax.random.key(0)).total

    gradients = jax.jit(jax.grad(loss))(params)
    assert {name.split("/")[0] for name in names_with_gradient(gradients)} == BODY
    assert "perceptual" in model.partition(params)[1]


@pytest.mark.slow
def test_gradient_through_the_extra_branches_changes_the_gradient_but_not_the_loss(
    loss_and_gradients: Callable,
) -> None:
    stopped, everywhere = (
        loss_and_gradients(**TCL, freeze_encoder=True, tcl_gradient_everywhere=flag) for flag in (False, True)
    )
    np.testing.assert_allclose(stopped[0], everywhere[0], rtol=1e-6)
    kernels = [gradients["idm"]["latent_out"]["kernel"] for _, gradients in (stopped, everywhere)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-2 * np.abs(kernels[0]).max()


@pytest.mark.slow
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

    options = {**TCL, "freeze_encoder": False, "tcl_gradient_everywhere": everywhere}
    _, gradients = loss_and_gradients(**options)
    chex.assert_trees_all_close(gradients, reference(como_params), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_rematerialisation_leaves_loss_and_gradients_of_the_model_as_they_are(loss_and_gradients: Callable) -> None:
    options = {**TCL, "freeze_encoder": False, "tcl_gradient_everywhere": True}
    plain, full = loss_and_gradients(**options), loss_and_gradients(**options, remat="full")
    np.testing.assert_allclose(plain[0], full[0], rtol=1e-5)
    chex.assert_trees_all_close(plain[1], full[1], rtol=1e-3, atol=1e-5)
