"""Reads the weights files of other projects: safetensors, and PyTorch's own without running anything in them.

A PyTorch file is a pickle, which may hold code. It is read with `torch.load(weights_only=True)` alone, which makes
nothing but tensors and plain containers, and refuses all else.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from como_jax.errors import RunError
from como_jax.weights.tables import Tensors, read_json

PYTORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_INDEX_SUFFIX = ".index.json"
# What a folder of Hugging Face holds, the first that is there.
_USUAL_NAMES = tuple(
    f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", _INDEX_SUFFIX)
)
# Under these a training program keeps the weights beside its own state.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
# Prefixes of nn.DataParallel and torch.compile.
_PREFIXES = ("module.", "_orig_mod.")
INSTALL_TORCH = "pip install 'como_jax[torch]'"


class Weights(Tensors):
    """All tensors of a checkpoint in memory, and which of them have been taken.

    Attributes:
      path: file or folder that they come from.
      beside: names of what the checkpoint holds beside tensors, such as an optimiser's state.
      read_from: all files.
    """

    def __init__(
        self,
        path: epath.Path,
        tensors: Mapping[str, np.ndarray],
        beside: tuple[str, ...] = (),
        read_from: tuple[epath.Path, ...] = (),
    ):
        self.path, self.beside, self.read_from = path, beside, read_from or (path,)
        self.files = dict.fromkeys(tensors, path)
        self._tensors, self._read = dict(tensors), set()

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor; raises RunError unless it is there, of this shape and finite."""
        if name not in self._tensors:
            raise RunError(f"{self.path} has no tensor {name}, which this format needs.")
        if self.shape(name) != shape:
            raise RunError(f"{self.path}: tensor {name} is {self.shape(name)} and must be {shape}.")
        tensor = self._tensors[name]
        if not np.all(np.isfinite(tensor)):
            raise RunError(f"{self.path}: tensor {name} holds numbers that are not finite; the file is damaged.")
        self._read.add(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor; raises RunError if it is not there."""
        if name not in self._tensors:
            raise RunError(f"{self.path} has no tensor {name}, from which the sizes of this format are read.")
        return tuple(self._tensors[name].shape)

    def depth(self, pattern: str) -> int:
        """How many layers there are, by tensors whose names fit a pattern with `{layer}` in place of the number."""
        number = re.compile(re.escape(pattern).replace(re.escape("{layer}"), r"(\d+)"))
        found = [int(match[1]) for name in self._tensors if (match := number.fullmatch(name))]
        if not found:
            raise RunError(f"{self.path} has no tensor {pattern.format(layer=0)}; is it of another --format?")
        return 1 + max(found)

    def merged(self, other: Weights) -> Weights:
        """The tensors of two checkpoints; raises RunError where both hold one of a name and they differ."""
        for name in self.files.keys() & other.files.keys():
            if not np.array_equal(self._tensors[name], other._tensors[name]):
                raise RunError(f"{self.path} and {other.path} hold different tensors {name}.")
        tensors, beside = {**self._tensors, **other._tensors}, (*self.beside, *other.beside)
        return Weights(self.path, tensors, beside, (*self.read_from, *other.read_from))


def read_weights(path: epath.PathLike) -> Weights:
    """Reads a file, an index of several, or a folder that holds either.

    Raises:
      RunError: nothing there, a damaged file, one with more than plain tensors in it, or PyTorch is needed to read it
        and not installed.
    """
    file = find_file(epath.Path(path))
    if file.name.endswith(_INDEX_SUFFIX):
        tensors, parts = _read_indexed(file)
        return Weights(file, _without_prefixes(tensors), read_from=(file, *parts))
    tensors, beside = _read_file(file)
    return Weights(file, _without_prefixes(tensors), beside)


def find_file(path: epath.Path) -> epath.Path:
    """The file of weights, which may be in a folder; raises RunError unless there is one, and one alone."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise RunError(f"--input {path} does not exist.")
    for name in _USUAL_NAMES:
        if (path / name).is_file():
            return path / name
    found = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", *PYTORCH_SUFFIXES))
    if len(found) != 1:
        names = f"more than one ({', '.join(file.name for file in found)})" if found else "no file of weights"
        raise RunError(f"--input {path} holds {names}; name the file itself.")
    return found[0]


def _read_indexed(index: epath.Path) -> tuple[dict[str, np.ndarray], list[epath.Path]]:
    """The tensors of all files that an index names, and these files."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RunError(f"{index} has no weight_map, which says what file each tensor is in.")
    parts = [index.parent / name for name in sorted(map(str, set(weight_map.values())))]
    tensors: dict[str, np.ndarray] = {}
    for part in parts:
        if not part.is_file():
            raise RunError(f"{index} names {part.name}, which is not beside it.")
        tensors |= _read_file(part)[0]
    if missing := sorted(weight_map.keys() - tensors.keys()):
        raise RunError(f"{index} names {len(missing)} tensors that no file has, such as {missing[0]}.")
    return tensors, parts


def _read_file(path: epath.Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path), ()
    if path.suffix in PYTORCH_SUFFIXES:
        return _read_pytorch(path)
    raise RunError(f"--input {path} is none of .safetensors, {', '.join(PYTORCH_SUFFIXES)}.")


def _read_safetensors(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(os.fspath(path), framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise RunError(f"{path} cannot be read as safetensors; it is damaged or cut off ({error}).") from error


def _read_pytorch(path: epath.Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    try:
        # Here alone, since nothing else needs it.
        import torch
    except ImportError as error:
        raise RunError(
            f"{path} is a PyTorch file, which takes PyTorch to read: {INSTALL_TORCH}, or save it as safetensors."
        ) from error
    try:
        # MAE's training program keeps its flags in a Namespace, which is a plain container.
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RunError(
            f"{path} holds more than tensors, which may be code, and is not read: {_refused(error)}. Save the model's "
            "state_dict alone, best as safetensors, where the file can be trusted."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RunError(f"{path} cannot be read as a PyTorch file; it is damaged or cut off ({reason}).") from error
    return _state_dict(content, path, torch.Tensor)


def _refused(error: pickle.UnpicklingError) -> str:
    """What torch.load says it met, without its advice to read the file all the same."""
    name = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:global|class) ([\w.]+)", str(error))
    return next(part for part in name.groups() if part) if name else "something that is no tensor"


def _state_dict(content: Any, path: epath.Path, kind: type) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The tensors of a PyTorch file, whether it is a state_dict or has one among other things."""
    beside: list[str] = []
    while isinstance(content, Mapping) and not any(isinstance(value, kind) for value in content.values()):
        name = next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if name is None:
            break
        beside += [str(other) for other in content if other != name]
        content = content[name]
    tensors = {}
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, kind):
            tensors[str(name)] = _to_numpy(value, f"{path}: tensor {name}")
        else:
            beside.append(str(name))
    if not tensors:
        raise RunError(f"{path} holds no state_dict, neither on top nor under {', '.join(_WRAPPERS)}.")
    return tensors, tuple(beside)


def _to_numpy(tensor: Any, name: str) -> np.ndarray:
    """A PyTorch tensor as NumPy has it; raises RunError for kinds that are no plain arrays."""
    try:
        # NumPy has no bfloat16.
        tensor = tensor.detach()
        return np.asarray(tensor.float() if tensor.is_floating_point() else tensor)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise RunError(f"{name} is no plain array of numbers ({type(error).__name__}).") from error


def _without_prefixes(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    while prefix := next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in tensors)), None):
        if not tensors:
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
