"""CoMo (arXiv 2505.17006): continuous latent motion from frame pairs.

    python -m experiments.pretrain --config configs/pretrain_como.py:tiny --workdir RUN --data DIR[=WEIGHT],DIR

| variant | hardware | what to expect |
|---|---|---|
| (none)  | TPU slice, large GPUs | ViT-L/16, 224 px, the paper's settings; start it from an MAE run |
| `:base` | one GPU | ViT-B/16, 224 px, batch 64 |
| `:tiny` | laptop CPU, minutes | 64 px, small encoder; start it from `pretrain_mae.py:tiny` |
| `:smoke`| anything, seconds | a check that everything runs; learns nothing |

The perceptual term (LPIPS, weight 1) of the paper's recipe is not part of the loss here.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(variant: str = "") -> ConfigDict:
    """The paper's recipe, or a smaller one by name."""
    config = common.pretraining("como")
    config.encoder = common.encoder("L")
    config.encoder.frozen = True
    config.encoder.init_from = ""  # Workdir of a run whose encoder to start from, of configs/pretrain_mae.py.
    config.model = ConfigDict(
        {
            "num_queries": 8,
            "latent_dim": 16,
            "motion_input": "difference",  # "future" is the plain continuous variant, without Td.
            "idm_width": 768,
            "idm_depth": 4,
            "idm_heads": 12,
            "fdm_width": 768,
            "fdm_depth": 12,
            "fdm_heads": 12,
            "fdm_patch_size": 16,
            "residual": False,
            "mse_weight": 1.0,
            "tcl_weight": 0.004,  # 0.0 turns Tcl off.
            "tcl_temperature": 0.1,
            "tcl_gradient_everywhere": False,
        }
    )
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
    config.train.num_steps = 700


def smoke(config: ConfigDict) -> None:
    """Seconds on anything."""
    tiny(config)
    common.shrink_to_smoke(config)
    config.model.update(
        {"idm_width": 32, "idm_depth": 2, "idm_heads": 2, "fdm_width": 32, "fdm_depth": 1, "fdm_heads": 2}
    )
