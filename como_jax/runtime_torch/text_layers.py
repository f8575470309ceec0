"""What the towers of public text models share. Axes: B batch, M tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# As config.json of public weights names them.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def split_text(text: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of tokens, int64 `[B, M]`, and which of them are there; the first always is.

    Args:
      text: int32 `[B, M]`, numbers of tokens plus one, 0 after the end: token 0 stays a token.
    """
    return (text.long() - 1).clamp(min=0), F.pad(text[:, 1:] != 0, (1, 0), value=True)
