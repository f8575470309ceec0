r"""Converts a source of episodes to a dataset in the schema of `como_jax.data.schema`.

    python -m tools.datasets.build video_folder --source clips --out datasets/clips --control_rate 3
    python -m tools.datasets.build rlds --source bridge/1.0.0 --out datasets/bridge --control_rate 5 \
        --camera image_0
    python -m tools.datasets.build lerobot --source pusht --out datasets/pusht
    python -m tools.datasets.build tabletop --out datasets/tabletop --episodes 200

--out itself becomes the TFDS directory; `statistics.json` and `conversion_report.json` lie in it. The same command
goes on with a conversion that was stopped or killed. como_jax/convert/README.md has the rest.
"""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from como_jax import cli
from como_jax.convert.catalog import BUILDERS, make_settings
from como_jax.convert.report import REPORT_NAME
from como_jax.convert.runners import BEAM_RUNNERS, Runner, run_in_processes, run_on_beam, usable_cores
from como_jax.errors import ConversionError

_MAX_LISTED = 5
# What shells give for a command that Ctrl-C ended.
_INTERRUPTED = 130

_OUT = flags.DEFINE_string("out", None, "Directory to be made.")
_NAME = flags.DEFINE_string("name", None, "Name of the dataset; by default made from --out.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace --out, once the new dataset is complete.")
_RESTART = flags.DEFINE_bool("restart", False, "Discard what a stopped conversion left, and begin anew.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Processes that convert at once [one for every CPU core].")
_BEAM_RUNNER = flags.DEFINE_enum("beam_runner", None, BEAM_RUNNERS, "Convert on Apache Beam, with this runner.")
_BEAM_OPTIONS = flags.DEFINE_string("beam_options", "", "Options of the Beam pipeline: '--name=value --name=value'.")

# Flags without a value are left to the builder's settings, which know the defaults.
_SETTINGS = [
    flags.DEFINE_integer("image_size", None, "Shorter side of larger pictures [256; tabletop, metaworld 64]."),
    flags.DEFINE_float("validation_fraction", None, "Share of the sources that becomes `val` [0.1]."),
    flags.DEFINE_integer("seed", None, "Fixes the split, and the episodes of tabletop and metaworld [0]."),
    flags.DEFINE_string("source", None, "Folder to convert, or for rlds a TFDS name; not for tabletop, metaworld."),
    flags.DEFINE_string("data_dir", None, "rlds: where datasets given by name lie [where TFDS keeps them]."),
    flags.DEFINE_string("table", None, "rlds: TOML file of known datasets [Open X-Embodiment]."),
    flags.DEFINE_string("entry", None, "rlds: entry of the table [the name of the dataset]."),
    flags.DEFINE_float("control_rate", None, "Steps per second (Hz), where the source does not say."),
    flags.DEFINE_integer("frame_stride", None, "video_folder: keep every so many frames [1]."),
    flags.DEFINE_float("clip_seconds", None, "video_folder, calvin: cut longer recordings into clips [20]."),
    flags.DEFINE_list("camera", None, "Camera keys, the first is the main camera; see the builder."),
    flags.DEFINE_list("action", None, "Keys of actions, joined; '' for none [action]."),
    flags.DEFINE_list("state", None, "Keys of states, joined; '' for none [the usual ones]."),
    flags.DEFINE_string("language", None, "rlds, npz: key of the text; '' for none [the first of the usual ones]."),
    flags.DEFINE_string("orientation", None, "libero: rotate180, flip or stored [rotate180]."),
    flags.DEFINE_integer("action_shift", None, "libero: picture t gets the action stored at t + this number [1]."),
    flags.DEFINE_bool("drop_noops", None, "libero: leave out steps that command no motion [false]."),
    flags.DEFINE_string("segments", None, "calvin: language (annotated windows), play (all) or both [language]."),
    flags.DEFINE_integer("episodes", None, "tabletop, metaworld: number of episodes [200]."),
    flags.DEFINE_list("tasks", None, "tabletop, metaworld: tasks, or `all` [all]."),
    flags.DEFINE_string("look", None, "tabletop: plain, moving, hard or human [plain]."),
    flags.DEFINE_float("noise", None, "tabletop, metaworld: standard deviation of the noise on actions [0]."),
    flags.DEFINE_bool("actions", None, "tabletop, metaworld: record actions and states [true]."),
    flags.DEFINE_integer("action_repeat", None, "metaworld: simulator steps that an action lasts [2]."),
]


def given_settings() -> dict[str, Any]:
    """The settings whose flags were set."""
    given = {flag.name: flag.value for flag in _SETTINGS if flag.value is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def chosen_runner() -> Runner:
    """How the shards are to be written."""
    if _BEAM_RUNNER.value is None:
        if _BEAM_OPTIONS.value:
            raise ConversionError("--beam_options needs --beam_runner")
        count = usable_cores() if _PROCESSES.value is None else _PROCESSES.value
        return functools.partial(run_in_processes, count=count)
    if _PROCESSES.value is not None:
        raise ConversionError("--processes does not apply to --beam_runner, whose options say how many workers it has")
    return functools.partial(run_on_beam, runner=_BEAM_RUNNER.value, options=shlex.split(_BEAM_OPTIONS.value))


def with_notes(message: str, error: BaseException) -> str:
    """A message with what else is known about an error, such as what is kept."""
    return "; ".join([message, *getattr(error, "__notes__", [])])


def print_summary(out: str, report: dict[str, Any]) -> None:
    """Says where the dataset is, how large, and what is missing from it."""
    sizes = [f"{split} {report['episodes'][split]} episodes, {steps} steps" for split, steps in report["steps"].items()]
    print(f"dataset {report['name']} in {out}: {'; '.join(sizes)}")
    for title in ("left_out", "partially_converted"):
        entries = report[title]
        if entries:
            print(f"{title.replace('_', ' ')}: {len(entries)} of {report['sources']['found']} sources")
        for entry in entries[:_MAX_LISTED]:
            print(f"  {entry['source']}: {entry['reasons'][0]}")
        if len(entries) > _MAX_LISTED:
            print(f"  and {len(entries) - _MAX_LISTED} more")
    for warning in report["warnings"]:
        times = f" ({warning['count']} sources)" if warning["count"] > 1 else ""
        print(f"warning: {warning['message']}{times}")
    print(f"the full report is {out}/{REPORT_NAME}")


def main(arguments: Sequence[str]) -> None:
    """Runs the conversion that the command line asks for."""
    if len(arguments) != 1:
        raise ConversionError(f"expected the name of one builder: {', '.join(BUILDERS)}")
    if _OUT.value is None:
        raise ConversionError("--out is missing: the directory to be made")
    settings, runner = make_settings(arguments[0], given_settings()), chosen_runner()
    try:
        builder = BUILDERS[arguments[0]](_OUT.value, settings, _NAME.value)
        report = builder.convert(_OVERWRITE.value, show_progress=True, restart=_RESTART.value, runner=runner)
    except ConversionError as error:
        raise ConversionError(with_notes(str(error), error)) from error
    except OSError as error:
        raise ConversionError(with_notes(f"the conversion failed: {error}", error)) from error
    except KeyboardInterrupt as error:
        print(with_notes("stopped", error), file=sys.stderr)
        sys.exit(_INTERRUPTED)
    print_summary(_OUT.value, report)


if __name__ == "__main__":
    cli.run(main)
