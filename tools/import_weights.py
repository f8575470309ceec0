r"""Imports public PyTorch weights as the directory of a run, with an account of every tensor.

    python -m tools.import_weights --format mae-huggingface --input vit-mae-large --out mae
    python -m experiments.pretrain --config configs/pretrain_como.py --config.encoder.init_from=mae ...

| format | what it reads | how its output is used |
|---|---|---|
| mae-facebook, mae-huggingface | MAE ViT-B/L/H, with or without its decoder | `--config.encoder.init_from=OUT` |
| timm-vit | a ViT of timm with a class token | the same |
| siglip | the image tower, as transformers saves it | `--config.init_from=OUT --config.encoder.tower=siglip` |
| laq | LAPA's laq_openx.pt | as a finished run: `--workdir=OUT` |
| moto, como | latent motion tokenizers; `--encoder` names a run of MAE ViT-L | the same |
| lpips, torchvision | VGG16 or AlexNet; files by commas | `--config.model.perceptual_file=OUT/model.safetensors` |
| clip-text, t5-encoder | as transformers saves them, with config.json | `--config.text.weights=OUT/model.safetensors` |

The input is a file or a folder: .safetensors, or PyTorch's .pt, .pth and .bin, of which nothing but tensors is read.
Every tensor is loaded, resized or skipped by a rule that the report gives; one that is missing or unknown is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from como_jax import cli
from como_jax.errors import UsageError
from como_jax.motion.build import FAMILIES
from como_jax.weights import converted, mae, moto
from como_jax.weights.checkpoints import Weights, read_weights
from como_jax.weights.importing import Accounts, Foreign, Format, Options, import_parameters
from como_jax.weights.laq_openx import laq_openx
from como_jax.weights.runs import check_free, check_parameters, read_encoder, write_run
from como_jax.weights.siglip import siglip
from como_jax.weights.tables import CONFIG_NAME, read_json
from como_jax.weights.timm import timm_vit

logger = logging.getLogger("como_jax.import_weights")

RUNS: dict[str, Format] = {
    "mae-facebook": mae.mae_facebook,
    "mae-huggingface": mae.mae_huggingface,
    "timm-vit": timm_vit,
    "siglip": siglip,
    "laq": laq_openx,
    "moto": moto.moto,
    "como": moto.como,
}
"""Formats that become the directory of a run."""

FILES: dict[str, Format] = {
    "lpips": converted.lpips,
    "torchvision": converted.torchvision,
    "clip-text": converted.clip_text,
    "t5-encoder": converted.t5_encoder,
}
"""Formats that become a file of safetensors."""

_USES = {
    "encoder": "--config.encoder.init_from={out}",
    "mae": "--config.encoder.init_from={out}",
    "observation": "--config.encoder.tower=siglip --config.init_from={out}",
    "laq": "--workdir={out}, as a finished run",
    "como": "--workdir={out}, as a finished run",
}


class Imported(NamedTuple):
    """The account of all tensors, and the flags by which the output is used."""

    accounts: Accounts
    use: str


def import_weights(
    format_name: str, sources: Sequence[epath.PathLike], out: epath.PathLike, options: Options
) -> Imported:
    """Reads weights and writes what the format becomes.

    Args:
      format_name: one of `RUNS` and `FILES`.
      sources: files or folders, whose tensors belong together.
      out: directory to be made.
      options: what the files do not say; their `settings` are read from config.json beside the first.

    Raises:
      UsageError: a file cannot be read, is not of this format, or the output cannot be written.
    """
    check_free(out)
    weights = functools.reduce(Weights.merged, [read_weights(source) for source in sources])
    options = dataclasses.replace(options, settings=read_settings(weights.path))
    foreign = (RUNS | FILES)[format_name](weights, options)
    params, accounts = import_parameters(weights, foreign)
    report = make_report(format_name, weights, foreign, accounts)
    if format_name in FILES:
        return Imported(accounts, converted.write_converted(out, foreign, params, weights.path, report))
    config = make_config(foreign)
    check_parameters(config, params)
    write_run(out, config, params, report)
    return Imported(accounts, _USES[foreign.family].format(out=out))


def read_settings(path: epath.Path) -> dict[str, Any]:
    """The config.json beside a file, if there is one."""
    beside = path.parent / CONFIG_NAME
    return read_json(beside) if beside.is_file() else {}


def make_config(foreign: Foreign) -> ConfigDict:
    """The config of the run: the recipe of its family with what the file has, or what there is of a model."""
    if foreign.family in FAMILIES:
        config = importlib.import_module(f"configs.pretrain_{foreign.family}").get_config()
        # The recipe's is not what these weights were trained on, and nothing may be compared with it.
        config.data.mixture = "data_of_the_imported_weights"
    else:
        config = ConfigDict({"family": foreign.family, "data": {}, "encoder": {}})
    with config.unlocked():
        for name, value in foreign.config.items():
            section, _, field = name.rpartition(".")
            (config[section] if section else config)[field] = value
    return config


def make_report(format_name: str, weights: Weights, foreign: Foreign, accounts: Accounts) -> dict[str, Any]:
    """What the output keeps of where its parameters are from."""
    return {
        "format": format_name,
        "files": [
            {"name": path.name, "bytes": path.stat().length, "sha256": _sha256(path)} for path in weights.read_from
        ],
        "config": dict(foreign.config),
        **dataclasses.asdict(accounts),
    }


def _sha256(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_enum("format", None, sorted(RUNS | FILES), "Layout of the weights.", required=True)
    flags.DEFINE_list("input", None, "File or folder of weights; of several, all that belong together.", required=True)
    flags.DEFINE_string("out", None, "Directory to be made.", required=True)
    flags.DEFINE_integer("image_size", 0, "Side of the model's pictures [that of the file].", lower_bound=0)
    flags.DEFINE_integer("num_heads", 0, "Heads of the encoder [those usual for its width].", lower_bound=0)
    flags.DEFINE_integer("decoder_heads", 0, "Heads of MAE's decoder, or of Moto's and CoMo's parts.", lower_bound=0)
    flags.DEFINE_list("pixel_mean", [], "Mean of red, green and blue that a timm model was trained with [ImageNet's].")
    flags.DEFINE_list("pixel_std", [], "Their standard deviation.")
    flags.DEFINE_string("encoder", None, "Run whose encoder goes into Moto or CoMo, if their file has none.")
    flags.DEFINE_bool("separate_types", False, "Moto and CoMo were trained with legacy=False: two token types.")


def read_options(given: flags.FlagValues) -> Options:
    """What the flags say."""
    encoder, encoder_config = read_encoder(given.encoder) if given.encoder else ({}, {})
    try:
        mean, std = (tuple(float(number) for number in numbers) for numbers in (given.pixel_mean, given.pixel_std))
    except ValueError as error:
        raise UsageError(f"--pixel_mean and --pixel_std take three numbers, such as 0.5,0.5,0.5: {error}") from error
    return Options(
        image_size=given.image_size,
        num_heads=given.num_heads,
        decoder_heads=given.decoder_heads,
        pixel_mean=mean,
        pixel_std=std,
        encoder=encoder,
        encoder_config=encoder_config,
        separate_types=given.separate_types,
    )


def main(arguments: Sequence[str]) -> None:
    """Prints the account."""
    cli.no_arguments(arguments)
    given = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")
    imported = import_weights(given.format, given.input, given.out, read_options(given))
    print(imported.accounts.describe())
    print(f"Written to {given.out}; use it by {imported.use}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
