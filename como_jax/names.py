"""Names that datasets and environments share; a module of its own since simulators start quicker without TFDS."""

from __future__ import annotations

DEFAULT_CAMERA = "image"
"""The camera of whatever has only one."""
