"""Vision-language-action model (LAPA, arXiv 2410.11758), on discrete latent actions or on CoMo's continuous ones.

    python -m experiments.train_policy --config configs/policy_vla.py:latent --workdir LATENT --data LABELLED
    python -m experiments.train_policy --config configs/policy_vla.py:finetune --workdir RUN --data ROBOT \\
        --config.init_from=LATENT

Variants are joined by commas, as in `:latent,tiny`.

| variant | what it is |
|---|---|
| (none)      | ViT-B and a decoder of 0.3 B parameters, 224 px; robot data and labelled videos at once |
| `latent`    | stage 2: latent actions of labelled datasets, whether they have true ones or not |
| `finetune`  | stage 3: true actions alone |
| `paligemma` | 3 B parameters in the layout of PaliGemma (arXiv 2407.07726), from `--config.model.weights` or scratch |
| `lora`      | trains low-rank changes of the decoder and the new heads alone (arXiv 2106.09685) |
| `small`     | one CPU core, half an hour |
| `tiny`      | laptop CPU, minutes |
| `smoke`     | a check that everything runs, seconds; learns nothing |

Labels of a model with a codebook are learned as codes, all others as vectors, by regression or with
`--config.model.latent_head=flow`; actions as bins, or as vectors with `--config.model.action_head=regression` or
`flow`.
"""

from ml_collections import ConfigDict

from como_jax.spec.policies import VlaConfig
from como_jax.spec.towers import DecoderConfig
from configs import common


def get_config(variant: str = "") -> ConfigDict:
    """The full recipe, or what some variants make of it."""
    model = common.section(DecoderConfig)
    model.update(common.section(VlaConfig, "chunk", "stride"))
    config = common.policy("latent_vla", model)
    config.data.update({"chunk": 1, "random_shift": 0, "normalization": "uniform"})
    config.encoder.pool = 1
    config.text.update({"tower": "tokens", "frozen": False, "max_length": 128})
    config.text.prompt = "what action should the robot take to {}"
    config.model.weights = ""  # PaliGemma's: .safetensors or .safetensors.index.json, with config.json beside it.
    config.model.update({"width": 1024, "mlp_width": 4096})
    config.model.update({"text_weight": 0.01, "causal_text": True})
    config.optim.update({"learning_rate": 2e-5, "final_learning_rate": 2e-5, "weight_decay": 0.0, "warmup_steps": 0})
    config.train.num_steps = 70_000
    config.evaluation.execute = 1
    return common.apply_variant(config, variant, (latent, finetune, paligemma, lora, small, tiny, smoke))


def latent(config: ConfigDict) -> None:
    """Stage 2."""
    config.data.update({"latent_only": True, "proprioception": False})


def finetune(config: ConfigDict) -> None:
    """Stage 3."""
    config.data.update({"videos": (), "robot_latents": False, "batch_size": 128, "min_crop_fraction": 0.9})
    config.model.color_jitter = 1.0


def paligemma(config: ConfigDict) -> None:
    """Sizes of PaliGemma 3B at 224 px; other sizes are those of `model.weights`."""
    config.encoder.update({"tower": "siglip", "patch_size": 14, "mlp_width": 4304})
    config.encoder.update({"width": 1152, "depth": 27, "num_heads": 16})
    config.model.update({"width": 2048, "mlp_width": 16_384})
    # As PaliGemma was trained: all of the prefix reads each other.
    config.model.update({"text_weight": 0.0, "causal_text": False})
    config.text.vocabulary_size = 257_152
    config.train.remat = "full"


def lora(config: ConfigDict) -> None:
    """One small GPU."""
    config.model.lora_rank = 16
    config.text.frozen = True
    config.encoder.frozen = True
    config.optim.learning_rate = config.optim.final_learning_rate = 2e-4
    config.data.batch_size = 16


def small(config: ConfigDict) -> None:
    """Half an hour of one CPU core."""
    common.shrink_policy_to_small(config)
    _shrink(config)
    config.model.update({"width": 128, "depth": 2})


def tiny(config: ConfigDict) -> None:
    """Minutes on two CPU cores."""
    common.shrink_policy(config)
    _shrink(config)


def _shrink(config: ConfigDict) -> None:
    """A small decoder that writes numbers."""
    # As text the instruction would be most of the sequence.
    config.text.update({"tower": "bytes", "prompt": "{}"})
    config.model.update({"width": 96, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "head_size": 24, "mlp_width": 256})
    config.data.min_crop_fraction = 1.0
    config.model.update({"head_width": 64, "head_depth": 1, "text_weight": 0.0, "causal_text": False})
    config.model.color_jitter = 0.0
    # On a few demonstrations 256 bins, each seen a few times, act worse than numbers do (see experiments/ABLATION.md).
    config.data.normalization = "min_max"
    config.model.action_head = "regression"


def smoke(config: ConfigDict) -> None:
    """Seconds on anything."""
    tiny(config)
    common.shrink_policy_to_smoke(config)
    config.data.normalization = "uniform"
    config.model.action_head = "bins"
    config.model.update({"width": 32, "depth": 1, "num_heads": 2, "num_kv_heads": 1, "head_size": 16, "mlp_width": 48})
