"""Image towers of policies beside the ViT. Axes: B batch, H and W pixels, N patches, D width."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from como_jax.runtime_torch.layers import Block, LayerNorm, Linear, normalize_frames, patchify, run_blocks
from como_jax.spec.towers import VitConfig


class ConvTower(nn.Module):
    """Four convolutions of stride 2, each followed by a norm over channels and a SiLU; float32, for it is small."""

    in_float32 = ("convs", "norms")

    def __init__(self, width: int):
        super().__init__()
        channels = (3, max(8, width // 4), max(8, width // 2), width, width)
        self.convs = nn.ModuleList(nn.Conv2d(*sizes, 3, stride=2) for sizes in itertools.pairwise(channels))
        self.norms = nn.ModuleList(LayerNorm(size) for size in channels[1:])

    def forward(self, frames: Tensor) -> Tensor:
        """Features `[B, H / 16 * W / 16, D]` of uint8 `[B, H, W, 3]`."""
        x = normalize_frames(frames).movedim(-1, 1)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            # An even side needs one more pixel, which training has at the end.
            x = F.silu(norm(conv(F.pad(x, (0, 1, 0, 1))).movedim(1, -1))).movedim(-1, 1)
        return x.flatten(2).transpose(1, 2)


class Siglip(nn.Module):
    """SigLIP's ViT (arXiv 2303.15343): no class token, no pooling head, and GELU by its tanh formula."""

    in_float32 = ("norm",)

    def __init__(self, config: VitConfig):
        super().__init__()
        self.patch_size, width = config.patch_size, config.width
        self.patch_embed = Linear(config.patch_size**2 * 3, width)
        self.pos_embed = nn.Parameter(torch.empty(config.grid**2, width))
        sizes = (width, config.num_heads, config.mlp_width)
        self.blocks = nn.ModuleList(Block(*sizes, tanh_gelu=True) for _ in range(config.depth))
        self.norm = LayerNorm(width)

    def forward(self, frames: Tensor) -> Tensor:
        """Features `[B, N, D]`, float32, of uint8 `[B, H, W, 3]`."""
        x = self.patch_embed(patchify(frames.float() * (2.0 / 255.0) - 1.0, self.patch_size))
        return self.norm(run_blocks(self.blocks, x + self.pos_embed))
