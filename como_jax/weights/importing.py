"""Makes parameters from the weights of another project and accounts for every tensor: loaded, resized or skipped.

A format is a function from `Weights` and `Options` to `Foreign`, which says where the parameters lie in the file, which
tensors have no place in the model, and which parameters the file does not contain.
Axes: N patches of a square grid, row by row, D width.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from como_jax.errors import ConfigError, RunError
from como_jax.weights.tables import DeepTable, Entry, array, make_parameters
from como_jax.weights.tensors import Weights

Flat = dict[str, np.ndarray]
"""Parameters by their paths."""

_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Options:
    """What a weights file does not say about its model.

    Attributes:
      image_size: of the model to be made; 0 for that of the file.
      num_heads: attention heads of the encoder; 0 for those that config.json beside the file gives, or else those usual
        for the width.
      decoder_heads: attention heads of MAE's decoder, or of both transformers of Moto and CoMo; 0 for the same.
      settings: the content of config.json beside the file; empty if there is none.
      pixel_mean, pixel_std: normalisation of the pixels that the model was trained on; empty for that of config.json
        beside the file, or else ImageNet's.
      encoder: parameters of the frozen encoder, which files of Moto and CoMo leave out.
      encoder_config: the config fields of this encoder, by full name.
      separate_types: whether a model of Moto or CoMo was trained with a separate token type for the motion.
    """

    image_size: int = 0
    num_heads: int = 0
    decoder_heads: int = 0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pixel_mean: tuple[float, ...] = ()
    pixel_std: tuple[float, ...] = ()
    encoder: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    encoder_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    separate_types: bool = False


@dataclasses.dataclass(frozen=True)
class Skip:
    """A rule for tensors that the model has no place for: a regular expression of their names, and the reason."""

    pattern: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Constant:
    """A parameter that the file does not contain, and the reason for its value."""

    value: np.ndarray
    reason: str


@dataclasses.dataclass(frozen=True)
class Foreign:
    """How a file of another project becomes a run.

    Attributes:
      family: of the run's config, as in `como_jax.motion.models`; "encoder" or "observation" for a part of a model.
      config: config fields, by full name, that differ from the recipe of the family.
      table: where the parameters lie in the file.
      skips: rules for all other tensors.
      constants: parameters that the file does not contain.
      resized: how parameters were resized to the image size, by their paths.
      finish: a last change of all parameters together.
    """

    family: str
    config: Mapping[str, Any]
    table: DeepTable
    skips: tuple[Skip, ...] = ()
    constants: Mapping[str, Constant] = dataclasses.field(default_factory=dict)
    resized: Mapping[str, str] = dataclasses.field(default_factory=dict)
    finish: Callable[[Flat], Flat] | None = None


Format = Callable[[Weights, Options], Foreign]


@dataclasses.dataclass(frozen=True)
class Accounts:
    """What became of every tensor of the file, and where all other parameters come from.

    Attributes:
      loaded: the parameter of each tensor that was used as it is.
      resized: how each tensor that was resized was resized.
      skipped: the reason for each tensor that was skipped.
      filled: the reason for each parameter that the file does not contain.
      beside: names of what the file holds besides tensors.
    """

    loaded: Mapping[str, str]
    resized: Mapping[str, str]
    skipped: Mapping[str, str]
    filled: Mapping[str, str]
    beside: tuple[str, ...]

    def describe(self) -> str:
        """A summary with one line for every reason."""
        lines = [f"{len(self.loaded)} tensors loaded, {len(self.resized)} resized, {len(self.skipped)} skipped"]
        lines += [f"  resized {name}: {how}" for name, how in self.resized.items()]
        for title, reasons in (("skipped", self.skipped), ("filled", self.filled)):
            for reason, count in collections.Counter(reasons.values()).items():
                lines.append(f"  {title} {count}: {reason}")
        if self.beside:
            lines.append(f"  beside the weights, left aside: {_some(self.beside)}")
        return "\n".join(lines)


def import_parameters(weights: Weights, foreign: Foreign) -> tuple[Flat, Accounts]:
    """Returns all parameters, float32, by their paths, and the account of all tensors.

    Raises:
      RunError: tensors are missing, unknown or of another shape.
    """
    places = _places(foreign.table)
    skipped = {name: rule for name in weights.files.keys() - places.keys() if (rule := _rule(name, foreign.skips))}
    unknown = weights.files.keys() - places.keys() - skipped.keys()
    missing = places.keys() - weights.files.keys()
    problems = [
        f"{len(names)} {what} ({_some(sorted(names))})"
        for names, what in ((missing, "tensors are missing"), (unknown, "tensors have no place here"))
        if names
    ]
    if problems:
        raise RunError(f"{weights.path} is not of this format or size: {'; '.join(problems)}.")
    params = make_parameters(foreign.table, weights)
    params |= {path: np.asarray(constant.value, np.float32) for path, constant in foreign.constants.items()}
    if foreign.finish:
        params = foreign.finish(params)
    resized = {name: foreign.resized[path] for name, path in places.items() if path in foreign.resized}
    return params, Accounts(
        loaded={name: path for name, path in places.items() if name not in resized},
        resized=resized,
        skipped=dict(sorted(skipped.items())),
        filled={path: constant.reason for path, constant in foreign.constants.items()},
        beside=weights.beside,
    )


def _places(table: DeepTable) -> dict[str, str]:
    """The parameter of every tensor of a table, or all of them if several share it."""
    places: dict[str, str] = {}
    for path, (entry, depth) in table.items():
        for name in dict.fromkeys(name.format(layer=layer) for layer in range(depth) for name in entry.names):
            places[name] = f"{places[name]}, {path}" if name in places else path
    return places


def _rule(name: str, skips: tuple[Skip, ...]) -> str | None:
    return next((skip.reason for skip in skips if re.fullmatch(skip.pattern, name)), None)


def _some(names: Any) -> str:
    shown = ", ".join(list(names)[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


# Standard widths whose heads are not 64 wide: ViT-H (arXiv 2010.11929), SO400M (2305.13035), ViT-g (2106.04560).
_HEADS = {1280: 16, 1152: 16, 1408: 16}


def usual_heads(weights: Weights, width: int, wanted: int) -> int:
    """The given number of heads, or the usual one for a width; raises RunError if the width is no multiple of it."""
    heads = wanted or _HEADS.get(width, width // 64)
    if not heads or width % heads:
        raise RunError(
            f"{weights.path}: {width} numbers cannot be split into {heads} heads; set `num_heads` or `decoder_heads`."
        )
    return heads


def grid_of(weights: Weights, name: str, extra: int, axis: int = 1) -> int:
    """Side of the square grid of a table of positions, of which `extra` belong to no patch."""
    count = weights.shape(name)[axis] - extra
    grid = math.isqrt(max(count, 0))
    if not grid or grid**2 != count:
        raise RunError(f"{weights.path}: {name} has {count} positions of patches, which form no square.")
    return grid


def new_grid(image_size: int, patch_size: int, old: int) -> int:
    """Side of the grid of another image size, or the old one for image size 0."""
    if image_size % patch_size:
        raise ConfigError(f"`image_size` {image_size} must be a multiple of the patch size, {patch_size}.")
    return image_size // patch_size or old


def positions(name: str, shape: tuple[int, ...], old: int, new: int, *, antialias: bool = False) -> Entry:
    """Positions `[..., extra + N, D]`, of which those of patches are resized to another grid."""
    if old == new:
        return array(name, *shape)
    extra = shape[-2] - old**2

    def make(table: np.ndarray) -> np.ndarray:
        rows = np.asarray(table, np.float32).reshape(-1, shape[-1])
        resized = resize_positions(rows[extra:], new, antialias=antialias)
        return np.concatenate([rows[:extra], resized]).reshape(*shape[:-2], -1, shape[-1])

    return Entry((name,), shape, make)


def resizing(old: int, new: int, *, antialias: bool = False) -> str:
    """The account of `positions`."""
    return f"grid of {old} x {old} to {new} x {new}, bicubic{' with antialiasing' if antialias else ''}"


PLAIN = -0.75
ANTIALIASED = -0.5
"""Parameter of the cubic kernel (Keys, 1981) in PyTorch, without and with antialiasing."""


def resize_positions(positions: np.ndarray, size: int, *, antialias: bool) -> np.ndarray:
    """Resizes positions `[N, D]` to a grid of `size` rows and columns by bicubic interpolation.

    MAE's programs do it without antialiasing and timm's with it. Both align the corners of the two grids, not the
    centres of their outer cells.
    """
    old = int(np.sqrt(len(positions)))
    matrix = cubic_matrix(old, size, antialias=antialias)
    grid = positions.astype(np.float64).reshape(old, old, -1)
    resized = np.einsum("ai,bj,ijd->abd", matrix, matrix, grid)
    return resized.reshape(size * size, -1).astype(np.float32)


def cubic_matrix(old: int, new: int, *, antialias: bool) -> np.ndarray:
    """The weights `[new, old]` of old samples in new ones."""
    scale = old / new
    centre = (np.arange(new) + 0.5) * scale - 0.5
    if antialias:
        # Shrinking widens the kernel; samples outside of the grid are left out.
        stretch = max(scale, 1.0)
        weights = _cubic((np.arange(old) - centre[:, None]) / stretch, ANTIALIASED)
        return weights / weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((new, old))
    first = np.floor(centre).astype(int)
    for offset in range(-1, 3):
        # Samples outside of the grid equal those at its edge.
        place = np.clip(first + offset, 0, old - 1)
        np.add.at(matrix, (np.arange(new), place), _cubic(centre - first - offset, PLAIN))
    return matrix


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
