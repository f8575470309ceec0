"""LAQ, stage 1 of LAPA (arXiv 2410.11758): discrete latent actions, everything trained from scratch.

    python -m experiments.pretrain --config configs/pretrain_laq.py:tiny --workdir RUN --data DIR[=WEIGHT],DIR

| variant | hardware | what to expect |
|---|---|---|
| (none)  | TPU slice, large GPUs | 256 px, 64 tokens a frame, 4 latent actions of 8 codes, the paper's settings |
| `:base` | one GPU | width 512, batch 64 |
| `:tiny` | laptop CPU, minutes | 64 px |
| `:smoke`| anything, seconds | a check that everything runs; learns nothing |

The run logs the perplexity of the codebook and its dead codes, and warns when it has collapsed.
"""

from ml_collections import ConfigDict

from como_jax.spec.motion import LaqConfig
from configs import common


def get_config(variant: str = "") -> ConfigDict:
    """The paper's recipe, or a smaller one by name."""
    config = common.pretraining("laq")
    config.model = common.section(LaqConfig)
    config.data.update({"image_size": 256, "gap_seconds": 0.6, "random_shift": 0, "batch_size": 512})
    config.optim.update({"final_learning_rate": 1e-4, "warmup_steps": 0})
    config.optim.update({"weight_decay": 0.0, "clip_norm": 0.5})
    return common.apply_variant(config, variant, (base, tiny, smoke))


def base(config: ConfigDict) -> None:
    """Half the width, on one GPU."""
    config.model.update({"width": 512, "num_heads": 8})
    config.data.batch_size = 64


def tiny(config: ConfigDict) -> None:
    """Minutes on two CPU cores."""
    common.shrink(config)
    config.data.gap_seconds = 0.5
    config.model.update({"patch_size": 8, "width": 96, "num_heads": 2, "head_size": 48})
    config.model.update({"spatial_depth": 2, "temporal_depth": 2, "decoder_depth": 3})
    config.train.num_steps = 700


def smoke(config: ConfigDict) -> None:
    """Seconds on anything."""
    tiny(config)
    common.shrink_to_smoke(config)
    config.model.update({"width": 32, "head_size": 16, "spatial_depth": 1, "temporal_depth": 1, "decoder_depth": 1})
