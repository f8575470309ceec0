"""Settings of dataset builders: each field is declared once, with its help, its default and its check."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from como_jax.errors import ConversionError

Check = Callable[[str, Any], None]
"""Gets the name and the value of a setting, and raises ConversionError if the value cannot be used."""


def setting(text: str, default: Any = dataclasses.MISSING, check: Check | None = None) -> Any:
    """Declares a field of `Settings`.

    Args:
      text: what the setting means, for the reader of the code and of the command's help.
      default: its value if it is not given; without a default it has to be given.
      check: is applied to every value but None.
    """
    return dataclasses.field(default=default, metadata={"help": text, "check": check})


def number(least: float, most: float = math.inf) -> Check:
    """Accepts numbers from `least` to `most`."""

    def check(name: str, value: float) -> None:
        if not (math.isfinite(value) and least <= value <= most):
            limits = f"be {least} or more" if most == math.inf else f"lie between {least} and {most}"
            raise ConversionError(f"{name} must {limits}, got {value}")

    return check


def positive(unit: str = "") -> Check:
    """Accepts finite numbers above 0; `unit` is added to the message."""

    def check(name: str, value: float) -> None:
        if not (math.isfinite(value) and value > 0):
            raise ConversionError(f"{name} must be a positive number{unit}, got {value}")

    return check


RATE = positive(" of steps per second (Hz)")


def check_control_rate(rate: float) -> None:
    """Raises ConversionError unless the control rate is a positive number of steps per second."""
    RATE("control_rate", rate)


def one_of(known: Sequence[str]) -> Check:
    """Accepts the values that are listed."""

    def check(name: str, value: str) -> None:
        if value not in known:
            raise ConversionError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    return check


def some_of(known: Sequence[str], may_be_empty: bool = True) -> Check:
    """Accepts tuples of different values that are listed."""

    def check(name: str, values: Sequence[str]) -> None:
        if not values and not may_be_empty:
            raise ConversionError(f"{name} must name one or more of {', '.join(known)}")
        if not set(values) <= set(known) or len(set(values)) < len(values):
            raise ConversionError(f"{name} must be different ones of {', '.join(known)}, got {', '.join(values)}")

    return check


def _share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConversionError(f"{name} must lie in [0, 1), got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What every builder can be asked for; each field is a flag of `tools.datasets.build`."""

    image_size: int = setting(
        "larger images are scaled down until their shorter side has this many pixels", 256, number(1)
    )
    validation_fraction: float = setting("share of the sources that becomes the split `val`", 0.1, _share)
    seed: int = setting("fixes everything that is drawn at random", 0)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, check = getattr(self, field.name), field.metadata.get("check")
            if value is not None and check is not None:
                check(field.name, value)
