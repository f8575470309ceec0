"""The model card of an exported policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from como_jax.export.pytorch.card import table_rows
from como_jax.export.pytorch.policy_graphs import STEPS
from como_jax.weights.policies import not_exported

_NAMES = {
    "diffusion_policy": "Diffusion policy",
    "autoregressive_policy": "Autoregressive policy",
    "latent_vla": "Vision-language-action model",
}

_CARD = """\
---
library_name: como_jax
tags: [robotics, {family}]
---

# {name}

Gives a robot's next action from camera pictures, the robot's state and an instruction. Trained in JAX and exported for
PyTorch.

```python
from como_jax.runtime_torch.policy import Policy

policy = Policy.from_pretrained("DIRECTORY", device="cpu"{robot})
observation = {{"images": {{{images}}}{state}}}
action = policy.act(observation, "INSTRUCTION")  # float32 [{action_size}], in the robot's units
```

Pictures are uint8 RGB `[H, W, 3]` of any size, made square ({fit}) and resized to {size} x {size} pixels as in
training. Call `act` {rate:g} times a second, and `reset` before an episode; every further robot has a session of its
own, `policy.new_session()`. Actions come in chunks of {chunk}, of which `execute=` are carried out before the next one
is asked for, or which `ensemble=` averages.

Robots: {robots}.

## Files

{files}

## Where it comes from

| | |
|---|---|
{origin}

provenance.json holds the whole config.

## Parity

Largest difference to JAX, float32 on a processor, with the same noise: of the network as a share of its largest value,
of actions as a share of their range.

| compared | difference |
|---|---|
{parity}

## Left out

{left_out}
"""


_FORMATS = {
    "pt2": "step.pt2",
    "onnx": "step.onnx, step.onnx.data",
}


def policy_card(
    described: Mapping[str, Any], provenance: Mapping[str, Any], metadata: Mapping[str, Any], formats: Sequence[str]
) -> str:
    """The text of README.md, of what config.json, provenance.json and `Policy.metadata` say, and of further formats."""
    robots, family = list(described["robots"]), described["family"]
    origin = {name: provenance[name] for name in ("run", "step", "parameters", "datasets", "exported")}
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    parity = provenance["largest relative difference to JAX"]
    return _CARD.format(
        family=family,
        name=_NAMES[family],
        robot=f', robot="{robots[0]}"' if len(robots) > 1 else "",
        images=", ".join(f'"{camera}": picture' for camera in metadata["cameras"]),
        state=', "state": state' if metadata["state_size"] else "",
        action_size=metadata["action_size"],
        fit=described["interface"]["fit"],
        size=described["observation"]["image_size"],
        rate=metadata["control_rate"],
        chunk=metadata["chunk"],
        robots=", ".join(f"{name} ({_size(described, name)})" for name in robots),
        files="\n".join(f"- `{name}`: {text}" for name, text in _files(described, formats).items()),
        origin=table_rows({**origin, "versions": versions}),
        parity=table_rows({name: f"{error:.1e}" for name, error in parity.items()}),
        left_out=_left_out(not_exported(described), provenance["left out"]),
    )


def _size(described: Mapping[str, Any], robot: str) -> str:
    action = described["robots"][robot]["action"]
    return f"{len(action.get('edges') or action['offset'])} numbers in an action"


def _files(described: Mapping[str, Any], formats: Sequence[str]) -> dict[str, str]:
    text = described["observation"]["text"]
    files = {
        "model.safetensors": "weights",
        "config.json": "sizes, scales of actions and states, and the sum of the weights, which loading checks",
        "provenance.json": "run, config, versions",
    }
    if text["tower"] == "embedding":
        files["instructions.safetensors"] = "the instructions that the policy knows, with their embeddings"
    if text["tokenizer_file"]:
        files[text["tokenizer_file"]] = "tokenizer of instructions"
    for name in formats:
        files[_FORMATS[name]] = (
            f"one policy step, which is one evaluation of the network, for one robot: {STEPS[described['family']]}, of "
            "the fields of `como_jax.runtime_torch.observation.Observation` that the policy uses"
        )
    return files


def _left_out(known: Mapping[str, str], paths: Sequence[str]) -> str:
    parts = [f"- {name}: {what}" for name, what in known.items() if any(path.startswith(name) for path in paths)]
    return "\n".join(parts) or "Nothing."
