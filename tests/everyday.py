"""Which of the parameters of a test are tried every day; the others are slow, and for `tools/test.sh --all`."""

from collections.abc import Iterable
from typing import Any

import pytest

SLOW = pytest.mark.slow


def mostly_slow(values: Iterable[Any], *everyday: Any) -> list[Any]:
    """The parameters, tuples where there are several, all of which but `everyday` are marked as slow."""
    values = list(values)
    assert all(value in values for value in everyday), f"{everyday} are not all of {values}"
    return [
        value if value in everyday else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=SLOW)
        for value in values
    ]
