"""SigLIP's image encoder (arXiv 2303.15343) as transformers saves it, for the tower of a policy.

Its run holds `observation/images` alone: `--config.init_from` takes it into a policy with `encoder.tower=siglip`.
"""

from __future__ import annotations

from como_jax.errors import RunError
from como_jax.weights.checkpoints import Weights
from como_jax.weights.importing import Foreign, Options, Skip
from como_jax.weights.tables import clip_blocks, norm, read_setting
from como_jax.weights.vit_tables import grid_of, new_grid, patch_table, positions, resizing, single, usual_heads

_PATCHES = "embeddings.patch_embedding"
_PREFIXES = ("", "vision_model.")
_SKIPS = (
    Skip(r"(vision_model\.)?head\..*", "the head that pools"),
    Skip(r"text_model\..*", "the text tower"),
    Skip(r"logit_(scale|bias)", "scale and bias of the contrastive loss"),
    Skip(r".*embeddings\.position_ids", "the numbers from 0 on"),
)


def siglip(weights: Weights, options: Options) -> Foreign:
    """The layouts of SiglipModel and SiglipVisionModel."""
    prefix = next((prefix for prefix in _PREFIXES if f"{prefix}{_PATCHES}.weight" in weights.files), _PREFIXES[0])
    width, _, _, patch_size = weights.shape(f"{prefix}{_PATCHES}.weight")
    depth = weights.depth(f"{prefix}encoder.layers.{{layer}}.mlp.fc1.weight")
    hidden = weights.shape(f"{prefix}encoder.layers.0.mlp.fc1.weight")[0]
    settings = options.settings.get("vision_config") or options.settings
    path = weights.path.parent / "config.json"
    given = options.num_heads
    if not given and "num_attention_heads" in settings:
        given = read_setting(settings, "num_attention_heads", int, path)
    heads = usual_heads(weights, width, given)
    for name, known in (("hidden_act", "gelu_pytorch_tanh"), ("layer_norm_eps", 1e-6)):
        if settings.get(name, known) != known:
            raise RunError(f"{path}: {name} {settings[name]!r} must be {known}, as in SigLIP.")
    table_name = f"{prefix}embeddings.position_embedding.weight"
    old = grid_of(weights, table_name, extra=0, axis=0)
    new = new_grid(options.image_size, patch_size, old)
    blocks = clip_blocks(f"{prefix}encoder.layers.", width, heads, hidden)
    tower = {
        **single(patch_table("patch_embed", f"{prefix}{_PATCHES}", width, patch_size)),
        **single({"pos_embed": positions(table_name, (old**2, width), old, new)}),
        **{name: (entry, depth) for name, entry in blocks.items()},
        **single(norm("norm", f"{prefix}post_layernorm", width)),
    }
    encoder = {"tower": "siglip", "patch_size": patch_size, "width": width, "depth": depth, "num_heads": heads}
    encoder["mlp_width"] = hidden
    return Foreign(
        family="observation",
        config={"data.image_size": new * patch_size, **{f"encoder.{name}": value for name, value in encoder.items()}},
        table={f"observation/images/{name}": entry for name, entry in tower.items()},
        skips=_SKIPS,
        resized={} if old == new else {"observation/images/pos_embed": resizing(old, new)},
    )
