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

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    """The paper's recipe, or a smaller one by name."""
    config = common.pretraining("como")
    config.encoder = common.encoder("L")
    config.encoder.frozen = True
    config.encoder.init_from = ""  # Workdir of a run whose encoder to start from, of configs/pretrain_mae.py.
    config.data.labels = "action"  # action, state or action,state: what model.label_weight reads from the latent.
    config.data.labelled_fraction = 0.05  # Of the episodes, those whose labels are used.
    config.model = motion_model()
    return common.apply_variant(config, variant, (base, tiny, smoke))


def motion_model() -> ConfigDict:
    """The paper's motion model; `MotionConfig` in como_jax/motion/como.py says what each field means."""
    model = ConfigDict()
    model.num_queries = 8
    model.latent_dim = 16
    model.motion_input = "difference"  # difference (Td), future, rgb_difference or future_only.
    model.bottleneck = ConfigDict(
        {
            "kind": "none",  # none, vq, vq_ema, nsvq, fsq or kl.
            "codebook_size": 128,
            "commitment": 0.25,
            "ema_decay": 0.99,
            "replace_below": 0.0,
            "fsq_levels": (8, 5, 5, 5),
            "kl_weight": 1e-4,
        }
    )
    model.update({"idm_width": 768, "idm_depth": 4, "idm_heads": 12})
    model.update({"fdm_width": 768, "fdm_depth": 12, "fdm_heads": 12, "fdm_patch_size": 16})
    model.residual = False
    # Loss terms; one of weight 0.0 is not computed.
    model.mse_weight = 1.0
    model.pixel_probe = False
    model.perceptual_weight = 1.0
    model.perceptual_space = "vgg16"  # vgg16, alexnet or encoder.
    model.perceptual_file = ""  # .safetensors or .npz, for vgg16 and alexnet.
    model.tcl_weight = 0.004
    model.tcl_temperature = 0.1
    model.tcl_gradient_everywhere = False
    model.feature_weight = 0.0
    model.feature_target = "future"  # future or difference.
    model.flow_weight = 0.0
    model.gap_weight = 0.0
    model.label_weight = 0.0
    model.label_size = 0  # 0 takes what the data has.
    return model


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
