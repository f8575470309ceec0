"""Diffusion policy on robot actions and latent motion (CoMo, arXiv 2505.17006, stage 2): a DiT over action chunks.

    python -m experiments.train_policy --config configs/policy_diffusion.py:tiny --workdir RUN --data ROBOT,LABELLED

| variant | hardware | what to expect |
|---|---|---|
| (none)  | TPU slice, large GPUs | ViT-B, from a run of `pretrain_mae.py` or scratch, and a 12-layer trunk, 224 px |
| `:small`| one CPU core, half an hour | 64 px; LIBERO-Spatial: 44 % from ten demonstrations, 62 % in 10,000 steps |
| `:tiny` | laptop CPU, minutes | 64 px, a small tower from scratch |
| `:smoke`| anything, seconds | a check that everything runs; learns nothing |

ROBOT has true actions, LABELLED is what `experiments.extract_labels` wrote. `--config.data.videos=()` leaves the
labelled videos out: the robot-only baseline, equal in all else. In two stages: first
`--config.data.latent_only=True`, then a new run on ROBOT alone with `--config.init_from=FIRST`.
`--config.model.diffusion.kind=flow` matches flows instead of denoising.
"""

from ml_collections import ConfigDict

from como_jax.spec.policies import DiffusionPolicyConfig
from configs import common


def get_config(variant: str = "") -> ConfigDict:
    """The full recipe, or a smaller one by name."""
    config = common.policy("diffusion_policy", common.section(DiffusionPolicyConfig, "chunk", "stride", "latent_size"))
    config.model.diffusion.clip = 1.0  # 0.0 for normalizations without limits.
    return common.apply_variant(config, variant, (small, tiny, smoke))


def small(config: ConfigDict) -> None:
    """Half an hour of one CPU core."""
    common.shrink_policy_to_small(config)
    config.model.update({"width": 128, "depth": 2, "num_heads": 4})


def tiny(config: ConfigDict) -> None:
    """Minutes on two CPU cores."""
    common.shrink_policy(config)
    config.model.update({"width": 96, "depth": 2, "num_heads": 2, "draws": 2})


def smoke(config: ConfigDict) -> None:
    """Seconds on anything."""
    tiny(config)
    common.shrink_policy_to_smoke(config)
    config.model.update({"width": 32, "depth": 1})
    config.model.diffusion.sample_steps = 2
