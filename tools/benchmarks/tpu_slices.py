"""How much of TPU slices the recipes of the papers' sizes need, and how fast they can be: the table of como_jax/tpu.

    python -m tools.benchmarks.tpu_slices --out runs/tpu_slices

Needs `pip install 'como_jax[tpu]'`, no TPU, and one to six minutes of a core for every row. Every row is one call of
`tools.compile_for_tpu`. Those that are done stay as they are; OUT/table.md gets the table.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from como_jax import cli
from como_jax.errors import RunError, UsageError
from como_jax.files import write_text
from como_jax.processes import run_commands

logger = logging.getLogger("como_jax.tpu_slices")

_GIB = 2**30


class Slice(NamedTuple):
    """A slice: the name under which it is rented, its topology, and its number of chips."""

    name: str
    topology: str
    chips: int


class Model(NamedTuple):
    """A recipe.

    Attributes:
      title: for the table.
      recipe: of `configs`.
      batch_per_chip: samples by generation of chips, which fit.
      fsdp: chips at most that parameters are split over.
    """

    title: str
    recipe: str
    batch_per_chip: Mapping[str, int]
    fsdp: int = 1


# The number in a name of v5p counts cores, of which a chip has two.
SLICES = (
    Slice("v5e-8", "v5e:2x4", 8),
    Slice("v5e-256", "v5e:16x16", 256),
    Slice("v5p-128", "v5p:4x4x4", 64),
    Slice("v6e-256", "v6e:16x16", 256),
)
MODELS = {
    "como": Model("CoMo, ViT-L", "pretrain_como.py", {"v5e": 16, "v5p": 64, "v6e": 32}),
    "laq": Model("LAQ", "pretrain_laq.py", {"v5e": 16, "v5p": 64, "v6e": 32}),
    "dit": Model("DiT policy", "policy_diffusion.py", {"v5e": 32, "v5p": 128, "v6e": 64}),
    # The image tower's width, 1152, is no multiple of 256, over which it would stay whole.
    "vla": Model("VLA, 3 B", "policy_vla.py:paligemma", {"v5e": 8, "v5p": 64, "v6e": 16}, fsdp=64),
}


def command(model: Model, slice_: Slice, json_file: Path) -> list[str]:
    """The command that compiles a row."""
    batch_size = model.batch_per_chip[slice_.name.split("-")[0]] * slice_.chips
    overrides = (f"data.batch_size={batch_size}", f"mesh.fsdp={min(model.fsdp, slice_.chips)}")
    return [
        *(sys.executable, "-m", "tools.compile_for_tpu", f"--config=configs/{model.recipe}"),
        *(f"--topology={slice_.topology}", f"--json={json_file}"),
        *(f"--config.{override}" for override in overrides),
    ]


def describe(model: Model, slice_: Slice, report: Mapping[str, Any]) -> str:
    """A row as a line of Markdown."""
    memory, time = report["memory"], report["time"]
    batch, chips = report["batch_per_chip"], math.prod(report["mesh"].values())
    mesh = ", ".join(f"{axis}={size}" for axis, size in report["mesh"].items() if size > 1)
    parts = (f"{name} {1e3 * time[key]:.0f}" for name, key in (("compute", "compute"), ("HBM", "hbm"), ("ICI", "ici")))
    cells = (
        *(model.title, slice_.name, mesh, f"{batch:g}"),
        f"{memory['total'] / _GIB:.1f} of {memory['chip'] / _GIB:.0f}",
        f"{1e3 * time['predicted']:.0f} ({', '.join(parts)})",
        f"{batch * chips / time['predicted']:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def table(out: Path, rows: Sequence[tuple[str, Slice]]) -> str:
    """Markdown of the rows that are done."""
    lines = [
        "| model | slice | mesh | batch a chip | HBM a chip, GiB | step at best, ms | samples/s at best |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, slice_ in rows:
        file = _report_file(out, name, slice_)
        if file.exists():
            lines.append(describe(MODELS[name], slice_, json.loads(file.read_text())))
    return "\n".join(lines) + "\n"


def compile_all(out: Path, rows: Sequence[tuple[str, Slice]], processes: int) -> list[str]:
    """Compiles the rows that are not done yet, and returns the names of those that failed."""
    waiting = [row for row in rows if not _report_file(out, *row).exists()]
    files = [_report_file(out, *row) for row in waiting]
    commands = [command(MODELS[name], slice_, file) for (name, slice_), file in zip(waiting, files, strict=True)]
    failed = []
    for number, status in run_commands(commands, [file.with_suffix(".log") for file in files], processes, os.environ):
        logger.info("%s: %s", files[number].stem, f"exit status {status}" if status else "done")
        if status:
            failed.append(files[number].stem)
    return failed


def _report_file(out: Path, name: str, slice_: Slice) -> Path:
    return out / f"{name}_{slice_.name}.json"


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("out", None, "Directory of everything.", required=True)
    flags.DEFINE_list("models", list(MODELS), f"Of {', '.join(MODELS)}.")
    flags.DEFINE_list("slices", [slice_.name for slice_ in SLICES], "By name.")
    flags.DEFINE_integer("processes", 2, "Compilers at once, each on an equal share of the cores.", lower_bound=1)


def main(arguments: Sequence[str]) -> None:
    """Compiles all and prints the table."""
    cli.no_arguments(arguments)
    given = flags.FLAGS
    slices = {slice_.name: slice_ for slice_ in SLICES}
    for flag, known in (("models", MODELS), ("slices", slices)):
        for name in given[flag].value:
            if name not in known:
                raise UsageError(f"--{flag} {name!r} is unknown; choose of {', '.join(known)}.")
    out, rows = Path(given.out).resolve(), [(name, slices[slice_]) for name in given.models for slice_ in given.slices]
    failed = compile_all(out, rows, given.processes)
    found = table(out, rows)
    write_text(out / "table.md", found)
    print(found, end="")
    if failed:
        raise RunError(f"{len(failed)} rows failed: {', '.join(failed)}; see their logs in {out}.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
