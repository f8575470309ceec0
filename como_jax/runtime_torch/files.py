"""Reading of an exported model's folder: config.json and the safetensors file that it names.

Nothing in there is ever executed: JSON and safetensors hold numbers and names alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from como_jax.runtime_torch.config import FORMAT, VERSION
from como_jax.runtime_torch.errors import ModelFileError
from como_jax.spec.policies import with_new_names

CONFIG_NAME = "config.json"

M = TypeVar("M", bound=nn.Module)


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of config.json.

    Raises:
      ModelFileError: it is missing, damaged, of another project, or of a version that this one does not know.
    """
    path = Path(directory) / CONFIG_NAME
    try:
        content = json.loads(path.read_bytes(), object_hook=with_new_names)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read ({error.strerror}); is {directory} an exported model?") from error
    except ValueError as error:
        raise ModelFileError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelFileError(f"{path} describes no model of como_jax; make one with python -m tools.export_torch.")
    if content.get("format_version") != VERSION:
        raise ModelFileError(
            f"{path} has format version {content.get('format_version')!r} and this runtime reads version {VERSION}; "
            "update como_jax or export the model again."
        )
    return content


def load_module(build: Callable[[], M], directory: str | os.PathLike[str], content: Mapping[str, Any]) -> M:
    """A module with the weights of a folder, on the CPU, in evaluation mode and without gradients.

    Args:
      build: makes the module.
      directory: the folder.
      content: of its config.json.

    Raises:
      ModelFileError: the weights are missing or damaged, or are not those of the module.
    """
    path, tensors = _read_weights(Path(directory), content.get("weights"))
    # Without memory for numbers that the file replaces.
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


def _read_weights(directory: Path, weights: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """The tensors of the file that config.json names, if they are those that were written."""
    if not isinstance(weights, dict) or not all(isinstance(weights.get(name), str) for name in ("file", "sha256")):
        raise ModelFileError(f"{directory / CONFIG_NAME}: weights must name a file and its sha256.")
    # A name alone, so that a model from elsewhere cannot lead out of its folder.
    path = directory / Path(weights["file"]).name
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}.") from error
    if digest != weights["sha256"]:
        raise ModelFileError(
            f"{path} is damaged or cut off, or of another export: it is not the file whose sum {CONFIG_NAME} holds; "
            "copy the model again."
        )
    try:
        return path, load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ModelFileError(f"{path} cannot be read as safetensors ({type(error).__name__}: {error}).") from error
