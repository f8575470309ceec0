"""How well a single linear layer reads the true action out of the latent motion (LP-MSE; CoMo, section 4).

The sums over transitions run in JAX, so that latents may be spread over devices; what is left is as small as the
latent is wide.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from como_jax.errors import UsageError
from como_jax.types import Array

MIN_PROBE_EPISODES = 2
# From strong to weak, so that every logistic regression starts close to where it ends.
STRENGTHS = (1e4, 1e2, 1.0, 1e-2, 1e-4)
MAX_LBFGS_STEPS = 300
LBFGS_TOLERANCE = 1e-5
FLOAT32_EPS = float(np.finfo(np.float32).eps)

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class ProbeError(UsageError):
    """Latents and actions that no probe can be fitted to or measured on."""


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """Errors on the test set, in squared units of the action.

    Attributes:
      lp_mse: of the linear probe.
      lp_mse_mean_action: of always predicting the mean action of the fitting set, which a useful latent must beat.
      r2: share of the test set's variance that the probe explains, averaged over the dimensions that vary there; nan
        where none does.
      per_dimension, per_dimension_mean_action, per_dimension_r2: the same, `[A]`; R² is nan where the test set does
        not vary.
      strength: of the regularisation that was chosen.
    """

    lp_mse: float
    lp_mse_mean_action: float
    r2: float
    per_dimension: np.ndarray
    per_dimension_mean_action: np.ndarray
    per_dimension_r2: np.ndarray
    strength: float


@dataclasses.dataclass(frozen=True)
class AccuracyResult:
    """Shares of the test set that are classified correctly.

    Attributes:
      accuracy: by the linear probe.
      majority_accuracy: by always naming the commonest class of the fitting set, which a useful latent must beat.
    """

    accuracy: float
    majority_accuracy: float


def linear_probe(latent: Array, action: Array, episode: Array, test_latent: Array, test_action: Array) -> ProbeResult:
    """Fits a ridge regression in closed form and measures it on other episodes.

    Inputs are standardised, and `strength * |w|^2` is added to the sum of squared errors. The strength is chosen on
    every fifth of the fitting episodes, then the probe is fitted on all of them. All arrays may be sharded by rows.

    Args:
      latent: `[N, D]` of the fitting episodes.
      action: `[N, A]`, the targets.
      episode: `[N]`, episode numbers.
      test_latent: `[M, D]` of held-out episodes.
      test_action: `[M, A]`.

    Raises:
      ProbeError: fewer than `MIN_PROBE_EPISODES` fitting episodes, no test transition, or numbers that are not finite.
    """
    chex.assert_rank([latent, action, test_latent, test_action], 2)
    chex.assert_equal_shape_suffix([action, test_action], 1)
    held_out = _validation_rows(latent, action, episode, test_latent, test_action)
    trial = _ridge(latent, action, ~held_out, STRENGTHS)
    errors = np.asarray(_squared_errors(latent, action, held_out, *trial), np.float64)
    strength = STRENGTHS[int(np.argmin(errors.mean(axis=1)))]

    fitted = _ridge(latent, action, np.ones_like(held_out), [strength])
    # A layer without weights predicts the mean action.
    with_baseline = fitted._replace(kernel=np.concatenate([fitted.kernel, np.zeros_like(fitted.kernel)]))
    everywhere = np.ones(len(test_latent), bool)
    error, baseline = np.asarray(_squared_errors(test_latent, test_action, everywhere, *with_baseline), np.float64)
    mean, std = _as_float64(_mean_and_std(test_action, everywhere))
    variance = np.where(_varies(mean, std), np.square(std), np.nan)
    r2 = 1.0 - error / variance
    return ProbeResult(
        lp_mse=float(error.mean()),
        lp_mse_mean_action=float(baseline.mean()),
        r2=float(np.nanmean(r2)) if np.any(~np.isnan(r2)) else float("nan"),
        per_dimension=error,
        per_dimension_mean_action=baseline,
        per_dimension_r2=r2,
        strength=strength,
    )


def linear_probe_accuracy(
    latent: Array,
    label: Array,
    episode: Array,
    test_latent: Array,
    test_label: Array,
    num_classes: int | None = None,
) -> AccuracyResult:
    """The same for actions that are choices: multinomial logistic regression on standardised inputs.

    `strength / 2 * |w|^2` is added to the sum of cross-entropies; the strength of least cross-entropy on every fifth of
    the fitting episodes is chosen, since accuracies of small sets are often equal.

    Args:
      latent: `[N, D]` of the fitting episodes.
      label: int `[N]` in `0 .. num_classes - 1`.
      episode: `[N]`, episode numbers.
      test_latent: `[M, D]` of held-out episodes.
      test_label: int `[M]`.
      num_classes: by default one more than the largest label.

    Raises:
      ProbeError: as `linear_probe`, or a label out of range.
    """
    chex.assert_rank([latent, test_latent], 2)
    chex.assert_type([label, test_label], int)
    held_out = _validation_rows(latent, label, episode, test_latent, test_label)
    labels = np.concatenate([np.asarray(label), np.asarray(test_label)])
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ProbeError(
            f"labels of {num_classes} classes are 0 to {num_classes - 1}; there are {labels.min()} to {labels.max()}."
        )
    layer = jnp.zeros((latent.shape[1], num_classes)), jnp.zeros(num_classes)
    errors = []
    for strength in STRENGTHS:
        layer = _fit_softmax(latent, label, ~held_out, layer, strength)
        errors.append(float(_scores(latent, label, held_out, ~held_out, latent, layer)[0]))
    everywhere = np.ones_like(held_out)
    layer = _fit_softmax(latent, label, everywhere, layer, STRENGTHS[int(np.argmin(errors))])
    _, hits = _scores(test_latent, test_label, np.ones(len(test_latent), bool), everywhere, latent, layer)
    correct = int(hits)
    majority = np.bincount(labels[: len(held_out)], minlength=num_classes).argmax()
    return AccuracyResult(correct / len(test_latent), float(np.mean(labels[len(held_out) :] == majority)))


class Layers(NamedTuple):
    """Linear layers `(x - input_mean) @ kernel + target_mean`, one for every strength."""

    input_mean: np.ndarray  # [D]
    kernel: np.ndarray  # [S, D, A]
    target_mean: np.ndarray  # [A]


def _validation_rows(
    latent: Array, target: Array, episode: Array, test_latent: Array, test_target: Array
) -> np.ndarray:
    """Which rows `[N]` choose the regularisation: those of every fifth episode, since rows of one are alike.

    Raises:
      ProbeError: data that no probe can be fitted to or measured on.
    """
    chex.assert_equal_shape_prefix([latent, target, episode], 1)
    chex.assert_equal_shape_prefix([test_latent, test_target], 1)
    chex.assert_equal_shape_suffix([latent, test_latent], 1)
    episode = np.asarray(episode)
    episodes = np.unique(episode)
    if len(episodes) < MIN_PROBE_EPISODES or not len(test_latent):
        raise ProbeError(
            f"the linear probe needs {MIN_PROBE_EPISODES} episodes to fit and 1 transition to test; there are "
            f"{len(episodes)} and {len(test_latent)}."
        )
    if not _all_finite((latent, target, test_latent, test_target)):
        raise ProbeError("the linear probe needs finite latents and actions; NaN or infinity is among them.")
    return np.isin(episode, episodes[::5])


@jax.jit
def _all_finite(arrays: tuple[Array, ...]) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(values)) for values in arrays]))


def _center(values: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Columns less their weighted mean, and that mean."""
    mean = _einsum("n,nd->d", weight, values) / jnp.sum(weight)
    centered = values - mean
    # A large mean is rounded, which matters to columns that hardly vary.
    rest = _einsum("n,nd->d", weight, centered) / jnp.sum(weight)
    return centered - rest, mean + rest


@jax.jit
def _products(inputs: Array, targets: Array, rows: Array, projection: Array) -> tuple[jax.Array, jax.Array]:
    """Sums of products `[D, D]` and `[D, A]` of centred and then projected inputs, with themselves and the targets."""
    weight = jnp.asarray(rows, jnp.float32)
    inputs, _ = _center(jnp.asarray(inputs, jnp.float32), weight)
    targets, _ = _center(jnp.asarray(targets, jnp.float32), weight)
    inputs = _einsum("nd,de->ne", inputs, projection)
    weighted = inputs * weight[:, None]
    return _einsum("nd,ne->de", weighted, inputs), _einsum("nd,na->da", weighted, targets)


@jax.jit
def _mean_and_std(values: Array, rows: Array) -> tuple[jax.Array, jax.Array]:
    weight = jnp.asarray(rows, jnp.float32)
    centered, mean = _center(jnp.asarray(values, jnp.float32), weight)
    return mean, jnp.sqrt(_einsum("n,nd->d", weight, jnp.square(centered)) / jnp.sum(weight))


@jax.jit
def _squared_errors(
    inputs: Array, targets: Array, rows: Array, input_mean: Array, kernel: Array, target_mean: Array
) -> jax.Array:
    """Mean squared errors `[S, A]` of every layer over the chosen rows."""
    inputs = jnp.asarray(inputs, jnp.float32) - input_mean
    predicted = _einsum("nd,sda->sna", inputs, kernel) + target_mean
    weight = jnp.asarray(rows, jnp.float32)
    return _einsum("n,sna->sa", weight, jnp.square(predicted - targets)) / jnp.sum(weight)


def _varies(mean: Array, std: Array) -> Array:
    """Whether columns differ by more than the rounding of their float32 numbers."""
    return (std > 1e-6 * abs(mean)) & (std > 1e-12)


def _ridge(inputs: Array, targets: Array, rows: Array, strengths: Sequence[float]) -> Layers:
    """Ridge regressions of all strengths on the chosen rows, from one eigendecomposition."""
    input_mean, std = _as_float64(_mean_and_std(inputs, rows))
    target_mean, _ = _as_float64(_mean_and_std(targets, rows))
    # A constant column becomes zero, and so does its weight.
    scale = np.where(_varies(input_mean, std), std, np.inf)
    gram, cross, basis = _accurate_products(inputs, targets, rows, scale)
    eigenvalues, rotation = np.linalg.eigh(gram)
    # Directions in which the inputs do not vary hold rounding errors alone, which weak regularisation would enlarge.
    kept = eigenvalues > (16 * FLOAT32_EPS) ** 2 * eigenvalues.sum()
    eigenvalues, rotation = eigenvalues[kept, None], rotation[:, kept]
    kernels = [rotation @ (rotation.T @ cross / (eigenvalues + strength)) for strength in strengths]
    return Layers(input_mean, np.stack([basis @ kernel / scale[:, None] for kernel in kernels]), target_mean)


def _accurate_products(
    inputs: Array, targets: Array, rows: Array, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Products of standardised inputs in an orthogonal basis, `[D, D]` and `[D, A]`, and that basis `[D, D]`.

    In a float32 sum the directions of large variance drown those of small variance, in which the motion may hide. So
    the sums are taken twice: the first gives directions and their spread, the second is of inputs of equal spread.
    """
    standardize = np.diag(1.0 / scale)
    gram, cross = _as_float64(_products(inputs, targets, rows, standardize))
    eigenvalues, basis = np.linalg.eigh(gram)
    smallest = max(FLOAT32_EPS * eigenvalues.sum(), np.finfo(np.float32).tiny)
    spread = np.sqrt(np.maximum(eigenvalues, smallest))
    gram, cross = _as_float64(_products(inputs, targets, rows, standardize @ basis / spread))
    return gram * np.outer(spread, spread), cross * spread[:, None], basis


def _as_float64(arrays: tuple[jax.Array, ...]) -> list[np.ndarray]:
    return [np.asarray(values, np.float64) for values in arrays]


def _standardize(values: Array, reference: Array, rows: Array) -> jax.Array:
    """Columns by the mean and deviation that the chosen rows of `reference` have; zero where those are constant."""
    mean, std = _mean_and_std(reference, rows)
    return (jnp.asarray(values, jnp.float32) - mean) / jnp.where(_varies(mean, std), std, jnp.inf)


def _logits(inputs: jax.Array, layer: tuple[jax.Array, jax.Array]) -> jax.Array:
    return _einsum("nd,dc->nc", inputs, layer[0]) + layer[1]


@jax.jit
def _fit_softmax(
    inputs: Array, label: Array, rows: Array, layer: tuple[jax.Array, jax.Array], strength: float
) -> tuple[jax.Array, jax.Array]:
    """Kernel `[D, C]` and bias `[C]` fitted to the chosen rows by L-BFGS, starting from `layer`."""
    inputs, weight = _standardize(inputs, inputs, rows), jnp.asarray(rows, jnp.float32)

    def loss(layer: tuple[jax.Array, jax.Array]) -> jax.Array:
        errors = optax.losses.softmax_cross_entropy_with_integer_labels(_logits(inputs, layer), label)
        penalty = 0.5 * strength * jnp.sum(jnp.square(layer[0]))
        return (jnp.sum(weight * errors) + penalty) / jnp.sum(weight)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def update(carry: tuple) -> tuple:
        layer, state, steps, _ = carry
        value, gradient = value_and_grad(layer, state=state)
        change, state = solver.update(gradient, state, layer, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(layer, change), state, steps + 1, optax.global_norm(gradient)

    def unfinished(carry: tuple) -> jax.Array:
        return (carry[2] < MAX_LBFGS_STEPS) & (carry[3] > LBFGS_TOLERANCE)

    return jax.lax.while_loop(unfinished, update, (layer, solver.init(layer), 0, jnp.inf))[0]


@jax.jit
def _scores(
    inputs: Array, label: Array, rows: Array, fitted_rows: Array, fitted: Array, layer: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Sum of cross-entropies and number of hits over the chosen rows; `fitted_rows` of `fitted` made the layer."""
    logits = _logits(_standardize(inputs, fitted, fitted_rows), layer)
    errors = optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)
    return jnp.sum(jnp.where(rows, errors, 0.0)), jnp.sum((jnp.argmax(logits, axis=1) == label) & rows)
