"""The sections that all pretraining recipes share, with the paper's values as defaults."""

from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

# Width, depth and heads of the standard ViT sizes, all with 16-pixel patches (arXiv 2010.11929 and 2012.12877).
VIT_SIZES = {"Ti": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}


def encoder(size: str) -> ConfigDict:
    """A standard ViT encoder."""
    width, depth, num_heads = VIT_SIZES[size]
    return ConfigDict({"patch_size": 16, "width": width, "depth": depth, "num_heads": num_heads})


def pretraining(family: str) -> ConfigDict:
    """Everything but the model: data, optimiser, loop, evaluation, mesh."""
    config = ConfigDict()
    config.family = family
    config.seed = 0

    config.data = ConfigDict()
    config.data.mixture = "datasets/tabletop"  # DIR[=WEIGHT],DIR[=WEIGHT] or MIXTURE.toml; --data replaces it.
    config.data.camera = ""  # Observation key; empty for the first camera of every dataset.
    config.data.image_size = 224
    config.data.gap_seconds = 0.5
    config.data.min_gap_fraction = 1.0  # Gaps are drawn between this share of gap_seconds and all of it.
    config.data.instants = 2  # Frames of a clip, each encoded once; one gap apart if pair_span is 1.
    # Instants that a gap spans. A pair is any two instants whose gap is at least min_gap_fraction of gap_seconds.
    config.data.pair_span = 1
    config.data.fit = "crop"  # How pictures become square: crop to the central square, or stretch.
    config.data.random_shift = 10  # Pixels, one shift for all frames of a clip.
    config.data.min_crop_fraction = 1.0  # Side of the part that is cut out at random, one for all frames of a clip.
    config.data.min_motion = 0.0  # Mean change a step, in [0, 1], under which a clip is left out as still.
    config.data.max_motion = 1.0  # Change of one step over which a clip is left out as cut.
    config.data.batch_size = 256  # Clips of all hosts together.
    config.data.num_threads = 16  # Decoding threads of a process.
    config.data.num_workers = 0  # Decoding processes; 0 decodes in threads of the training process.

    training(config)
    config.train.collapse_steps = 1000  # Steps with a hardly used codebook after which a warning is given.
    config.evaluation = ConfigDict()
    config.evaluation.num_clips = 1024
    config.evaluation.num_pictures = 6
    config.evaluation.batch_size = 64
    return config


def policy(family: str) -> ConfigDict:
    """Everything but the model of a policy: data, towers, optimiser, loop, evaluation, mesh."""
    config = ConfigDict()
    config.family = family
    config.seed = 0
    config.init_from = ""  # Workdir of another policy's run to start from; what fits is taken, the rest is new.

    config.data = ConfigDict()
    config.data.mixture = "datasets/robot,datasets/labelled"  # Robot and labelled data; --data replaces it.
    config.data.videos = ("*",)  # Names of datasets without actions that take part; () trains on robot data alone.
    config.data.latent_only = False  # Leaves out all actions: the first of two stages.
    config.data.robot_latents = False  # Whether labels of robot data are used beside its actions.
    config.data.cameras = ()  # Names of the pictures; () takes the first camera of every dataset.
    config.data.image_size = 224
    config.data.fit = "crop"  # How pictures become square: crop to the central square, or stretch.
    config.data.random_shift = 10  # Pixels, one shift for all pictures of a sample.
    config.data.min_crop_fraction = 1.0  # Side of the part that is cut out at random.
    config.data.instants = 1  # Pictures of each camera: now, and the history.
    config.data.stride = 1  # Control steps between two of them.
    config.data.chunk = 16  # Actions that are predicted at once.
    config.data.proprioception = True
    config.data.state_size = 0  # 0 takes what the data has.
    config.data.normalization = "min_max"  # Of actions and states: none, mean_std, quantile, min_max or uniform.
    config.data.latent_normalization = "mean_std"
    config.data.missing_instructions = "refuse"  # refuse, or empty to train on episodes without.
    config.data.batch_size = 256
    config.data.num_threads = 16
    config.data.num_workers = 0

    config.encoder = encoder("B")
    config.encoder.tower = "vit"  # vit, siglip, or conv: a small convolutional network from scratch.
    config.encoder.mlp_width = 0  # 0 for four times the width.
    config.encoder.frozen = False
    config.encoder.init_from = ""  # Workdir of a pretraining run whose encoder to start from.
    config.encoder.pool = 2  # Side of the square of image tokens that are averaged to one.

    config.text = ConfigDict()
    config.text.tower = "bytes"  # bytes, clip, t5, or embedding: made beforehand by tools/embed_instructions.py.
    config.text.max_length = 96  # Tokens of the longest instruction.
    config.text.prompt = "{}"  # What every instruction is put into before it is read.
    config.text.update({"width": 256, "depth": 4, "num_heads": 4, "pool": 1})  # Of the byte-level tower.
    config.text.frozen = True  # Of clip, t5 and the table of tokens.
    config.text.weights = ""  # .safetensors of clip or t5, with config.json beside it.
    config.text.tokenizer_file = ""  # tokenizer.json of clip or t5.
    config.text.embedding_size = 0  # 0 takes what the data has.
    # Of clip and t5, all taken from their config.json.
    config.text.update({"mlp_width": 0, "vocabulary_size": 0, "activation": "", "norm_epsilon": 1e-5, "positions": 0})
    config.text.update({"head_size": 0, "relative_buckets": 0, "relative_distance": 0})

    training(config)
    config.optim.update({"final_learning_rate": 1e-6, "beta2": 0.95, "ema_decay": 0.999})
    config.evaluation = ConfigDict()
    config.evaluation.num_samples = 512  # Of every robot dataset and split, for the action error.
    config.evaluation.batch_size = 64
    config.evaluation.env = ""  # FAMILY:TASK,... or FAMILY:all: also reports the success rate there.
    config.evaluation.env_settings = ()  # NAME=VALUE of the environment.
    config.evaluation.rollout_every = 0  # Steps between two rollouts, a multiple of evaluate_every; 0: at the end.
    config.evaluation.episodes = 10  # Of every task.
    config.evaluation.execute = 8  # Actions of every chunk that are executed.
    config.evaluation.env_workers = 2  # Processes.
    return config


def training(config: ConfigDict) -> None:
    """Optimiser, loop, mesh and trace."""
    config.optim = ConfigDict()
    config.optim.learning_rate = 1e-4
    config.optim.final_learning_rate = 5e-5
    config.optim.warmup_steps = 1000
    config.optim.weight_decay = 1e-4
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.99
    config.optim.clip_norm = 1.0
    config.optim.ema_decay = 0.0

    config.train = ConfigDict()
    config.train.num_steps = 100_000
    config.train.stop_after = 0
    config.train.accumulation = 1  # Microbatches of one update.
    config.train.dtype = "bfloat16"  # Of compute; parameters and reductions are float32.
    config.train.remat = "none"  # none, dots or full.
    config.train.attention = "xla"  # xla, or cudnn: fused kernels of a GPU, in bfloat16 and for the train step alone.
    config.train.log_every = 50
    config.train.evaluate_every = 5000
    config.train.checkpoint_every = 5000
    config.train.keep_checkpoints = 2

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.profile = ""  # Folder that gets a trace of a few steps, which TensorBoard and xprof open.


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
    config.evaluation.update({"num_clips": 8, "num_pictures": 2, "batch_size": 8})


def shrink_policy(config: ConfigDict) -> None:
    """64 px and small towers, for minutes on a CPU."""
    # From scratch: at this size it finds things on the table within a minute, which a small ViT does not.
    config.encoder.update({"tower": "conv", "patch_size": 16, "width": 64, "pool": 1})
    config.text.update({"width": 64, "depth": 1, "num_heads": 2, "max_length": 64, "pool": 8})
    config.data.update({"image_size": 64, "batch_size": 32, "random_shift": 2, "num_threads": 2, "chunk": 8})
    config.optim.update({"learning_rate": 1e-3, "final_learning_rate": 1e-5, "warmup_steps": 50, "ema_decay": 0.99})
    config.train.update({"dtype": "float32", "num_steps": 1500, "evaluate_every": 500, "checkpoint_every": 500})
    config.evaluation.update({"execute": 4})


def shrink_policy_to_smoke(config: ConfigDict) -> None:
    """A few steps of a few samples, on top of `shrink_policy`."""
    config.encoder.update({"width": 32, "depth": 1, "num_heads": 2})
    config.text.update({"width": 16, "depth": 1, "num_heads": 2})
    config.data.update({"image_size": 32, "batch_size": 8, "chunk": 4})
    config.train.update({"num_steps": 4, "log_every": 1, "evaluate_every": 2, "checkpoint_every": 2})
    config.evaluation.update({"num_samples": 8, "batch_size": 8, "episodes": 1})
