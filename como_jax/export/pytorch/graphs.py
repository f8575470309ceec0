"""`encode` of a motion model as a program: torch.export's .pt2, and ONNX.

They take pairs of frames, in batches of any size: the arithmetic of two free sizes is too much for exporters.
Axes: B batch, T instants, S side of frames, Q latent tokens, L size of one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import numpy as np
import torch
from etils import epath
from torch import Tensor, nn

from como_jax.errors import ConfigError
from como_jax.runtime_torch.latent_motion import Motion

Encode = Callable[[np.ndarray], Motion]

_NEEDED = {"pt2": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}

_FREE = {"frames": {0: torch.export.Dim("batch")}}


class EncodeProgram(nn.Module):
    """`encode` of pairs as a module: uint8 `[B, 2, S, S, 3]` to latents, and codes where there are some."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Latents `[B, Q, L]` and codes `[B, Q]`."""
        return tuple(part[:, 0] for part in self.module.encode(frames) if part is not None)


def check_installed(name: str) -> None:
    """Raises ConfigError where a package that a format needs is missing."""
    missing = [package for package in _NEEDED[name] if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"--formats {name} needs {', '.join(missing)}: pip install {' '.join(missing)}")


def write_pt2(module: nn.Module, frames: np.ndarray, folder: epath.Path) -> Encode:
    """Writes encode.pt2 and returns what runs the file on clips."""
    example, path = torch.from_numpy(_pairs(frames)), folder / "encode.pt2"
    program = torch.export.export(EncodeProgram(module).eval(), (example,), dynamic_shapes=_FREE)
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    return _over_clips(lambda pairs: [part.numpy() for part in loaded(torch.from_numpy(pairs))])


def write_onnx(module: nn.Module, frames: np.ndarray, folder: epath.Path) -> Encode:
    """Writes encode.onnx, with its weights in encode.onnx.data, and returns what runs it on clips."""
    import onnxruntime

    path = folder / "encode.onnx"
    torch.onnx.export(
        EncodeProgram(module).eval(),
        (torch.from_numpy(_pairs(frames)),),
        path,
        dynamo=True,
        dynamic_shapes=_FREE,
        input_names=["frames"],
        output_names=["latent", "codes"],
        external_data=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return _over_clips(lambda pairs: session.run(None, {"frames": pairs}))


def _pairs(frames: np.ndarray) -> np.ndarray:
    """Consecutive frames `[B * (T - 1), 2, ...]` of clips `[B, T, ...]`."""
    pairs = np.stack([frames[:, :-1], frames[:, 1:]], axis=2)
    return pairs.reshape(-1, *pairs.shape[2:])


def _over_clips(run: Callable[[np.ndarray], Sequence[np.ndarray]]) -> Encode:
    """What encodes clips `[B, T, ...]` with a program that encodes pairs."""

    def encode(frames: np.ndarray) -> Motion:
        latent, *codes = (part.reshape(len(frames), -1, *part.shape[1:]) for part in run(_pairs(frames)))
        return Motion(latent, codes[0] if codes else None)

    return encode
