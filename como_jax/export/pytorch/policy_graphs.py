"""One step of a policy as a program: torch.export's .pt2, and ONNX, for one robot at a time.

Of the diffusion policy it is one evaluation of the network, which a sampler calls again and again: what it says of a
noisy chunk at a time. The autoregressive policy evaluates its network once where it generates no latents, and its step
is a whole chunk of normalised actions. Axes: H steps of a chunk, A action.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from etils import epath
from torch import Tensor, nn

from como_jax.errors import ConfigError
from como_jax.export.pytorch.evaluations import NETWORK, one_step, to_observation
from como_jax.export.pytorch.graphs import check_installed
from como_jax.export.pytorch.parity import refuse_large, relative_error
from como_jax.export.pytorch.policy_noise import draw_noise
from como_jax.export.pytorch.policy_parity import PolicyReference
from como_jax.runtime_torch.autoregressive_policy import AutoregressivePolicy
from como_jax.runtime_torch.diffusion import denoise
from como_jax.runtime_torch.diffusion_policy import DiffusionPolicy
from como_jax.runtime_torch.latent_heads import with_gripper
from como_jax.runtime_torch.noise import GivenNoise
from como_jax.runtime_torch.observation import Observation

STEPS = {
    "diffusion_policy": "what is said of `noisy`, a chunk [1, H, A], at `time` [1], which goes from 1, noise, to 0",
    "autoregressive_policy": "a chunk of normalised actions [1, H, A]",
}
"""What a step gives, by family."""

Program = Callable[[dict[str, Tensor]], Tensor]
"""Takes inputs by name."""


class DiffusionStep(nn.Module):
    """One evaluation of the network of a diffusion policy."""

    def __init__(self, policy: DiffusionPolicy):
        super().__init__()
        self.policy = policy

    def forward(self, noisy: Tensor, time: Tensor, *observation: Tensor) -> Tensor:
        """What the network says of `[1, H, A]` at times `[1]`."""
        return self.policy.evaluate(noisy, time, self.policy.read(Observation(*observation)))


class AutoregressiveStep(nn.Module):
    """All of an autoregressive policy that generates no latents."""

    def __init__(self, policy: AutoregressivePolicy):
        super().__init__()
        self.policy = policy

    def forward(self, *observation: Tensor) -> Tensor:
        """Normalised actions `[1, H, A]`."""
        return self.policy.sample_actions(Observation(*observation), GivenNoise(()))


def check_formats(formats: Sequence[str], described: Mapping[str, Any]) -> None:
    """Raises ConfigError where a format is unknown, its package missing, or the policy has no such step.

    Args:
      formats: wanted ones.
      described: what config.json says of the policy.
    """
    for name in formats:
        if name not in _WRITERS:
            raise ConfigError(f"--formats {name!r} must be one of {', '.join(_WRITERS)}.")
        check_installed(name)
    if formats and (described["family"] not in STEPS or described["model"].get("generate_latents")):
        raise ConfigError(
            f"--formats {','.join(formats)}: this policy writes token after token, which is no single program; leave "
            "--formats out."
        )


def write_step(name: str, policy: nn.Module, reference: PolicyReference, folder: epath.Path) -> dict[str, float]:
    """Writes step.pt2 or step.onnx, and returns the difference to JAX of what it computes.

    Args:
      name: pt2 or onnx.
      policy: of a family in `STEPS`.
      reference: that it is compared with.
      folder: that gets the file.

    Raises:
      ConversionError: the difference is too large.
    """
    # The first of two samples.
    seen = [None if part is None else part[:1] for part in to_observation(reference.observation)]
    names = [field for field, part in zip(Observation._fields, seen, strict=True) if part is not None]
    inputs = dict(zip(names, (part for part in seen if part is not None), strict=True))
    if isinstance(policy, DiffusionPolicy):
        start, time = torch.zeros(1, policy.config.chunk, policy.config.action_size), torch.ones(1)
        program = _WRITERS[name](DiffusionStep(policy), {"noisy": start, "time": time, **inputs}, folder)
        found = _denoise(policy, program, inputs, reference)
    else:
        program = _WRITERS[name](AutoregressiveStep(policy), inputs, folder)
        found = program(inputs)
    wanted = torch.from_numpy(np.array(reference.evaluated[NETWORK][:1]))
    if isinstance(policy, AutoregressivePolicy):
        # Of all instants the last.
        wanted = with_gripper(wanted[:, -1], policy.config.gripper_dims)
    parity = {f"step.{name}": relative_error(found.numpy(), wanted.numpy())}
    refuse_large(parity)
    return parity


def _denoise(
    policy: DiffusionPolicy, program: Program, inputs: dict[str, Tensor], reference: PolicyReference
) -> Tensor:
    """The sample of one step of denoising, as the reference has it, with a program in place of the network."""
    noise = GivenNoise(draw_noise(policy.config, reference.keys[:1]))
    start = noise.normal(1, policy.config.chunk, policy.config.action_size)

    def network(noisy: Tensor, time: Tensor) -> Tensor:
        return program({"noisy": noisy, "time": time, **inputs})

    return denoise(one_step(policy.config.diffusion), network, start, noise)


def _write_pt2(step: nn.Module, inputs: dict[str, Tensor], folder: epath.Path) -> Program:
    path = folder / "step.pt2"
    torch.export.save(torch.export.export(step.eval(), tuple(inputs.values())), path)
    loaded = torch.export.load(path).module()
    return lambda given: loaded(*(given[name] for name in inputs))


def _write_onnx(step: nn.Module, inputs: dict[str, Tensor], folder: epath.Path) -> Program:
    import onnxruntime

    path = folder / "step.onnx"
    torch.onnx.export(
        step.eval(),
        tuple(inputs.values()),
        path,
        dynamo=True,
        input_names=list(inputs),
        output_names=["said"],
        external_data=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(given: dict[str, Tensor]) -> Tensor:
        # What a program does not read is no input of it.
        wanted = {node.name for node in session.get_inputs()}
        arrays: dict[str, Any] = {name: value.numpy() for name, value in given.items() if name in wanted}
        return torch.from_numpy(session.run(None, arrays)[0])

    return run


_WRITERS = {"pt2": _write_pt2, "onnx": _write_onnx}
