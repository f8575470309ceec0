"""The model card of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from como_jax.weights.motion import NOT_EXPORTED

_NAMES = {"como": "CoMo motion model", "laq": "LAQ motion model"}

_CARD = """\
---
library_name: como_jax
tags: [robotics, latent-motion, {family}]
---

# {name}

Gives the latent motion between two camera frames, and draws the frame that a latent motion leads to. Trained in JAX and
exported for PyTorch.

```python
from como_jax.runtime_torch.latent_motion import LatentMotion

model = LatentMotion.from_pretrained("DIRECTORY", device="cpu")
motion = model.encode(frames)  # uint8 RGB [B, T, H, W, 3]; motion.latent is [B, T - 1, {tokens}, {numbers}]{codes}
picture = model.predict(frames[:, -1], motion.latent[:, -1])  # float32 in [0, 1], [B, {size}, {size}, 3]
```

In training the two frames of a pair were {gap:g} s apart. Pictures of any size are made square ({fit}) and resized to
{size} x {size} pixels as in training.

## Files

{files}

## Where it comes from

| | |
|---|---|
{origin}

provenance.json holds the whole config.

## Parity

Largest difference to JAX, float32 on a processor, as a share of the largest value:

| compared | difference |
|---|---|
{parity}

## Left out

{left_out}
"""

_FILES = {
    "model.safetensors": "weights",
    "config.json": "sizes, and the sum of the weights, which loading checks",
    "provenance.json": "run, config, versions",
}
_ENCODER = {"encoder/": "the ViT alone: `transformers.ViTModel.from_pretrained(..., add_pooling_layer=False)`"}
_FORMATS = {
    "pt2": {
        "encode.pt2": "for `torch.export.load`: latents of pairs of frames of the model's size, uint8 [B, 2, S, S, 3]"
    },
    "onnx": {"encode.onnx, encode.onnx.data": "the same for ONNX runtimes"},
}


def model_card(
    described: Mapping[str, Any],
    provenance: Mapping[str, Any],
    latent_shape: tuple[int, int],
    formats: Sequence[str],
) -> str:
    """The text of README.md, of what config.json and provenance.json say."""
    encoder = _ENCODER if described["family"] == "como" else {}
    files = _FILES | encoder | {name: text for key in formats for name, text in _FORMATS[key].items()}
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    origin = {name: provenance[name] for name in ("run", "step", "parameters", "datasets", "exported")}
    parity = provenance["largest relative difference to JAX"]
    return _CARD.format(
        family=described["family"],
        name=_NAMES[described["family"]],
        tokens=latent_shape[0],
        numbers=latent_shape[1],
        codes=f", motion.codes [B, T - 1, {latent_shape[0]}]" if _is_discrete(described) else "",
        size=described["image_size"],
        gap=described["gap_seconds"],
        fit=described["fit"],
        files="\n".join(f"- `{name}`: {text}" for name, text in files.items()),
        origin=table_rows({**origin, "versions": versions}),
        parity=table_rows({name: f"{error:.1e}" for name, error in parity.items()}),
        left_out=_left_out(provenance["left out"]),
    )


def _is_discrete(described: Mapping[str, Any]) -> bool:
    return described["family"] == "laq" or described["model"]["bottleneck"]["kind"] not in ("none", "kl")


def _left_out(paths: Sequence[str]) -> str:
    parts = [f"- {name}: {what}" for name, what in NOT_EXPORTED.items() if any(path.startswith(name) for path in paths)]
    return "\n".join(parts) or "Nothing."


def table_rows(content: Mapping[str, Any]) -> str:
    """The rows of a table of two columns, in Markdown."""
    return "\n".join(f"| {name} | {value} |" for name, value in content.items())
