"""Reads the tensors of weights files: safetensors, and PyTorch's own format without running anything in it.

A PyTorch file is a pickle, which may contain code. It is read with `torch.load(weights_only=True)` only, which makes
nothing but tensors and plain containers and refuses everything else.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from como_jax.errors import RunError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
PYTORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_INDEX_SUFFIX = ".index.json"
# Files of a Hugging Face folder; the first that exists is read.
_USUAL_NAMES = tuple(
    f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", _INDEX_SUFFIX)
)
# Names under which training programs keep the weights beside their own state.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
# Prefixes that nn.DataParallel and torch.compile add.
_PREFIXES = ("module.", "_orig_mod.")
INSTALL_TORCH = "pip install 'como_jax[torch]'"


class Tensors:
    """The tensors of one or several safetensors files, which are read one at a time.

    Attributes:
      path: of the file or of the index of several.
      files: the file of every tensor.
    """

    def __init__(self, path: epath.Path):
        if not path.is_file():
            raise RunError(f"{path} does not exist: name a .safetensors file of weights.")
        self.path = path
        self._read: set[str] = set()
        if path.name.endswith(_INDEX_SUFFIX):
            files = read_json(path).get("weight_map") or {}
            self.files = {name: path.parent / file for name, file in files.items()}
        elif path.suffix == ".safetensors":
            self.files = self._open(path, lambda file: dict.fromkeys(file.keys(), path))
        else:
            raise RunError(
                f"{path} is not a .safetensors file; save PyTorch weights as safetensors first, with "
                "model.save_pretrained(DIR, safe_serialization=True)."
            )

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Reads a tensor; raises RunError unless it exists and has this shape."""
        if name not in self.files:
            raise RunError(f"{self.path} has no tensor {name}, which the model that {CONFIG_NAME} describes needs.")
        tensor = self._open(self.files[name], lambda file: file.get_tensor(name))
        if tensor.shape != shape:
            raise RunError(f"{self.path}: tensor {name} is {tensor.shape} and by {CONFIG_NAME} must be {shape}.")
        self._read.add(name)
        return tensor

    def check_unread(self, prefix: str = "") -> None:
        """Raises RunError if a tensor whose name begins with the prefix has not been read."""
        unread = sorted(name for name in self.files if name.startswith(prefix) and name not in self._read)
        if unread:
            raise RunError(
                f"{self.path} has {len(unread)} tensors more than {CONFIG_NAME} describes, such as {unread[0]}."
            )

    def _open(self, path: epath.Path, read: Callable[[Any], Any]) -> Any:
        try:
            with safe_open(os.fspath(path), framework="np") as file:
                return read(file)
        except (SafetensorError, OSError, TypeError) as error:
            raise RunError(f"{path} cannot be read as safetensors ({type(error).__name__}: {error}).") from error


class Weights(Tensors):
    """The tensors of a checkpoint, all in memory.

    Attributes:
      path: of the file, or of the index of several.
      files: see `Tensors`.
      beside: names of what the checkpoint holds besides tensors, such as an optimiser's state.
      read_from: all files that were read.
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
        """Returns a tensor; raises RunError unless it exists, has this shape and is finite."""
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
        """The shape of a tensor; raises RunError if it does not exist."""
        if name not in self._tensors:
            raise RunError(f"{self.path} has no tensor {name}, from which the sizes of this format are read.")
        return tuple(self._tensors[name].shape)

    def depth(self, pattern: str) -> int:
        """The number of layers, from tensors whose names fit a pattern with `{layer}` for the number."""
        number = re.compile(re.escape(pattern).replace(re.escape("{layer}"), r"(\d+)"))
        found = [int(match[1]) for name in self._tensors if (match := number.fullmatch(name))]
        if not found:
            raise RunError(f"{self.path} has no tensor {pattern.format(layer=0)}; is it of another format?")
        return 1 + max(found)

    def merged(self, other: Weights) -> Weights:
        """The tensors of two checkpoints; raises RunError if both have a tensor of one name and they differ."""
        for name in self.files.keys() & other.files.keys():
            if not np.array_equal(self._tensors[name], other._tensors[name]):
                raise RunError(f"{self.path} and {other.path} hold different tensors {name}.")
        tensors, beside = {**self._tensors, **other._tensors}, (*self.beside, *other.beside)
        return Weights(self.path, tensors, beside, (*self.read_from, *other.read_from))


def read_weights(path: epath.PathLike) -> Weights:
    """Reads all tensors of a file, of an index of several files, or of a folder that holds either.

    Raises:
      RunError: there is no file, it is damaged or contains more than plain tensors, or reading it needs PyTorch, which
        is not installed.
    """
    file = find_file(epath.Path(path))
    if file.name.endswith(_INDEX_SUFFIX):
        tensors, parts = _read_indexed(file)
        return Weights(file, _without_prefixes(tensors), read_from=(file, *parts))
    tensors, beside = _read_file(file)
    return Weights(file, _without_prefixes(tensors), beside)


def find_file(path: epath.Path) -> epath.Path:
    """The weights file at a path or in a folder; raises RunError unless there is exactly one."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise RunError(f"{path} does not exist.")
    for name in _USUAL_NAMES:
        if (path / name).is_file():
            return path / name
    found = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", *PYTORCH_SUFFIXES))
    if len(found) != 1:
        names = f"more than one weights file ({', '.join(file.name for file in found)})" if found else "no weights file"
        raise RunError(f"{path} holds {names}; name the file itself.")
    return found[0]


def _read_indexed(index: epath.Path) -> tuple[dict[str, np.ndarray], list[epath.Path]]:
    """The tensors of all files that an index names, and the paths of these files."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RunError(f"{index} has no weight_map, which names the file of each tensor.")
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
    raise RunError(f"{path} is none of .safetensors, {', '.join(PYTORCH_SUFFIXES)}.")


def _read_safetensors(path: epath.Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(os.fspath(path), framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise RunError(f"{path} cannot be read as safetensors; it is damaged or cut off ({error}).") from error


def _read_pytorch(path: epath.Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    try:
        # An optional package, which safetensors files do not need.
        import torch
    except ImportError as error:
        raise RunError(
            f"{path} is a PyTorch file, which only PyTorch reads: {INSTALL_TORCH}, or save it as safetensors."
        ) from error
    try:
        # MAE's training program keeps its flags in a Namespace, which is a plain container.
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RunError(
            f"{path} holds more than tensors, which may be code, and is not read: {_refused(error)}. If you "
            "trust the file, save the model's state_dict alone, best as safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise RunError(f"{path} cannot be read as a PyTorch file; it is damaged or cut off ({reason}).") from error
    return _state_dict(content, path, torch.Tensor)


def _refused(error: pickle.UnpicklingError) -> str:
    """The name of the object that torch.load refused, without its advice to read the file anyway."""
    name = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:global|class) ([\w.]+)", str(error))
    return next(part for part in name.groups() if part) if name else "something that is no tensor"


def _state_dict(content: Any, path: epath.Path, kind: type) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The tensors of a PyTorch file that is a state_dict or contains one, and the names of everything else."""
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
    """A PyTorch tensor as a NumPy array; raises RunError for tensors that are no plain arrays."""
    try:
        # NumPy has no bfloat16, so floats of every width become float32.
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


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON object; raises RunError if the file holds something else."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} must hold a JSON object.")
    return content


def read_setting(content: Mapping[str, Any], name: str, kind: type, path: epath.Path, default: Any = None) -> Any:
    """Returns a name or a positive number of a config.json.

    Args:
      content: of the file, or of one of its sections.
      name: of the setting.
      kind: str, int or float.
      path: of the file, for messages.
      default: the value of a setting that the file leaves out; None if it must be there.

    Raises:
      RunError: the setting is missing or of another kind.
    """
    value = content.get(name, default)
    if kind is str:
        fits = isinstance(value, str)
    else:
        fits = isinstance(value, int | float if kind is float else int) and value > 0
    if not fits:
        wanted = {str: "name", int: "positive whole number", float: "positive number"}[kind]
        raise RunError(f"{path}: {name} {value!r} must be a {wanted}.")
    return kind(value)
