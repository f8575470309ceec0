"""LAOM (arXiv 2502.00379) in this interface: a large continuous latent that predicts features instead of pixels.

The target is the frozen encoder's `F_{t+n}`; LAOM's own target, an encoder trained with the rest and followed by a
moving average, is not part of this interface. With actions for a few per cent of the episodes, which LAOM shows to
matter under distractors: `--config.model.label_weight=1.0 --config.data.labelled_fraction=0.025`. The head that draws
learns beside the model and trains nothing else.

    python -m experiments.pretrain --config configs/pretrain_laom.py:tiny --workdir RUN --data DIR

Everything else, variants included, is as in `pretrain_como.py`.
"""

from ml_collections import ConfigDict

from configs import pretrain_como


def get_config(variant: str = "") -> ConfigDict:
    """CoMo's recipe, changed."""
    config = pretrain_como.get_config(variant)
    config.model.motion_input = "future"
    config.model.update({"num_queries": 1, "latent_dim": 1024})
    config.model.update({"feature_weight": 1.0, "pixel_probe": True})
    config.model.update({"tcl_weight": 0.0, "perceptual_weight": 0.0})
    return config
