"""Where the parameters that read a policy's observations lie in `como_jax.runtime_torch`."""

from __future__ import annotations

import itertools

from como_jax.nn.text_towers import BYTE_VOCABULARY, NGRAM_ROWS, NGRAMS
from como_jax.spec.policies import ObservationConfig
from como_jax.spec.towers import PUBLIC_TOWERS, TextConfig, VitConfig
from como_jax.weights.motion import vit_table
from como_jax.weights.tables import DeepTable, Entry, Table, array, linear, norm, part, single, timm_blocks
from como_jax.weights.text import T5_TOKENS, clip_table, t5_table


def observation_table(config: ObservationConfig, width: int) -> DeepTable:
    """The encoder of observations.

    Args:
      config: its settings.
      width: of the model that reads the tokens.
    """
    side = config.grid // config.pool
    top = {
        **linear("observation/image_proj", "observation.image_proj", config.vit.width, width),
        "observation/image_pos": array("observation.image_pos", side * side, width),
        "observation/camera_embed": array("observation.camera_embed", config.cameras, width),
        "observation/instant_embed": array("observation.instant_embed", config.instants, width),
    }
    if config.text.tower != "tokens":
        top |= linear("observation/text_proj", "observation.text_proj", config.text.width, width)
    if config.state_size:
        top |= linear("observation/state_proj", "observation.state_proj", config.state_size, width)
        top |= {"observation/no_state": array("observation.no_state", width)}
    towers = {"conv": _conv_table, "siglip": _siglip_table, "vit": _vit_table}
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


def _conv_table(config: VitConfig) -> DeepTable:
    width, path, name = config.width, "observation/images", "observation.images"
    channels = (3, max(8, width // 4), max(8, width // 2), width, width)
    table: Table = {}
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(channels)):
        table |= {
            f"{path}/convs/{layer}/kernel": _convolution(f"{name}.convs.{layer}.weight", inputs, outputs),
            f"{path}/convs/{layer}/bias": array(f"{name}.convs.{layer}.bias", outputs),
            **norm(f"{path}/norms/{layer}", f"{name}.norms.{layer}", outputs),
        }
    return single(table)


def _convolution(name: str, inputs: int, outputs: int) -> Entry:
    """`[3, 3, inputs, outputs]`, which PyTorch keeps as `[outputs, inputs, 3, 3]`."""
    return Entry(
        (name,),
        (outputs, inputs, 3, 3),
        lambda weight: weight.transpose(2, 3, 1, 0),
        lambda value: [value.transpose(3, 2, 0, 1)],
    )


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
