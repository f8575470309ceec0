"""FLOPs of a sample against XLA's own count, and against what was worked out by hand."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from como_jax.training import flops
from como_jax.training.batches import DataSizes, assumed_sizes
from como_jax.training.flops import count_flops, train_flops


def recipe(name: str, **changes: Any) -> ConfigDict:
    """The full recipe with changes; keys have two underscores for a point."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    # Not those of public weights, which some of these configs have no file of.
    config.update_from_flattened_dict(assumed_sizes(config, DataSizes()))
    return config


@pytest.fixture
def counted_by_xla(monkeypatch: pytest.MonkeyPatch) -> Callable[[ConfigDict], float]:
    """Counts FLOPs of a sample by XLA, which counts the body of a loop once, so that loops are written out."""

    def count(config: ConfigDict) -> float:
        with monkeypatch.context() as patch:
            patch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
            patch.setattr(
                flops, "count_flops", lambda *args: jax.jit(args[0]).lower(*args[1:]).cost_analysis()["flops"]
            )
            return train_flops(config)

    return count


def also(*arguments: Any) -> Any:
    """A case that takes a while to trace."""
    return pytest.param(*arguments, marks=pytest.mark.slow)


TEXT = {"text__depth": 1, "text__mlp_width": 1024, "text__vocabulary_size": 99}
CLIP = {"text__tower": "clip", "text__activation": "quick_gelu", "text__frozen": False, **TEXT}
T5 = {"text__tower": "t5", "text__activation": "gated-gelu_new", **TEXT, "text__head_size": 48}
T5 |= {"text__relative_buckets": 32, "text__relative_distance": 128}
LORA = {"model__lora_rank": 16, "text__frozen": True, "encoder__frozen": True, "model__latent_head": "flow"}
ALL_PAIRS_OF_THREE = {"data__instants": 3, "data__pair_span": 2, "data__min_gap_fraction": 0.5}
SHALLOW = {"encoder__depth": 2, "model__idm_depth": 2, "model__fdm_depth": 2}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        also("pretrain_como", SHALLOW),
        ("pretrain_mae", {"encoder__depth": 2, "model__decoder_depth": 2}),
        also("pretrain_como", {**SHALLOW, "model__perceptual_space": "encoder", **ALL_PAIRS_OF_THREE}),
        also("pretrain_continuous", {**SHALLOW, "encoder__frozen": False, "model__perceptual_weight": 0.0}),
        also("pretrain_laq", {"model__spatial_depth": 1, "model__temporal_depth": 2, "model__decoder_depth": 1}),
        also("policy_diffusion", {"encoder__depth": 2, "model__depth": 2, "text__depth": 1, "model__draws": 3}),
        also("policy_autoregressive", {"encoder__depth": 2, "model__depth": 2, "text__depth": 1}),
        also("policy_diffusion", {"encoder__tower": "patch", "encoder__pool": 1, "model__depth": 1, **CLIP}),
        also("policy_vla", {"encoder__depth": 1, "model__depth": 2}),
        also("policy_vla", {"encoder__depth": 1, "model__depth": 1, "model__text_weight": 0.0, **T5, **LORA}),
    ],
)
def test_the_count_agrees_with_that_of_xla(
    counted_by_xla: Callable[[ConfigDict], float], name: str, changes: dict[str, Any]
) -> None:
    config = recipe(name, **changes)
    assert train_flops(config) == pytest.approx(counted_by_xla(config), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain_como", "pretrain_laq", "pretrain_mae", "policy_diffusion"])
def test_the_count_agrees_for_the_full_recipes(counted_by_xla: Callable[[ConfigDict], float], name: str) -> None:
    config = recipe(name)
    assert train_flops(config) == pytest.approx(counted_by_xla(config), rel=0.05)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_pair_costs_what_was_worked_out_by_hand(remat: str) -> None:
    counted = train_flops(recipe("pretrain_continuous", model__perceptual_weight=0.0, train__remat=remat))
    # Twice the 24 frozen layers of 197 tokens; thrice, with the backward pass, the 12 trained layers of 196 tokens. Of
    # the Q-former's last layer only the queries are computed, which saves 16 of 77 GFLOP.
    assert counted == pytest.approx(2 * 61.55e9 * 2 + 3 * 35.1e9 + 60.6e9, rel=0.01)


@pytest.mark.slow
def test_more_instants_share_the_encoder() -> None:
    changes = {"model__perceptual_weight": 0.0}
    two, three, four = (
        train_flops(recipe("pretrain_continuous", data__instants=count, **changes)) for count in (2, 3, 4)
    )
    assert four - three == pytest.approx(three - two)
    # One encoder and one pair less than twice as much.
    assert 123e9 < 2 * two - three < 124e9


@pytest.mark.parametrize(("stride", "kernel", "places"), [(1, 1, 4), (1, 3, 10), (2, 2, 4)])
def test_a_convolution_costs_what_its_kernel_touches_and_not_the_padding(stride: int, kernel: int, places: int) -> None:
    image, weights = jnp.zeros((5, 4, 4, 3)), jnp.zeros((kernel, kernel, 3, 7))
    numbers = ("NHWC", "HWIO", "NHWC")

    def convolve(image: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(image, weights, (stride, stride), "SAME", dimension_numbers=numbers)

    forward = 2 * 5 * places**2 * 3 * 7
    assert count_flops(convolve, image, weights) == forward
    gradient = jax.value_and_grad(lambda *inputs: convolve(*inputs).sum(), argnums=(0, 1))
    # The forward pass, and as much for the gradient of each.
    assert count_flops(gradient, image, weights) == 3 * forward


def test_what_nobody_reads_costs_nothing() -> None:
    def function(x: jax.Array) -> jax.Array:
        def body(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
            return (carry[0] @ x, carry[1] @ x @ x), None

        return jax.lax.scan(body, (x, x), length=3)[0][0]

    assert count_flops(function, jnp.ones((4, 4))) == 3 * 2 * 4**3


def test_a_loop_costs_as_often_as_it_runs() -> None:
    def function(x: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, length=6)
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert count_flops(jax.jit(function), jnp.ones((4, 4))) == (6 + 2) * 2 * 4**3
