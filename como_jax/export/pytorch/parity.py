"""Checks that an exported motion model computes in PyTorch what the run computes in JAX, in float32 on the CPU.

Axes: B batch, T instants, H and W pixels, S side of the model's frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from como_jax.errors import ConversionError
from como_jax.motion.bottlenecks import Bottleneck
from como_jax.motion.models import build_model, codebook_size
from como_jax.nn.model_def import ModelDef, Params
from como_jax.runtime_torch.latent_motion import LatentMotion, Motion
from como_jax.spec.images import fit_frames
from como_jax.training.run import Run

TOLERANCE = 1e-4
"""Limit of the largest difference, as a share of the largest value."""

_CAMERA = (480, 640)


class Reference:
    """The outputs of a run for two clips of three instants, in float32.

    Attributes:
      images: uint8 `[3, H, W, 3]`, a clip of a camera's size.
      frames: uint8 `[2, 3, S, S, 3]`: a clip of noise, and `images` fitted to the model as in training.
      inferred: `[2, 2, Q, ...]`, the inputs of the bottleneck.
      latent: `[2, 2, Q, L]`.
      codes: int32 `[2, 2, Q]`, or None for continuous latents.
      drawn: float32 `[2, S, S, 3]`, predictions from the first frames and the first latents.
    """

    def __init__(self, run: Run):
        size, rng = run.config.data.image_size, np.random.default_rng(0)
        self.images = _moving_images(rng)
        fitted = fit_frames(self.images, size, run.config.data.fit)
        self.frames = np.stack([rng.integers(0, 256, fitted.shape, dtype=np.uint8), fitted])
        model, is_discrete = _in_float32(run), codebook_size(run.config) > 0

        @jax.jit
        def answer(params: Params, frames: jax.Array) -> Any:
            module = model.bind(params)
            # Codes hide small differences, so the inputs of the bottleneck are compared too.
            bottleneck, module.bottleneck = module.bottleneck, Bottleneck(module.bottleneck.input_dim)
            inferred = module.encode(frames)
            latent, codes = bottleneck(inferred).latent, bottleneck.codes(inferred) if is_discrete else None
            return inferred, latent, codes, module.predict(frames[:, 0], latent[:, 0])

        with jax.default_matmul_precision("highest"):
            found = answer(run.params, jax.device_put(self.frames, jax.tree.leaves(run.params)[0].sharding))
        self.inferred, self.latent, self.codes, self.drawn = jax.tree.map(np.asarray, found)


def check_parity(reference: Reference, model: LatentMotion) -> dict[str, float]:
    """Returns the largest relative differences between a model and the reference, by what was compared.

    Raises:
      ConversionError: a difference is too large.
    """
    with torch.inference_mode():
        inferred = model.module.infer(torch.from_numpy(reference.frames))
    found = {"encode, before the bottleneck": relative_error(inferred.numpy(), reference.inferred)}
    refuse_large(found)
    found |= compare(reference, model.encode, "encode")
    camera = model.encode(reference.images[None])
    found["encode, camera images"] = relative_error(camera.latent.numpy(), reference.latent[1:])
    drawn = model.predict(reference.frames[:, 0], np.array(reference.latent[:, 0]))
    found["predict"] = relative_error(drawn.numpy(), reference.drawn)
    refuse_large(found)
    return found


def compare(reference: Reference, encode: Callable[[np.ndarray], Motion], name: str) -> dict[str, float]:
    """Compares the latents, and the codes if there are any, of one way to encode; see `check_parity`."""
    motion = encode(reference.frames)
    found = {name: relative_error(np.asarray(motion.latent), reference.latent)}
    refuse_large(found)
    if reference.codes is not None and not np.array_equal(np.asarray(motion.codes), reference.codes):
        raise ConversionError(f"{name} chooses other codes in PyTorch than in JAX, so nothing was written.")
    return found


def relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    """The largest difference, as a share of the largest value of the reference; infinite if the shapes differ."""
    if value.shape != reference.shape:
        return float("inf")
    return float(np.max(np.abs(value - reference)) / max(np.max(np.abs(reference)), 1e-12))


def refuse_large(found: dict[str, float], tolerance: float = TOLERANCE) -> None:
    """Raises ConversionError if a difference is too large or not a number."""
    for name, error in found.items():
        if not error < tolerance:
            raise ConversionError(
                f"{name} differs between PyTorch and JAX by {error:.1e} of the largest value, more than {tolerance:g}, "
                "so nothing was written."
            )


def _in_float32(run: Run) -> ModelDef:
    """The model of a run, computing in float32 whatever it was trained in."""
    if run.config.train.dtype == "float32":
        return run.model
    config = run.config.copy_and_resolve_references().unlock()
    config.train.dtype = "float32"
    return build_model(config)


def _moving_images(rng: np.random.Generator) -> np.ndarray:
    """A smooth pattern that moves to the right, with the noise of a camera: uint8 `[3, H, W, 3]`."""
    rows, columns = np.meshgrid(*(np.linspace(0, 6, size) for size in _CAMERA), indexing="ij")
    phases = np.arange(3)
    waves = [np.sin(rows[..., None] + phases) * np.cos(columns[..., None] - 0.2 * t + phases) for t in range(3)]
    noisy = 127.5 + 100 * np.stack(waves) + rng.normal(size=(3, *_CAMERA, 3))
    return noisy.clip(0, 255).astype(np.uint8)
