"""The shortest time that a step can take: compute, memory and network each at its full rate."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import jax

from como_jax.tpu.costs import Collective
from como_jax.tpu.topology import Reach, Topology, reach


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds that a step needs of each resource of a chip.

    Attributes:
      compute: for matrix products at the peak rate of bfloat16.
      hbm: for reading and writing memory.
      ici: for exchanges within a slice.
      dcn: for exchanges between slices; None where the rate of the network is not known.
    """

    compute: float
    hbm: float
    ici: float
    dcn: float | None = 0.0

    @property
    def predicted(self) -> float:
        """The time if all work at once, so that the slowest decides."""
        return max(self._known.values())

    @property
    def without_overlap(self) -> float:
        """The time if one works after the other."""
        return sum(self._known.values())

    @property
    def bound(self) -> str:
        """The name of the slowest resource."""
        return max(self._known, key=self._known.__getitem__)

    @property
    def _known(self) -> dict[str, float]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def step_time(
    topology: Topology, devices: Sequence[jax.Device], flops: float, hbm_bytes: float, collectives: Sequence[Collective]
) -> StepTime | None:
    """The time for one device's share of a step; None where the rates of the chip are not known.

    Args:
      topology: of the slice.
      devices: in the order of the mesh, which numbers the groups of collectives.
      flops: of matrix products.
      hbm_bytes: read and written.
      collectives: of the step.
    """
    chip = topology.chip
    if chip is None:
        return None
    ici = dcn = 0.0
    permuted: collections.Counter[bool] = collections.Counter()
    for collective in collectives:
        group = [devices[place] for place in collective.group] or list(devices)
        if len(group) == 1:
            continue
        connected = reach(topology, group)
        if collective.kind == "collective-permute":
            # Sending to the next device and sending to the one before use different directions of the links.
            is_forward = collective.group[1] == collective.group[0] + 1
            permuted[is_forward] += collective.times * _ici_bytes(collective, connected)
        else:
            ici += collective.times * _ici_bytes(collective, connected)
        dcn += collective.times * _dcn_bytes(collective, connected)
    ici = (ici + max(permuted.values(), default=0.0)) / chip.link_bandwidth
    between = None if dcn and chip.between_slices is None else dcn / (chip.between_slices or 1)
    return StepTime(flops / chip.flops, hbm_bytes / chip.hbm_bandwidth, ici, between)


def _ici_bytes(collective: Collective, connected: Reach) -> float:
    """Bytes over the busiest link: rings along all axes share the work, and a closed ring runs in both directions."""
    count, links = connected.in_slice, connected.links
    if count == 1 or not links:
        return 0.0
    if collective.kind == "collective-permute":
        return collective.bytes
    share = collective.bytes * (count - 1) / count / links
    if collective.kind == "all-reduce":
        return 2 * share
    if collective.kind == "all-to-all":
        # A chip is, on average, a quarter of a ring away from another.
        return share * max(1.0, connected.longest / 4)
    return share


def _dcn_bytes(collective: Collective, connected: Reach) -> float:
    """Bytes that leave a slice, for each of its chips, which share the work."""
    if connected.slices == 1:
        return 0.0
    share = collective.bytes * (connected.slices - 1) / connected.slices / connected.in_slice
    return 2 * share if collective.kind == "all-reduce" else share
