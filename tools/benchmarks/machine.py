"""Describes the machine that a measurement was made on."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import jax


def describe_machine() -> str:
    """Processor, devices and versions, in one line."""
    devices = jax.devices()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "flax", "numpy"))
    return f"{_processor()}, {os.cpu_count()} cores; {len(devices)} x {devices[0].device_kind}; {versions}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
