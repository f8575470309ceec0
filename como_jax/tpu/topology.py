"""A TPU slice that need not exist: what its chips can do, its devices as the compiler knows them, and their links."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from como_jax.errors import UsageError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What Google publishes of one chip; rates are per second.

    Attributes:
      name: as in the names of topologies.
      hbm: bytes of memory.
      flops: peak rate of bfloat16 matrix products.
      hbm_bandwidth: bytes read from and written to memory.
      link_bandwidth: bytes in one direction of one link to a neighbour (ICI).
      axes: of the torus of chips; a chip has two links along each.
      full_ring: the two ends of an axis are joined where its number of chips is a multiple of this.
      between_slices: a chip's share of its host's network (DCN), in bytes in one direction, or None where unknown.
    """

    name: str
    hbm: int
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    axes: int
    full_ring: int
    between_slices: float | None


# Peak compute, capacity and bandwidth of HBM: https://cloud.google.com/tpu/docs/v4, and /v5e, /v5p and /v6e.
# Links: the same pages give v5e and v6e 400 and 800 GB/s in both directions of four ports together, and v5p 4800 Gbit/s
# in one direction of six; v4 has six of 50 GB/s (arXiv 2304.01433, table 4). Rings: axes of 16 chips of v5e and v6e,
# multiples of 4 of v4 and v5p. Between slices: 6.4 Tbit/s for the 256 chips of a v5e pod, 25.6 of v6e.
CHIPS = {
    "TPU v4": Chip("v4", 32 * GIB, 275e12, 1200e9, 50e9, axes=3, full_ring=4, between_slices=None),
    "TPU v5 lite": Chip("v5e", 16 * GIB, 197e12, 819e9, 50e9, axes=2, full_ring=16, between_slices=3.125e9),
    "TPU v5": Chip("v5p", 95 * GIB, 459e12, 2765e9, 100e9, axes=3, full_ring=4, between_slices=None),
    "TPU v6 lite": Chip("v6e", 32 * GIB, 918e12, 1638e9, 100e9, axes=2, full_ring=16, between_slices=12.5e9),
}
"""Chips by what JAX calls the kind of a device."""

# Without these, libtpu asks the host of a TPU for them, or complains.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class TopologyError(UsageError):
    """The compiler does not know the slice, or there is no compiler for TPUs."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or several slices.

    Attributes:
      name: such as "v5e:4x8".
      devices: of all slices.
      chip: what each device is, or None where its figures are not known.
    """

    name: str
    devices: tuple[jax.Device, ...]
    chip: Chip | None

    @property
    def kind(self) -> str:
        """What JAX calls the devices."""
        return self.devices[0].device_kind

    @property
    def shape(self) -> tuple[int, ...]:
        """Chips of one slice along each axis."""
        return tuple(max(axis) + 1 for axis in zip(*(device.coords for device in self.devices), strict=True))


def open_topology(name: str, num_slices: int = 1) -> Topology:
    """Returns the slice of that name, or several of them.

    Args:
      name: GENERATION:AxB or GENERATION:AxBxC, such as v5e:4x8 or v5p:4x4x4.
      num_slices: slices, connected by the network of the data centre.

    Raises:
      TopologyError: libtpu is not installed, or knows no such slice.
    """
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # As on a real v4, where one device is a chip of two cores.
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    if num_slices > 1:
        options["num_slices"] = num_slices
    try:
        devices = topologies.get_topology_desc(name, "tpu", **options).devices
    except RuntimeError as error:
        if "not installed" in str(error):
            raise TopologyError("Compiling for TPUs needs libtpu: pip install 'como_jax[tpu]'.") from error
        raise TopologyError(f"`topology` {name}: {str(error).splitlines()[0]}") from error
    return Topology(name, tuple(devices), CHIPS.get(devices[0].device_kind))


@dataclasses.dataclass(frozen=True)
class Reach:
    """How a group of devices is connected.

    Attributes:
      slices: number of slices that the group spans.
      in_slice: devices of the group in one slice.
      links: links of one device that lead along the axes that the group spans.
      longest: chips along the longest of these axes.
    """

    slices: int
    in_slice: int
    links: int
    longest: int


def reach(topology: Topology, group: Sequence[jax.Device]) -> Reach:
    """How devices that exchange something are connected."""
    # Only devices of several slices say which is theirs.
    slices = len({getattr(device, "slice_index", 0) for device in group})
    spans = [len(set(axis)) for axis in zip(*(device.coords for device in group), strict=True)]
    links = 0
    for span, size in zip(spans, topology.shape, strict=True):
        is_ring = span == size and topology.chip is not None and size % topology.chip.full_ring == 0
        links += 0 if span == 1 else 2 if is_ring else 1
    return Reach(slices, len(group) // slices, links, max(spans))
