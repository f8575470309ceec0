"""Makes parameters of another project's tensors and accounts for every tensor: loaded, resized, or skipped by a rule.

A format is a function from `Weights` and `Options` to `Foreign`: where the parameters are found, what the file has that
has no place here, and what the model here has that the file has not.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from como_jax.errors import RunError
from como_jax.weights.checkpoints import Weights
from como_jax.weights.tables import DeepTable, make_parameters

Flat = dict[str, np.ndarray]
"""Parameters by their paths."""

_SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Options:
    """What a file of weights does not say of itself.

    Attributes:
      image_size: of the model to be made; 0 for that of the file.
      num_heads: of the encoder's attention; 0 for what config.json beside the file says or is usual for the width.
      decoder_heads: of MAE's decoder, and of both transformers of Moto and CoMo; 0 for the same.
      settings: of config.json beside the file, empty where there is none.
      pixel_mean, pixel_std: of the pixels that the file's model was trained on; empty for what config.json beside the
        file says, or else ImageNet's.
      encoder: parameters of the frozen encoder, for Moto and CoMo, whose files leave it out.
      encoder_config: fields of the config, by full name, that the encoder has.
      separate_types: of Moto and CoMo: whether the file was trained with a token type of its own for the motion.
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
    """Tensors that have no place here, by a regular expression for their whole names, and why."""

    pattern: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Constant:
    """A parameter that the file has not, and why it has this value."""

    value: np.ndarray
    reason: str


@dataclasses.dataclass(frozen=True)
class Foreign:
    """How a file of another project becomes a run.

    Attributes:
      family: of the run's config, as in `como_jax.motion.build`; "encoder" or "observation" for a part of a model.
      config: fields of the config, by full name, that differ from the recipe of the family.
      table: where the parameters are found.
      skips: rules for all other tensors.
      constants: parameters that the file has not.
      resized: how parameters that do not fit the image size have been made to, by their paths.
      finish: the last change, of all parameters at once.
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
    """What became of every tensor of the file, and where every parameter that is in no file is from.

    Attributes:
      loaded: parameter of each tensor.
      resized: parameter of each tensor that was resized, and how.
      skipped: rule of each tensor that was left aside.
      filled: reason of each parameter that the file has not.
      beside: what the file holds beside tensors.
    """

    loaded: Mapping[str, str]
    resized: Mapping[str, str]
    skipped: Mapping[str, str]
    filled: Mapping[str, str]
    beside: tuple[str, ...]

    def describe(self) -> str:
        """In a few lines, with a line for every rule."""
        lines = [f"{len(self.loaded)} tensors loaded, {len(self.resized)} resized, {len(self.skipped)} skipped"]
        lines += [f"  resized {name}: {how}" for name, how in self.resized.items()]
        for title, reasons in (("skipped", self.skipped), ("filled", self.filled)):
            for reason, count in collections.Counter(reasons.values()).items():
                lines.append(f"  {title} {count}: {reason}")
        if self.beside:
            lines.append(f"  beside the weights, left aside: {_some(self.beside)}")
        return "\n".join(lines)


def import_parameters(weights: Weights, foreign: Foreign) -> tuple[Flat, Accounts]:
    """All parameters, float32, by their paths, and the account of all tensors.

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
    """The parameter of every tensor of a table; of several that share one, all."""
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
