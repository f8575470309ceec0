"""S-PCFC: does the latent hold motion, or the static scene (CoMo, section 4)?"""

from __future__ import annotations

import chex
import numpy as np


def past_future_similarity(past_to_current: np.ndarray, future_to_current: np.ndarray) -> float:
    """S-PCFC: mean cosine of `z(o_{t-n}, o_t)` and `z(o_{t+n}, o_t)`, each `[N, D]`.

    Near 1 the latent describes the current scene, whichever way it was reached. Lower is better, but a constant or
    random latent may be low too: read it beside LP-MSE.
    """
    chex.assert_equal_shape([past_to_current, future_to_current])
    a, b = (np.asarray(z, np.float64) for z in (past_to_current, future_to_current))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean(np.sum(a * b, axis=1) / np.maximum(norms, 1e-12)))
