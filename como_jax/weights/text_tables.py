"""Where the parameters of text towers are found in files of Hugging Face."""

from __future__ import annotations

from como_jax.nn.text_towers import GATED
from como_jax.spec.towers import TextConfig
from como_jax.weights.tables import Table, array, clip_blocks, kernel, norm, qkv_kernel


def clip_table(config: TextConfig, prefix: str) -> Table:
    """Where the parameters of `ClipTextTower` are found in files of CLIPModel and CLIPTextModel."""
    width = config.width
    return {
        "token_embed": array(f"{prefix}embeddings.token_embedding.weight", config.vocabulary_size, width),
        "pos_embed": array(f"{prefix}embeddings.position_embedding.weight", config.positions, width),
        **clip_blocks(f"{prefix}encoder.layers.", width, config.num_heads, config.mlp_width),
        **norm("norm", f"{prefix}final_layer_norm", width),
    }


T5_TOKENS = ("shared.weight", "encoder.embed_tokens.weight")
"""Names of the table of tokens, which is saved once or twice."""


def t5_table(config: TextConfig, tokens: str) -> Table:
    """Where the parameters of `T5Tower` are found in files of T5 and T5EncoderModel; `tokens` is one of `T5_TOKENS`."""
    width, hidden, heads = config.width, config.mlp_width, (config.num_heads, config.head_size)
    attention, mlp = (f"encoder.block.{{layer}}.layer.{part}." for part in (0, 1))
    inner = f"{mlp}DenseReluDense."
    gated = config.activation.startswith(GATED)
    blocks = {
        "norm1/scale": array(f"{attention}layer_norm.weight", width),
        "attn/qkv/kernel": qkv_kernel([f"{attention}SelfAttention.{part}.weight" for part in "qkv"], width, heads),
        "attn/proj/kernel": kernel(f"{attention}SelfAttention.o.weight", heads, (width,)),
        "norm2/scale": array(f"{mlp}layer_norm.weight", width),
        "mlp/fc1/kernel": kernel(f"{inner}wi_0.weight" if gated else f"{inner}wi.weight", (width,), (hidden,)),
        **({"mlp/gate/kernel": kernel(f"{inner}wi_1.weight", (width,), (hidden,))} if gated else {}),
        "mlp/fc2/kernel": kernel(f"{inner}wo.weight", (hidden,), (width,)),
    }
    # All layers share the relative positions of the first.
    relative = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return {
        "token_embed": array(tokens, config.vocabulary_size, width),
        "relative_bias": array(relative, config.relative_buckets, config.num_heads),
        **{f"blocks/layers/{path}": entry for path, entry in blocks.items()},
        "norm/scale": array("encoder.final_layer_norm.weight", width),
    }
