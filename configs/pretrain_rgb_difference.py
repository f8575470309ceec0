"""The difference of pixels in place of that of features: `F_t` and ViT(`O_{t+n} - O_t`) (CoMo, arXiv 2505.17006, v1).

    python -m experiments.pretrain --config configs/pretrain_rgb_difference.py:tiny --workdir RUN --data DIR

Everything else, variants included, is as in `pretrain_como.py`.
"""

from ml_collections import ConfigDict

from configs import pretrain_como


def get_config(variant: str = "") -> ConfigDict:
    """CoMo's recipe, changed."""
    config = pretrain_como.get_config(variant)
    config.model.motion_input = "rgb_difference"
    config.model.tcl_weight = 0.0
    return config
