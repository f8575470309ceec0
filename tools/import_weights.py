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

The input is a file or a folder: .safetensors, or PyTorch's .pt, .pth and .bin, from which only tensors are read. Every
tensor is loaded, resized, or skipped for a reason that the report gives; missing and unknown tensors are errors.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import ConfigDict

from como_jax import cli
from como_jax.errors import UsageError
from como_jax.training.imported import FILES, RUNS, import_weights, read_encoder
from como_jax.weights.importing import Options

_PERCEPTUAL = "--config.model.perceptual_space={family} --config.model.perceptual_file={out}/model.safetensors"
_TEXT = "--config.text.tower={family} --config.text.weights={out}/model.safetensors"
USES = {
    "encoder": "--config.encoder.init_from={out}",
    "mae": "--config.encoder.init_from={out}",
    "observation": "--config.encoder.tower=siglip --config.init_from={out}",
    **dict.fromkeys(("laq", "como"), "--workdir={out}, as a finished run"),
    **dict.fromkeys(("vgg16", "alexnet"), _PERCEPTUAL),
    **dict.fromkeys(("clip", "t5"), _TEXT),
}
"""The flags by which the output is used, by its family."""


def load_recipe(family: str) -> ConfigDict:
    """The recipe that pretrains a family of motion models."""
    return importlib.import_module(f"configs.pretrain_{family}").get_config()


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_enum("format", None, sorted(RUNS | FILES), "Layout of the weights.", required=True)
    flags.DEFINE_list("input", None, "File or folder of weights; of several, all that belong together.", required=True)
    flags.DEFINE_string("out", None, "Directory to be made.", required=True)
    flags.DEFINE_integer("image_size", 0, "Side of the model's images [that of the file].", lower_bound=0)
    flags.DEFINE_integer("num_heads", 0, "Heads of the encoder [those usual for its width].", lower_bound=0)
    flags.DEFINE_integer("decoder_heads", 0, "Heads of MAE's decoder, or of Moto's and CoMo's parts.", lower_bound=0)
    flags.DEFINE_list("pixel_mean", [], "Mean of red, green and blue that a timm model was trained with [ImageNet's].")
    flags.DEFINE_list("pixel_std", [], "Their standard deviation.")
    flags.DEFINE_string("encoder", None, "Run whose encoder goes into Moto or CoMo, if their file has none.")
    flags.DEFINE_bool("separate_types", False, "Moto and CoMo were trained with legacy=False: two token types.")


def read_options(given: flags.FlagValues) -> Options:
    """The options that the flags give."""
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
    """Imports the weights and prints the account of all tensors."""
    cli.no_arguments(arguments)
    given = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")
    imported = import_weights(given.format, given.input, given.out, read_options(given), load_recipe)
    print(imported.accounts.describe())
    print(f"Written to {given.out}; use it by {USES[imported.family].format(family=imported.family, out=given.out)}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
