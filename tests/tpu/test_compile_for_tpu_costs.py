"""What is read out of the text of a compiled module."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from como_jax.tpu.compiling import largest
from como_jax.tpu.costs import Collective, Window, collectives, hbm_bytes, matmul_flops
from como_jax.tpu.hlo import Module, Shape
from como_jax.tpu.roofline import step_time
from como_jax.tpu.topology import CHIPS, Topology, reach

TEXT = """\
HloModule jit_step_fn, is_scheduled=true, num_partitions=8

%fused (param_0: bf16[6,4,8], param_1: s32[], param_2: bf16[16,4]) -> (bf16[16,8], bf16[4,8]) {
  %param_0 = bf16[6,4,8]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)S(6)} parameter(1)
  %slice = bf16[1,4,8]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0, %param_1), dynamic_slice_sizes={1,4,8}
  %weights = bf16[4,8]{1,0:T(8,128)(2,1)} bitcast(%slice)
  %param_2 = bf16[16,4]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %product = bf16[16,8]{1,0:T(8,128)(2,1)} convolution(%param_2, %weights), dim_labels=bf_io->bf
  %gathered.1 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%weights), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %both = (bf16[16,8]{1,0:T(8,128)(2,1)}, bf16[4,8]{1,0}) tuple(%product, /*index=1*/%gathered.1)
}

%body (carry: (s32[], bf16[6,4,8], bf16[16,4])) -> (s32[], bf16[6,4,8], bf16[16,4]) {
  %carry = (s32[]{:T(128)}, bf16[6,4,8]{2,1,0}, bf16[16,4]{1,0:S(1)}) parameter(0)
  %round = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %stack = bf16[6,4,8]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %x = bf16[16,4]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carry), index=2
  %first = (bf16[16,8]{1,0:T(8,128)(2,1)}, bf16[4,8]{1,0}) fusion(%stack, %round, %x), kind=kOutput, calls=%fused
  %second = (bf16[16,8]{1,0:T(8,128)(2,1)S(1)}, bf16[4,8]{1,0}) fusion(%stack, %round, %x), kind=kOutput, calls=%fused
  %two = s32[]{:T(128)} constant(2)
  %after = s32[]{:T(128)} add(%round, %two)
  ROOT %next = (s32[]{:T(128)}, bf16[6,4,8]{2,1,0}, bf16[16,4]{1,0:S(1)}) tuple(%after, %stack, %x)
}

%condition (carry: (s32[], bf16[6,4,8], bf16[16,4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(12)
  %carry = (s32[]{:T(128)}, bf16[6,4,8]{2,1,0}, bf16[16,4]{1,0:S(1)}) parameter(0)
  %round = s32[]{:T(128)} get-tuple-element(%carry), index=0
  ROOT %go = pred[]{:T(512)} compare(%round, %bound), direction=LT
}

ENTRY %main (param.0: f32[32], param.1: bf16[6,4,8]) -> f32[32] {
  %param.0 = f32[32]{0:T(128)} parameter(0), metadata={op_name="state.params[\\'idm\\'][\\'bias\\']"}
  %param.1 = bf16[6,4,8]{2,1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="batch.frames"}
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[6,4,8]{2,1,0}, bf16[16,4]{1,0:S(1)}) tuple(%zero, %param.1, %param.1)
  %loop = (s32[]{:T(128)}, bf16[6,4,8]{2,1,0}, bf16[16,4]{1,0:S(1)}) while(%start), condition=%condition, body=%body
  %move-start = (f32[32]{0:T(128)S(1)}, f32[32]{0:T(128)}, u32[]{:S(2)}) copy-start(%param.0)
  %move-done = f32[32]{0:T(128)S(1)} copy-done(%move-start)
  ROOT %sum = f32[32]{0:T(128)} all-reduce(%move-done), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%add, \
metadata={op_name="jit(step_fn)/add"}
}
"""


COUNTING = 3 * 4 + 2 * 4
"""Bytes of a round for the loop's counter: two numbers added, and both fusions told the sum before."""


@pytest.fixture(scope="module")
def module() -> Module:
    return Module.parse(TEXT)


def test_the_body_of_a_loop_runs_from_start_to_bound_by_steps(module: Module) -> None:
    assert [(len(computation), times) for computation, times in module.executed()] == [(8, 1), (9, 6)]
    later = Module.parse(TEXT.replace("%zero = s32[]{:T(128)} constant(0)", "%zero = s32[]{:T(128)} constant(3)"))
    assert [times for _, times in later.executed()] == [1, 5]


def test_a_bound_that_is_not_seen_counts_once() -> None:
    unknown = Module.parse(TEXT.replace("direction=LT", "direction=NE"))
    assert [times for _, times in unknown.executed()] == [1, 1]


def test_arguments_have_the_names_and_the_shapes_of_one_device(module: Module) -> None:
    assert module.parameters == {
        "state.params['idm']['bias']": Shape("f32", (32,)),
        "batch.frames": Shape("bf16", (6, 4, 8)),
    }


def test_matrix_products_of_a_loop_count_every_time(module: Module) -> None:
    assert matmul_flops(module) == 6 * 2 * (2 * 16 * 4 * 8)


def test_memory_traffic_is_of_slices_and_of_what_is_not_on_the_chip(module: Module) -> None:
    # A fusion reads one slice of the stack and the round's number; only the first one's product goes to HBM.
    # What is exchanged while it computes is not its own. The copy onto the chip reads, the sum of it writes.
    assert hbm_bytes(module) == 6 * (2 * 64 + 16 * 8 * 2 + COUNTING) + 128 + 128


def test_an_exchange_in_several_fusions_is_one(module: Module) -> None:
    gather, reduce = sorted(collectives(module), key=lambda item: item.kind)
    assert (gather.kind, gather.bytes, gather.group, gather.times) == ("all-gather", 64, (0, 1, 2, 3), 6)
    assert (reduce.kind, reduce.bytes, reduce.group, reduce.times) == ("all-reduce", 128, (0, 1, 2, 3), 1)
    assert reduce.source == "jit(step_fn)/add"


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", (0, 4)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=mesh['x'=2,'y'=2,'z'=2] {'x', 'z'}", (0, 1, 4, 5)),
        ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", (0, 4)),
    ],
)
def test_groups_are_read_in_all_notations(attributes: str, group: tuple[int, ...]) -> None:
    text = TEXT.replace("replica_groups=mesh['a'=2,'b'=4] {'b'}", attributes)
    assert {item.kind: item.group for item in collectives(Module.parse(text))}["all-reduce"] == group


def test_text_without_an_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        Module.parse("HloModule empty\n")


@pytest.mark.parametrize("shape", [(3, 5, 5, 4), (2, 8, 6, 3)])
def test_a_convolution_counts_as_xla_counts_it(shape: tuple[int, ...]) -> None:
    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        padding, names = ((1, 2), (0, 3)), ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (2, 1), padding, lhs_dilation=(1, 2), dimension_numbers=names)

    compiled = jax.jit(convolve).lower(jnp.zeros(shape), jnp.zeros((3, 3, shape[-1], 7))).compile()
    assert matmul_flops(Module.parse(compiled.as_text())) == compiled.cost_analysis()["flops"]


def test_a_matrix_product_counts_as_xla_counts_it() -> None:
    product = jax.jit(lambda a, b: jnp.einsum("bij,bjk->bik", a, b))
    compiled = product.lower(jnp.zeros((2, 3, 5)), jnp.zeros((2, 5, 7))).compile()
    assert matmul_flops(Module.parse(compiled.as_text())) == 2 * 2 * 3 * 5 * 7


def test_holes_of_a_batched_product_are_no_work() -> None:
    # 48 x 2 products as TPUs write them: a convolution over 48 x 2 places with holes between them.
    rows, columns = Window(size=48, stride=47, lhs_dilate=48), Window(size=2, stride=1, lhs_dilate=2)
    assert rows.products(48, 48) == 48
    assert columns.products(2, 2) == 2


@dataclasses.dataclass(frozen=True)
class FakeChip:
    """What a topology says of a device."""

    coords: tuple[int, ...]
    slice_index: int = 0
    device_kind: str = "TPU v5 lite"


def slice_of(rows: int, columns: int, num_slices: int = 1) -> Topology:
    """A v5e that needs no compiler."""
    chips = [
        FakeChip((row, column, 0), number)
        for number in range(num_slices)
        for row in range(rows)
        for column in range(columns)
    ]
    return Topology(f"v5e:{rows}x{columns}", tuple(chips), CHIPS["TPU v5 lite"])


def test_groups_use_the_links_along_the_axes_that_they_span() -> None:
    topology = slice_of(4, 16)
    everyone, row, column = topology.devices, topology.devices[:16], topology.devices[::16]
    # 16 chips in a row close a ring, 4 do not.
    assert [reach(topology, group).links for group in (everyone, row, column, row[:2])] == [3, 2, 1, 1]


def test_time_is_that_of_the_slowest_part() -> None:
    topology = slice_of(4, 16)
    gather = Collective("all-gather", 1.6e9, tuple(range(16)), 2, (), "")
    time = step_time(topology, topology.devices, flops=197e12, hbm_bytes=0.819e9, collectives=[gather])
    np.testing.assert_allclose([time.compute, time.hbm, time.ici, time.dcn], [1.0, 1e-3, 0.03, 0.0])
    assert (time.predicted, time.bound) == (1.0, "compute")
    assert time.without_overlap == pytest.approx(1.031)


def test_permutations_in_both_directions_of_a_ring_overlap() -> None:
    topology = slice_of(1, 16)
    on, back = (Collective("collective-permute", 50e9, group, 1, (), "") for group in ((0, 1), (0, 15)))
    assert step_time(topology, topology.devices, 0.0, 0.0, [on, back]).ici == pytest.approx(1.0)
    assert step_time(topology, topology.devices, 0.0, 0.0, [on, on]).ici == pytest.approx(2.0)


def test_sums_over_slices_cross_the_network_once_for_every_chip() -> None:
    topology = slice_of(1, 16, num_slices=2)
    reduce = Collective("all-reduce", 1.6e9, tuple(range(32)), 1, (), "")
    time = step_time(topology, topology.devices, 0.0, 0.0, [reduce])
    assert time.ici == pytest.approx(2 * 1.6e9 * 15 / 16 / 2 / 50e9)
    assert time.dcn == pytest.approx(2 * 1.6e9 / 2 / 16 / 3.125e9)
    unknown = dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, between_slices=None))
    assert step_time(unknown, topology.devices, 0.0, 0.0, [reduce]).dcn is None


def test_rates_of_an_unknown_chip_give_no_time() -> None:
    topology = dataclasses.replace(slice_of(1, 2), chip=None)
    assert step_time(topology, topology.devices, 1.0, 1.0, []) is None


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 31, 32, 33, 100])
@pytest.mark.parametrize("first", [1, 8, 200])
def test_the_search_ends_close_below_the_limit(limit: int, first: int) -> None:
    trials = []

    def fits(number: int) -> bool:
        trials.append(number)
        return number <= limit

    found = largest(fits, first)
    assert found <= limit < found + max(1, found // 8) + 1
    assert len(trials) == len(set(trials)) <= 12


def test_figures_of_chips_are_those_of_whole_pods() -> None:
    # As published of pods of 256 chips: 50.63 and 234.9 PFLOP/s, 51.2 and 102.4 TB/s in sums over all.
    v5e, v6e = CHIPS["TPU v5 lite"], CHIPS["TPU v6 lite"]
    assert 256 * v5e.flops == pytest.approx(50.63e15, rel=0.005)
    assert 256 * v6e.flops == pytest.approx(234.9e15, rel=0.005)
    assert [256 * 2 * chip.axes * chip.link_bandwidth for chip in (v5e, v6e)] == [51.2e12, 102.4e12]
