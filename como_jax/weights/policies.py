"""Policies as `como_jax.runtime_torch` has them: what is exported of a run, and where its parameters lie."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from como_jax.errors import ConversionError, RunError
from como_jax.policies.models import MODEL_CONFIGS, observation_config
from como_jax.spec.exported import POLICY_FAMILIES, ExportedPolicy, PolicyModel
from como_jax.spec.interface import PolicySpec
from como_jax.spec.policies import (
    COARSE_PATCH,
    FINE_PATCH,
    AutoregressiveConfig,
    DiffusionPolicyConfig,
    ObservationConfig,
    VlaConfig,
)
from como_jax.spec.towers import (
    BYTE_VOCABULARY,
    NGRAM_ROWS,
    NGRAMS,
    PUBLIC_TOWERS,
    DecoderConfig,
    TextConfig,
    VitConfig,
)
from como_jax.weights.motion import vit_table
from como_jax.weights.tables import (
    DeepTable,
    Table,
    array,
    flat,
    kernel,
    linear,
    norm,
    part,
    single,
    stacked,
    timm_block,
    timm_blocks,
)
from como_jax.weights.text import T5_TOKENS, clip_table, t5_table

# Numbers in the encoding of the time of diffusion.
_TIME_FEATURES = 128


def describe_policy(config: ConfigDict, spec: PolicySpec) -> ExportedPolicy:
    """The policy of a run, without the parts that acting does not need.

    Args:
      config: of the run.
      spec: of the same run, from its policy.json.

    Raises:
      ConversionError: the runtime does not have this family.
      RunError: the policy was trained on latent motion alone.
    """
    if config.family not in POLICY_FAMILIES:
        raise ConversionError(
            f"Policies of family {config.family!r} cannot be exported yet; those that can: "
            f"{', '.join(POLICY_FAMILIES)}."
        )
    if not spec.robots:
        raise RunError(
            "The policy was trained on latent motion alone, so it cannot act; finetune it on robot data first."
        )
    observation = observation_config(config)
    text = observation.text
    # The folder holds the tokenizer's file itself.
    text = dataclasses.replace(text, tokenizer_file=epath.Path(text.tokenizer_file).name if text.tokenizer_file else "")
    model = _acting(MODEL_CONFIGS[config.family](config))
    return ExportedPolicy(config.family, dataclasses.replace(observation, text=text), model, spec)


def policy_table(described: ExportedPolicy) -> DeepTable:
    """The table of an exported policy."""
    observation, model = described.observation, described.model
    if isinstance(model, DiffusionPolicyConfig):
        return {**observation_table(observation, model.width), **diffusion_policy_table(model)}
    if isinstance(model, AutoregressiveConfig):
        table = autoregressive_policy_table(model, observation.instants)
        return {**observation_table(observation, model.width), **table}
    return {**observation_table(observation, model.decoder.width), **latent_vla_table(model)}


def not_exported(described: ExportedPolicy) -> dict[str, str]:
    """Prefixes of the paths of parameters that acting does not need, and what these are."""
    if not isinstance(described.model, AutoregressiveConfig):
        return {"latent": "output of latent motion, which acting does not need"}
    if described.model.generate_latents:
        return {}
    return dict.fromkeys(
        ("latent_start", "latent_pos", "latent_in", "latent_head"), "of latent motion, which no action reads"
    )


def _acting(model: PolicyModel) -> PolicyModel:
    """Removes latents from the settings, unless the policy generates them before it acts."""
    if isinstance(model, DiffusionPolicyConfig):
        return dataclasses.replace(model, latent_size=0)
    if isinstance(model, AutoregressiveConfig) and model.generate_latents and model.latent_dim:
        return model
    without: dict[str, Any] = {"latent_dim": 0, "codebook_size": 0, "latent_head": "regression"}
    if isinstance(model, AutoregressiveConfig):
        without["generate_latents"] = False
    return dataclasses.replace(model, **without)


def observation_table(config: ObservationConfig, width: int) -> DeepTable:
    """The observation encoder.

    Args:
      config: its settings.
      width: of the model that reads its tokens.
    """
    side = config.grid // config.pool
    top = {
        **linear("observation/image_proj", "observation.image_proj", config.pooled_width, width),
        "observation/image_pos": array("observation.image_pos", side * side, width),
        "observation/camera_embed": array("observation.camera_embed", config.cameras, width),
        "observation/instant_embed": array("observation.instant_embed", config.instants, width),
    }
    if config.text.tower != "tokens":
        top |= linear("observation/text_proj", "observation.text_proj", config.text.width, width)
    if config.state_size:
        top |= linear("observation/state_proj", "observation.state_proj", config.state_size, width)
        top |= {"observation/no_state": array("observation.no_state", width)}
    towers = {"patch": _patch_table, "siglip": _siglip_table, "vit": _vit_table}
    return {**towers[config.image_tower](config.vit), **single(top), **_text_table(config.text, width)}


def _vit_table(config: VitConfig) -> DeepTable:
    return vit_table(config, "observation/images")


def _siglip_table(config: VitConfig) -> DeepTable:
    path, name = "observation/images", "observation.images"
    top = {
        **linear(f"{path}/patch_embed", f"{name}.patch_embed", config.patch_size**2 * 3, config.width),
        f"{path}/pos_embed": array(f"{name}.pos_embed", config.grid**2, config.width),
        **norm(f"{path}/norm", f"{name}.norm", config.width),
    }
    sizes = (config.depth, config.width, config.num_heads, config.mlp_width or 4 * config.width)
    return {**single(top), **timm_blocks(f"{path}/blocks", f"{name}.blocks", *sizes)}


def _patch_table(config: VitConfig) -> DeepTable:
    width, path, name = config.width, "observation/images", "observation.images"
    sizes = {"fine": (FINE_PATCH**2 * 3, 2 * width), "coarse": (COARSE_PATCH**2 * 2 * width, width)}
    table: Table = {}
    for layer, (inputs, outputs) in sizes.items():
        table |= linear(f"{path}/{layer}", f"{name}.{layer}", inputs, outputs)
        table |= norm(f"{path}/{layer}_norm", f"{name}.{layer}_norm", outputs)
    return single(table)


def _text_table(config: TextConfig, model_width: int) -> DeepTable:
    path, name, width = "observation/text", "observation.text", config.width
    if config.tower == "tokens":
        rows = config.vocabulary_size or BYTE_VOCABULARY - 1
        return single({f"{path}/table": array(f"{name}.table", rows, model_width)})
    if config.tower == "embedding":
        return single(linear(f"{path}/proj", f"{name}.proj", config.embedding_size, width))
    if config.tower in PUBLIC_TOWERS:
        # As transformers names the parts of these towers.
        table = clip_table(config, "") if config.tower == "clip" else t5_table(config, T5_TOKENS[0])
        return part(path, table, config.depth)
    top = {
        f"{path}/token_embed": array(f"{name}.token_embed", BYTE_VOCABULARY, width),
        f"{path}/ngram_embed": array(f"{name}.ngram_embed", len(NGRAMS), NGRAM_ROWS, width),
        f"{path}/pos_embed": array(f"{name}.pos_embed", config.max_length, width),
        **norm(f"{path}/norm", f"{name}.norm", width),
    }
    blocks = timm_blocks(f"{path}/blocks", f"{name}.blocks", config.depth, width, config.num_heads, 4 * width)
    return {**single(top), **blocks}


def diffusion_policy_table(config: DiffusionPolicyConfig) -> DeepTable:
    """The diffusion policy, without its head for latent motion."""
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
    """The autoregressive policy, with its latents if it generates them before it acts.

    Args:
      config: of the policy; `latent_dim` is 0 if latents are left out.
      instants: number of instants of the history.
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
    """The vision-language-action model, without its head for latent actions."""
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
    """The layer that makes tokens of codes, or of vectors if there are no codes."""
    name = path.replace("/", ".")
    return {f"{path}/table": array(f"{name}.table", codes, width)} if codes else linear(path, name, size, width)


def _head(path: str, kind: str, width: int, size: int, *, hidden: int, depth: int) -> Table:
    """A head of `como_jax.policies.heads` with `size` outputs."""
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
