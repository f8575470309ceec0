"""Settings of the policies: what they observe, and the networks of the three families."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from como_jax.errors import ConfigError
from como_jax.spec.towers import DecoderConfig, TextConfig, VitConfig

IMAGE_TOWERS = ("vit", "siglip", "patch")
FINE_PATCH, COARSE_PATCH = 8, 2
"""Sides of the patches of the small image tower: in pixels, and in features of those."""
_PATCH = FINE_PATCH * COARSE_PATCH
DIFFUSIONS = ("ddpm", "flow", "regression")
PREDICTIONS = ("epsilon", "sample")
LATENT_HEADS = ("regression", "diffusion")
VECTOR_HEADS = ("regression", "flow")
ACTION_HEADS = ("bins", *VECTOR_HEADS)
RENAMED_FIELDS = {"think": "generate_latents"}
"""Fields that runs and exports of earlier versions hold under another name."""


def with_new_names(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section of a config.json, whose fields of earlier versions get their present names: an `object_hook`."""
    return {RENAMED_FIELDS.get(name, name): value for name, value in section.items()}


@dataclasses.dataclass(frozen=True)
class ObservationConfig:
    """How observations become tokens.

    Attributes:
      image_tower: "vit", "siglip", or "patch", two linear layers over patches, trained from scratch.
      vit: sizes of the ViT or SigLIP; the tower over patches uses only image size and width.
      freeze_images: whether the ViT or SigLIP gets no gradient.
      pool: side of the square of image tokens that become one; 1 keeps all. Those of the tower over patches are joined,
        which keeps what lies where, and others are averaged.
      cameras: number of cameras.
      instants: number of images of each camera, one after another.
      state_size: numbers in the proprioceptive state; 0 leaves it out.
      text: the tower that reads instructions.
    """

    vit: VitConfig
    text: TextConfig
    image_tower: str = "vit"
    freeze_images: bool = False
    pool: int = 1
    cameras: int = 1
    instants: int = 1
    state_size: int = 0

    def __post_init__(self) -> None:
        if self.image_tower not in IMAGE_TOWERS:
            raise ConfigError(f"encoder.tower {self.image_tower!r} must be one of {', '.join(IMAGE_TOWERS)}.")
        if self.image_tower == "patch" and self.vit.image_size % _PATCH:
            raise ConfigError(
                f"encoder.tower=patch needs a data.image_size that {_PATCH} divides, not {self.vit.image_size}."
            )
        if self.pool < 1 or self.grid % self.pool:
            raise ConfigError(f"encoder.pool {self.pool} must divide the {self.grid} image tokens along one side.")
        if self.freeze_images and self.image_tower == "patch":
            raise ConfigError("encoder.frozen needs another encoder.tower: that over patches starts from scratch.")

    @property
    def grid(self) -> int:
        """Image tokens along one side, before pooling."""
        return self.vit.image_size // _PATCH if self.image_tower == "patch" else self.vit.grid

    @property
    def pooled_width(self) -> int:
        """Numbers in an image token after pooling."""
        return self.pool**2 * self.vit.width if self.image_tower == "patch" else self.vit.width


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """How samples are noised and made.

    Attributes:
      kind: "ddpm" (arXiv 2006.11239) on the cosine schedule (arXiv 2102.09672), sampled by DDIM (arXiv 2010.02502);
        "flow", matching the straight flow from noise to data (arXiv 2210.02747); or "regression", which adds no noise
        and predicts the mean in one step, for demonstrations that do alike what can be done in several ways.
      train_steps: noise levels of DDPM; flow matching knows all.
      sample_steps: steps of sampling.
      prediction: what the network of DDPM predicts: the clean "sample", or the noise, "epsilon". At the noisiest steps
        of the cosine schedule, a sample computed from predicted noise has an error of many times its size, so that
        "epsilon" needs `clip`.
      eta: share of DDPM's noise that DDIM adds at every step; 0 is deterministic.
      clip: largest magnitude of a clean sample on the way back, for data of known limits; 0 clips nothing.
    """

    kind: str = "ddpm"
    train_steps: int = 100
    sample_steps: int = 10
    prediction: str = "sample"
    eta: float = 0.0
    clip: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in (("kind", DIFFUSIONS), ("prediction", PREDICTIONS)):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"model.diffusion.{name} {getattr(self, name)!r} must be one of {', '.join(choices)}."
                )
        limit = self.train_steps if self.kind == "ddpm" else math.inf
        if not 1 <= self.sample_steps <= limit:
            raise ConfigError(f"model.diffusion.sample_steps must lie between 1 and {limit}, not {self.sample_steps}.")


@dataclasses.dataclass(frozen=True)
class DiffusionPolicyConfig:
    """Sizes and losses.

    Attributes:
      width, depth, num_heads: of the trunk.
      chunk: steps of a chunk.
      stride: steps between two instants of the history.
      action_size: numbers in an action; 0 for a policy without that head, to be finetuned.
      latent_size: numbers of a latent motion; 0 for a policy without that head.
      diffusion: how chunks are noised and made.
      draws: noisy versions of every chunk in a batch, which share the reading of the observation.
      action_weight, latent_weight: of the two losses, each a mean over what is there.
      latent_share: of the samples that have both actions and latent motion, how often latent motion is drawn.
      instruction_dropout: how often the instruction is hidden in training, for guidance.
      guidance: strength of classifier-free guidance by the instruction (arXiv 2207.12598); 1 is off.
    """

    width: int = 512
    depth: int = 12
    num_heads: int = 8
    chunk: int = 16
    stride: int = 1
    action_size: int = 7
    latent_size: int = 0
    diffusion: DiffusionConfig = DiffusionConfig()
    draws: int = 1
    action_weight: float = 1.0
    latent_weight: float = 1.0
    latent_share: float = 0.5
    instruction_dropout: float = 0.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.guidance != 1 and not self.instruction_dropout:
            raise ConfigError("model.guidance needs a policy trained with model.instruction_dropout above 0.")


@dataclasses.dataclass(frozen=True)
class AutoregressiveConfig:
    """Everything of the policy but its observation encoder.

    Attributes:
      action_size: numbers in an action; 0 for a policy of latents alone, which has no parameters for actions.
      chunk: actions that are predicted at once.
      stride: steps between two instants of the history.
      width, depth, num_heads: of the transformer.
      gripper_dim: the dimension of the action that only opens or closes a gripper, -1 for none. Its sign after
        normalisation is learned by cross entropy, and -1 or 1 predicted: use a normalisation to [-1, 1].
      latent_queries: latent tokens of a transition.
      latent_dim: numbers in each of them; 0 for a policy without latents, which has no parameters for them.
      codebook_size: of discrete latents, which are learned as codes; 0 for continuous ones.
      latent_head: "regression", or "diffusion" with a head of its own noise; both of continuous latents.
      head_width, head_depth, diffusion_steps: of the diffusion head.
      latent_dropout: share of the samples whose action queries do not see the latents in training.
      action_weight: of the action's loss (Moto has 100, with actions in their own units).
      gripper_weight: of the gripper's part in it (0.01 in Moto).
      latent_weight: of the latents' loss.
      generate_latents: whether latents are generated before actions, which then depend on them. It has no effect in a
        policy without latents.
      temperature: of generated codes; 0 takes the likeliest.
    """

    action_size: int
    chunk: int = 8
    stride: int = 1
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    gripper_dim: int = -1
    latent_queries: int = 8
    latent_dim: int = 0
    codebook_size: int = 0
    latent_head: str = "regression"
    head_width: int = 512
    head_depth: int = 3
    diffusion_steps: int = 100
    latent_dropout: float = 0.5
    action_weight: float = 1.0
    gripper_weight: float = 0.1
    latent_weight: float = 1.0
    generate_latents: bool = False
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if not self.action_size and not self.latent_dim:
            raise ConfigError("model.action_size and model.latent_dim are both 0: there is nothing to learn.")
        if self.latent_head not in LATENT_HEADS:
            raise ConfigError(
                f"model.latent_head {self.latent_head!r} is unknown; choose one of {', '.join(LATENT_HEADS)}."
            )
        if not -1 <= self.gripper_dim < self.action_size:
            raise ConfigError(
                f"model.gripper_dim {self.gripper_dim} is no dimension of actions of {self.action_size} numbers; "
                "count from 0, or set -1 for none."
            )
        if self.codebook_size and self.latent_head != "regression":
            raise ConfigError("model.latent_head=diffusion needs continuous latents: set model.codebook_size=0.")

    @property
    def action_tokens(self) -> int:
        """Action queries of an instant; 0 without actions."""
        return self.chunk if self.action_size else 0

    @property
    def head_diffusion(self) -> DiffusionConfig:
        """How the diffusion head makes a latent: DDIM with an eta of 1 is DDPM (arXiv 2006.11239, algorithm 2)."""
        # Latents are normalised, so that larger estimates come only from nearly pure noise.
        return DiffusionConfig("ddpm", self.diffusion_steps, self.diffusion_steps, "epsilon", eta=1.0, clip=5.0)

    @property
    def latent_tokens(self) -> int:
        """Latent tokens of an instant: the start token and the latents; 0 without latents."""
        return self.latent_queries + 1 if self.latent_dim else 0


@dataclasses.dataclass(frozen=True)
class VlaConfig:
    """Everything of the policy but its observation encoder.

    Attributes:
      decoder: its sizes.
      action_size: numbers in an action; 0 for a policy of latents alone, which has no parameters for actions.
      chunk: actions that are written, one after another; 1 in LAPA.
      stride: steps between two instants of the history.
      action_head: "bins", a token for every number, or "regression" or "flow", a token for every action.
      num_bins: of the range from -1 to 1 of a normalised number. With `data.normalization=uniform` they hold equally
        many of the data's, as in LAPA.
      gripper_dim: the dimension of the action that only opens or closes a gripper, -1 for none: it is -1 or 1 by its
        sign after normalisation.
      latent_queries: latent tokens of a transition.
      latent_dim: numbers in each of them; 0 for a policy without latents, which has no parameters for them.
      codebook_size: of discrete latents, which are learned as codes; 0 for continuous ones.
      latent_head: "regression" or "flow", of continuous latents.
      head_width, head_depth, flow_steps: of the networks that match flows, and of their sampling.
      action_weight, latent_weight, text_weight: of the losses; 0.99 and 0.01 for latents and text in LAPA.
      causal_text: whether the instruction reads itself from left to right and images do not read it, which learning
        it as text needs.
      color_jitter: strength of random changes of the images' colours in training; 0 for none.
      temperature: of generated codes and bins; 0 takes the likeliest.
    """

    decoder: DecoderConfig
    action_size: int
    chunk: int = 1
    stride: int = 1
    action_head: str = "bins"
    num_bins: int = 256
    gripper_dim: int = -1
    latent_queries: int = 4
    latent_dim: int = 0
    codebook_size: int = 0
    latent_head: str = "regression"
    head_width: int = 512
    head_depth: int = 3
    flow_steps: int = 10
    action_weight: float = 1.0
    latent_weight: float = 0.99
    text_weight: float = 0.0
    causal_text: bool = False
    color_jitter: float = 0.0
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if not self.action_size and not self.latent_dim:
            raise ConfigError("model.action_size and model.latent_dim are both 0: there is nothing to learn.")
        for name, choices in (("action_head", ACTION_HEADS), ("latent_head", VECTOR_HEADS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"model.{name} {getattr(self, name)!r} must be one of {', '.join(choices)}.")
        if not -1 <= self.gripper_dim < max(self.action_size, 1):
            raise ConfigError(
                f"model.gripper_dim {self.gripper_dim} is no dimension of actions of {self.action_size} numbers; "
                "count from 0, or set -1 for none."
            )
        if self.num_bins < 2:
            raise ConfigError(f"model.num_bins must be at least 2, not {self.num_bins}.")
        if self.text_weight and not self.causal_text:
            raise ConfigError("model.text_weight needs model.causal_text=True: text that reads itself is known to it.")

    @property
    def head_diffusion(self) -> DiffusionConfig:
        """How heads that match flows make a vector."""
        return DiffusionConfig("flow", sample_steps=self.flow_steps)
