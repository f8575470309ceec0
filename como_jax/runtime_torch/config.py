"""What config.json says of an exported model, checked field by field."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from como_jax.runtime_torch.errors import ModelFileError
from como_jax.spec.images import FITS

FORMAT = "como_jax"
VERSION = 1

T = TypeVar("T")

MOTION_INPUTS = ("difference", "future", "future_only", "rgb_difference")
BOTTLENECKS = ("none", "kl", "vq", "vq_ema", "nsvq", "fsq")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes of a ViT; an `mlp_width` of 0 is four times the width."""

    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int


@dataclasses.dataclass(frozen=True)
class BottleneckConfig:
    """Which bottleneck, its codes, and the values of every latent number where it is a grid."""

    kind: str
    codebook_size: int
    fsq_levels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ComoConfig:
    """Sizes of CoMo and what its inverse dynamics model sees; the fields of `como_jax.motion.como.MotionConfig`."""

    num_queries: int
    latent_dim: int
    motion_input: str
    bottleneck: BottleneckConfig
    idm_width: int
    idm_depth: int
    idm_heads: int
    fdm_width: int
    fdm_depth: int
    fdm_heads: int
    fdm_patch_size: int
    residual: bool


@dataclasses.dataclass(frozen=True)
class LaqConfig:
    """Sizes of LAQ; the fields of `como_jax.motion.laq.LaqConfig`."""

    patch_size: int
    width: int
    num_heads: int
    head_size: int
    spatial_depth: int
    temporal_depth: int
    decoder_depth: int
    latent_dim: int
    codebook_size: int


@dataclasses.dataclass(frozen=True)
class MotionModelConfig:
    """An exported motion model.

    Attributes:
      family: como or laq.
      image_size: side of the square frames.
      fit: how pictures become square, see `images.fit_frames`.
      gap_seconds: time between the two frames of a pair in training.
      model: sizes.
      encoder: of CoMo; None for LAQ.
    """

    family: str
    image_size: int
    fit: str
    gap_seconds: float
    model: ComoConfig | LaqConfig
    encoder: EncoderConfig | None

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Latent tokens of a transition, and numbers of each."""
        if isinstance(self.model, ComoConfig):
            return self.model.num_queries, self.model.latent_dim
        # Two convolutions of stride two pool the grid of patches.
        return (self.image_size // self.model.patch_size // 4) ** 2, self.model.latent_dim


def parse_motion_model(content: Mapping[str, Any], path: Path) -> MotionModelConfig:
    """The model that a config.json describes; raises ModelFileError, naming the field, where it describes none."""
    if content.get("kind") != "latent_motion":
        raise ModelFileError(f"{path}: kind {content.get('kind')!r} is no latent motion model.")
    families: dict[Any, Any] = {"como": ComoConfig, "laq": LaqConfig}
    family = content.get("family")
    if not isinstance(family, str) or family not in families:
        raise ModelFileError(f"{path}: family {family!r} must be one of {', '.join(families)}.")
    encoder = parse_section(EncoderConfig, content.get("encoder"), path, "encoder.") if family == "como" else None
    config = MotionModelConfig(
        family,
        model=parse_section(families[family], content.get("model"), path, "model."),
        encoder=encoder,
        **{
            name: _check(kind, content.get(name), f"{path}: {name}")
            for name, kind in {"image_size": int, "fit": str, "gap_seconds": float}.items()
        },
    )
    _check_sizes(config, path)
    return config


def parse_section(kind: type[T], content: Any, path: Path, prefix: str = "") -> T:
    """A dataclass of a JSON object with just its fields; raises ModelFileError, naming the field.

    Fields that have a default may be left out.
    """
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} has no section {prefix.rstrip('.')!r}.")
    hints = typing.get_type_hints(kind)
    unknown = sorted(content.keys() - hints.keys())
    if unknown:
        raise ModelFileError(f"{path}: {prefix}{unknown[0]} is unknown; update como_jax or export again.")
    values = {}
    for name, hint in hints.items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            values[name] = parse_section(hint, content.get(name), path, f"{prefix}{name}.")
        # A default is an attribute of the class.
        elif name in content or not hasattr(kind, name):
            values[name] = _check(hint, content.get(name), f"{path}: {prefix}{name}")
    return kind(**values)


def _check(hint: Any, value: Any, where: str) -> Any:
    """The value, if it is of the kind that a field has: a bool, a text, a number that is not negative, or a tuple."""
    if isinstance(hint, types.GenericAlias):
        if isinstance(value, list):
            return tuple(_check(typing.get_args(hint)[0], item, where) for item in value)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
            return float(value)
    elif type(value) is hint and (hint is not int or value >= 0):
        return value
    raise ModelFileError(f"{where} is {value!r}, which is no such setting.")


def _check_sizes(config: MotionModelConfig, path: Path) -> None:
    """Raises ModelFileError unless sizes go together and choices are known."""
    model, encoder = config.model, config.encoder
    check_choice(config.fit, FITS, f"{path}: fit")
    patches = {"model.patch_size": 4 * model.patch_size} if isinstance(model, LaqConfig) else {}
    positive: dict[str, int] = {"image_size": config.image_size}
    if isinstance(model, ComoConfig) and encoder is not None:
        patches = {"encoder.patch_size": encoder.patch_size, "model.fdm_patch_size": model.fdm_patch_size}
        check_choice(model.motion_input, MOTION_INPUTS, f"{path}: model.motion_input")
        check_choice(model.bottleneck.kind, BOTTLENECKS, f"{path}: model.bottleneck.kind")
        heads = {"encoder": (encoder.width, encoder.num_heads)}
        heads |= {"model.idm": (model.idm_width, model.idm_heads), "model.fdm": (model.fdm_width, model.fdm_heads)}
        for name, (width, num_heads) in heads.items():
            if not num_heads or width % num_heads:
                raise ModelFileError(f"{path}: {name} has width {width}, which {num_heads} heads do not share.")
        if model.bottleneck.kind == "fsq" and len(model.bottleneck.fsq_levels) != model.latent_dim:
            raise ModelFileError(f"{path}: model.bottleneck.fsq_levels does not have model.latent_dim numbers.")
    for name, size in (positive | patches).items():
        if not size or config.image_size % size:
            raise ModelFileError(f"{path}: image_size {config.image_size} does not go with {name}.")


def check_choice(value: str, choices: tuple[str, ...], where: str) -> None:
    """Raises ModelFileError unless the value is one of the choices; `where` is the field that holds it."""
    if value not in choices:
        raise ModelFileError(f"{where} {value!r} must be one of {', '.join(choices)}.")
