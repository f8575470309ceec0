"""CoMo (arXiv 2505.17006) and its variants: latent motion from frames, and frames from latent motion.

Axes: B batch, T instants, P = T - 1 pairs, N tokens of one frame, M patches, D width, Q queries, L latent size of one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from como_jax.runtime_torch.bottlenecks import make_bottleneck
from como_jax.runtime_torch.layers import (
    Block,
    LayerNorm,
    Linear,
    denormalize_frames,
    normalize_frames,
    patchify,
    run_blocks,
    unpatchify,
)
from como_jax.runtime_torch.vit import Vit
from como_jax.spec.motion import MotionConfig
from como_jax.spec.towers import VitConfig


class InverseDynamics(nn.Module):
    """ME-IDM, the motion Q-former: learned queries read the current frame's features and its motion."""

    in_float32 = ("latent_out",)

    def __init__(self, num_tokens: int, feature_width: int, output_dim: int, config: MotionConfig):
        super().__init__()
        width, self.num_queries = config.idm_width, config.num_queries
        self.conditioned = config.motion_input != "future_only"
        self.input_proj = Linear(feature_width, width)
        self.queries = nn.Parameter(torch.empty(1, config.num_queries, width))
        self.motion_type = nn.Parameter(torch.empty(1, 1, width))
        if self.conditioned:
            self.separator = nn.Parameter(torch.empty(1, 1, width))
            self.condition_type = nn.Parameter(torch.empty(1, 1, width))
        num_read = 2 * num_tokens + 1 if self.conditioned else num_tokens
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_queries + num_read, width))
        self.blocks = nn.ModuleList(Block(width, config.idm_heads) for _ in range(config.idm_depth))
        self.norm = LayerNorm(width)
        self.latent_hidden = Linear(width, width)
        self.latent_out = Linear(width, output_dim)

    def forward(self, condition: Tensor, motion: Tensor) -> Tensor:
        """Input of the bottleneck, float32 `[B, Q, ...]`, from features `[B, N, D]` of a frame and of its motion."""
        tokens = [self.queries.expand(motion.shape[0], -1, -1)]
        if self.conditioned:
            tokens += [self.input_proj(condition) + self.condition_type, self.separator.expand(motion.shape[0], -1, -1)]
        tokens.append(self.input_proj(motion) + self.motion_type)
        x = run_blocks(self.blocks[:-1], torch.cat(tokens, dim=1) + self.pos_embed)
        x = self.norm(self.blocks[-1](x, self.num_queries))
        return self.latent_out(torch.tanh(self.latent_hidden(x)))


class ForwardDynamics(nn.Module):
    """FDM: a ViT on the current frame's pixels with the latent motion added to every patch."""

    in_float32 = ("norm", "head")

    def __init__(self, image_size: int, config: MotionConfig):
        super().__init__()
        width, pixels = config.fdm_width, config.fdm_patch_size**2 * 3
        self.image_size, self.patch_size, self.residual = image_size, config.fdm_patch_size, config.residual
        self.patch_embed = Linear(pixels, width)
        self.pos_embed = nn.Parameter(torch.empty(1, (image_size // config.fdm_patch_size) ** 2, width))
        self.latent_up = Linear(config.latent_dim, width)
        self.latent_pool = Linear(config.num_queries * width, width)
        self.blocks = nn.ModuleList(Block(width, config.fdm_heads) for _ in range(config.fdm_depth))
        self.norm = LayerNorm(width)
        self.head = Linear(width, pixels)

    def forward(self, images: Tensor, latent: Tensor) -> Tensor:
        """Normalised next images `[B, H, W, 3]` from normalised images and latent motion `[B, Q, L]`."""
        motion = self.latent_pool(self.latent_up(latent).flatten(1))
        x = self.patch_embed(patchify(images, self.patch_size)) + self.pos_embed + motion[:, None]
        patches = self.head(self.norm(run_blocks(self.blocks, x)))
        output = unpatchify(patches, self.patch_size, self.image_size)
        return images + output if self.residual else output


class Como(nn.Module):
    """Encoder, inverse dynamics, bottleneck and forward dynamics."""

    in_float32 = ("bottleneck",)

    def __init__(self, vit: VitConfig, config: MotionConfig):
        super().__init__()
        self.motion_input = config.motion_input
        self.encoder = Vit(vit)
        self.bottleneck = make_bottleneck(config.bottleneck, config.latent_dim)
        num_tokens = self.encoder.pos_embed.shape[1]
        self.idm = InverseDynamics(num_tokens, vit.width, self.bottleneck.input_dim, config)
        self.fdm = ForwardDynamics(vit.image_size, config)

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents `[B, P, Q, L]` and codes `[B, P, Q]`, or None, between frames of uint8 `[B, T, H, W, 3]`."""
        return self.bottleneck(self.infer(frames))

    def infer(self, frames: Tensor) -> Tensor:
        """Input of the bottleneck, `[B, P, Q, ...]`, for frames of uint8 `[B, T, H, W, 3]`."""
        images = normalize_frames(frames)
        features = self._features(images)
        source, target = features[:, :-1], features[:, 1:]
        if self.motion_input == "difference":
            motion = target - source
        elif self.motion_input == "rgb_difference":
            # The mean that normalisation subtracts cancels.
            motion = self._features(images[:, 1:] - images[:, :-1])
        else:
            motion = target
        return self.idm(source.flatten(0, 1), motion.flatten(0, 1)).unflatten(0, motion.shape[:2])

    def predict(self, frames: Tensor, latent: Tensor) -> Tensor:
        """The frames, float32 in [0, 1], that follow uint8 `[B, H, W, 3]` under latents `[B, Q, L]`."""
        return denormalize_frames(self.fdm(normalize_frames(frames), latent))

    def _features(self, images: Tensor) -> Tensor:
        """Token features `[B, T, N, D]` of normalised images `[B, T, H, W, 3]`."""
        return self.encoder(images.flatten(0, 1)).unflatten(0, images.shape[:2])
