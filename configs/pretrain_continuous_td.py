"""Continuous with the temporal difference alone: `F_t` and `D_t`, no Tcl (CoMo, arXiv 2505.17006, ablation).

    python -m experiments.pretrain --config configs/pretrain_continuous_td.py:tiny --workdir RUN --data DIR

Everything else, variants included, is as in `pretrain_como.py`.
"""

from ml_collections import ConfigDict

from configs import pretrain_como


def get_config(variant: str = "") -> ConfigDict:
    """CoMo's recipe, changed."""
    config = pretrain_como.get_config(variant)
    config.model.tcl_weight = 0.0
    return config
