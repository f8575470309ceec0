"""LAPO (arXiv 2312.10812) in this interface: everything from scratch, one discrete latent action, next-frame pixels.

The encoder is trained with the rest and the codebook follows moving averages, as in LAPO. Its convolutional networks
are replaced by the transformers of the other recipes, and its inverse dynamics model sees two frames, not three.

    python -m experiments.pretrain --config configs/pretrain_lapo.py:tiny --workdir RUN --data DIR

Everything else, variants included, is as in `pretrain_como.py`.
"""

from ml_collections import ConfigDict

from configs import pretrain_como


def get_config(variant: str = "") -> ConfigDict:
    """CoMo's recipe, changed."""
    config = pretrain_como.get_config(variant)
    config.encoder.frozen = False
    config.model.motion_input = "future"
    config.model.bottleneck.update({"kind": "vq_ema", "codebook_size": 64, "replace_below": 0.1})
    config.model.update({"num_queries": 4, "latent_dim": 16})
    config.model.update({"tcl_weight": 0.0, "perceptual_weight": 0.0})
    return config
