"""Where the parameters of policies, but for those that read observations, lie in `como_jax.runtime_torch`."""

from __future__ import annotations

import math

from como_jax.spec.policies import AutoregressiveConfig, DiffusionPolicyConfig, VlaConfig
from como_jax.spec.towers import DecoderConfig
from como_jax.weights.tables import (
    DeepTable,
    Table,
    array,
    flat,
    kernel,
    linear,
    norm,
    single,
    stacked,
    timm_block,
    timm_blocks,
)

_TIME_FEATURES = 128


def diffusion_policy_table(config: DiffusionPolicyConfig) -> DeepTable:
    """The diffusion policy, without its head of latent motion."""
    width = config.width
    top = {
        "no_instruction": array("no_instruction", width),
        **norm("context_norm", "context_norm", width),
        **linear("time_hidden", "time_hidden", _TIME_FEATURES, width),
        **linear("time_out", "time_out", width, width),
        "step_embed": array("step_embed", config.chunk, width),
        **norm("norm", "norm", width),
        **linear("modulation", "modulation", width, 2 * width),
        **linear("action/inputs", "action.inputs", config.action_size, width),
        **linear("action/outputs", "action.outputs", width, config.action_size),
    }
    return {**single(top), **stacked("blocks", _dit_block(width, config.num_heads), config.depth)}


def _dit_block(width: int, num_heads: int) -> Table:
    layer, heads = "blocks.{layer}.", (num_heads, width // num_heads)
    cross = f"{layer}cross_attn"
    return {
        **timm_block(layer, width, num_heads, 4 * width),
        "cross_attn/q/kernel": kernel(f"{cross}.q.weight", (width,), heads),
        "cross_attn/q/bias": flat(f"{cross}.q.bias", *heads),
        "cross_attn/kv/kernel": kernel(f"{cross}.kv.weight", (width,), (2, *heads)),
        "cross_attn/kv/bias": flat(f"{cross}.kv.bias", 2, *heads),
        "cross_attn/proj/kernel": kernel(f"{cross}.proj.weight", heads, (width,)),
        "cross_attn/proj/bias": array(f"{cross}.proj.bias", width),
        **norm("norm3", f"{layer}norm3", width),
        **linear("modulation", f"{layer}modulation", width, 9 * width),
    }


def autoregressive_policy_table(config: AutoregressiveConfig, instants: int) -> DeepTable:
    """The autoregressive policy; with its latents where it generates them before it acts.

    Args:
      config: of the policy; `latent_dim` is 0 where latents are left out.
      instants: of the history.
    """
    width = config.width
    top = {
        **norm("norm", "norm", width),
        "instant_embed": array("instant_embed", instants, width),
        "action_queries": array("action_queries", config.chunk, width),
        **linear("action_head", "action_head", width, config.action_size),
    }
    if config.latent_dim:
        sizes = {"hidden": config.head_width, "depth": config.head_depth}
        top |= {
            "latent_start": array("latent_start", width),
            "latent_pos": array("latent_pos", config.latent_tokens, width),
            **_embedding("latent_in", width, config.latent_dim, config.codebook_size),
            **_head("latent_head", config.latent_head, width, config.codebook_size or config.latent_dim, **sizes),
        }
    return {**single(top), **timm_blocks("blocks", "blocks", config.depth, width, config.num_heads, 4 * width)}


def latent_vla_table(config: VlaConfig) -> DeepTable:
    """The vision-language-action model, without its output of latent actions."""
    decoder, is_coded = config.decoder, config.action_head == "bins"
    width, codes = decoder.width, config.num_bins if is_coded else 0
    sizes = {"hidden": config.head_width, "depth": config.head_depth}
    top = {
        "action/start": array("action.start", width),
        "action/places": array("action.places", config.chunk * (config.action_size if is_coded else 1), width),
        **_embedding("action/embed", width, config.action_size, codes),
        **_head("action/head", config.action_head, width, codes or config.action_size, **sizes),
        "decoder/norm/scale": array("decoder.norm.scale", width),
    }
    return {**single(top), **stacked("decoder/blocks", _decoder_block(decoder), decoder.depth)}


def _decoder_block(config: DecoderConfig) -> Table:
    layer, width, hidden = "decoder.blocks.{layer}.", (config.width,), (config.mlp_width,)
    heads, shared = ((count, config.head_size) for count in (config.num_heads, config.num_kv_heads))
    projections = {
        "attn/q": (width, heads),
        "attn/k": (width, shared),
        "attn/v": (width, shared),
        "attn/proj": (heads, width),
        "mlp/gate": (width, hidden),
        "mlp/up": (width, hidden),
        "mlp/down": (hidden, width),
    }
    table = {f"{name}/scale": array(f"{layer}{name}.scale", config.width) for name in ("norm1", "norm2")}
    for path, (inputs, outputs) in projections.items():
        name = layer + path.replace("/", ".")
        table[f"{path}/kernel"] = kernel(f"{name}.weight", inputs, outputs)
        if config.lora_rank:
            table[f"{path}/lora_a"] = kernel(f"{name}.lora_a", (math.prod(inputs),), (config.lora_rank,))
            table[f"{path}/lora_b"] = kernel(f"{name}.lora_b", (config.lora_rank,), (math.prod(outputs),))
    return table


def _embedding(path: str, width: int, size: int, codes: int) -> Table:
    """What makes tokens of codes, or of vectors where there are none."""
    name = path.replace("/", ".")
    return {f"{path}/table": array(f"{name}.table", codes, width)} if codes else linear(path, name, size, width)


def _head(path: str, kind: str, width: int, size: int, *, hidden: int, depth: int) -> Table:
    """A head of `como_jax.policies.heads` that gives `size` numbers."""
    name = path.replace("/", ".")
    if kind not in ("diffusion", "flow"):
        return linear(f"{path}/out", f"{name}.out", width, size)
    table = {
        **linear(f"{path}/noisy_in", f"{name}.noisy_in", size, hidden),
        **linear(f"{path}/condition_in", f"{name}.condition_in", width, hidden),
        **linear(f"{path}/time_in", f"{name}.time_in", hidden, hidden),
        **norm(f"{path}/norm", f"{name}.norm", hidden),
        **linear(f"{path}/out", f"{name}.out", hidden, size),
    }
    for block in range(depth):
        inner, inner_name = f"{path}/blocks/{block}", f"{name}.blocks.{block}"
        table |= {
            **norm(f"{inner}/norm", f"{inner_name}.norm", hidden),
            **linear(f"{inner}/modulation", f"{inner_name}.modulation", hidden, 2 * hidden),
            **linear(f"{inner}/fc1", f"{inner_name}.fc1", hidden, hidden),
            **linear(f"{inner}/fc2", f"{inner_name}.fc2", hidden, hidden),
        }
    return table
