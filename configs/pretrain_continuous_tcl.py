"""Continuous with temporal contrastive learning alone: `F_t` and `F_{t+n}` (CoMo, arXiv 2505.17006, ablation).

    python -m experiments.pretrain --config configs/pretrain_continuous_tcl.py:tiny --workdir RUN --data DIR

Everything else, variants included, is as in `pretrain_como.py`.
"""

from ml_collections import ConfigDict

from configs import pretrain_como


def get_config(variant: str = "") -> ConfigDict:
    """CoMo's recipe, changed."""
    config = pretrain_como.get_config(variant)
    config.model.motion_input = "future"
    return config
