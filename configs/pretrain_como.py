"""CoMo (arXiv 2505.17006): continuous latent motion from frame pairs.

    python -m experiments.pretrain --config configs/pretrain_como.py:tiny --workdir RUN --data DIR[=WEIGHT],DIR

| variant | hardware | what to expect |
|---|---|---|
| (none)  | TPU slice, large GPUs | ViT-L/16, 224 px, the paper's settings; start it from an MAE run |
| `:base` | one GPU | ViT-B/16, 224 px, batch 64 |
| `:tiny` | laptop CPU, minutes | 64 px, small encoder; start it from `pretrain_mae.py:tiny` |
| `:smoke`| anything, seconds | a check that everything runs; learns nothing |

The paper's perceptual loss needs the weights of a VGG16 with LPIPS heads, which cannot be shipped: name their file by
`--config.model.perceptual_file`, or take the motion encoder as the perceptual space with
`--config.model.perceptual_space=encoder`, or turn the term off with `--config.model.perceptual_weight=0.0`. The two
small variants have it off. The paper's ablations are the other recipes, each a few lines that change this one.
"""

from ml_collections import ConfigDict

from como_jax.spec.motion import MotionConfig
from configs import common


def get_config(variant: str = "") -> ConfigDict:
    """The paper's recipe, or a smaller one by name."""
    config = common.pretraining("como")
    config.encoder = common.encoder("L")
    config.encoder.frozen = True
    config.encoder.init_from = ""  # Directory of a run whose encoder to start from, of configs/pretrain_mae.py.
    config.data.labels = "action"  # action, state or action,state: what model.label_weight reads from the latent.
    config.data.labelled_fraction = 0.05  # Of the episodes, those whose labels are used.
    config.model = common.section(MotionConfig, "freeze_encoder", "pair_spans")
    config.model.perceptual_file = ""  # .safetensors or .npz, for the perceptual spaces vgg16 and alexnet.
    return common.apply_variant(config, variant, (base, tiny, smoke))


def base(config: ConfigDict) -> None:
    """ViT-B on one GPU."""
    config.encoder.update(common.encoder("B"))
    config.data.batch_size = 64


def tiny(config: ConfigDict) -> None:
    """Minutes on two CPU cores."""
    common.shrink(config)
    config.model.update(
        {"idm_width": 128, "idm_depth": 2, "idm_heads": 2, "fdm_width": 128, "fdm_depth": 4, "fdm_heads": 2}
    )
    config.model.fdm_patch_size = 8
    config.model.residual = True
    config.model.perceptual_weight = 0.0
    config.train.num_steps = 700


def smoke(config: ConfigDict) -> None:
    """Seconds on anything."""
    tiny(config)
    common.shrink_to_smoke(config)
    config.model.update(
        {"idm_width": 32, "idm_depth": 2, "idm_heads": 2, "fdm_width": 32, "fdm_depth": 1, "fdm_patch_size": 16}
    )
