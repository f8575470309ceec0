"""The report on a compiled step, as text and as JSON."""

from __future__ import annotations

import collections
import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from como_jax.files import HLO_MARK, check_file_output, write_text
from como_jax.tpu.compiling import CompiledStep, DoesNotFitError, compile_step, largest, with_batch_per_chip
from como_jax.tpu.costs import Collective, collectives, hbm_bytes, matmul_flops
from como_jax.tpu.hlo import Module
from como_jax.tpu.roofline import StepTime, step_time
from como_jax.tpu.topology import GIB, Topology
from como_jax.training.batches import DataSizes
from como_jax.training.sharding import path_name
from como_jax.training.train_state import TrainState

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on one chip.

    Attributes:
      arguments: of state and batch.
      output: of the new state and the metrics.
      alias: of the part of the output that takes the place of an argument.
      temporaries: of activations and gradients, when they are most.
      code: of the program.
      chip: that the chip has, or None where its figures are not known.
    """

    arguments: int
    output: int
    alias: int
    temporaries: int
    code: int
    chip: int | None

    @property
    def total(self) -> int:
        """The most that is in use at once. A step that the compiler accepts fits, even if this exceeds the chip's."""
        return self.arguments + self.output - self.alias + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The exchanges of one kind in a step: how many there are, and the bytes that one chip moves."""

    kind: str
    count: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Report:
    """The figures of a compiled step. Figures are for one chip and one step.

    Attributes:
      topology, device: what the step was compiled for.
      mesh: sizes of the axes.
      batch_per_chip: samples.
      compile_seconds: time that compiling took.
      memory: use of HBM.
      whole: bytes of the parts of the state that every chip holds whole, by path, the largest first.
      flops: of matrix products and convolutions.
      hbm_bytes: bytes read and written.
      exchanges: by kind.
      largest_exchanges: the few that move most bytes, as text.
      time: the shortest possible time, or None where the chip's rates are not known.
      largest_batch_per_chip: the largest batch that fits, or None where it was not searched for.
    """

    topology: str
    device: str
    mesh: dict[str, int]
    batch_per_chip: float
    compile_seconds: float
    memory: Memory
    whole: Mapping[str, int]
    flops: float
    hbm_bytes: float
    exchanges: tuple[Exchange, ...]
    largest_exchanges: tuple[str, ...]
    time: StepTime | None
    largest_batch_per_chip: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns plain numbers, including those that follow from others."""
        found = dataclasses.asdict(self)
        found["memory"]["total"] = self.memory.total
        if self.time is not None:
            found["time"] |= {name: getattr(self.time, name) for name in ("predicted", "without_overlap", "bound")}
        return found


def analyze(config: ConfigDict, topology: Topology, sizes: DataSizes, hlo: str | None = None) -> Report:
    """Compiles the train step of a config for a slice, and reports on it.

    Args:
      config: of a recipe.
      topology: the slice.
      sizes: what a dataset would decide.
      hlo: file that gets the text of the compiled module, if any.

    Raises:
      DoesNotFitError: the step needs more memory than there is.
      OutputError: the file of `hlo` is not one of this project.
    """
    step = compile_step(config, topology, sizes)
    if hlo:
        check_file_output(hlo)
        write_text(hlo, HLO_MARK + step.compiled.as_text())
    return make_report(step, topology)


def search(config: ConfigDict, topology: Topology, sizes: DataSizes) -> Report:
    """Reports on the largest batch that fits; the search begins with the batch of the config.

    Raises:
      DoesNotFitError: not even one sample a chip fits.
    """
    chips, accumulation, reports = len(topology.devices), config.train.accumulation, {}

    def fits(per_pass: int) -> bool:
        per_chip = per_pass * accumulation
        try:
            reports[per_pass] = analyze(with_batch_per_chip(config, per_chip, chips), topology, sizes)
        except DoesNotFitError as error:
            logger.info("%d samples a chip: %s", per_chip, error)
            return False
        logger.info("%d samples a chip fit, compiled in %.0f s", per_chip, reports[per_pass].compile_seconds)
        return True

    best = largest(fits, config.data.batch_size // chips // accumulation)
    if not best:
        raise DoesNotFitError("not even one sample a chip fits; try mesh.fsdp=-1 or train.remat=full.")
    return dataclasses.replace(reports[best], largest_batch_per_chip=best * accumulation)


def make_report(step: CompiledStep, topology: Topology) -> Report:
    """Reads the figures out of the compiled module."""
    module = Module.parse(step.compiled.as_text())
    found, flops, traffic = collectives(module), matmul_flops(module), hbm_bytes(module)
    stats = step.compiled.memory_analysis()
    devices = list(step.mesh.devices.flat)
    return Report(
        topology=topology.name,
        device=topology.kind,
        mesh=dict(step.mesh.shape),
        batch_per_chip=step.config.data.batch_size / len(devices),
        compile_seconds=step.seconds,
        memory=Memory(
            arguments=stats.argument_size_in_bytes,
            output=stats.output_size_in_bytes,
            alias=stats.alias_size_in_bytes,
            temporaries=stats.temp_size_in_bytes,
            code=stats.generated_code_size_in_bytes,
            chip=topology.chip.hbm if topology.chip else None,
        ),
        whole=kept_whole(step.state),
        flops=flops,
        hbm_bytes=traffic,
        exchanges=_by_kind(found),
        largest_exchanges=tuple(_describe(item) for item in sorted(found, key=lambda x: -x.bytes * x.times)[:5]),
        time=step_time(topology, devices, flops, traffic, found),
    )


def format_report(report: Report) -> str:
    """The report as lines for a terminal."""
    memory, chips = report.memory, math.prod(report.mesh.values())
    mesh = ", ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    of_chip = f" of {memory.chip / GIB:.0f} GiB ({memory.total / memory.chip:.0%})" if memory.chip else ""
    if memory.chip and memory.total > memory.chip:
        of_chip += ", which the compiler accepts all the same"
    lines = [
        f"{report.topology}: {chips} x {report.device}, mesh {mesh}, {report.batch_per_chip:g} samples a chip "
        f"({report.batch_per_chip * chips:g} in all), compiled in {report.compile_seconds:.0f} s",
        f"HBM a chip: {memory.total / GIB:.2f}{of_chip}: arguments {memory.arguments / GIB:.2f}, temporaries "
        f"{memory.temporaries / GIB:.2f}, output {memory.output / GIB:.2f} of which {memory.alias / GIB:.2f} take the "
        f"place of arguments, program {memory.code / GIB:.2f}",
        *describe_whole(report.whole, report.mesh),
        f"Work a chip and step: {report.flops / 1e12:.3f} TFLOP in matrix products, {report.hbm_bytes / 1e9:.2f} GB to "
        "and from HBM",
        *(f"Exchange: {item.kind}, {item.count:g} runs, {item.bytes / 1e6:.1f} MB" for item in report.exchanges),
        *(f"  {text}" for text in report.largest_exchanges),
        _describe_time(report, chips),
    ]
    if report.largest_batch_per_chip is not None:
        lines.append(f"Largest batch that fits: {report.largest_batch_per_chip} samples a chip")
    return "\n".join(lines)


def kept_whole(state: TrainState) -> dict[str, int]:
    """Bytes of the parts of the state that every chip holds whole, by path, the largest first."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    found = {
        path_name(path): leaf.size * leaf.dtype.itemsize for path, leaf in leaves if leaf.sharding.is_fully_replicated
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def describe_whole(whole: Mapping[str, int], mesh: Mapping[str, int]) -> list[str]:
    """One line if the mesh splits parameters but leaves many of them whole, else none."""
    total, most = sum(whole.values()), next(iter(whole), "")
    if mesh["fsdp"] * mesh["tensor"] == 1 or total < GIB / 4:
        return []
    return [
        f"Not split: {total / GIB:.2f} GiB of the state, whose sizes are no multiples of fsdp={mesh['fsdp']} or "
        f"tensor={mesh['tensor']}, most of it {most}; a smaller mesh.fsdp may need less memory"
    ]


def _describe_time(report: Report, chips: int) -> str:
    time = report.time
    if time is None:
        return f"Step time: the rates of {report.device} are not known here"
    dcn = "DCN of unknown rate" if time.dcn is None else f"DCN {1e3 * time.dcn:.2f}"
    rate = report.batch_per_chip * chips / time.predicted
    return (
        f"Step time: {1e3 * time.predicted:.2f} ms at best, bound by {time.bound} ({rate:.0f} samples/s); compute "
        f"{1e3 * time.compute:.2f}, HBM {1e3 * time.hbm:.2f}, ICI {1e3 * time.ici:.2f}, {dcn}; "
        f"{1e3 * time.without_overlap:.2f} if nothing overlaps"
    )


def _by_kind(found: Sequence[Collective]) -> tuple[Exchange, ...]:
    count: collections.Counter[str] = collections.Counter()
    moved: collections.Counter[str] = collections.Counter()
    for item in found:
        count[item.kind] += item.times
        moved[item.kind] += item.times * item.bytes
    return tuple(Exchange(kind, count[kind], moved[kind]) for kind, _ in moved.most_common())


def _describe(item: Collective) -> str:
    shapes = ", ".join(f"{shape.dtype}{list(shape.dims)}" for shape in item.shapes[:3])
    more = f" and {len(item.shapes) - 3} more" if len(item.shapes) > 3 else ""
    return (
        f"{item.kind} of {shapes}{more} among {len(item.group) or 'all'}, {item.times:g} times "
        f"{item.bytes / 1e6:.1f} MB: {item.source or 'made by the compiler'}"
    )
