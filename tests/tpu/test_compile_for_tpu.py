"""Train steps compiled for TPU slices that are not there."""

import dataclasses
import importlib
import importlib.util
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from como_jax.errors import MeshError
from como_jax.tpu import report as report_module
from como_jax.tpu.compiling import CompiledStep, DoesNotFitError, compile_step
from como_jax.tpu.costs import collectives
from como_jax.tpu.hlo import Module
from como_jax.tpu.report import Report, describe_whole, format_report, kept_whole, make_report
from como_jax.tpu.topology import Topology, TopologyError, open_topology
from como_jax.training import sharding
from como_jax.training.batches import DataSizes
from como_jax.training.flops import train_flops

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the compiler for TPUs, is not installed: [tpu]"
)


@pytest.fixture(scope="module", autouse=True)
def compiling_is_quick() -> Iterator[None]:
    """No test looks at what the compiler does to make a step fast, which takes it half of its time."""
    level = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O0")
    yield
    jax.config.update("jax_optimization_level", level)


# Samples a chip: no size of a model is a multiple of it, so that whatever is one has samples of a batch.
PER_CHIP = 11


class Compiled(NamedTuple):
    """A step and what is made of it."""

    step: CompiledStep
    module: Module
    report: Report


def recipe(name: str, variant: str = "", **changes: Any) -> ConfigDict:
    """A recipe with changes; keys have two underscores for a point."""
    config = importlib.import_module(f"configs.{name}").get_config(variant)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def compiled(config: ConfigDict, name: str) -> Compiled:
    topology = open_topology(name)
    config.data.batch_size = PER_CHIP * len(topology.devices)
    step = compile_step(config, topology, DataSizes())
    return Compiled(step, Module.parse(step.compiled.as_text()), make_report(step, topology))


# One test, since compiling takes long and tests run in several processes.
@needs_libtpu
@pytest.mark.slow
def test_a_train_step_for_a_slice_is_split_as_planned() -> None:
    found = compiled(recipe("pretrain_como", "", mesh__data=1, mesh__fsdp=-1, train__dtype="bfloat16"), "v5e:2x4")
    check_that_samples_stay(found.module)
    check_that_sums_are_in_float32(found.module)
    check_that_the_state_is_split(found)
    check_the_report(found)


def check_that_samples_stay(module: Module) -> None:
    """No chip gets activations of another."""
    exchanged = [(item.source, shape.dims) for item in collectives(module) for shape in item.shapes]
    assert exchanged
    assert not [(source, dims) for source, dims in exchanged if any(size % PER_CHIP == 0 for size in dims)]


def check_that_sums_are_in_float32(module: Module) -> None:
    """What chips add up, which is losses and gradients."""
    sums = [item for item in collectives(module) if item.kind in ("all-reduce", "reduce-scatter")]
    assert sums
    assert not [(item.source, shape) for item in sums for shape in item.shapes if shape.dtype == "bf16"]


def check_that_the_state_is_split(found: Compiled) -> None:
    """Arguments of the compiled program are parameters and moments as the table splits them."""
    chips, checked, split = found.step.mesh.size, 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(found.step.state):
        argument = found.module.parameters.get("state" + jax.tree_util.keystr(path))
        if argument is None:
            # What no loss reads is no argument.
            continue
        assert argument.dims == leaf.sharding.shard_shape(leaf.shape), path
        checked += 1
        split += math.prod(argument.dims) * chips == leaf.size
    assert checked > 100 and split > 40
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(found.step.state))
    # Vectors stay whole, and the batch is there too.
    assert found.report.memory.arguments < 1.5 * whole / chips + 20e6


def check_the_report(found: Compiled) -> None:
    """It says all, and that a chip computes its own samples alone."""
    report, chips = found.report, found.step.mesh.size
    assert report.flops == pytest.approx(PER_CHIP * train_flops(found.step.config), rel=0.03)
    text, figures = format_report(report), json.loads(json.dumps(report.to_json()))
    for word in (f"{chips} x TPU v5 lite", f"fsdp={chips}", f"11 samples a chip ({11 * chips} in all)", "HBM a chip"):
        assert word in text
    for word in ("of 16 GiB", "temporaries", "Exchange: all-gather", "Step time", "bound by", "ICI"):
        assert word in text
    memory, time = figures["memory"], figures["time"]
    in_use = memory["arguments"] + memory["output"] - memory["alias"] + memory["temporaries"] + memory["code"]
    assert memory["total"] == in_use < memory["chip"]
    assert time["predicted"] == max(time[name] for name in ("compute", "hbm", "ici"))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain_laq", "policy_diffusion", "policy_vla"])
def test_other_recipes_keep_their_samples_too(name: str) -> None:
    config = recipe(name, "smoke", mesh__data=2, mesh__fsdp=2, train__dtype="bfloat16")
    module = compiled(config, "v5e:2x2").module
    check_that_samples_stay(module)
    # LAQ's position bias is summed before it goes back through the layers that made it, whose products take bfloat16.
    if name != "pretrain_laq":
        check_that_sums_are_in_float32(module)


@needs_libtpu
def test_several_slices_share_the_data_axis_alone() -> None:
    devices = open_topology("v5e:2x2", num_slices=2).devices
    mesh = sharding.make_mesh(-1, 4, 1, devices=devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {1}]
    with pytest.raises(MeshError, match="data must be a multiple of the 2 slices"):
        sharding.make_mesh(1, -1, 1, devices=devices)


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:16x16", "v5p:4x4x4", "v6e:16x16"])
@pytest.mark.parametrize("sizes", [(-1, 64, 1), (-1, 8, 2), (1, -1, 4)])
def test_axes_of_a_mesh_need_not_be_those_of_the_torus(name: str, sizes: tuple[int, int, int]) -> None:
    devices = open_topology(name).devices
    mesh = sharding.make_mesh(*sizes, devices=devices)
    assert all(found == size for found, size in zip(mesh.devices.shape, sizes, strict=True) if size != -1)
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}


@needs_libtpu
def test_a_chip_of_two_cores_is_one_device() -> None:
    v4, v5p = open_topology("v4:2x2x2"), open_topology("v5p:2x2x2")
    assert [len(topology.devices) for topology in (v4, v5p)] == [8, 8]
    assert [topology.chip.name for topology in (v4, v5p)] == ["v4", "v5p"]
    assert v4.shape == (2, 2, 2)


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e-8", "abacus:2x2"])
def test_an_unknown_slice_is_refused(name: str) -> None:
    with pytest.raises(TopologyError, match=f"`topology` {name}: .*"):
        open_topology(name)


def test_without_a_compiler_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", missing)
    with pytest.raises(TopologyError, match=r"pip install 'como_jax\[tpu\]'"):
        open_topology("v5e:2x2")


def test_what_the_mesh_leaves_whole_is_named() -> None:
    mesh = sharding.make_mesh(data=1, fsdp=8, devices=jax.devices())
    shapes = {"uneven": (27, 1150, 4304), "even": (27, 1152, 4304)}
    state = {
        name: {"mlp": {"fc1": {"kernel": jax.ShapeDtypeStruct(shape, np.float32)}}} for name, shape in shapes.items()
    }
    split = jax.tree.map(lambda x, y: x.update(sharding=y), state, sharding.tree_shardings(state, mesh))
    whole = kept_whole(split)
    assert whole == {"uneven/mlp/fc1/kernel": 27 * 1150 * 4304 * 4}
    (line,) = describe_whole(whole, mesh.shape)
    assert "0.50 GiB" in line and "uneven/mlp/fc1/kernel" in line and "fsdp=8" in line
    assert not describe_whole(whole, sharding.make_mesh().shape)


def fake_report(per_chip: int) -> Report:
    return Report("v5e:2x2", "TPU v5 lite", {"data": 4}, per_chip, 0.0, None, {}, 0.0, 0.0, (), (), None)


def test_the_search_ends_with_the_report_of_the_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def analyze(config: ConfigDict, *_: Any) -> Report:
        per_chip = config.data.batch_size // 4
        if per_chip > 26:
            raise DoesNotFitError("too large")
        return fake_report(per_chip)

    monkeypatch.setattr(report_module, "analyze", analyze)
    topology = Topology("v5e:2x2", (None,) * 4, None)
    config = recipe("pretrain_como", "smoke", train__accumulation=2, data__batch_size=32)
    report = report_module.search(config, topology, DataSizes())
    assert report == dataclasses.replace(fake_report(26), largest_batch_per_chip=26)


def test_what_never_fits_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def analyze(*_: Any) -> Report:
        raise DoesNotFitError("too large")

    monkeypatch.setattr(report_module, "analyze", analyze)
    with pytest.raises(DoesNotFitError, match="not even one sample a chip fits; try mesh.fsdp=-1"):
        report_module.search(recipe("pretrain_como", "smoke"), Topology("v5e:2x2", (None,) * 4, None), DataSizes())
