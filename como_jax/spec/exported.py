"""The format of an exported folder: what config.json says of a model, and the names of the other files.

config.json holds the fields of `ExportedMotion` or `ExportedPolicy`, written by `to_json` and read by
`read_description`, and the file of the weights with its SHA-256. Nothing in a folder is ever executed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from como_jax.errors import ConfigError, ModelFileError
from como_jax.spec.images import FITS
from como_jax.spec.interface import PolicySpec
from como_jax.spec.motion import LAQ_POOLING, LaqConfig, MotionConfig
from como_jax.spec.policies import (
    AutoregressiveConfig,
    DiffusionPolicyConfig,
    ObservationConfig,
    VlaConfig,
    with_new_names,
)
from como_jax.spec.towers import ACTIVATIONS, GATED, PUBLIC_TOWERS, TextConfig, VitConfig

FORMAT = "como_jax"
VERSION = 2
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
EMBEDDINGS_NAME = "instructions.safetensors"
"""Holds one tensor, `embedding` `[n, E]`, and in its metadata the `instructions`, a list as JSON."""

MotionModel = MotionConfig | LaqConfig
MOTION_FAMILIES: dict[str, type[MotionModel]] = {"como": MotionConfig, "laq": LaqConfig}
PolicyModel = DiffusionPolicyConfig | AutoregressiveConfig | VlaConfig
POLICY_FAMILIES: dict[str, type[PolicyModel]] = {
    "diffusion_policy": DiffusionPolicyConfig,
    "autoregressive_policy": AutoregressiveConfig,
    "latent_vla": VlaConfig,
}

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ExportedMotion:
    """An exported motion model.

    Attributes:
      family: one of `MOTION_FAMILIES`.
      image_size: side of the square frames.
      fit: how images become square, one of `como_jax.spec.images.FITS`.
      gap_seconds: time between the two frames of a pair in training.
      model: settings of the family.
      encoder: sizes of the ViT of CoMo; None for LAQ.
    """

    kind: ClassVar[str] = "latent_motion"

    family: str
    image_size: int
    fit: str
    gap_seconds: float
    model: MotionModel
    encoder: VitConfig | None

    def __post_init__(self) -> None:
        _check_choice("fit", self.fit, FITS)
        if isinstance(self.model, LaqConfig):
            parts = {"model.patch_size": LAQ_POOLING * self.model.patch_size}
        else:
            if self.encoder is None or self.encoder.image_size != self.image_size:
                raise ConfigError(f"encoder must be a ViT for frames of {self.image_size} pixels.")
            parts = {"model.fdm_patch_size": self.model.fdm_patch_size}
            _check_heads("encoder", self.encoder.width, self.encoder.num_heads)
            _check_heads("model.idm", self.model.idm_width, self.model.idm_heads)
            _check_heads("model.fdm", self.model.fdm_width, self.model.fdm_heads)
            bottleneck = self.model.bottleneck
            if bottleneck.kind == "fsq" and len(bottleneck.fsq_levels) != self.model.latent_dim:
                raise ConfigError("model.bottleneck.fsq_levels must have model.latent_dim numbers.")
        for name, part in parts.items():
            if not part or self.image_size % part:
                raise ConfigError(f"image_size {self.image_size} must be a multiple of {name}, {part}.")

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Latent tokens of a transition, and numbers of each."""
        if isinstance(self.model, LaqConfig):
            return (self.image_size // self.model.patch_size // LAQ_POOLING) ** 2, self.model.latent_dim
        return self.model.num_queries, self.model.latent_dim

    def to_json(self) -> dict[str, Any]:
        """What config.json says of the model."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ExportedMotion:
        """Reads what `to_json` wrote; raises ConfigError, naming the field, where it is something else."""
        model = MOTION_FAMILIES[_check_choice("family", content.get("family"), tuple(MOTION_FAMILIES))]
        encoder = content.get("encoder")
        return cls(
            family=content["family"],
            **{name: _read(kind, content.get(name), name) for name, kind in _MOTION_FIELDS.items()},
            model=from_dict(model, content.get("model"), "model"),
            encoder=from_dict(VitConfig, encoder, "encoder") if model is MotionConfig else None,
        )


_MOTION_FIELDS = {"image_size": int, "fit": str, "gap_seconds": float}


@dataclasses.dataclass(frozen=True)
class ExportedPolicy:
    """An exported policy.

    Attributes:
      family: one of `POLICY_FAMILIES`.
      observation: how observations become tokens.
      model: all other settings of the network, without what acting does not need.
      interface: what the policy takes and gives.
    """

    kind: ClassVar[str] = "policy"

    family: str
    observation: ObservationConfig
    model: PolicyModel
    interface: PolicySpec

    def __post_init__(self) -> None:
        observation, model, interface = self.observation, self.model, self.interface
        _check_text(observation.text)
        if observation.image_tower != "patch":
            _check_heads("observation.vit", observation.vit.width, observation.vit.num_heads)
        if not isinstance(model, VlaConfig):
            _check_heads("model", model.width, model.num_heads)
        for name, found, wanted in (
            ("interface.cameras", len(interface.cameras), observation.cameras),
            ("interface.image_size", interface.image_size, observation.vit.image_size),
            ("interface.instants", interface.instants, observation.instants),
            ("interface.state_size", interface.state_size, observation.state_size),
            ("interface.stride", interface.stride, model.stride),
            ("interface.chunk", interface.chunk, model.chunk),
            ("interface.action_size", interface.action_size, model.action_size),
        ):
            if found != wanted:
                raise ConfigError(f"{name} is {found}, which does not fit the network's {wanted}.")
        for name in ("instants", "stride", "chunk", "action_size"):
            if getattr(interface, name) < 1:
                raise ConfigError(f"interface.{name} must be at least 1.")
        if not interface.robots:
            raise ConfigError("interface.robots must hold at least one robot.")
        for name, robot in interface.robots.items():
            if robot.action.size > interface.action_size:
                raise ConfigError(f"interface.robots.{name} has more numbers in an action than interface.action_size.")
            if robot.state is not None and robot.state.size > interface.state_size:
                raise ConfigError(f"interface.robots.{name} has more numbers in a state than interface.state_size.")

    def to_json(self) -> dict[str, Any]:
        """What config.json says of the policy."""
        sections = {name: dataclasses.asdict(getattr(self, name)) for name in ("observation", "model")}
        return {"kind": self.kind, "family": self.family, **sections, "interface": self.interface.to_json()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ExportedPolicy:
        """Reads what `to_json` wrote; raises ConfigError, naming the field, where it is something else."""
        family = _check_choice("family", content.get("family"), tuple(POLICY_FAMILIES))
        observation = from_dict(ObservationConfig, content.get("observation"), "observation")
        model = from_dict(POLICY_FAMILIES[family], content.get("model"), "model")
        try:
            interface = PolicySpec.from_json(content["interface"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"interface does not describe inputs and robots of a policy: {error}.") from error
        return cls(family, observation, model, interface)


Exported = TypeVar("Exported", ExportedMotion, ExportedPolicy)


def read_description(directory: str | os.PathLike[str], kind: type[Exported]) -> tuple[Exported, dict[str, Any]]:
    """What config.json of a folder says of its model, and the section `weights`, which names the file of its weights.

    Args:
      directory: of the exported model.
      kind: of model that must be there.

    Raises:
      ModelFileError: the file is missing, damaged, of another project, of a later version, or about another kind of
        model; the message names the field.
    """
    path = Path(directory) / CONFIG_NAME
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read ({error.strerror}); is {directory} an exported model?") from error
    except ValueError as error:
        raise ModelFileError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelFileError(f"{path} describes no model of como_jax; make one with python -m tools.export_torch.")
    version = content.get("format_version")
    if version not in (1, VERSION):
        raise ModelFileError(
            f"{path} has format version {version!r} and this runtime reads versions up to {VERSION}; update como_jax "
            "or export the model again."
        )
    if content.get("kind") != kind.kind:
        raise ModelFileError(f"{path}: kind is {content.get('kind')!r} and must be {kind.kind!r}.")
    try:
        described = kind.from_json(_from_version_1(content) if version == 1 else content)
    except ConfigError as error:
        raise ModelFileError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelFileError(f"{path} lacks a section or has another thing in its place: {error}.") from error
    weights = content.get("weights")
    return described, weights if isinstance(weights, dict) else {}


def from_dict(kind: type[T], content: Any, name: str) -> T:
    """A dataclass from a JSON object of its fields; those that have a default may be left out.

    Args:
      kind: the dataclass.
      content: of the object.
      name: of the object, for messages.

    Raises:
      ConfigError: a field is unknown, missing, or of another type, or its value is refused by the dataclass.
    """
    if not isinstance(content, Mapping):
        raise ConfigError(f"{name} must be a section of fields, not {content!r}.")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(content.keys() - fields.keys())
    if unknown:
        raise ConfigError(f"{name}.{unknown[0]} is unknown; update como_jax or export the model again.")
    needed = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    missing = [field for field in needed if field not in content]
    if missing:
        raise ConfigError(f"{name}.{missing[0]} is missing; export the model again.")
    return kind(**{field: _read(hints[field], value, f"{name}.{field}") for field, value in content.items()})


def _read(hint: Any, value: Any, name: str) -> Any:
    """A value of JSON as a field of the hinted type has it."""
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, name)  # type: ignore[arg-type]
    if isinstance(hint, types.GenericAlias):
        item, *rest = typing.get_args(hint)
        if isinstance(value, list) and (rest == [...] or len(value) == 1 + len(rest)):
            return tuple(_read(item, part, f"{name}[{number}]") for number, part in enumerate(value))
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif type(value) is hint:
        return value
    raise ConfigError(f"{name} is {value!r} and must be of type {getattr(hint, '__name__', hint)}.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    """The value; raises ConfigError unless it is one of the choices."""
    if value not in choices:
        raise ConfigError(f"{name} {value!r} must be one of {', '.join(choices)}.")
    return value


def _check_heads(name: str, width: int, num_heads: int) -> None:
    """Raises ConfigError unless the heads of a transformer share its width."""
    if num_heads < 1 or width % num_heads:
        raise ConfigError(f"{name} has width {width}, which must be a multiple of its {num_heads} heads.")


def _check_text(text: TextConfig) -> None:
    """Raises ConfigError unless a text tower has all that building it needs."""
    if text.prompt.count("{}") != 1:
        raise ConfigError(f"observation.text.prompt {text.prompt!r} must have {{}} once, where the instruction is put.")
    if text.tower in ("bytes", "clip"):
        _check_heads("observation.text", text.width, text.num_heads)
    if text.tower not in PUBLIC_TOWERS:
        return
    for name in ("tokenizer_file", "width", "depth", "num_heads", "vocabulary_size", "mlp_width", "norm_epsilon"):
        if not getattr(text, name):
            raise ConfigError(f"observation.text.{name} is missing, which the tower {text.tower} needs.")
    gates = ("", GATED) if text.tower == "t5" else ("",)
    _check_choice("observation.text.activation", text.activation, tuple(f"{g}{a}" for g in gates for a in ACTIVATIONS))
    if text.tower == "clip" and text.num_positions < text.max_length:
        raise ConfigError(
            f"observation.text.positions {text.positions} must be at least max_length, {text.max_length}."
        )
    # A quarter of the buckets are for one distance each, on either side.
    if text.tower == "t5" and not 1 <= text.relative_buckets // 4 < text.relative_distance:
        raise ConfigError(
            f"observation.text.relative_buckets {text.relative_buckets} must be at least 4, and a quarter of them less "
            f"than relative_distance, {text.relative_distance}."
        )


def _from_version_1(content: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json of an export of version 1 would say today."""
    model = with_new_names(content["model"])
    if content["kind"] == ExportedMotion.kind:
        encoder = content.get("encoder")
        sized = encoder and {"image_size": content["image_size"], **encoder}
        return {**content, "model": model, "encoder": sized}
    observation, interface = dict(content["observation"]), content["interface"]
    observation["vit"] = {"image_size": observation.pop("image_size"), **observation.pop("encoder")}
    model["stride"] = interface["stride"]
    if "gripper_dims" in model:
        model["gripper_dim"] = next(iter(model.pop("gripper_dims")), -1)
    if model.get("guidance", 1) != 1:
        # How often training hid the instruction was not kept; guidance only needs that it did.
        model["instruction_dropout"] = 1.0
    interface = {
        **interface,
        "image_size": observation["vit"]["image_size"],
        "instants": observation["instants"],
        "chunk": model["chunk"],
        "action_size": model["action_size"],
        "state_size": observation["state_size"],
        "robots": content["robots"],
    }
    return {**content, "observation": observation, "model": model, "interface": interface}
