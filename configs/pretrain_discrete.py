"""Discrete latent motion: `F_t` and `F_{t+n}` through vector quantisation, as in Moto (arXiv 2412.04445).

8 codes a transition out of 128, 32 numbers each. The run logs perplexity and dead codes.

    python -m experiments.pretrain --config configs/pretrain_discrete.py:tiny --workdir RUN --data DIR

Everything else, variants included, is as in `pretrain_como.py`.
"""

from ml_collections import ConfigDict

from configs import pretrain_como


def get_config(variant: str = "") -> ConfigDict:
    """CoMo's recipe, changed."""
    config = pretrain_como.get_config(variant)
    config.model.motion_input = "future"
    config.model.bottleneck.update({"kind": "vq", "replace_below": 0.1})
    config.model.latent_dim = 32
    config.model.tcl_weight = 0.0
    return config
