"""What TPU chips can do, as Google publishes it."""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip; rates are per second.

    Attributes:
      name: as in topologies.
      hbm: bytes of memory.
      flops: peak of bfloat16 matrix products.
      hbm_bandwidth: bytes to and from memory.
      link_bandwidth: bytes in one direction of one link to a neighbour (ICI).
      axes: of the torus of chips; two links along each.
      full_ring: chips along an axis, or a number of which they must be a multiple, from which on its ends are joined.
      between_slices: bytes in one direction, of a chip's share of its host's network (DCN), or None where unknown.
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
"""By the kind that JAX gives of a device."""
