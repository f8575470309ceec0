"""The model card of an export: README.md, from config.json and provenance.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from como_jax.export.pytorch.contents import INSTALL, REQUIREMENTS_NAME
from como_jax.export.pytorch.programs import STEPS
from como_jax.spec.exported import ExportedMotion, ExportedPolicy
from como_jax.spec.interface import PolicySpec
from como_jax.spec.motion import LaqConfig
from como_jax.weights.motion import NOT_EXPORTED
from como_jax.weights.policies import not_exported

_NAMES = {
    "como": "CoMo motion model",
    "laq": "LAQ motion model",
    "diffusion_policy": "Diffusion policy",
    "autoregressive_policy": "Autoregressive policy",
    "latent_vla": "Vision-language-action model",
}

_CARD = """\
---
library_name: como_jax
tags: [robotics, {tags}]
---

# {name}

{summary} Trained in JAX and exported for PyTorch.

```bash
{install}   # como_jax: a checkout, a wheel or git+URL; no JAX is needed
```

```python
{usage}
```

{details}

## Files

{files}

## Where it comes from

| | |
|---|---|
{origin}

provenance.json holds the whole config.

## Parity

{parity_note}

| compared | difference |
|---|---|
{parity}

## Left out

{left_out}
"""

_MOTION_USAGE = """\
from como_jax.runtime_torch.latent_motion import LatentMotion

model = LatentMotion.from_pretrained("DIRECTORY", device="cpu")
motion = model.encode(frames)  # uint8 RGB [B, T, H, W, 3]; motion.latent is [B, T - 1, {tokens}, {numbers}]{codes}
image = model.predict(frames[:, -1], motion.latent[:, -1])  # float32 in [0, 1], [B, {size}, {size}, 3]"""

_MOTION_DETAILS = """\
In training the two frames of a pair were {gap:g} s apart. Images of any size are made square ({fit}) and resized to
{size} x {size} pixels as in training."""

_POLICY_USAGE = """\
from como_jax.runtime_torch.policy import Policy

policy = Policy.from_pretrained("DIRECTORY", device="cpu"{robot})
observation = {{"images": {{{images}}}{state}}}
action = policy.act(observation, "INSTRUCTION")  # float32 [{action_size}], in the robot's units"""

_POLICY_DETAILS = """\
Images are uint8 RGB `[H, W, 3]` of any size, made square ({fit}) and resized to {size} x {size} pixels as in training.
Call `act` {rate:g} times a second, and `reset` before an episode. Every further robot has its own session,
`policy.new_session()`. Actions come in chunks of {chunk}; `execute=` says how many of them are carried out before the
next chunk is asked for, and `ensemble=` averages overlapping chunks.

Robots: {robots}."""

_FILES = {
    "model.safetensors": "weights",
    "provenance.json": "run, config, versions",
    REQUIREMENTS_NAME: "the packages that the model needs",
}
_ENCODER = {"encoder/": "the ViT alone: `transformers.ViTModel.from_pretrained(..., add_pooling_layer=False)`"}
_PROGRAMS = {"pt2": "{name}.pt2", "onnx": "{name}.onnx, {name}.onnx.data"}


def motion_card(described: ExportedMotion, provenance: Mapping[str, Any], formats: Sequence[str]) -> str:
    """The card of a motion model.

    Args:
      described: the model, as config.json says.
      provenance: the content of provenance.json.
      formats: of the programs beside the weights.
    """
    size, family, latent_shape = described.image_size, described.family, described.latent_shape
    is_discrete = isinstance(described.model, LaqConfig) or described.model.bottleneck.kind not in ("none", "kl")
    codes = f", motion.codes [B, T - 1, {latent_shape[0]}]" if is_discrete else ""
    files = {"config.json": "sizes, and the checksum of the weights"} | (_ENCODER if family == "como" else {})
    for name in formats:
        files[_PROGRAMS[name].format(name="encode")] = "latents of pairs of frames, uint8 [B, 2, S, S, 3]"
    return _card(
        described,
        provenance,
        files,
        tags=f"latent-motion, {family}",
        summary="Gives the latent motion between two camera frames, and draws the frame that a latent motion leads to.",
        usage=_MOTION_USAGE.format(tokens=latent_shape[0], numbers=latent_shape[1], codes=codes, size=size),
        details=_MOTION_DETAILS.format(gap=described.gap_seconds, fit=described.fit, size=size),
        parity_note="Largest difference to JAX, in float32 on a CPU, as a share of the largest value:",
        known=NOT_EXPORTED,
    )


def policy_card(
    described: ExportedPolicy, provenance: Mapping[str, Any], spec: PolicySpec, formats: Sequence[str]
) -> str:
    """The card of a policy.

    Args:
      described: the policy, as config.json says.
      provenance: the content of provenance.json.
      spec: of the policy, with the sizes of its first robot.
      formats: of the programs beside the weights.
    """
    robots, text = described.interface.robots, described.observation.text
    files = {"config.json": "sizes, normalisation of actions and states, and the checksum of the weights"}
    if text.tower == "embedding":
        files["instructions.safetensors"] = "the instructions that the policy knows, with their embeddings"
    if text.tokenizer_file:
        files[text.tokenizer_file] = "tokenizer of instructions"
    for name in formats:
        files[_PROGRAMS[name].format(name="step")] = (
            f"one step of the policy, for one robot: {STEPS[described.family]}, from the fields of "
            "`como_jax.runtime_torch.observation.Observation` that the policy uses"
        )
    return _card(
        described,
        provenance,
        files,
        tags=described.family,
        summary="Gives a robot's next action from camera images, the robot's state and an instruction.",
        usage=_POLICY_USAGE.format(
            robot=f', robot="{next(iter(robots))}"' if len(robots) > 1 else "",
            images=", ".join(f'"{camera}": image' for camera in spec.cameras),
            state=', "state": state' if spec.state_size else "",
            action_size=spec.action_size,
        ),
        details=_POLICY_DETAILS.format(
            fit=spec.fit,
            size=spec.image_size,
            rate=spec.control_rate,
            chunk=spec.chunk,
            robots=", ".join(f"{name} ({robot.action.size} numbers in an action)" for name, robot in robots.items()),
        ),
        parity_note="Largest difference to JAX, in float32 on a CPU and with the same noise: of the network as a share "
        "of its\nlargest value, of actions as a share of their range.",
        known=not_exported(described),
    )


def _card(
    described: ExportedMotion | ExportedPolicy,
    provenance: Mapping[str, Any],
    files: Mapping[str, str],
    known: Mapping[str, str],
    **texts: str,
) -> str:
    """Fills the template; `known` are the parameters that may be left out, and what they are."""
    origin = {name: provenance[name] for name in ("run", "step", "parameters", "datasets", "exported")}
    origin["versions"] = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    parity = provenance["largest relative difference to JAX"]
    paths = provenance["left out"]
    left_out = [f"- {name}: {what}" for name, what in known.items() if any(path.startswith(name) for path in paths)]
    return _CARD.format(
        name=_NAMES[described.family],
        install=INSTALL.format(directory="DIRECTORY"),
        files="\n".join(f"- `{name}`: {text}" for name, text in (_FILES | files).items()),
        origin=_table_rows(origin),
        parity=_table_rows({name: f"{error:.1e}" for name, error in parity.items()}),
        left_out="\n".join(left_out) or "Nothing.",
        **texts,
    )


def _table_rows(content: Mapping[str, Any]) -> str:
    """The rows of a Markdown table of two columns."""
    return "\n".join(f"| {name} | {value} |" for name, value in content.items())
