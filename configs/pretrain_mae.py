"""MAE (arXiv 2111.06377): pretrains the encoder on the user's own videos, where no public weights can be had.

    python -m experiments.pretrain --config configs/pretrain_mae.py:tiny --workdir RUN --data DIR[=WEIGHT],DIR

Then start CoMo from it with `--config.encoder.init_from=RUN`. The variants match those of `pretrain_como.py`.
"""

from ml_collections import ConfigDict

from como_jax.spec.motion import MaeConfig
from configs import common


def get_config(variant: str = "") -> ConfigDict:
    """ViT-L with the paper's decoder, or a smaller one by name."""
    config = common.pretraining("mae")
    config.encoder = common.encoder("L")
    config.model = common.section(MaeConfig)
    config.data.batch_size = 1024
    config.optim.update({"learning_rate": 6e-4, "final_learning_rate": 1e-6, "warmup_steps": 5000})
    config.optim.update({"beta2": 0.95, "weight_decay": 0.05})
    return common.apply_variant(config, variant, (base, tiny, smoke))


def base(config: ConfigDict) -> None:
    """ViT-B on one GPU."""
    config.encoder.update(common.encoder("B"))
    config.data.batch_size = 256
    config.optim.learning_rate = 1.5e-4


def tiny(config: ConfigDict) -> None:
    """Minutes on two CPU cores."""
    common.shrink(config)
    config.model.update({"decoder_width": 64, "decoder_depth": 2, "decoder_heads": 4})
    config.train.num_steps = 500


def smoke(config: ConfigDict) -> None:
    """Seconds on anything."""
    tiny(config)
    common.shrink_to_smoke(config)
    config.model.update({"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2})
