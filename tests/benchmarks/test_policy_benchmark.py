"""The benchmark of policies: random data that fits a recipe, and times of all that it prints."""

from __future__ import annotations

import importlib
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from como_jax.policies.models import build_policy
from tools.benchmarks import policy as benchmark


def load(recipe: str) -> ConfigDict:
    """With towers that compile quickly."""
    config = importlib.import_module(f"configs.{recipe}").get_config("smoke")
    config.encoder.update({"tower": "patch", "frozen": False})
    config.text.tower = "embedding"
    return config


@pytest.mark.slow
def test_steps_of_both_kinds_of_training_are_timed() -> None:
    alone, both = benchmark.time_training(load("policy_diffusion"), num_steps=2)
    for timing in (alone, both):
        assert timing.wall.shape == timing.cpu.shape == (2,)
        # The first one compiles.
        assert timing.first > timing.wall.max() > 0
    lines = benchmark.describe_training(alone, both, batch_size=8)
    assert [line.partition(":")[0] for line in lines] == [
        "robot data alone",
        "co-trained",
        "rate of co-training beside robot data alone",
    ]


@pytest.mark.slow
def test_every_way_of_sampling_is_timed() -> None:
    found = dict(benchmark.time_sampling(load("policy_autoregressive"), (), batch_sizes=(1, 2), calls=2))
    assert list(found) == ["actions at once", "latent motion first"]
    row = benchmark.describe_sampling("latent motion first", *found["latent motion first"])
    assert row.startswith("| latent motion first | ") and row.count("|") == 6


def test_diffusion_is_sampled_in_every_number_of_steps_and_flow_in_the_recipe_s() -> None:
    config = benchmark.with_fake_sizes(load("policy_diffusion"), latents=True)
    ways = benchmark.ways_of_sampling(config, (1, 300))
    assert list(ways) == ["ddpm, steps: 1", "ddpm, steps: 300", "flow, steps: 2"]
    for changes in ways.values():
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        jax.eval_shape(build_policy(changed).init, jax.random.key(0))


def test_a_batch_of_robots_alone_is_as_large_and_all_robots() -> None:
    configs = [benchmark.with_fake_sizes(load("policy_diffusion"), latents=latents) for latents in (False, True)]
    alone, both = (benchmark.make_batch(config, 8) for config in configs)
    alone.check_shapes()
    both.check_shapes()
    assert alone.latent is None and alone.has_action.all() and alone.observation.has_state.all()
    np.testing.assert_array_equal(both.has_action.any(axis=(1, 2)), [True] * 4 + [False] * 4)
    np.testing.assert_array_equal(both.has_latent.any(axis=1), [False] * 4 + [True] * 4)
    assert alone.action.shape == both.action.shape


def test_sizes_that_a_recipe_sets_are_kept() -> None:
    config = load("policy_autoregressive")
    config.model.update({"action_size": 3, "codebook_size": 16, "latent_queries": 2})
    batch = benchmark.make_batch(benchmark.with_fake_sizes(config, latents=True), 4)
    batch.check_shapes()
    assert batch.action.shape[-1] == 3 and batch.codes.shape[-1] == 2 and batch.codes.max() < 16
    assert batch.observation.text is None and batch.observation.text_embedding.shape == (4, 512)


def test_functions_take_turns_and_the_first_times_do_not_count() -> None:
    order = []

    def first() -> None:
        order.append("first")
        time.sleep(0.05 if len(order) <= 2 else 0.0)

    timings = benchmark.time_in_turn([first, lambda: order.append("second")], count=2, warm_up=1)
    assert order == ["first", "second"] * 3
    assert timings[0].first >= 0.05 > timings[0].wall.max()
