"""The same training on any mesh, and meshes that do not fit."""

from collections.abc import Callable

import chex
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from como_jax.errors import MeshError
from como_jax.nn.model_def import merge_params
from como_jax.training import sharding
from tests.everyday import mostly_slow


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    mostly_slow([((8, 1, 1), 1), ((2, 2, 2), 2)], ((2, 2, 2), 2)),
)
def test_losses_and_parameters_equal_those_of_one_device(
    train: Callable, mesh: tuple[int, ...], accumulation: int
) -> None:
    reference, run = train(1, 1, 1), train(*mesh, accumulation=accumulation)
    np.testing.assert_allclose(run.losses, reference.losses, rtol=1e-5)
    for tree in ("params", "ema"):
        chex.assert_trees_all_close(getattr(run.state, tree), getattr(reference.state, tree), rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_a_codebook_is_the_same_on_any_mesh(train: Callable) -> None:
    reference, run = train(1, 1, 1, model="discrete"), train(2, 2, 2, model="discrete")
    np.testing.assert_allclose(run.losses, reference.losses, rtol=1e-4)
    found, expected = (
        merge_params(result.state.params, result.state.frozen)["bottleneck"] for result in (run, reference)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-4)
    usage = np.asarray(run.state.frozen["bottleneck"]["usage"])
    np.testing.assert_allclose(usage.sum(), 3.0, rtol=1e-5)
    assert reference.compilations == run.compilations == 1


def test_three_steps_change_every_trained_parameter_and_lower_the_loss(train: Callable) -> None:
    run = train(1, 1, 1)
    assert run.losses[2] < run.losses[0]
    assert int(run.state.step) == 3


@pytest.mark.parametrize(("mesh", "accumulation"), mostly_slow([((2, 4, 1), 1), ((2, 2, 2), 2)], ((2, 2, 2), 2)))
def test_moments_are_split_over_devices_like_their_parameters(
    train: Callable, mesh: tuple[int, ...], accumulation: int
) -> None:
    run = train(*mesh, accumulation=accumulation)
    specs = {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(run.state.params)}
    split = 0
    for path, moment in jax.tree_util.tree_leaves_with_path(run.state.opt_state):
        _, _, name = sharding.path_name(path).partition("/mu/")
        if name:
            assert moment.sharding.is_equivalent_to(specs[name].sharding, moment.ndim), name
            split += moment.addressable_shards[0].data.size < moment.size
    assert split >= 10


def test_a_split_kernel_takes_a_fraction_of_the_memory_on_every_device(train: Callable) -> None:
    kernel = train(2, 2, 2, accumulation=2).state.params["idm"]["blocks"]["layers"]["mlp"]["fc1"]["kernel"]
    assert kernel.shape == (2, 16, 64)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 8, 32)}


def test_the_sharding_of_the_state_stays_as_planned_while_training(train: Callable) -> None:
    run = train(2, 2, 2, accumulation=2)
    same = jax.tree.map(lambda x, plan: x.sharding.is_equivalent_to(plan.sharding, x.ndim), run.state, run.abstract)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("encoder/blocks/layers/attn/qkv/kernel", (2, 16, 3, 2, 8), (None, "fsdp", None, "tensor", None)),
        ("encoder/blocks/layers/attn/proj/kernel", (2, 2, 8, 16), (None, "tensor", None, "fsdp")),
        ("blocks/layers/cross_attn/q/kernel", (2, 16, 2, 8), (None, "fsdp", "tensor", None)),
        ("encoder/blocks/layers/mlp/fc2/kernel", (2, 64, 16), (None, "tensor", "fsdp")),
        ("idm/latent_out/kernel", (16, 3), ("fsdp", None)),
        ("idm/input_proj/kernel", (15, 16), (None, None)),  # 15 does not divide.
        ("encoder/norm/scale", (16,), ()),
        ("0/1/mu/fdm/head/kernel", (16, 192), ("fsdp", None)),
    ],
)
def test_a_parameter_is_split_by_its_path(
    mesh_of: Callable[..., Mesh], path: str, shape: tuple[int, ...], spec: tuple[str | None, ...]
) -> None:
    assert sharding.param_spec(path, shape, mesh_of(2, 2, 2)) == PartitionSpec(*spec)


def test_a_free_axis_takes_the_devices_that_are_left() -> None:
    assert dict(sharding.make_mesh(-1, 2, 2, devices=jax.devices()).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(sharding.make_mesh(devices=jax.devices()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (4, 4, 1)])
def test_a_mesh_that_does_not_fill_the_devices_is_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(MeshError, match=f"data={sizes[0]}, fsdp={sizes[1]}.* does not fit 8 devices"):
        sharding.make_mesh(*sizes, devices=jax.devices())


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 8, 1), (-2, 4, 1)])
def test_sizes_that_mean_nothing_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(MeshError, match="must be positive, and one at most may be -1"):
        sharding.make_mesh(*sizes, devices=jax.devices())


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_sizes(mesh_of: Callable[..., Mesh]) -> None:
    sharding.check_batch_size(mesh_of(2, 2, 2), batch_size=16, accumulation=2)
    with pytest.raises(MeshError, match="20 is not divisible by 4 devices x 2 .* are 16 and 24"):
        sharding.check_batch_size(mesh_of(2, 2, 2), batch_size=20, accumulation=2)
    with pytest.raises(MeshError, match="are 8 and 16"):
        sharding.check_batch_size(mesh_of(8, 1, 1), batch_size=3, accumulation=1)


def test_a_batch_is_split_over_data_and_fsdp(mesh_of: Callable[..., Mesh]) -> None:
    batch = sharding.shard_batch({"x": np.arange(8).reshape(8, 1)}, mesh_of(2, 2, 2))
    np.testing.assert_array_equal(batch["x"], np.arange(8).reshape(8, 1))
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 1)}
