"""FLOP formulas against XLA's own count of the loss and its gradients."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from como_jax.errors import ConfigError
from como_jax.nn.model_def import merge_params
from como_jax.training import sharding
from como_jax.training.batches import DataSizes, abstract_batch, assumed_sizes
from como_jax.training.flops import train_flops
from como_jax.training.models import make_model, resolve

BATCH = 8


def recipe(name: str, **changes: Any) -> ConfigDict:
    """The full recipe with changes; keys have two underscores for a point."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return resolve(config, assumed_sizes(config, DataSizes()))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[ConfigDict], float]:
    """Counts FLOPs of a sample by XLA, which counts the body of a loop once, so that loops are written out."""
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))

    def count(config: ConfigDict) -> float:
        model = make_model(config)
        trained, frozen = model.partition(jax.eval_shape(model.init, jax.random.key(0)))

        def loss(trained: Any, frozen: Any, batch: Any) -> jax.Array:
            return model.bind(merge_params(trained, frozen)).loss(batch, jax.random.key(0)).total

        def flops(batch_size: int) -> float:
            config.data.batch_size = batch_size
            batch = abstract_batch(config, sharding.make_mesh(1, devices=jax.devices()[:1]))
            return jax.jit(jax.grad(loss)).lower(trained, frozen, batch).cost_analysis()["flops"]

        # What does not grow with the batch is no work of a sample.
        return (flops(2 * BATCH) - flops(BATCH)) / BATCH

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
        ("pretrain_como", SHALLOW),
        ("pretrain_mae", {"encoder__depth": 2, "model__decoder_depth": 2}),
        also("pretrain_como", {**SHALLOW, "model__perceptual_space": "encoder", **ALL_PAIRS_OF_THREE}),
        also("pretrain_continuous", {**SHALLOW, "encoder__frozen": False, "model__perceptual_weight": 0.0}),
        also("pretrain_laq", {"model__spatial_depth": 1, "model__temporal_depth": 2, "model__decoder_depth": 1}),
        also("policy_diffusion", {"encoder__depth": 2, "model__depth": 2, "text__depth": 1, "model__draws": 3}),
        also("policy_autoregressive", {"encoder__depth": 2, "model__depth": 2, "text__depth": 1}),
        also("policy_diffusion", {"encoder__tower": "conv", "encoder__pool": 1, "model__depth": 1, **CLIP}),
        also("policy_vla", {"encoder__depth": 1, "model__depth": 2}),
        also("policy_vla", {"encoder__depth": 1, "model__depth": 1, "model__text_weight": 0.0, **T5, **LORA}),
    ],
)
def test_the_formula_agrees_with_the_count_of_xla(
    counted: Callable[[ConfigDict], float], name: str, changes: dict[str, Any]
) -> None:
    config = recipe(name, **changes)
    assert sum(train_flops(config).values()) == pytest.approx(counted(config), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain_como", "pretrain_laq", "pretrain_mae", "policy_diffusion"])
def test_the_formula_agrees_for_the_full_recipes(counted: Callable[[ConfigDict], float], name: str) -> None:
    config = recipe(name)
    assert sum(train_flops(config).values()) == pytest.approx(counted(config), rel=0.05)


def test_a_pair_costs_what_was_worked_out_by_hand() -> None:
    parts = train_flops(recipe("pretrain_continuous", model__perceptual_weight=0.0))
    # 24 layers of 197 tokens, twice; 12 layers of 196 tokens, thrice.
    assert parts["encoder"] / 2e9 == pytest.approx(123.1, rel=0.001)
    assert parts["fdm"] / 3e9 == pytest.approx(35.1, rel=0.002)
    # All but the queries are left out of the last layer of the Q-former: 76 GFLOP with them.
    assert 60e9 < parts["idm"] < 61e9


def test_more_instants_share_the_encoder() -> None:
    two, four = (train_flops(recipe("pretrain_continuous", data__instants=count)) for count in (2, 4))
    assert four["encoder"] == 2 * two["encoder"]
    assert four["fdm"] == pytest.approx(3 * two["fdm"])


def test_a_family_without_formula_is_refused() -> None:
    config = recipe("pretrain_mae").unlock()
    config.family = "other"
    with pytest.raises(ConfigError, match="'other' has no FLOP formula; known are como"):
        train_flops(config)
