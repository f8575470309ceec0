"""What config.json says of an exported policy, checked field by field."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from como_jax.runtime_torch.config import EncoderConfig, check_choice, parse_section
from como_jax.runtime_torch.errors import ModelFileError
from como_jax.runtime_torch.text_layers import ACTIVATIONS, GATED
from como_jax.spec.images import FITS
from como_jax.spec.normalization import Normalizer, normalizer_from_json

IMAGE_TOWERS = ("vit", "siglip", "conv")
TEXT_TOWERS = ("bytes", "clip", "t5", "embedding", "tokens")
DIFFUSIONS = ("ddpm", "flow")
SAYS = ("epsilon", "sample")
LATENT_HEADS = ("regression", "diffusion")
ACTION_HEADS = ("bins", "regression", "flow")
# What CLIP and T5 need beside what all towers have.
_PUBLIC_SIZES = {
    "clip": ("norm_epsilon", "positions"),
    "t5": ("norm_epsilon", "num_heads", "head_size", "relative_distance"),
}
CONV_STRIDE = 16
"""Pixels along one side for each feature of the convolutional tower."""


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The tower that reads instructions; fields as of `como_jax.spec.towers.TextConfig`.

    Attributes:
      prompt: what an instruction is put into, at {}.
      tokenizer_file: of the folder; empty for bytes.
      mlp_width, activation, norm_epsilon: of CLIP and T5.
      positions: of CLIP.
      head_size, relative_buckets, relative_distance: of T5.
    """

    tower: str
    max_length: int
    width: int
    depth: int
    num_heads: int
    pool: int
    vocabulary_size: int
    embedding_size: int
    prompt: str
    tokenizer_file: str
    mlp_width: int = 0
    activation: str = ""
    norm_epsilon: float = 0.0
    positions: int = 0
    head_size: int = 0
    relative_buckets: int = 0
    relative_distance: int = 0


@dataclasses.dataclass(frozen=True)
class ObservationConfig:
    """How observations become tokens; fields as of `como_jax.policies.observation.ObservationConfig`."""

    image_tower: str
    image_size: int
    encoder: EncoderConfig
    pool: int
    cameras: int
    instants: int
    state_size: int
    text: TextConfig

    @property
    def grid(self) -> int:
        """Image tokens along one side, before pooling."""
        return self.image_size // (CONV_STRIDE if self.image_tower == "conv" else self.encoder.patch_size)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """How samples are made; fields of `como_jax.spec.policies.DiffusionConfig`."""

    kind: str
    train_steps: int
    sample_steps: int
    prediction: str
    eta: float
    clip: float


@dataclasses.dataclass(frozen=True)
class DiffusionPolicyConfig:
    """Sizes; fields of `como_jax.spec.policies.DiffusionPolicyConfig`."""

    width: int
    depth: int
    num_heads: int
    chunk: int
    action_size: int
    diffusion: DiffusionConfig
    guidance: float


@dataclasses.dataclass(frozen=True)
class AutoregressiveConfig:
    """Sizes and sampling; fields of `como_jax.policies.autoregressive.AutoregressiveConfig`.

    Attributes:
      gripper_dims: of the action those that only open or close a gripper.
      generate_latents: whether latents are generated before actions; otherwise the fields that describe latents have
        no effect.
    """

    width: int
    depth: int
    num_heads: int
    chunk: int
    action_size: int
    gripper_dims: tuple[int, ...]
    generate_latents: bool
    latent_queries: int
    latent_dim: int
    codebook_size: int
    latent_head: str
    head_width: int
    head_depth: int
    diffusion_steps: int
    temperature: float


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes; fields of `como_jax.nn.decoder.DecoderConfig`."""

    width: int
    depth: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    mlp_width: int
    rope_period: float
    norm_epsilon: float
    lora_rank: int
    lora_alpha: float


@dataclasses.dataclass(frozen=True)
class VlaConfig:
    """Sizes and sampling; fields of `como_jax.policies.vla.VlaConfig`, and `gripper_dims` as above."""

    decoder: DecoderConfig
    chunk: int
    action_size: int
    gripper_dims: tuple[int, ...]
    action_head: str
    num_bins: int
    head_width: int
    head_depth: int
    flow_steps: int
    causal_text: bool
    temperature: float


@dataclasses.dataclass(frozen=True)
class InterfaceConfig:
    """What a policy sees, and at what rate it acts.

    Attributes:
      cameras: names of its pictures.
      fit: how pictures become square, see `images.fit_frames`.
      stride: steps between two instants of the history.
      control_rate: actions a second (Hz).
      uses_text: whether it was trained to heed instructions.
    """

    cameras: tuple[str, ...]
    fit: str
    stride: int
    control_rate: float
    uses_text: bool


@dataclasses.dataclass(frozen=True)
class Robot:
    """Scales of a robot's actions, and of its states; None where the policy was trained without them."""

    action: Normalizer
    state: Normalizer | None


ModelConfig = DiffusionPolicyConfig | AutoregressiveConfig | VlaConfig
FAMILIES: dict[str, type[ModelConfig]] = {
    "diffusion_policy": DiffusionPolicyConfig,
    "autoregressive_policy": AutoregressiveConfig,
    "latent_vla": VlaConfig,
}


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """An exported policy.

    Attributes:
      family: of `FAMILIES`.
      observation: how observations become tokens.
      model: everything else of the network.
      interface: what is seen.
      robots: by name of the dataset.
    """

    family: str
    observation: ObservationConfig
    model: ModelConfig
    interface: InterfaceConfig
    robots: Mapping[str, Robot]


def parse_policy(content: Mapping[str, Any], path: Path) -> PolicyConfig:
    """The policy that a config.json describes; raises ModelFileError, naming the field, where it describes none."""
    if content.get("kind") != "policy":
        raise ModelFileError(f"{path}: kind {content.get('kind')!r} is no policy.")
    family = content.get("family")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ModelFileError(f"{path}: family {family!r} must be one of {', '.join(FAMILIES)}.")
    config = PolicyConfig(
        family,
        parse_section(ObservationConfig, content.get("observation"), path, "observation."),
        parse_section(FAMILIES[family], content.get("model"), path, "model."),
        parse_section(InterfaceConfig, content.get("interface"), path, "interface."),
        _parse_robots(content.get("robots"), path),
    )
    _check_sizes(config, path)
    return config


def _parse_robots(content: Any, path: Path) -> dict[str, Robot]:
    if not isinstance(content, dict) or not content:
        raise ModelFileError(f"{path}: robots must hold the scales of at least one robot.")
    robots = {}
    for name, scales in content.items():
        try:
            state = scales["state"]
            robots[name] = Robot(
                normalizer_from_json(scales["action"]), None if state is None else normalizer_from_json(state)
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFileError(f"{path}: robots.{name} holds no scales of actions and states: {error}.") from error
    return robots


def _check_sizes(config: PolicyConfig, path: Path) -> None:
    """Raises ModelFileError unless sizes go together and choices are known."""
    observation, text = config.observation, config.observation.text
    check_choice(config.interface.fit, FITS, f"{path}: interface.fit")
    check_choice(observation.image_tower, IMAGE_TOWERS, f"{path}: observation.image_tower")
    _check_text(text, path)
    if len(config.interface.cameras) != observation.cameras:
        raise ModelFileError(f"{path}: interface.cameras must be {observation.cameras} names.")
    positive = {"observation.instants": observation.instants, "interface.stride": config.interface.stride}
    for name, size in (positive | {"model.chunk": config.model.chunk}).items():
        if not size:
            raise ModelFileError(f"{path}: {name} must not be 0.")
    patch_size = CONV_STRIDE if observation.image_tower == "conv" else observation.encoder.patch_size
    for name, whole, part in (
        ("observation.encoder.patch_size", observation.image_size, patch_size),
        ("observation.pool", observation.grid if patch_size else 0, observation.pool),
        ("observation.text.pool", text.max_length, text.pool),
        *((f"{name}, in heads,", width, heads) for name, width, heads in _attention(config)),
    ):
        if not whole or not part or whole % part:
            raise ModelFileError(f"{path}: {name} {part} does not divide {whole}.")
    _check_model(config.model, path)
    for name, robot in config.robots.items():
        if robot.action.size > config.model.action_size:
            raise ModelFileError(f"{path}: robots.{name} has more numbers in an action than model.action_size.")
        if robot.state is not None and robot.state.size > observation.state_size:
            raise ModelFileError(f"{path}: robots.{name} has more numbers in a state than observation.state_size.")


def _check_text(text: TextConfig, path: Path) -> None:
    """Raises ModelFileError unless the tower is known and has what it needs."""
    where = f"{path}: observation.text"
    check_choice(text.tower, TEXT_TOWERS, f"{where}.tower")
    if text.prompt.count("{}") != 1:
        raise ModelFileError(f"{where}.prompt {text.prompt!r} must have {{}} once.")
    if text.tower not in _PUBLIC_SIZES:
        return
    for name in ("tokenizer_file", "width", "depth", "vocabulary_size", "mlp_width", *_PUBLIC_SIZES[text.tower]):
        if not getattr(text, name):
            raise ModelFileError(f"{where}.{name} is missing, which the tower {text.tower} needs.")
    gates = ("", GATED) if text.tower == "t5" else ("",)
    check_choice(text.activation, tuple(gate + name for gate in gates for name in ACTIVATIONS), f"{where}.activation")
    if text.tower == "clip" and text.positions < text.max_length:
        raise ModelFileError(f"{where}.positions {text.positions} must be at least max_length, {text.max_length}.")
    # A quarter of them are for one distance each, on either side.
    if text.tower == "t5" and not 1 <= text.relative_buckets // 4 < text.relative_distance:
        raise ModelFileError(
            f"{where}.relative_buckets {text.relative_buckets} must be at least 4, and a quarter of them less than "
            f"relative_distance, {text.relative_distance}."
        )


def _check_model(model: ModelConfig, path: Path) -> None:
    """Raises ModelFileError unless choices are known and dimensions are those of an action."""
    choices: dict[str, tuple[str, tuple[str, ...]]] = {}
    if isinstance(model, DiffusionPolicyConfig):
        diffusion = model.diffusion
        choices = {"diffusion.kind": (diffusion.kind, DIFFUSIONS), "diffusion.prediction": (diffusion.prediction, SAYS)}
        if not diffusion.sample_steps or not diffusion.train_steps:
            raise ModelFileError(f"{path}: model.diffusion must have steps.")
    elif isinstance(model, AutoregressiveConfig):
        choices = {"latent_head": (model.latent_head, LATENT_HEADS)}
    else:
        choices = {"action_head": (model.action_head, ACTION_HEADS)}
    for name, (value, known) in choices.items():
        check_choice(value, known, f"{path}: model.{name}")
    if not isinstance(model, DiffusionPolicyConfig) and not all(dim < model.action_size for dim in model.gripper_dims):
        raise ModelFileError(f"{path}: model.gripper_dims {model.gripper_dims} are no dimensions of an action.")


def _attention(config: PolicyConfig) -> Iterator[tuple[str, int, int]]:
    """Names, widths and heads of all transformers."""
    observation, text, model = config.observation, config.observation.text, config.model
    if observation.image_tower != "conv":
        yield "observation.encoder", observation.encoder.width, observation.encoder.num_heads
    if text.tower in ("bytes", "clip"):
        yield "observation.text", text.width, text.num_heads
    if isinstance(model, VlaConfig):
        # Groups of heads share keys and values, and the halves of a head are rotated together.
        yield "model.decoder.num_kv_heads", model.decoder.num_heads, model.decoder.num_kv_heads
        yield "model.decoder.head_size", model.decoder.head_size, 2
    else:
        yield "model", model.width, model.num_heads
