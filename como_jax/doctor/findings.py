"""What the doctor says about a dataset."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

_MAX_NAMED = 4


class Severity(enum.StrEnum):
    """How bad a finding is: errors make a part of the data useless, warnings harm training without being noticed."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One fault or peculiarity.

    Attributes:
      severity: how bad it is.
      name: name of this kind of finding, the same in every run.
      message: one sentence that says what it is.
      advice: one sentence that says what to do.
    """

    severity: Severity
    name: str
    message: str
    advice: str


def info(name: str, message: str, advice: str) -> Finding:
    """Something that is good to know."""
    return Finding(Severity.INFO, name, message, advice)


def warning(name: str, message: str, advice: str) -> Finding:
    """Something that harms training without being noticed."""
    return Finding(Severity.WARNING, name, message, advice)


def error(name: str, message: str, advice: str) -> Finding:
    """Something that makes a part of the data useless."""
    return Finding(Severity.ERROR, name, message, advice)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A part of the dataset that could not be read."""

    source: str
    reason: str


def name_some(names: Sequence[object]) -> str:
    """Lists the first few names, and says how many more there are."""
    shown = ", ".join(str(name) for name in names[:_MAX_NAMED])
    more = len(names) - _MAX_NAMED
    return f"{shown} and {more} more" if more > 0 else shown


def name_dimensions(dimensions: Sequence[int]) -> str:
    """Lists sorted dimensions with ranges joined, as in `0-5, 7`."""
    parts: list[list[int]] = []
    for dimension in dimensions:
        if parts and dimension == parts[-1][-1] + 1:
            parts[-1].append(dimension)
        else:
            parts.append([dimension])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in parts)


def count_of(count: int, noun: str) -> str:
    """Returns `1 file`, or `2 files`."""
    return f"{count} {noun}{'s' if count != 1 else ''}"


def share_of(part: int, total: int, noun: str) -> str:
    """Returns `3 of 12 episodes`, or `all 12 episodes`."""
    if part == total:
        return f"all {total} {noun}s" if total != 1 else f"the one {noun}"
    return f"{part} of {total} {noun}s"
