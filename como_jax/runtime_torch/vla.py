"""A vision-language-action model: a decoder that reads images and an instruction and writes actions (LAPA,
arXiv 2410.11758), token after token.

Axes: B batch, P tokens of the prefix, S of an output, L numbers of one, H steps of a chunk, A action, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from como_jax.runtime_torch.decoder import Decoder
from como_jax.runtime_torch.heads import CodeEmbedding, CodeHead, DiffusionHead, RegressionHead, with_gripper
from como_jax.runtime_torch.layers import Linear
from como_jax.runtime_torch.noise import Noise
from como_jax.runtime_torch.observation import Observation, ObservationEncoder
from como_jax.spec.policies import ObservationConfig, VlaConfig


class Prefix(NamedTuple):
    """What the decoder reads before it writes.

    Attributes:
      tokens: `[B, P, D]`, those of images first, those of the instruction after them.
      present: bool `[B, P]`, False at padding.
      mask: bool `[B, P, P]`; row i says what token i reads.
    """

    tokens: Tensor
    present: Tensor
    mask: Tensor

    @property
    def positions(self) -> Tensor:
        """Positions of the tokens, int64 `[B, P]`; padding does not count."""
        return (self.present.cumsum(dim=1) - 1).clamp(min=0)


class OutputTokens(nn.Module):
    """The tokens of a chunk: a code for every number, or a vector for every action."""

    def __init__(self, config: VlaConfig):
        super().__init__()
        self.config, width = config, config.decoder.width
        self.is_coded = config.action_head == "bins"
        self.length = config.chunk * config.action_size if self.is_coded else config.chunk
        self.start = nn.Parameter(torch.empty(width))
        self.places = nn.Parameter(torch.empty(self.length, width))
        if self.is_coded:
            self.embed: nn.Module = CodeEmbedding(config.num_bins, width)
            self.head: CodeHead | RegressionHead | DiffusionHead = CodeHead(width, config.num_bins, config.temperature)
            return
        self.embed = Linear(config.action_size, width)
        if config.action_head == "regression":
            self.head = RegressionHead(width, config.action_size)
        else:
            sizes = {"hidden": config.head_width, "depth": config.head_depth}
            self.head = DiffusionHead(width, config.action_size, config.head_diffusion, **sizes)

    def input_at(self, token: int, before: Tensor | None, batch: int) -> Tensor:
        """The input at a token, `[B, 1, D]`, from the value before it, `[B]` or `[B, L]`; None at the first token."""
        known = self.start.expand(batch, -1) if before is None else self.embed(before)
        return (known + self.places[token])[:, None]


class LatentVla(nn.Module):
    """See the module's docstring; it has the output of actions, and none of latent actions."""

    def __init__(self, observation: ObservationConfig, config: VlaConfig):
        super().__init__()
        self.config = config
        self.observation = ObservationEncoder(observation, config.decoder.width)
        self.decoder = Decoder(config.decoder)
        self.action = OutputTokens(config)

    def sample_actions(self, observation: Observation, noise: Noise) -> Tensor:
        """Normalised actions, float32 `[B, H, A]`, from now on.

        The head draws from `noise` token after token.
        """
        config = self.config
        values = self.write(observation, lambda _, features: self.action.head.sample(features, noise))
        if self.action.is_coded:
            # The middle of each bin of the range from -1 to 1.
            values = (values.float() + 0.5) * (2 / config.num_bins) - 1
        return with_gripper(values.reshape(len(values), config.chunk, config.action_size), config.gripper_dim)

    def write(self, observation: Observation, choose: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The values of the action's tokens, `[B, S]` or `[B, S, L]`.

        Args:
          observation: what is seen.
          choose: gives the values of a token, by its number, from the decoder's output `[B, D]` before it.
        """
        prefix = self.read(observation)
        _, cache = self.decoder(prefix.tokens, prefix.positions, prefix.mask)
        length, readable = prefix.present.sum(dim=1, keepdim=True), prefix.present[:, None]
        values: list[Tensor] = []
        for token in range(self.action.length):
            x = self.action.input_at(token, values[-1] if values else None, len(length))
            readable = F.pad(readable, (0, 1), value=True)
            # The output starts where the prefix ends.
            features, cache = self.decoder(x, length + token, readable, cache)
            values.append(choose(token, features[:, 0]))
        return torch.stack(values, dim=1)

    def read(self, observation: Observation) -> Prefix:
        """The prefix made of the observation and its instruction."""
        features = self.observation(observation)
        tokens, present = features.context()
        number = torch.arange(tokens.shape[1], device=tokens.device)
        allowed = torch.ones_like(present[:, None])
        if self.config.causal_text:
            seen = len(number) - features.text.tokens.shape[1]
            allowed = (number <= number[:, None]) | (number < seen)
        # A token that is not there is read only by itself, which keeps every row of the softmax finite.
        return Prefix(tokens, present, (allowed & present[:, None]) | (number == number[:, None]))
