"""Checkpoints that fit, that do not fit, and directories of other runs."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import chex
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from como_jax.errors import RunError
from como_jax.nn.model_def import ModelDef
from como_jax.training import checkpoint
from como_jax.training.checkpoint import Checkpointer
from como_jax.training.run import claim_workdir
from como_jax.training.train_state import TrainState, abstract_state, evaluation_params
from tests.training.conftest import OPTIMIZER


def make_iterator() -> grain.DatasetIterator:
    return iter(grain.MapDataset.range(10).seed(0).shuffle().repeat().to_iter_dataset())


@pytest.fixture(scope="module")
def plan(make_como: Callable[..., ModelDef], mesh_of: Callable[..., Mesh]) -> Callable[..., TrainState]:
    """Shapes and shardings of the state of a CoMo on a mesh of the given sizes."""
    model = make_como(freeze_encoder=False, tcl_weight=0.1)
    return lambda *sizes: abstract_state(model, OPTIMIZER, mesh_of(*sizes), use_ema=True)


def random_state(abstract: TrainState) -> TrainState:
    """A state in which all arrays differ."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding), abstract)


@pytest.fixture(scope="module")
def saved_run(plan: Callable[..., TrainState], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    """The workdir of a run on eight data-parallel devices, saved after four batches, and its state; only to be read."""
    workdir = tmp_path_factory.mktemp("saved")
    state, iterator = random_state(plan(8, 1, 1)), make_iterator()
    for _ in range(4):
        next(iterator)
    checkpointer = Checkpointer(workdir)
    checkpointer.save(3, state, iterator)
    checkpointer.close()
    return workdir, state


def test_a_state_comes_back_exactly_on_another_mesh_with_its_data_position(
    saved_run: tuple[Path, TrainState], plan: Callable[..., TrainState]
) -> None:
    (workdir, state), abstract, iterator = saved_run, plan(2, 4, 1), make_iterator()
    checkpointer = Checkpointer(workdir)
    assert checkpointer.latest_step() == 3
    restored = checkpointer.restore(abstract, iterator)
    checkpointer.close()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    chex.assert_trees_all_equal(restored, state)
    same = jax.tree.map(lambda x, plan: x.sharding.is_equivalent_to(plan.sharding, x.ndim), restored, abstract)
    assert all(jax.tree.leaves(same))
    expected = make_iterator()
    assert next(iterator) == [next(expected) for _ in range(5)][-1]


def test_a_checkpoint_of_another_model_is_refused_with_the_parameter(
    saved_run: tuple[Path, TrainState], make_como: Callable[..., ModelDef], mesh_of: Callable[..., Mesh]
) -> None:
    other = make_como(freeze_encoder=False, latent_dim=5)
    abstract = abstract_state(other, optax.sgd(0.1), mesh_of(1, 1, 1), use_ema=False)
    checkpointer = Checkpointer(saved_run[0])
    with pytest.raises(RunError, match=r"idm/latent_out/.* there and \(.*5.*\) here"):
        checkpointer.restore(abstract, make_iterator())
    checkpointer.close()


def test_a_part_of_a_run_is_loaded_from_its_moving_average(saved_run: tuple[Path, TrainState]) -> None:
    workdir, state = saved_run
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), {"encoder": state.params["encoder"]})
    loaded = checkpoint.load_params(workdir, wanted)
    assert set(loaded) == {"encoder"}
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(loaded)} == {1}
    chex.assert_trees_all_equal(loaded["encoder"], state.ema["encoder"])


def test_a_part_of_a_run_is_loaded_onto_the_mesh_of_the_reader(
    saved_run: tuple[Path, TrainState], plan: Callable[..., TrainState]
) -> None:
    for wanted in (plan(2, 4, 1).params["idm"], random_state(plan(1, 1, 1)).params["idm"]):
        loaded = checkpoint.load_params(saved_run[0], {"idm": wanted})["idm"]
        same = jax.tree.map(lambda x, plan: x.sharding.is_equivalent_to(plan.sharding, x.ndim), loaded, wanted)
        assert all(jax.tree.leaves(same))


def test_a_part_that_the_run_lacks_is_named(saved_run: tuple[Path, TrainState]) -> None:
    wanted = {"encoder": {"extra": {"kernel": jnp.zeros(3)}}}
    with pytest.raises(RunError, match=r"encoder/extra/kernel is missing there and \(3,\) here"):
        checkpoint.load_params(saved_run[0], wanted)


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        checkpoint.load_params(tmp_path, {})


def test_items_of_a_list_are_loaded_by_their_numbers(tmp_path: Path) -> None:
    params = {"convs": {number: {"kernel": jnp.full(2, float(number))} for number in range(3)}}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, TrainState(jnp.int32(1), params, {}, (), None), make_iterator())
    checkpointer.close()
    wanted = {"convs": {number: params["convs"][number] for number in (0, 2)}}
    for loaded in (checkpoint.load_params(tmp_path, wanted), checkpoint.load_matching_params(tmp_path, wanted).params):
        assert jax.tree.structure(loaded) == jax.tree.structure(wanted)
        chex.assert_trees_all_equal(loaded, wanted)
    assert checkpoint.load_matching_params(tmp_path, wanted).dropped == ("convs/1/kernel",)


def test_old_checkpoints_are_dropped(tmp_path: Path) -> None:
    state = TrainState(jnp.zeros((), jnp.int32), {"w": jnp.zeros(2)}, {}, (), None)
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpointer.save(step, dataclasses.replace(state, step=jnp.int32(step)), make_iterator())
    checkpointer.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()) == ["2", "3"]


@pytest.fixture
def config() -> ConfigDict:
    train, data = {"num_steps": 10, "log_every": 1}, {"num_threads": 2, "num_workers": 0}
    return ConfigDict(
        {"family": "como", "model": {"latent_dim": 16}, "train": train, "data": data, "mesh": {"fsdp": 1}}
    )


def test_a_new_directory_gets_the_config(tmp_path: Path, config: ConfigDict) -> None:
    claim_workdir(tmp_path / "new" / "run", config)
    assert json.loads((tmp_path / "new" / "run" / "config.json").read_text()) == config.to_dict()


def test_a_directory_of_another_config_is_refused_with_every_differing_field(
    tmp_path: Path, config: ConfigDict
) -> None:
    claim_workdir(tmp_path, config)
    config.model.latent_dim, config.train.num_steps = 32, 20
    with pytest.raises(RunError, match="config.model.latent_dim was 16 and is 32; config.train.num_steps was 10"):
        claim_workdir(tmp_path, config)


def test_fields_that_change_no_result_may_differ(tmp_path: Path, config: ConfigDict) -> None:
    claim_workdir(tmp_path, config)
    config.train.log_every, config.mesh.fsdp, config.data.num_threads = 50, 8, 16
    claim_workdir(tmp_path, config)


def test_the_number_of_workers_may_not_differ_since_the_iterator_is_saved_for_it(
    tmp_path: Path, config: ConfigDict
) -> None:
    claim_workdir(tmp_path, config)
    config.data.num_workers = 2
    with pytest.raises(RunError, match="config.data.num_workers was 0 and is 2"):
        claim_workdir(tmp_path, config)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path, config: ConfigDict) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot be written"):
        claim_workdir(tmp_path / "file" / "run", config)


def test_what_fits_of_another_model_is_loaded_and_the_rest_is_named(
    saved_run: tuple[Path, TrainState], make_como: Callable[..., ModelDef]
) -> None:
    (workdir, state), other = saved_run, make_como(freeze_encoder=False, latent_dim=5, gap_weight=0.1)
    abstract = jax.eval_shape(other.init, jax.random.key(0))
    matched = checkpoint.load_matching_params(workdir, abstract)
    saved, wanted, loaded = (
        traverse_util.flatten_dict(tree, sep="/") for tree in (state.ema, abstract, matched.params)
    )
    fits = {name for name in wanted if name in saved and wanted[name].shape == saved[name].shape}
    assert set(loaded) == fits and "idm/latent_out/kernel" not in fits
    for name, value in loaded.items():
        np.testing.assert_array_equal(value, saved[name], err_msg=name)
    assert set(matched.new) == set(wanted) - fits and set(matched.dropped) == set(saved) - fits
    new = {name for name in wanted if name not in saved}
    assert new and new <= set(matched.new) and "idm/latent_out/kernel" in matched.dropped
    line = matched.describe()
    assert line.startswith(f"{len(fits)} arrays loaded, {len(matched.new)} new (")
    assert f"{len(matched.dropped)} dropped (" in line and line.count("idm/latent_out") == 2


def test_a_model_that_has_all_is_loaded_whole(saved_run: tuple[Path, TrainState]) -> None:
    workdir, state = saved_run
    matched = checkpoint.load_matching_params(workdir, evaluation_params(state))
    assert (matched.new, matched.dropped) == ((), ())
    assert matched.describe() == f"{len(jax.tree.leaves(matched.params))} arrays loaded, 0 new, 0 dropped"
    chex.assert_trees_all_equal(matched.params, evaluation_params(state))


def test_a_run_of_which_nothing_fits_is_refused(saved_run: tuple[Path, TrainState]) -> None:
    with pytest.raises(RunError, match="has no parameter of this model"):
        checkpoint.load_matching_params(saved_run[0], {"encoder": {"norm": {"scale": jnp.zeros(7)}}})
    with pytest.raises(RunError, match="holds no run"):
        checkpoint.load_matching_params(saved_run[0] / "nowhere", {"w": jnp.zeros(2)})
