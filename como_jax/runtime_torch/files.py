"""Reads the weights of an exported folder; safetensors hold numbers and names alone, so that nothing is executed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from como_jax.errors import ModelFileError

CONFIG_NAME = "config.json"

M = TypeVar("M", bound=nn.Module)


def load_module(build: Callable[[], M], directory: str | os.PathLike[str], weights: Mapping[str, Any]) -> M:
    """A module with the weights of a folder, on the CPU, in evaluation mode and without gradients.

    Args:
      build: makes the module.
      directory: of the exported model.
      weights: the section of that name of its config.json: the `file`, and its `sha256`.

    Raises:
      ModelFileError: the weights are missing or damaged, or are not those of the module.
    """
    path, tensors = _read_weights(Path(directory), weights)
    # On the meta device, so that no memory is used for numbers that the file replaces.
    with torch.device("meta"):
        module = build()
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for problem, names in (("lacks", wanted.keys() - tensors.keys()), ("has", tensors.keys() - wanted.keys())):
        if names:
            expected = "needs" if problem == "lacks" else "does not know"
            raise ModelFileError(
                f"{path} {problem} {min(names)}, which a model as {CONFIG_NAME} describes it {expected}; "
                "export the model again."
            )
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise ModelFileError(
                f"{path}: {name} is {list(tensors[name].shape)} and by {CONFIG_NAME} must be {list(shape)}; export "
                "the model again."
            )
    module.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
    return module.eval().requires_grad_(False)


def _read_weights(directory: Path, weights: Mapping[str, Any]) -> tuple[Path, dict[str, torch.Tensor]]:
    """The path of the file that config.json names, and its tensors, if it is the file that was written."""
    if not all(isinstance(weights.get(name), str) for name in ("file", "sha256")):
        raise ModelFileError(f"{directory / CONFIG_NAME}: weights must name a file and its sha256.")
    # Only the name, so that a model from elsewhere cannot point out of its folder.
    path = directory / Path(weights["file"]).name
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}.") from error
    if digest != weights["sha256"]:
        raise ModelFileError(
            f"{path} is damaged or cut off, or of another export: its SHA-256 is not the one in {CONFIG_NAME}; "
            "copy the model again."
        )
    try:
        return path, load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ModelFileError(f"{path} cannot be read as safetensors ({type(error).__name__}: {error}).") from error
