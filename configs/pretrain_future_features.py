"""The future frame's features themselves are the motion: the upper end of S-PCFC (CoMo, arXiv 2505.17006, ablation).

The latent is read from `F_{t+n}` alone, so that it cannot tell the past from the future: its S-PCFC is 1 by
construction, the worst that there is.

    python -m experiments.pretrain --config configs/pretrain_future_features.py:tiny --workdir RUN --data DIR

Everything else, variants included, is as in `pretrain_como.py`.
"""

from ml_collections import ConfigDict

from configs import pretrain_como


def get_config(variant: str = "") -> ConfigDict:
    """CoMo's recipe, changed."""
    config = pretrain_como.get_config(variant)
    config.model.motion_input = "future_only"
    config.model.tcl_weight = 0.0
    return config
