"""What the recipes share. A recipe states only what differs from the dataclasses that each section is made of."""

from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from como_jax.data.settings import MotionDataSettings, PolicyDataSettings
from como_jax.evaluation.latents.in_loop import EvaluationConfig
from como_jax.evaluation.rollouts.in_loop import PolicyEvaluationConfig
from como_jax.spec.sections import default_fields
from como_jax.spec.towers import TextConfig
from como_jax.training.optim import OptimConfig
from como_jax.training.sharding import MeshSettings
from como_jax.training.trainer import TrainSettings

# Width, depth and heads of the standard ViT sizes, all with 16-pixel patches (arXiv 2010.11929 and 2012.12877).
VIT_SIZES = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}


def section(settings: type, *without: str) -> ConfigDict:
    """A section with the defaults of a dataclass, except for some fields that other sections hold."""
    fields = default_fields(settings)
    return ConfigDict({name: fields[name] for name in fields if name not in without})


def encoder(size: str) -> ConfigDict:
    """A standard ViT encoder."""
    width, depth, num_heads = VIT_SIZES[size]
    return ConfigDict({"patch_size": 16, "width": width, "depth": depth, "num_heads": num_heads})


def pretraining(family: str) -> ConfigDict:
    """Everything but the model: data, optimiser, loop, evaluation, mesh."""
    config = _training(family)
    config.data = section(MotionDataSettings)
    config.train.collapse_steps = 1000  # Steps with a hardly used codebook after which a warning is given.
    config.evaluation = section(EvaluationConfig)
    return config


def policy(family: str, model: ConfigDict) -> ConfigDict:
    """Everything but the settings of the model itself: data, towers, optimiser, loop, evaluation, mesh."""
    config = _training(family)
    config.init_from = ""  # Directory of another policy's run to start from; what fits is taken, the rest is new.
    config.data = section(PolicyDataSettings)

    config.encoder = encoder("B")
    config.encoder.tower = "vit"  # vit, siglip, or patch: two linear layers over patches, from scratch.
    config.encoder.mlp_width = 0  # 0 for four times the width.
    config.encoder.frozen = False
    config.encoder.init_from = ""  # Directory of a pretraining run whose encoder to start from.
    config.encoder.pool = 2  # Side of the square of image tokens that are averaged to one.

    config.text = section(TextConfig)
    config.text.max_length = 96
    # Those of public towers come from the config.json beside their weights.
    config.text.update({"activation": "", "relative_buckets": 0, "relative_distance": 0})
    config.text.weights = ""  # .safetensors of clip or t5, with config.json beside it.

    config.model = model
    # 0 takes what the data has.
    config.model.update({"action_size": 0, "latent_queries": 0, "latent_dim": 0, "codebook_size": 0})

    config.optim.update({"final_learning_rate": 1e-6, "beta2": 0.95, "ema_decay": 0.999})
    config.evaluation = section(PolicyEvaluationConfig)
    return config


def _training(family: str) -> ConfigDict:
    """Optimiser, loop, mesh and trace."""
    config = ConfigDict({"family": family, "seed": 0})
    config.optim, config.train, config.mesh = section(OptimConfig), section(TrainSettings), section(MeshSettings)
    config.profile = ""  # Folder that gets a trace of a few steps, which TensorBoard and xprof open.
    return config


def apply_variant(config: ConfigDict, name: str, variants: Sequence[Callable[[ConfigDict], None]]) -> ConfigDict:
    """Makes of the full recipe the variant of that name and locks it; "" changes nothing.

    Args:
      config: the full recipe.
      name: of one of `variants`, or several joined by commas.
      variants: functions that change a recipe; those that are named are called in this order.
    """
    names = [part.strip() for part in name.split(",") if part.strip()]
    known = [variant.__name__ for variant in variants]
    for part in names:
        if part not in known:
            raise ValueError(f"Unknown variant {part!r}; choose one of {', '.join(known)}.")
    for variant in variants:
        if variant.__name__ in names:
            variant(config)
    return config.lock()


def shrink(config: ConfigDict) -> None:
    """64 px and a small encoder, for minutes on a CPU."""
    if "encoder" in config:
        config.encoder.update({"patch_size": 8, "width": 128, "depth": 3, "num_heads": 2})
    config.data.update({"image_size": 64, "batch_size": 32, "random_shift": 3, "num_threads": 2})
    config.optim.update({"learning_rate": 2e-3, "final_learning_rate": 2e-5, "warmup_steps": 50})
    config.train.update({"dtype": "float32", "evaluate_every": 350, "checkpoint_every": 350, "collapse_steps": 100})
    config.evaluation.num_clips = 1024


def shrink_to_smoke(config: ConfigDict) -> None:
    """A few steps of a few samples, on top of `shrink`."""
    if "encoder" in config:
        config.encoder.update({"patch_size": 16, "width": 32, "depth": 1, "num_heads": 2})
    config.data.update({"image_size": 32, "batch_size": 8})
    config.train.update({"num_steps": 4, "log_every": 1, "evaluate_every": 2, "checkpoint_every": 2})
    config.evaluation.update({"num_clips": 8, "num_images": 2, "batch_size": 8})


def shrink_policy(config: ConfigDict) -> None:
    """64 px and small towers, for minutes on a CPU."""
    # From scratch: at this size it finds things on the table within a minute, which a small ViT does not.
    config.encoder.update({"tower": "patch", "patch_size": 16, "width": 64, "pool": 1})
    config.text.update({"width": 64, "depth": 1, "num_heads": 2, "max_length": 64, "pool": 8})
    config.data.update({"image_size": 64, "batch_size": 32, "random_shift": 2, "num_threads": 2, "chunk": 8})
    config.optim.update({"learning_rate": 1e-3, "final_learning_rate": 1e-5, "warmup_steps": 50, "ema_decay": 0.99})
    config.train.update({"dtype": "float32", "num_steps": 1500, "evaluate_every": 500, "checkpoint_every": 500})
    config.evaluation.update({"execute": 4})


def shrink_policy_to_small(config: ConfigDict) -> None:
    """64 px, a tower over patches and a bag of words, for half an hour of one CPU core."""
    shrink_policy(config)
    config.encoder.pool = 2
    config.text.update({"width": 32, "depth": 0, "max_length": 128, "pool": 128})
    config.data.update({"batch_size": 128, "random_shift": 3})
    config.optim.update({"warmup_steps": 200, "ema_decay": 0.998})
    config.train.update({"num_steps": 3500, "evaluate_every": 0, "checkpoint_every": 1000})


def shrink_policy_to_smoke(config: ConfigDict) -> None:
    """A few steps of a few samples, on top of `shrink_policy`."""
    config.encoder.update({"width": 32, "depth": 1, "num_heads": 2})
    config.text.update({"width": 16, "depth": 1, "num_heads": 2})
    config.data.update({"image_size": 32, "batch_size": 8, "chunk": 4})
    config.train.update({"num_steps": 4, "log_every": 1, "evaluate_every": 2, "checkpoint_every": 2})
    config.evaluation.update({"num_samples": 8, "batch_size": 8, "episodes": 1})
