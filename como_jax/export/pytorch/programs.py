"""Exports networks as programs: torch.export's .pt2 and ONNX, which need no code of this project.

The program of a motion model is `encode` for pairs of frames, in batches of any size. (Exporters cannot handle two free
sizes.) The program of a policy is one step for one robot. For the diffusion policy this is one evaluation of the
network, which a sampler calls repeatedly. For the autoregressive policy, if it generates no latents, it is all of the
policy. Axes: B batch, T instants, S side of frames, Q latent tokens, L size of a token, H steps of a chunk, A action.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from etils import epath
from torch import Tensor, nn

from como_jax.errors import ConfigError
from como_jax.export.pytorch.parity import Reference, compare, refuse_large, relative_error
from como_jax.export.pytorch.policy_parity import NETWORK, PolicyReference, draw_noise, one_step, to_torch_observation
from como_jax.runtime_torch.autoregressive import AutoregressivePolicy
from como_jax.runtime_torch.denoising import denoise
from como_jax.runtime_torch.diffusion import DiffusionPolicy
from como_jax.runtime_torch.heads import with_gripper
from como_jax.runtime_torch.latent_motion import Motion
from como_jax.runtime_torch.noise import GivenNoise
from como_jax.runtime_torch.observation import Observation
from como_jax.spec.exported import ExportedPolicy

FORMATS = {"pt2": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}
"""The formats and the packages that each needs besides PyTorch."""

STEPS = {
    "diffusion_policy": "the network's output for `noisy`, a chunk [1, H, A], at `time` [1], from 1 (noise) to 0",
    "autoregressive_policy": "a chunk of normalised actions [1, H, A]",
}
"""The output of a policy's program, by family."""

Run = Callable[[dict[str, Tensor]], list[Tensor]]
"""Runs a written program on inputs by name."""


def check_formats(formats: Sequence[str], policy: ExportedPolicy | None = None) -> None:
    """Raises ConfigError if a format is unknown, lacks a package, or the model has no program.

    Args:
      formats: keys of `FORMATS`.
      policy: that is exported; None for a motion model, which has a program of every format.
    """
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(f"`formats` has {name!r}; each must be one of {', '.join(FORMATS)}.")
        missing = [package for package in FORMATS[name] if importlib.util.find_spec(package) is None]
        if missing:
            raise ConfigError(f"The format {name} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if not formats or policy is None:
        return
    if policy.family not in STEPS or getattr(policy.model, "generate_latents", False):
        raise ConfigError(
            f"This policy generates token after token, which is no single program; leave {', '.join(formats)} out of "
            "`formats`."
        )


class EncodeProgram(nn.Module):
    """`encode` of a motion model for pairs of frames."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        """Latents `[B, Q, L]`, and codes `[B, Q]` if there are any, of uint8 `[B, 2, S, S, 3]`."""
        return tuple(part[:, 0] for part in self.module.encode(frames) if part is not None)


class DiffusionStep(nn.Module):
    """One evaluation of the network of a diffusion policy."""

    def __init__(self, policy: DiffusionPolicy):
        super().__init__()
        self.policy = policy

    def forward(self, noisy: Tensor, time: Tensor, *observation: Tensor) -> Tensor:
        """The output `[1, H, A]` for a noisy chunk `[1, H, A]` at a time `[1]`."""
        return self.policy.evaluate(noisy, time, self.policy.read(Observation(*observation)))


class AutoregressiveStep(nn.Module):
    """An autoregressive policy that generates no latents."""

    def __init__(self, policy: AutoregressivePolicy):
        super().__init__()
        self.policy = policy

    def forward(self, *observation: Tensor) -> Tensor:
        """Normalised actions `[1, H, A]`."""
        return self.policy.sample_actions(Observation(*observation), GivenNoise(()))


def write_encode(name: str, module: nn.Module, reference: Reference, folder: epath.Path) -> dict[str, float]:
    """Writes encode.pt2 or encode.onnx, and returns the difference between its outputs and those of JAX.

    Args:
      name: of the format.
      module: the motion model.
      reference: what JAX computes.
      folder: that gets the file.

    Raises:
      ConversionError: the difference is too large.
    """
    inputs = {"frames": torch.from_numpy(_pairs(reference.frames))}
    free = {"frames": {0: torch.export.Dim("batch")}}
    run = _WRITERS[name](EncodeProgram(module), inputs, ["latent", "codes"], folder / f"encode.{name}", free)

    def encode(frames: np.ndarray) -> Motion:
        found = run({"frames": torch.from_numpy(_pairs(frames))})
        latent, *codes = (part.numpy().reshape(len(frames), -1, *part.shape[1:]) for part in found)
        return Motion(latent, codes[0] if codes else None)

    return compare(reference, encode, f"encode.{name}")


def write_step(name: str, policy: nn.Module, reference: PolicyReference, folder: epath.Path) -> dict[str, float]:
    """Writes step.pt2 or step.onnx, and returns the difference between its output and that of JAX.

    Args:
      name: of the format.
      policy: of a family in `STEPS`.
      reference: what JAX computes.
      folder: that gets the file.

    Raises:
      ConversionError: the difference is too large.
    """
    path = folder / f"step.{name}"
    # The first of two samples.
    seen = [None if part is None else part[:1] for part in to_torch_observation(reference.observation)]
    inputs = {name: part for name, part in zip(Observation._fields, seen, strict=True) if part is not None}
    wanted = torch.from_numpy(np.array(reference.evaluated[NETWORK][:1]))
    if isinstance(policy, DiffusionPolicy):
        start, time = torch.zeros(1, policy.config.chunk, policy.config.action_size), torch.ones(1)
        run = _WRITERS[name](DiffusionStep(policy), {"noisy": start, "time": time, **inputs}, ["output"], path)
        found = _denoise(policy, run, inputs, reference)
    else:
        [found] = _WRITERS[name](AutoregressiveStep(policy), inputs, ["output"], path)(inputs)
        # The policy acts on the last instant.
        wanted = with_gripper(wanted[:, -1], policy.config.gripper_dim)
    parity = {path.name: relative_error(found.numpy(), wanted.numpy())}
    refuse_large(parity)
    return parity


def _denoise(policy: DiffusionPolicy, run: Run, inputs: dict[str, Tensor], reference: PolicyReference) -> Tensor:
    """One step of denoising with a program in place of the network, as the reference has it."""
    noise = GivenNoise(draw_noise(policy.config, reference.keys[:1]))
    start = noise.normal(1, policy.config.chunk, policy.config.action_size)

    def network(noisy: Tensor, time: Tensor) -> Tensor:
        return run({"noisy": noisy, "time": time, **inputs})[0]

    return denoise(one_step(policy.config.diffusion), network, start, noise)


def _pairs(frames: np.ndarray) -> np.ndarray:
    """Consecutive frames `[B * (T - 1), 2, S, S, 3]` of clips `[B, T, S, S, 3]`."""
    pairs = np.stack([frames[:, :-1], frames[:, 1:]], axis=2)
    return pairs.reshape(-1, *pairs.shape[2:])


def _write_pt2(
    module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], path: epath.Path, free: Any = None
) -> Run:
    del outputs
    torch.export.save(torch.export.export(module.eval(), tuple(inputs.values()), dynamic_shapes=free), path)
    loaded = torch.export.load(path).module()

    def run(given: dict[str, Tensor]) -> list[Tensor]:
        found = loaded(*(given[name] for name in inputs))
        return [found] if isinstance(found, Tensor) else list(found)

    return run


def _write_onnx(
    module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], path: epath.Path, free: Any = None
) -> Run:
    """Writes a file and its weights beside it, in a file that also ends in .data."""
    # An optional package, which `check_formats` has found.
    import onnxruntime

    torch.onnx.export(
        module.eval(),
        tuple(inputs.values()),
        path,
        dynamo=True,
        dynamic_shapes=free,
        input_names=list(inputs),
        output_names=outputs,
        external_data=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(given: dict[str, Tensor]) -> list[Tensor]:
        # The exporter removes inputs that the program does not use.
        wanted = {node.name for node in session.get_inputs()}
        arrays: dict[str, Any] = {name: value.numpy() for name, value in given.items() if name in wanted}
        return [torch.from_numpy(np.asarray(part)) for part in session.run(None, arrays)]

    return run


_WRITERS = {"pt2": _write_pt2, "onnx": _write_onnx}
