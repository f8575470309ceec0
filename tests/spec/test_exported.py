"""config.json of an exported folder: what is written is read, and exports of earlier versions are read too."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from como_jax.errors import ConfigError, ModelFileError
from como_jax.spec.exported import ExportedMotion, ExportedPolicy, from_dict, read_description
from como_jax.spec.interface import NormStats, PolicySpec
from como_jax.spec.motion import BottleneckConfig, LaqConfig, MotionConfig
from como_jax.spec.normalization import AffineNormalizer
from como_jax.spec.policies import (
    AutoregressiveConfig,
    DiffusionConfig,
    DiffusionPolicyConfig,
    ObservationConfig,
    VlaConfig,
)
from como_jax.spec.towers import DecoderConfig, TextConfig, VitConfig

VIT = VitConfig(64, 16, 24, 2, 2, 96)
GRID = BottleneckConfig("fsq", fsq_levels=(4, 5, 3))
COMO = MotionConfig(num_queries=3, latent_dim=3, bottleneck=GRID, idm_width=48, fdm_width=48, pair_spans=(1, 2))
LAQ = LaqConfig(patch_size=8, width=32, latent_dim=4, codebook_size=6)
MOTIONS = {
    "como": ExportedMotion("como", 64, "crop", 0.5, COMO, VIT),
    "laq": ExportedMotion("laq", 64, "stretch", 1.0, LAQ, None),
}
SPEC = PolicySpec(
    cameras=("top", "wrist"),
    image_size=64,
    fit="crop",
    instants=2,
    stride=3,
    chunk=4,
    action_size=3,
    state_size=2,
    control_rate=10.0,
    uses_text=True,
    robots={"arm": NormStats(AffineNormalizer.fit("none", {"mean": [0.0, 1.0, 2.0]}), None)},
)
TEXT = TextConfig("bytes", width=16, prompt="please {}")
OBSERVATION = ObservationConfig(VIT, TEXT, cameras=2, instants=2, state_size=2)
WINDOW = {"chunk": 4, "stride": 3, "action_size": 3}
DIFFUSION = DiffusionPolicyConfig(
    **WINDOW, width=32, depth=2, diffusion=DiffusionConfig("flow"), instruction_dropout=0.1, guidance=2.0
)
AUTOREGRESSIVE = AutoregressiveConfig(**WINDOW, gripper_dim=2, latent_dim=3, latent_queries=2, generate_latents=True)
VLA = VlaConfig(DecoderConfig(width=32, depth=2, lora_rank=2), **WINDOW, action_head="flow", flow_steps=3)
POLICIES = {
    "diffusion_policy": ExportedPolicy("diffusion_policy", OBSERVATION, DIFFUSION, SPEC),
    "autoregressive_policy": ExportedPolicy("autoregressive_policy", OBSERVATION, AUTOREGRESSIVE, SPEC),
    "latent_vla": ExportedPolicy("latent_vla", OBSERVATION, VLA, SPEC),
}
EXPORTED = MOTIONS | POLICIES


def write(folder: Path, content: dict[str, Any], version: int = 2) -> Path:
    weights = {"file": "model.safetensors", "sha256": "0"}
    whole = {"format": "como_jax", "format_version": version, **content, "weights": weights}
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


@pytest.mark.parametrize("family", EXPORTED)
def test_what_is_written_is_read(family: str, tmp_path: Path) -> None:
    exported = EXPORTED[family]
    found, weights = read_description(write(tmp_path, exported.to_json()), type(exported))
    assert found.to_json() == exported.to_json() and found.model == exported.model
    assert weights == {"file": "model.safetensors", "sha256": "0"}
    other = ExportedPolicy if family in MOTIONS else ExportedMotion
    with pytest.raises(ModelFileError, match=f"kind is '{exported.kind}' and must be '{other.kind}'"):
        read_description(tmp_path, other)


def test_the_shape_of_a_latent_follows_from_the_settings() -> None:
    assert [exported.latent_shape for exported in MOTIONS.values()] == [(3, 3), (4, 4)]


def version_1(exported: ExportedMotion | ExportedPolicy) -> dict[str, Any]:
    """What the first version wrote of the same model: fewer fields, and some by other names."""
    content = json.loads(json.dumps(exported.to_json()))
    if isinstance(exported, ExportedMotion):
        if content["encoder"]:
            del content["encoder"]["image_size"]
            kept = [f"{part}_{size}" for part in ("idm", "fdm") for size in ("width", "depth", "heads")]
            kept += ["num_queries", "latent_dim", "motion_input", "fdm_patch_size", "residual", "bottleneck"]
            content["model"] = {name: content["model"][name] for name in kept}
            bottleneck = content["model"]["bottleneck"]
            content["model"]["bottleneck"] = {
                name: bottleneck[name] for name in ("kind", "codebook_size", "fsq_levels")
            }
        else:
            del content["model"]["replace_below"], content["encoder"]
        return content
    content["robots"] = content["interface"].pop("robots")
    for name in ("image_size", "instants", "chunk", "action_size", "state_size"):
        del content["interface"][name]
    observation, model = content["observation"], content["model"]
    vit = observation.pop("vit")
    observation |= {"image_size": vit.pop("image_size"), "encoder": vit}
    unknown = {"freeze_images": observation, "frozen": observation["text"], "stride": model, "action_weight": model}
    unknown |= {"latent_weight": model, "instruction_dropout": model, "latent_share": model, "draws": model}
    unknown |= {"latent_dropout": model, "gripper_weight": model, "text_weight": model, "color_jitter": model}
    for name, section in unknown.items():
        section.pop(name, None)
    if "gripper_dim" in model:
        model["gripper_dims"] = [dim for dim in [model.pop("gripper_dim")] if dim >= 0]
    if "generate_latents" in model:
        model["think"] = model.pop("generate_latents")
    return content


@pytest.mark.parametrize("family", EXPORTED)
def test_exports_of_version_1_are_read(family: str, tmp_path: Path) -> None:
    exported = EXPORTED[family]
    found, _ = read_description(write(tmp_path, version_1(exported), version=1), type(exported))
    # What only training needs was not kept.
    model = found.model
    if isinstance(model, MotionConfig):
        model = dataclasses.replace(model, pair_spans=COMO.pair_spans)
    if isinstance(model, DiffusionPolicyConfig):
        assert model.instruction_dropout
        model = dataclasses.replace(model, instruction_dropout=DIFFUSION.instruction_dropout)
    assert dataclasses.replace(found, model=model).to_json() == exported.to_json()


def test_fields_are_checked_one_by_one() -> None:
    whole = dataclasses.asdict(VLA)
    for changes, message in (
        ({"decoder": {"depth": 1.5}}, "model.decoder.depth is 1.5 and must be of type int"),
        ({"decoder": []}, r"model.decoder must be a section of fields, not \[\]"),
        ({"decoder": {"layers": 1}}, "model.decoder.layers is unknown; update como_jax"),
        ({"causal_text": 1}, "model.causal_text is 1 and must be of type bool"),
        ({"action_head": "other"}, "action_head 'other' must be one of bins"),
        ({"temperature": "0"}, "model.temperature is '0' and must be of type float"),
        ({"chunk": True}, "model.chunk is True and must be of type int"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_dict(VlaConfig, whole | changes, "model")
    with pytest.raises(ConfigError, match="model.action_size is missing"):
        from_dict(VlaConfig, {"decoder": {}}, "model")
    assert from_dict(MotionConfig, {"pair_spans": [1, 2]}, "model").pair_spans == (1, 2)
    with pytest.raises(ConfigError, match=r"pair_spans is \[1\]"):
        from_dict(MotionConfig, {"pair_spans": [1]}, "model")
    assert from_dict(MotionConfig, {"mse_weight": 2}, "model").mse_weight == 2.0


@pytest.mark.parametrize("section", ["observation", "model", "interface", "family"])
@pytest.mark.parametrize("value", [None, [], "text", {}])
@pytest.mark.parametrize("version", [1, 2])
def test_sections_of_another_kind_are_refused(section: str, value: Any, version: int, tmp_path: Path) -> None:
    exported = POLICIES["latent_vla"]
    content = version_1(exported) if version == 1 else exported.to_json()
    with pytest.raises(ModelFileError, match=r"config\.json"):
        read_description(write(tmp_path, {**content, section: value}, version), ExportedPolicy)
