"""The instruction of a LIBERO file: from its attributes, or from its name."""

from __future__ import annotations

import json
import re
from typing import Any

import h5py


def stored_instruction(data: h5py.Group) -> str:
    """`language_instruction` of the attribute `problem_info`; empty if there is none that is text."""
    text = attribute_text(data, "problem_info")
    try:
        problem = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    instruction = problem.get("language_instruction") if isinstance(problem, dict) else None
    if isinstance(instruction, list):
        instruction = " ".join(map(str, instruction))
    return _valid(instruction).strip().strip('"').strip()


def named_instruction(file_name: str) -> str:
    """The instruction in a name such as `KITCHEN_SCENE10_close_the_top_drawer_demo.hdf5`."""
    task = file_name.rpartition(".")[0].removesuffix("_demo")
    return re.sub(r"^[A-Z_]*SCENE\d+_", "", task).replace("_", " ").strip()


def attribute_text(data: h5py.Group, name: str) -> str:
    """An attribute, or an empty text if it is missing or is no valid text."""
    try:
        return _valid(data.attrs.get(name))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return ""


def _valid(text: Any) -> str:
    """The text if it is one that can be written as UTF-8, or an empty one."""
    try:
        text = text.decode() if isinstance(text, bytes) else text
        return text if isinstance(text, str) and text.encode() else ""
    except UnicodeError:
        return ""
