"""What a policy sees, as tokens of one width: images of all cameras, proprioception and the instruction.

Axes: B batch, T instants, C cameras, N tokens of one instant, M tokens of the instruction, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from como_jax.runtime_torch.layers import LayerNorm, Linear, normalize_frames, patchify
from como_jax.runtime_torch.text_towers import (
    ByteTransformer,
    ClipTextTower,
    EmbeddingTower,
    T5Tower,
    TextFeatures,
    TokenTable,
)
from como_jax.runtime_torch.vit import Siglip, Vit
from como_jax.spec.policies import COARSE_PATCH, FINE_PATCH, ObservationConfig
from como_jax.spec.towers import TextConfig


class Observation(NamedTuple):
    """The inputs of the network for one batch.

    Attributes:
      images: uint8 RGB `[B, T, C, H, W, 3]`; the last instant is now.
      has_camera: float32 `[B, C]`, 0 where an image is missing and black.
      instruction: int32 `[B, M]`, token ids plus one, 0 after the end; or embeddings, float32 `[B, E]`.
      state: float32 `[B, T, S]`, normalised proprioception, or None where the policy has none.
      has_state: float32 `[B]`, 0 where the robot has no state, or None.
    """

    images: Tensor
    has_camera: Tensor
    instruction: Tensor
    state: Tensor | None = None
    has_state: Tensor | None = None


class ObservationFeatures(NamedTuple):
    """Tokens of every instant `[B, T, N, D]`, their mask, bool `[B, T, N]`, and the tokens of the instruction."""

    tokens: Tensor
    mask: Tensor
    text: TextFeatures

    def context(self) -> tuple[Tensor, Tensor]:
        """All tokens `[B, T * N + M, D]` in one sequence, and their mask."""
        tokens = torch.cat([self.tokens.flatten(1, 2), self.text.tokens], dim=1)
        return tokens, torch.cat([self.mask.flatten(1), self.text.mask], dim=1)


class PatchTower(nn.Module):
    """Two linear layers over patches: of 8 x 8 pixels, and of 2 x 2 of what the first one makes of them."""

    def __init__(self, width: int):
        super().__init__()
        self.fine = Linear(FINE_PATCH**2 * 3, 2 * width)
        self.fine_norm = LayerNorm(2 * width)
        self.coarse = Linear(COARSE_PATCH**2 * 2 * width, width)
        self.coarse_norm = LayerNorm(width)

    def forward(self, frames: Tensor) -> Tensor:
        """Features `[B, N, D]` of the 16 x 16 patches of uint8 `[B, H, W, 3]`."""
        height, width = frames.shape[1:3]
        fine = F.silu(self.fine_norm(self.fine(patchify(normalize_frames(frames), FINE_PATCH))))
        cells = fine.unflatten(1, (height // FINE_PATCH, width // FINE_PATCH))
        return F.silu(self.coarse_norm(self.coarse(patchify(cells, COARSE_PATCH))))


class ObservationEncoder(nn.Module):
    """Reads an `Observation`. One image tower sees the images of all cameras and instants."""

    def __init__(self, config: ObservationConfig, width: int):
        super().__init__()
        self.config = config
        self.images = _make_image_tower(config)
        self.image_proj = Linear(config.pooled_width, width)
        self.image_pos = nn.Parameter(torch.empty((config.grid // config.pool) ** 2, width))
        self.camera_embed = nn.Parameter(torch.empty(config.cameras, width))
        self.instant_embed = nn.Parameter(torch.empty(config.instants, width))
        text = config.text
        if text.tower == "tokens":
            self.text: nn.Module = TokenTable(text, width)
        else:
            self.text = _TEXT_TOWERS[text.tower](text)
            self.text_proj = Linear(text.width, width)
        if config.state_size:
            self.state_proj = Linear(config.state_size, width)
            self.no_state = nn.Parameter(torch.empty(width))

    def forward(self, observation: Observation) -> ObservationFeatures:
        """Tokens of width D of the whole observation."""
        images = self._image_tokens(observation.images) + self.image_pos + self.camera_embed[:, None]
        instants, per_camera = images.shape[1], images.shape[3]
        tokens = images.flatten(2, 3)
        mask = (observation.has_camera > 0).repeat_interleave(per_camera, dim=1)[:, None].expand(-1, instants, -1)
        if observation.state is not None and observation.has_state is not None:
            has_state = observation.has_state[:, None, None] > 0
            state = torch.where(has_state, self.state_proj(observation.state), self.no_state)
            tokens = torch.cat([tokens, state[:, :, None]], dim=2)
            mask = torch.cat([mask, mask.new_ones((*mask.shape[:2], 1))], dim=2)
        return ObservationFeatures(tokens + self.instant_embed[:, None], mask, self._read_text(observation.instruction))

    def _image_tokens(self, images: Tensor) -> Tensor:
        """`[B, T, C, H, W, 3]` to `[B, T, C, N, D]`."""
        config = self.config
        frames = images.flatten(0, 2)
        features = self.images(normalize_frames(frames))[:, 1:] if config.image_tower == "vit" else self.images(frames)
        side, pool = config.grid // config.pool, config.pool
        cells = features.reshape(-1, side, pool, side, pool, features.shape[-1])
        cells = cells.movedim(3, 2).flatten(3) if config.image_tower == "patch" else cells.mean(dim=(2, 4))
        return self.image_proj(cells.flatten(1, 2)).unflatten(0, images.shape[:3])

    def _read_text(self, instruction: Tensor) -> TextFeatures:
        found = self.text(instruction)
        if self.config.text.tower == "tokens":
            return found
        return TextFeatures(self.text_proj(found.tokens), found.mask, self.text_proj(found.pooled))


_TEXT_TOWERS: dict[str, Callable[[TextConfig], nn.Module]] = {
    "bytes": ByteTransformer,
    "clip": ClipTextTower,
    "t5": T5Tower,
    "embedding": EmbeddingTower,
}


def _make_image_tower(config: ObservationConfig) -> nn.Module:
    if config.image_tower == "patch":
        return PatchTower(config.vit.width)
    return (Vit if config.image_tower == "vit" else Siglip)(config.vit)
