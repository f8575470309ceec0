"""LP-MSE: how well a single linear layer reads the true action out of the latent motion (CoMo, section 4)."""

from __future__ import annotations

import dataclasses

import chex
import numpy as np

REGULARIZATION = (1e-4, 1e-2, 1.0, 1e2, 1e4)


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """Errors on the test set, in squared units of the action.

    Attributes:
      lp_mse: of the linear probe.
      lp_mse_mean_action: of always predicting the mean action of the fitting set, which a useful latent must beat.
      per_dimension, per_dimension_mean_action: the same, `[A]`.
    """

    lp_mse: float
    lp_mse_mean_action: float
    per_dimension: np.ndarray
    per_dimension_mean_action: np.ndarray


def linear_probe(
    latent: np.ndarray,
    action: np.ndarray,
    episode: np.ndarray,
    test_latent: np.ndarray,
    test_action: np.ndarray,
) -> ProbeResult:
    """Fits a ridge regression in closed form and measures it on other episodes.

    The regularisation is chosen on every fifth of the fitting episodes, then the probe is fitted on all of them.

    Args:
      latent: `[N, D]` of the fitting episodes.
      action: `[N, A]`, the targets.
      episode: `[N]`, episode numbers.
      test_latent: `[M, D]` of held-out episodes.
      test_action: `[M, A]`.

    Raises:
      ValueError: fewer than two fitting episodes or no test transition.
    """
    chex.assert_equal_shape_prefix([latent, action, episode], 1)
    chex.assert_equal_shape_prefix([test_latent, test_action], 1)
    episodes = np.unique(episode)
    if len(episodes) < 2 or not len(test_latent):
        raise ValueError(
            f"The linear probe needs two episodes to fit and one transition to test, not {len(episodes)} and "
            f"{len(test_latent)}."
        )
    validation = np.isin(episode, episodes[::5])
    errors = []
    for strength in REGULARIZATION:
        probe = Ridge(latent[~validation], action[~validation], strength)
        errors.append(np.mean(np.square(probe(latent[validation]) - action[validation])))
    probe = Ridge(latent, action, REGULARIZATION[int(np.argmin(errors))])

    error = np.mean(np.square(probe(test_latent) - test_action), axis=0)
    baseline = np.mean(np.square(action.mean(axis=0) - test_action), axis=0)
    return ProbeResult(float(error.mean()), float(baseline.mean()), error, baseline)


class Ridge:
    """Linear regression with intercept: inputs are standardised, `strength * |w|^2` is added to the squared error."""

    def __init__(self, inputs: np.ndarray, targets: np.ndarray, strength: float):
        inputs, targets = np.asarray(inputs, np.float64), np.asarray(targets, np.float64)
        self._mean, self._offset = inputs.mean(axis=0), targets.mean(axis=0)
        std = inputs.std(axis=0)
        self._scale = np.where(std > 1e-12, std, 1.0)
        x = (inputs - self._mean) / self._scale
        gram = x.T @ x + strength * np.eye(x.shape[1])
        self._weights = np.linalg.solve(gram, x.T @ (targets - self._offset))

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Predictions `[N, A]`."""
        return (np.asarray(inputs, np.float64) - self._mean) / self._scale @ self._weights + self._offset
