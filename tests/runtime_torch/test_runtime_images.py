"""The runtime makes frames of pictures exactly as training does."""

from __future__ import annotations

import numpy as np
import pytest

from como_jax.data.transforms import View, cut, resize
from como_jax.runtime_torch.images import fit_frames


@pytest.mark.parametrize("fit", ("crop", "stretch"))
def test_frames_are_those_of_training_for_pictures_of_any_size(fit: str) -> None:
    rng = np.random.default_rng(0)
    for height, width in ((480, 641), (63, 40), (64, 64), (70, 90), (20, 31), (1, 500)):
        pictures = rng.integers(0, 256, (2, 2, height, width, 3), dtype=np.uint8)
        wanted = np.empty((2, 2, 64, 64, 3), np.uint8)
        for index in np.ndindex(2, 2):
            resize(cut(pictures[index], View(fit)), wanted[index])
        assert np.array_equal(fit_frames(pictures, 64, fit), wanted)
