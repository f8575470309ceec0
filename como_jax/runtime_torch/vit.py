"""Vision transformers: with the names of MAE (arXiv 2111.06377) and timm, and that of SigLIP (arXiv 2303.15343).

Axes: B batch, H and W pixels, N patches, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from como_jax.runtime_torch.layers import Block, LayerNorm, Linear, patchify, run_blocks
from como_jax.spec.towers import VitConfig


class Vit(nn.Module):
    """Plain ViT encoder with a class token and fixed positions."""

    in_float32 = ("norm",)

    def __init__(self, config: VitConfig):
        super().__init__()
        self.patch_size, width = config.patch_size, config.width
        self.patch_embed = Linear(config.patch_size**2 * 3, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.grid**2, width))
        self.blocks = nn.ModuleList(Block(width, config.num_heads, config.mlp_width) for _ in range(config.depth))
        self.norm = LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """Features `[B, 1 + N, D]`, float32, of normalised images `[B, H, W, 3]`; the class token comes first."""
        patches = self.patch_embed(patchify(images, self.patch_size))
        cls = self.cls_token.expand(patches.shape[0], -1, -1)
        return self.norm(run_blocks(self.blocks, torch.cat([cls, patches], dim=1) + self.pos_embed))


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
