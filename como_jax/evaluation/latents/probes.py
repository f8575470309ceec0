"""How well a single linear layer reads the true action out of the latent motion (LP-MSE; CoMo, section 4).

The probes are scikit-learn's, in float64 and on standardised latents: in float32 the directions of large variance drown
those of small variance, in which the motion may hide. Axes: N fitting and M test transitions, D numbers of a latent,
A numbers of an action.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import chex
import jax
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge

from como_jax import hosts
from como_jax.errors import UsageError
from como_jax.types import Array

MIN_PROBE_EPISODES = 2
# From strong to weak, so that every logistic regression starts close to its optimum.
STRENGTHS = (1e4, 1e2, 1.0, 1e-2, 1e-4)
MAX_STEPS, TOLERANCE = 300, 1e-6


class ProbeError(UsageError):
    """Latents and actions that no probe can be fitted to or measured on."""


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """Errors on the test set, in squared units of the action.

    Attributes:
      lp_mse: mean squared error of the linear probe.
      lp_mse_mean_action: of always predicting the mean action of the fitting set; a useful latent must beat it.
      r2: share of the test set's variance that the probe explains, averaged over the dimensions that vary there; nan
        where none does.
      per_dimension, per_dimension_mean_action, per_dimension_r2: the same for every dimension, `[A]`; R² is nan where
        the test set does not vary.
      strength: the chosen strength of the regularisation.
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
      majority_accuracy: by always naming the most frequent class of the fitting set; a useful latent must beat it.
    """

    accuracy: float
    majority_accuracy: float


def linear_probe(latent: Array, action: Array, episode: Array, test_latent: Array, test_action: Array) -> ProbeResult:
    """Fits a ridge regression and measures it on other episodes.

    `strength * |w|^2` is added to the sum of squared errors. The strength is chosen on every fifth of the fitting
    episodes, then the probe is fitted on all of them. All arrays may be split over devices and hosts.

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
    (latent, action, test_latent, test_action), held_out = _checked(latent, action, episode, test_latent, test_action)
    inputs, held_inputs = _standardize(latent[~held_out], latent[held_out])
    errors = [
        np.mean(np.square(_ridge(inputs, action[~held_out], held_inputs, strength) - action[held_out]))
        for strength in STRENGTHS
    ]
    strength = STRENGTHS[int(np.argmin(errors))]

    inputs, test_inputs = _standardize(latent, test_latent)
    error = np.mean(np.square(_ridge(inputs, action, test_inputs, strength) - test_action), axis=0)
    baseline = np.mean(np.square(action.mean(axis=0) - test_action), axis=0)
    r2 = 1.0 - error / np.where(_varies(test_action), np.var(test_action, axis=0), np.nan)
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
    """The same for actions that are choices: multinomial logistic regression.

    `strength / 2 * |w|^2` is added to the sum of cross-entropies. The strength of least cross-entropy on every fifth of
    the fitting episodes is chosen, not that of highest accuracy, since accuracies of small sets are often equal.

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
    arrays, held_out = _checked(latent, label, episode, test_latent, test_label)
    latent, test_latent = arrays[0], arrays[2]
    label, test_label = (labels.astype(np.int64) for labels in arrays[1::2])
    low, high = min(label.min(), test_label.min()), max(label.max(), test_label.max())
    num_classes = int(high) + 1 if num_classes is None else num_classes
    if low < 0 or high >= num_classes:
        raise ProbeError(f"labels of {num_classes} classes are 0 to {num_classes - 1}; there are {low} to {high}.")
    inputs, held_inputs = _standardize(latent[~held_out], latent[held_out])
    scores = _classify(inputs, label[~held_out], held_inputs, STRENGTHS, num_classes)
    rows = np.arange(len(held_inputs))
    strength = STRENGTHS[int(np.argmin([-found[rows, label[held_out]].sum() for found in scores]))]

    inputs, test_inputs = _standardize(latent, test_latent)
    (found,) = _classify(inputs, label, test_inputs, [strength], num_classes)
    majority = np.bincount(label, minlength=num_classes).argmax()
    return AccuracyResult(float(np.mean(found.argmax(axis=1) == test_label)), float(np.mean(test_label == majority)))


def _checked(
    latent: Array, target: Array, episode: Array, test_latent: Array, test_target: Array
) -> tuple[list[np.ndarray], np.ndarray]:
    """The latents and targets, whole and in float64, and which rows `[N]` choose the regularisation.

    Those are the rows of every fifth episode, since rows of one episode are alike.

    Raises:
      ProbeError: data that no probe can be fitted to or measured on.
    """
    chex.assert_equal_shape_prefix([latent, target, episode], 1)
    chex.assert_equal_shape_prefix([test_latent, test_target], 1)
    chex.assert_equal_shape_suffix([latent, test_latent], 1)
    episode = _whole(episode)
    episodes = np.unique(episode)
    if len(episodes) < MIN_PROBE_EPISODES or not len(test_latent):
        raise ProbeError(
            f"the linear probe needs {MIN_PROBE_EPISODES} episodes to fit and 1 transition to test; there are "
            f"{len(episodes)} and {len(test_latent)}."
        )
    arrays = [_whole(values).astype(np.float64) for values in (latent, target, test_latent, test_target)]
    if not all(np.isfinite(values).all() for values in arrays):
        raise ProbeError("the linear probe needs finite latents and actions; NaN or infinity is among them.")
    return arrays, np.isin(episode, episodes[::5])


def _whole(values: Array) -> np.ndarray:
    """An array that may be split over devices and hosts, whole on this host."""
    is_elsewhere = isinstance(values, jax.Array) and not values.is_fully_addressable
    return hosts.gather(values) if is_elsewhere else np.asarray(values)


def _varies(values: np.ndarray) -> np.ndarray:
    """Whether columns differ by more than the rounding of the float32 numbers that they were made of."""
    mean, std = values.mean(axis=0), values.std(axis=0)
    return (std > 1e-6 * abs(mean)) & (std > 1e-12)


def _standardize(latent: np.ndarray, others: np.ndarray) -> list[np.ndarray]:
    """Both with the columns of `latent` at mean 0 and deviation 1; columns that are constant there become 0."""
    scale = np.where(_varies(latent), latent.std(axis=0), np.inf)
    return [(values - latent.mean(axis=0)) / scale for values in (latent, others)]


def _ridge(inputs: np.ndarray, targets: np.ndarray, others: np.ndarray, strength: float) -> np.ndarray:
    """Predictions `[M, A]` for `others` `[M, D]` of the ridge regression from inputs `[N, D]` to targets `[N, A]`."""
    return Ridge(strength).fit(inputs, targets).predict(others).reshape(len(others), -1)


def _classify(
    inputs: np.ndarray, label: np.ndarray, others: np.ndarray, strengths: Sequence[float], num_classes: int
) -> list[np.ndarray]:
    """Log-probabilities `[M, C]` for `others` `[M, D]` by the logistic regression of each strength."""
    classes = np.unique(label)
    # Of two classes scikit-learn has one vector of weights, the difference of those of a softmax, with twice the |w|^2.
    factor = 2.0 if len(classes) == 2 else 1.0
    probe = LogisticRegression(warm_start=True, max_iter=MAX_STEPS, tol=TOLERANCE)
    found = []
    for strength in strengths:
        # A class that is not among the labels, or the only one.
        probability = np.where(np.isin(np.arange(num_classes), classes), 1.0, 0.0) * np.ones((len(others), 1))
        if len(classes) > 1:
            with warnings.catch_warnings():
                # Classes that separate have no optimum without regularisation, and a distant one with a weak one.
                warnings.simplefilter("ignore", ConvergenceWarning)
                probe.set_params(C=factor / strength).fit(inputs, label)
            probability[:, classes] = probe.predict_proba(others)
        found.append(np.log(np.maximum(probability, np.finfo(np.float64).tiny)))
    return found
