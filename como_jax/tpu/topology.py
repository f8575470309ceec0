"""A TPU slice that need not exist: its devices, as the compiler knows them, and how they are connected."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from como_jax.errors import UsageError
from como_jax.tpu.chips import CHIPS, Chip

# What libtpu would otherwise ask of a TPU's host, or complain about.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class TopologyError(UsageError):
    """A slice that the compiler does not know, or no compiler for TPUs."""


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
    """The slice of that name, or several of them.

    Args:
      name: GENERATION:AxB or GENERATION:AxBxC, such as v5e:4x8 or v5p:4x4x4.
      num_slices: connected by the data centre's network.

    Raises:
      TopologyError: libtpu is not installed, or knows no such slice.
    """
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # On a real v4, too, a device is a chip of two cores.
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    if num_slices > 1:
        options["num_slices"] = num_slices
    try:
        devices = topologies.get_topology_desc(name, "tpu", **options).devices
    except RuntimeError as error:
        if "not installed" in str(error):
            raise TopologyError("Compiling for TPUs needs libtpu: pip install 'como_jax[tpu]'.") from error
        raise TopologyError(f"--topology {name}: {str(error).splitlines()[0]}") from error
    return Topology(name, tuple(devices), CHIPS.get(devices[0].device_kind))


@dataclasses.dataclass(frozen=True)
class Reach:
    """How a group of devices is connected.

    Attributes:
      slices: that it spans.
      in_slice: its devices in one slice.
      links: of each of them that lead along the axes of its slice that the group spans.
      longest: chips along the longest of these axes.
    """

    slices: int
    in_slice: int
    links: int
    longest: int


def reach(topology: Topology, group: Sequence[jax.Device]) -> Reach:
    """Of devices that exchange something."""
    # Only devices of several slices say which is theirs.
    slices = len({getattr(device, "slice_index", 0) for device in group})
    spans = [len(set(axis)) for axis in zip(*(device.coords for device in group), strict=True)]
    links = 0
    for span, size in zip(spans, topology.shape, strict=True):
        is_ring = span == size and topology.chip is not None and size % topology.chip.full_ring == 0
        links += 0 if span == 1 else 2 if is_ring else 1
    return Reach(slices, len(group) // slices, links, max(spans))
