"""Autoregressive policy on actions and latent motion: a GPT after Moto (arXiv 2412.04445) and CoMo on CALVIN.

    python -m experiments.train_policy --config configs/policy_autoregressive.py:tiny --workdir RUN --data DIR,LABELLED

Everything else, variants included, is as in `policy_diffusion.py`. Labels of a model with a codebook are learned as
codes, all others as continuous tokens, by regression or with `--config.model.latent_head=diffusion`.
"""

from ml_collections import ConfigDict

from como_jax.spec.policies import AutoregressiveConfig
from configs import common


def get_config(variant: str = "") -> ConfigDict:
    """The full recipe, or a smaller one by name."""
    config = common.policy("autoregressive_policy", common.section(AutoregressiveConfig, "chunk", "stride"))
    config.data.update({"instants": 2, "stride": 5, "chunk": 5, "robot_latents": True})
    return common.apply_variant(config, variant, (small, tiny, smoke))


def small(config: ConfigDict) -> None:
    """Half an hour of one CPU core."""
    common.shrink_policy_to_small(config)
    config.data.instants = 1
    config.model.update({"width": 128, "depth": 2, "num_heads": 4, "head_width": 64, "head_depth": 1})


def tiny(config: ConfigDict) -> None:
    """Minutes on two CPU cores."""
    common.shrink_policy(config)
    config.data.instants = 1
    config.model.update({"width": 96, "depth": 2, "num_heads": 2, "head_width": 64, "head_depth": 1})


def smoke(config: ConfigDict) -> None:
    """Seconds on anything."""
    tiny(config)
    common.shrink_policy_to_smoke(config)
    config.data.instants = 2
    config.model.update({"width": 32, "depth": 1})
