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
from como_jax.convert.catalog import BUILDERS, list_settings, make_settings
from como_jax.convert.report import summarize
from como_jax.convert.runners import BEAM_RUNNERS, Runner, run_in_processes, run_on_beam, usable_cores
from como_jax.errors import ConversionError

# What shells give for a command that Ctrl-C ended.
_INTERRUPTED = 130

_OUT = flags.DEFINE_string("out", None, "Directory to be made.")
_NAME = flags.DEFINE_string("name", None, "Name of the dataset; by default made from --out.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace --out, once the new dataset is complete.")
_RESTART = flags.DEFINE_bool("restart", False, "Discard what a stopped conversion left, and begin anew.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Processes that convert at once [one for every CPU core].")
_BEAM_RUNNER = flags.DEFINE_enum("beam_runner", None, BEAM_RUNNERS, "Convert on Apache Beam, with this runner.")
_BEAM_OPTIONS = flags.DEFINE_string("beam_options", "", "Options of the Beam pipeline: '--name=value --name=value'.")

_DEFINE = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
    tuple: flags.DEFINE_list,
}
# A flag for every setting of any builder; those that are not given have the builder's default.
_SETTINGS = [_DEFINE[kind](name, None, text) for name, (kind, text) in list_settings().items()]


def given_settings() -> dict[str, Any]:
    """Returns the settings whose flags were given."""
    given = {flag.name: flag.value for flag in _SETTINGS if flag.value is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def chosen_runner() -> Runner:
    """Returns what is to write the shards."""
    if _BEAM_RUNNER.value is None:
        if _BEAM_OPTIONS.value:
            raise ConversionError("--beam_options needs --beam_runner")
        count = usable_cores() if _PROCESSES.value is None else _PROCESSES.value
        return functools.partial(run_in_processes, count=count)
    if _PROCESSES.value is not None:
        raise ConversionError("--processes does not apply to --beam_runner, whose options say how many workers it has")
    return functools.partial(run_on_beam, runner=_BEAM_RUNNER.value, options=shlex.split(_BEAM_OPTIONS.value))


def with_notes(message: str, error: BaseException) -> str:
    """Adds to a message what else is known about an error, such as what is kept."""
    return "; ".join([message, *getattr(error, "__notes__", [])])


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
    print(cli.name_flags("\n".join(summarize(report, _OUT.value))))


if __name__ == "__main__":
    cli.run(main)
