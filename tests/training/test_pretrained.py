"""What a fresh run of a policy takes from elsewhere."""

import logging
from collections.abc import Callable
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from flax import traverse_util

from como_jax.errors import RunError
from como_jax.motion.models import build_model
from como_jax.nn.model_def import Params
from como_jax.training import sharding
from como_jax.training.run import open_run
from como_jax.training.train_state import evaluation_params
from configs import pretrain_mae
from experiments.pretrain import pretrain
from experiments.train_policy import train_policy
from tests.everyday import mostly_slow
from tests.policies.smoke_policies import FAMILIES, PolicyRun, smoke, start

IMAGES = ("observation", "images")
VIT = {"encoder.tower": "vit", "encoder.frozen": True}


def flatten(params: Params) -> dict[tuple[str, ...], jax.Array]:
    return traverse_util.flatten_dict(params)


@pytest.fixture(scope="module")
def mae(tabletop_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of an MAE run, of another seed, since the encoders of equal seeds start equal."""
    config, workdir = pretrain_mae.get_config("smoke"), tmp_path_factory.mktemp("runs") / "mae"
    config.update_from_flattened_dict({"data.mixture": str(tabletop_dataset), "seed": 1, "train.stop_after": 2})
    pretrain(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def encoder(mae: Path) -> Params:
    """Its encoder."""
    return open_run(mae, sharding.make_mesh(), ("mae",), build_model, "is no MAE").params["encoder"]


@pytest.mark.slow
@pytest.mark.parametrize("frozen", mostly_slow([True, False], True))
@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "diffusion"))
def test_an_encoder_of_a_pretraining_run_takes_the_place_of_the_random_one_and_of_nothing_else(
    family: str, frozen: bool, mae: Path, encoder: Params, robot_dataset: Path, tmp_path: Path
) -> None:
    changes = {**VIT, "encoder.frozen": frozen}
    fresh = start(smoke(family, robot_dataset, **changes), tmp_path / "fresh")
    state = start(smoke(family, robot_dataset, **changes, **{"encoder.init_from": str(mae)}), tmp_path / "run")
    holder = state.frozen if frozen else state.params
    chex.assert_trees_all_equal(holder["observation"]["images"], encoder)
    assert ("images" in state.params["observation"]) != frozen
    chex.assert_trees_all_equal(state.ema, state.params)
    before, after = flatten(evaluation_params(fresh)), flatten(evaluation_params(state))
    changed = {path for path in after if not np.array_equal(after[path], before[path])}
    assert changed and all(path[:2] == IMAGES for path in changed)
    assert before.keys() == after.keys()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_that_was_taken_over_is_trained_on(
    family: str, mae: Path, encoder: Params, robot_dataset: Path, tmp_path: Path
) -> None:
    changes = {"encoder.tower": "vit", "encoder.init_from": str(mae), "train.stop_after": 3, "optim.warmup_steps": 0}
    # What starts as zero hides the encoder from the first two updates of diffusion.
    state = train_policy(smoke(family, robot_dataset, **changes), tmp_path / "run")
    images, average = (flatten(tree["observation"]["images"]) for tree in (state.params, state.ema))
    for path, start_value in flatten(encoder).items():
        # The average of a few steps lies between where they began and where they lead.
        assert np.abs(average[path] - start_value).max() <= np.abs(images[path] - start_value).max() + 1e-7
    assert max(float(np.abs(images[path] - value).max()) for path, value in flatten(encoder).items()) > 1e-5


@pytest.mark.slow
def test_an_encoder_of_other_sizes_is_refused(mae: Path, robot_dataset: Path, tmp_path: Path) -> None:
    config = smoke("diffusion", robot_dataset, **VIT, **{"encoder.init_from": str(mae), "encoder.width": 16})
    with pytest.raises(RunError, match=r"encoder/.* is \(.*\) there and \(.*\) here"):
        start(config, tmp_path / "run")


@pytest.mark.slow
def test_a_frozen_random_encoder_is_warned_of(
    mae: Path, policy_run: Callable[..., PolicyRun], robot_dataset: Path, tmp_path: Path, caplog
) -> None:
    policy = policy_run("diffusion", robot_dataset, **VIT, **{"train.stop_after": 1})
    for name, changes, expected in (
        ("random", VIT, 1),
        ("trained", {"encoder.tower": "vit"}, 0),
        ("mae", {**VIT, "encoder.init_from": str(mae)}, 0),
        ("policy", {**VIT, "init_from": str(policy.workdir)}, 0),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "como_jax"):
            start(smoke("diffusion", robot_dataset, **changes), tmp_path / name)
        assert sum("frozen encoder is random" in record.getMessage() for record in caplog.records) == expected, name


@pytest.mark.slow
def test_of_another_policy_what_fits_is_taken_and_the_rest_is_named(
    policy_run: Callable[..., PolicyRun], robot_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = policy_run("diffusion", robot_dataset, **VIT, **{"train.stop_after": 1})
    changes = {"data.chunk": 8, "data.proprioception": False, "encoder.tower": "vit"}
    with caplog.at_level(logging.INFO, "como_jax"):
        state = start(smoke("diffusion", robot_dataset, init_from=str(policy.workdir), **changes), tmp_path / "run")
    [line] = [record.getMessage() for record in caplog.records if "arrays loaded" in record.getMessage()]
    theirs, ours = flatten(evaluation_params(policy.state)), flatten(evaluation_params(state))
    fitting = [path for path in ours if path != ("step_embed",)]
    dropped = {path for path in theirs if path not in fitting}
    beginning, _, modules = line.partition(f", {len(dropped)} dropped ")
    assert beginning == f"From {policy.workdir}: {len(fitting)} arrays loaded, 1 new (step_embed)"
    assert set(modules.strip("()").split(", ")) == {"step_embed", "observation/state_proj", "observation/no_state"}
    for path in fitting:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=str(path))


@pytest.mark.slow
def test_a_policy_of_which_nothing_fits_is_refused(
    smoke_run: Callable[[str], Path], robot_dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="has no parameter of this model"):
        start(smoke("diffusion", robot_dataset, init_from=str(smoke_run("laq"))), tmp_path / "run")
