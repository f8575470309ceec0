"""Settings of the networks that motion models and policies are built from: image towers, text towers, decoders."""

from __future__ import annotations

import dataclasses

from como_jax.errors import ConfigError

TEXT_TOWERS = ("bytes", "clip", "t5", "embedding", "tokens")
PUBLIC_TOWERS = ("clip", "t5")
"""The text towers whose weights and sizes come from files that the user brings."""
ACTIVATIONS = ("relu", "silu", "gelu", "gelu_new", "quick_gelu")
"""Activations of public text towers, as the config.json beside their weights names them."""
GATED = "gated-"
"""Begins the name of the activation of a gated linear unit."""
BYTE_VOCABULARY = 257
"""Rows of the byte-level tower's table: token 0 ends the text, byte b is token b + 1."""
NGRAMS = (3, 4, 5, 6)
"""Bytes in a row that the byte-level tower also looks up together."""
NGRAM_ROWS = 4096
"""Rows of the table of each of them, which is indexed by a hash."""


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Sizes of a ViT; `image_size` must be a multiple of `patch_size`, an `mlp_width` of 0 is four times the width."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_width: int = 0

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"data.image_size {self.image_size} must be a multiple of encoder.patch_size {self.patch_size}."
            )


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The tower that reads instructions.

    Attributes:
      tower: "bytes", trained with the policy; "clip" or "t5" with weights that the user brings (see
        `como_jax.weights.text`); "embedding" for embeddings that the dataset holds; "tokens" for a table alone, for
        models that read the instruction themselves.
      max_length: tokens of the longest instruction.
      width, depth, num_heads: of the tower; of public towers those of their weights. With a depth of 0 the byte-level
        tower is a bag of letters and of hashed n-grams.
      pool: number of neighbouring bytes whose outputs the byte-level tower averages to one token.
      mlp_width, vocabulary_size, activation, norm_epsilon: of public towers, those of their weights. An activation
        "gated-NAME" is that of a gated linear unit.
      positions: of CLIP's table of positions; 0 for max_length.
      head_size: of one head of T5; 0 for width / num_heads.
      relative_buckets, relative_distance: of T5's relative positions: their number, and the distance from which on
        all share the last.
      frozen: whether a public tower or the table of tokens is not trained; other towers are always trained.
      embedding_size: size of the dataset's embeddings; 0 means the size that the data has.
      prompt: text with {} where the instruction is put before it is read.
      tokenizer_file: the file that comes with the tower's weights; empty for bytes.
    """

    tower: str = "bytes"
    max_length: int = 64
    width: int = 256
    depth: int = 4
    num_heads: int = 4
    pool: int = 1
    mlp_width: int = 0
    vocabulary_size: int = 0
    activation: str = "quick_gelu"
    norm_epsilon: float = 1e-5
    positions: int = 0
    head_size: int = 0
    relative_buckets: int = 32
    relative_distance: int = 128
    frozen: bool = True
    embedding_size: int = 0
    prompt: str = "{}"
    tokenizer_file: str = ""

    def __post_init__(self) -> None:
        if self.tower not in TEXT_TOWERS:
            raise ConfigError(f"text.tower {self.tower!r} is unknown; choose one of {', '.join(TEXT_TOWERS)}.")
        if self.pool < 1 or self.max_length % self.pool:
            raise ConfigError(f"text.pool {self.pool} must divide text.max_length {self.max_length}.")

    @property
    def num_positions(self) -> int:
        """Rows of CLIP's table of positions."""
        return self.positions or self.max_length

    @property
    def head_width(self) -> int:
        """Numbers in one head of T5."""
        return self.head_size or self.width // self.num_heads

    @property
    def is_frozen(self) -> bool:
        """Whether the optimiser leaves the tower alone."""
        return self.frozen and self.tower in (*PUBLIC_TOWERS, "tokens")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder.

    Attributes:
      width, depth: of the residual stream.
      num_heads, num_kv_heads, head_size: query heads, and the heads of keys and values that groups of them share.
      mlp_width: of both branches of the gated MLP.
      rope_period: longest period of the rotary positions over 2 pi.
      norm_epsilon: of the RMS norm.
      lora_rank: of the trained change of every kernel, which is frozen itself (LoRA, arXiv 2106.09685); 0 trains all.
      lora_alpha: the change is multiplied by `lora_alpha / lora_rank`.
    """

    width: int = 2048
    depth: int = 18
    num_heads: int = 8
    num_kv_heads: int = 1
    head_size: int = 256
    mlp_width: int = 16_384
    rope_period: float = 10_000.0
    norm_epsilon: float = 1e-6
    lora_rank: int = 0
    lora_alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"model.num_heads {self.num_heads} must be a multiple of model.num_kv_heads.")
        if self.head_size % 2:
            raise ConfigError(f"model.head_size {self.head_size} must be even for rotary positions.")
        if self.lora_rank < 0:
            raise ConfigError(f"model.lora_rank {self.lora_rank} must be positive, or 0 for none.")
