"""S-PCFC: does the latent hold motion, or the static scene (CoMo, section 4)?

It compares `z(o_{t-n}, o_t)`, past to current, with `z(o_{t+n}, o_t)`, future to current. Near 1 the latent describes
the current scene, whichever way it was reached. Lower is better, but a constant or random latent may be low too: read
it beside LP-MSE. Axes: N clips, Q queries, L latent size of one query.
"""

from __future__ import annotations

import chex
import numpy as np


def past_future_similarities(past_to_current: np.ndarray, future_to_current: np.ndarray) -> np.ndarray:
    """Cosines `[N]` of paired latents `[N, Q, L]` or `[N, D]`, each latent taken as one vector."""
    chex.assert_equal_shape([past_to_current, future_to_current])
    count = len(past_to_current)
    return _cosines(np.reshape(past_to_current, (count, -1)), np.reshape(future_to_current, (count, -1)))


def past_future_similarity(past_to_current: np.ndarray, future_to_current: np.ndarray) -> float:
    """S-PCFC: the mean of `past_future_similarities`."""
    return float(np.mean(past_future_similarities(past_to_current, future_to_current)))


def past_future_similarity_by_token(past_to_current: np.ndarray, future_to_current: np.ndarray) -> float:
    """S-PCFC taken token by token: the mean over clips and queries of the cosines of single tokens, `[N, Q, L]` each.

    The paper's formula leaves open how the tokens of one latent are compared; this is the other reading. Every token
    counts the same here, while in `past_future_similarity` those of large norm count most.
    """
    chex.assert_rank([past_to_current, future_to_current], 3)
    chex.assert_equal_shape([past_to_current, future_to_current])
    return float(np.mean(_cosines(past_to_current, future_to_current)))


def _cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosines along the last axis; 0 where a vector is zero."""
    a, b = (np.asarray(z, np.float64) for z in (first, second))
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.sum(a * b, axis=-1) / np.maximum(norms, 1e-12)
