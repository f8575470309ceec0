"""Measures how far the latent motion moves when the frozen encoder computes in int8 or fp8.

    pip install qwix
    python -m tools.benchmarks.quantized_encoder --workdir RUN --data DIR
    python -m tools.benchmarks.quantized_encoder --config configs/pretrain_como.py --data DIR --clips 1

The first takes a trained model, the second random parameters of a recipe. Every linear layer of the encoder is
quantised by qwix, symmetrically: weights with a scale for every output, activations with one for every token, taken
from the token itself. Attention, layer norms and all that comes after the encoder stay as they are. The reference is
the model in float32; bfloat16, in which models train, is beside it as a yardstick.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from como_jax import cli
from como_jax.data.mixture import parse_mixture
from como_jax.errors import ConfigError, DatasetError, UsageError
from como_jax.evaluation.latents.transitions import EvaluationSet
from como_jax.motion.build import build_model
from como_jax.nn import mixed_precision
from como_jax.training import sharding
from como_jax.training.run import load_run
from como_jax.training.train_state import ModelDef, Params
from tools.benchmarks.machine import describe_machine

Matmul = Callable[[jax.Array, jax.Array], jax.Array]


class Computation(NamedTuple):
    """How encoder and inverse dynamics model compute.

    Attributes:
      encoder: dtype of the encoder.
      rest: dtype of what comes after it.
      weights: what the encoder's weights are quantised to, or None.
      activations: what the inputs of its linear layers are quantised to, or None.
    """

    encoder: str = "float32"
    rest: str = "float32"
    weights: str | None = None
    activations: str | None = None


REFERENCE = Computation()
COMPUTATIONS = {
    "bfloat16": Computation("bfloat16", "bfloat16"),
    "bfloat16 encoder": Computation("bfloat16"),
    "int8 weights": Computation(weights="int8"),
    "int8": Computation(weights="int8", activations="int8"),
    "int8, bfloat16": Computation("bfloat16", "bfloat16", "int8", "int8"),
    "fp8 weights": Computation(weights="float8_e4m3fn"),
    "fp8": Computation(weights="float8_e4m3fn", activations="float8_e4m3fn"),
    "fp8, bfloat16": Computation("bfloat16", "bfloat16", "float8_e4m3fn", "float8_e4m3fn"),
}


class Motion(NamedTuple):
    """What a model finds in clips of B transitions.

    Attributes:
      features: float32 `[B, N, D]` of the current frame.
      difference: float32 `[B, N, D]`, by which the next frame's features differ from them.
      latent: float32 `[B, Q, L]`.
    """

    features: jax.Array | np.ndarray
    difference: jax.Array | np.ndarray
    latent: jax.Array | np.ndarray


class Deviation(NamedTuple):
    """Norms of errors over norms of what they are errors of.

    Attributes:
      features, difference, latent: over the whole batch.
      worst: of the latent of one transition, the largest.
      spread: of the latents, over their norm about their mean.
    """

    features: float
    difference: float
    latent: float
    worst: float
    spread: float


def deviation(found: Motion, true: Motion) -> Deviation:
    """How far a motion is from the true one."""
    features, difference, latent = map(_relative, found, true)
    worst = max(map(_relative, found.latent, true.latent))
    return Deviation(
        features, difference, latent, worst, _relative(found.latent, true.latent, true.latent.mean(axis=0))
    )


def _relative(found: Any, true: Any, origin: Any = 0.0) -> float:
    return float(np.linalg.norm(found - true) / np.linalg.norm(true - origin))


def quantized_matmul(weights: str, activations: str | None) -> Matmul:
    """A product of `[M, K]` and a kernel `[K, N]` for `mixed_precision.matmul`, in the dtype of the former.

    Raises:
      UsageError: qwix is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise UsageError("Quantisation needs qwix: pip install qwix") from error

    def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
        # Scales have the dtype of what they scale; in bfloat16 they would add an error of their own.
        left, right = x.astype(kernel.dtype), qwix.quantize(kernel, weights, channelwise_axes=(1,))
        if activations is not None:
            left = qwix.quantize(left, activations, channelwise_axes=(0,))
        return qwix.dot_general(left, right, (((1,), (0,)), ((), ()))).astype(x.dtype)

    return matmul


class Model:
    """A motion model in every dtype, with its parameters."""

    def __init__(self, config: ConfigDict, params: Params):
        self.params = params
        self._config = config

    def __call__(self, frames: np.ndarray, how: Computation) -> Motion:
        """Encodes all transitions between consecutive frames of uint8 `[B, T, H, W, 3]`."""
        encoder, rest = self._of_dtype(how.encoder), self._of_dtype(how.rest)
        matmul: Matmul = mixed_precision.matmul
        if how.weights is not None:
            matmul = quantized_matmul(how.weights, how.activations)

        def run(params: Params, frames: jax.Array) -> Motion:
            with mock.patch.object(mixed_precision, "matmul", matmul):
                embedded = encoder.bind(params).embed(frames.reshape(-1, *frames.shape[2:]))
            by_clip = jax.tree.map(lambda x: x.reshape(*frames.shape[:2], *x.shape[1:]), embedded)
            source, target = (_merge(by_clip, part) for part in (np.s_[:-1], np.s_[1:]))
            latent = rest.bind(params).label(source, target).latent
            return Motion(source["features"], target["features"] - source["features"], latent)

        return jax.tree.map(np.asarray, jax.jit(run)(self.params, frames))

    def _of_dtype(self, dtype: str) -> ModelDef:
        config = self._config.copy_and_resolve_references()
        config.train.dtype = dtype
        return build_model(config)


def _merge(embedded: dict[str, jax.Array], instants: slice) -> dict[str, jax.Array]:
    """Some instants of `[B, T, ...]` as `[B * T, ...]`."""
    return jax.tree.map(lambda x: x[:, instants].reshape(-1, *x.shape[2:]), embedded)


def read_frames(config: ConfigDict, data: str | None, clips: int) -> np.ndarray:
    """Clips of three instants, uint8 `[B, 3, H, W, 3]`, spread over the first dataset, held out where it can be."""
    notes: list[str] = []
    sets = EvaluationSet.open_all(
        parse_mixture(config.data.mixture if data is None else data),
        gap_seconds=config.data.gap_seconds,
        image_size=config.data.image_size,
        camera=config.data.camera,
        fit=config.data.fit,
        warn=notes.append,
    )
    if not sets:
        raise DatasetError(" ".join(notes))
    item = next((item for item in sets if item.split == "val"), sets[0])
    clips = min(clips, len(item.index))
    return item.read(np.linspace(0, len(item.index) - 1, clips).astype(int).tolist())["frames"]


def table(rows: dict[str, Deviation]) -> str:
    """A line for every computation."""
    lines = [
        "| encoder | features | difference | latent | worst latent | latent, of spread |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{value:.2%}' for value in found)} |")
    return "\n".join(lines)


def define_flags() -> None:
    """Defines the flags of the command."""
    config_flags.DEFINE_config_file("config", None, "Recipe of CoMo, whose model gets random parameters.")
    flags.DEFINE_string("workdir", None, "Run of experiments.pretrain, in place of --config.")
    flags.DEFINE_string("data", None, "Dataset; by default that of the run or recipe.")
    flags.DEFINE_integer("clips", 32, "Clips of three frames, which all are in memory at once.", lower_bound=1)
    flags.DEFINE_multi_enum("only", [], list(COMPUTATIONS), "Measures these alone.")


def open_model(workdir: str | None, config: ConfigDict | None) -> tuple[ConfigDict, Params, str]:
    """Config, parameters and a description of what is measured."""
    if workdir is not None and config is None:
        run = load_run(workdir, sharding.make_mesh())
        _check(run.config)
        return run.config, run.params, f"step {run.step} of {run.workdir.name}"
    if config is None or workdir is not None:
        raise ConfigError("Pass either --workdir, a run, or --config, a recipe.")
    _check(config)
    return config, jax.jit(build_model(config).init)(jax.random.key(config.seed)), "random parameters"


def _check(config: ConfigDict) -> None:
    if config.family != "como":
        raise ConfigError(f"There is an encoder to quantise in family como alone, not in {config.family}.")


def main(arguments: Sequence[str]) -> None:
    """Prints machine, sizes and the table."""
    cli.no_arguments(arguments)
    given: Any = flags.FLAGS
    config, params, what = open_model(given.workdir, given.config)
    frames, model = read_frames(config, given.data, given.clips), Model(config, params)
    encoder = config.encoder
    print(describe_machine())
    print(
        f"{what}; encoder of width {encoder.width} and depth {encoder.depth}, {config.data.image_size} px, "
        f"{frames.shape[0] * (frames.shape[1] - 1)} transitions; relative to float32:"
    )
    true = model(frames, REFERENCE)
    names = given.only or COMPUTATIONS
    print(table({name: deviation(model(frames, COMPUTATIONS[name]), true) for name in names}), flush=True)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
