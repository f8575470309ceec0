"""Compiles the train step of a recipe for a TPU slice, without having one: does it fit, and how fast can it be?

    python -m tools.compile_for_tpu --config configs/pretrain_como.py --config.mesh.fsdp=8 --topology v5e:4x8

It needs `pip install 'como_jax[tpu]'`, but no TPU and no data. Compiling takes minutes of one processor.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import config_flags

from como_jax import cli
from como_jax.errors import UsageError
from como_jax.files import check_file_output, write_figures
from como_jax.tpu.compiling import DoesNotFitError
from como_jax.tpu.report import analyze, format_report, search
from como_jax.tpu.topology import open_topology
from como_jax.training.batches import DataSizes


def define_flags() -> None:
    """Defines the flags of the command."""
    config_flags.DEFINE_config_file("config", None, "Recipe, as configs/NAME.py or configs/NAME.py:VARIANT.")
    flags.DEFINE_string("topology", None, "GENERATION:AxB[xC], such as v5e:4x8, v5p:4x4x4 or v6e:16x16.")
    flags.DEFINE_integer("num_slices", 1, "Slices, connected by the data centre's network; mesh.data spans them.")
    flags.DEFINE_bool("search_batch", False, "Search for the largest batch a chip that fits; compiles several times.")
    flags.DEFINE_string("json", None, "File that gets the figures.")
    flags.DEFINE_string("hlo", None, "File that gets the compiled module's text, unless --search_batch.")
    defaults = DataSizes()
    flags.DEFINE_integer("action_size", defaults.action_size, "Numbers in an action, which data would decide.")
    flags.DEFINE_integer("state_size", defaults.state_size, "Numbers in a state, which data would decide.")
    flags.DEFINE_string("latent_shape", "8x16", "Tokens and their size of labels, which data would decide; 0x0: none.")
    flags.DEFINE_integer("codebook_size", defaults.codebook_size, "Of discrete labels; 0 for continuous ones.")
    flags.DEFINE_integer("label_size", defaults.label_size, "Numbers in what model.label_weight reads.")
    flags.DEFINE_integer("embedding_size", defaults.embedding_size, "Of instructions embedded beforehand.")
    flags.mark_flags_as_required(["config", "topology"])


def data_sizes(given: flags.FlagValues) -> DataSizes:
    """The sizes that a dataset would decide, from the flags."""
    parts = given.latent_shape.split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise UsageError(f"--latent_shape {given.latent_shape!r} must be TOKENSxSIZE, such as 8x16.")
    return DataSizes(
        action_size=given.action_size,
        state_size=given.state_size,
        latent_shape=(int(parts[0]), int(parts[1])),
        codebook_size=given.codebook_size,
        label_size=given.label_size,
        embedding_size=given.embedding_size,
    )


def main(arguments: Sequence[str]) -> None:
    """Prints the report."""
    cli.no_arguments(arguments)
    given = flags.FLAGS
    for path in filter(None, (given.json, given.hlo)):
        # Before minutes of compiling, not after.
        check_file_output(path)
    # The slice is compiled for, not run on.
    jax.config.update("jax_platforms", "cpu")
    topology, sizes = open_topology(given.topology, given.num_slices), data_sizes(given)
    try:
        if given.search_batch:
            report = search(given.config, topology, sizes)
        else:
            report = analyze(given.config, topology, sizes, given.hlo)
    except DoesNotFitError as error:
        print(f"It does not fit: {error}")
        sys.exit(1)
    print(format_report(report))
    if given.json:
        write_figures(given.json, report.to_json())


if __name__ == "__main__":
    define_flags()
    cli.run(main)
