"""What all commands share: plain log lines, and errors a user can mend in one line instead of a traceback."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import absl.logging
from absl import app, flags

from como_jax.errors import NonFiniteError, UsageError

_CACHE = flags.DEFINE_string(
    "compilation_cache", None, "Folder that keeps compiled programs for later runs [that of JAX_COMPILATION_CACHE_DIR]."
)


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a command: exit status 2 for errors of usage, 1 for a run that failed.

    Args:
      main: gets the arguments that are not flags.
    """
    _log_plainly()

    def guarded(argv: Sequence[str]) -> None:
        try:
            keep_programs(_CACHE.value)
            main(argv[1:])
        except UsageError as error:
            _fail(name_flags(str(error)), status=2)
        except NonFiniteError as error:
            _fail(str(error), status=1)

    app.run(guarded, flags_parser=_parse_flags)


def keep_programs(directory: str | None) -> None:
    """Has compiled programs kept in a folder and found there again; None leaves it to JAX's own settings."""
    if directory is not None:
        # Here, since most commands without anything to compile do not need JAX.
        import jax

        jax.config.update("jax_compilation_cache_dir", directory)


def name_flags(message: str) -> str:
    """Replaces the fields that a message of the library names in backquotes by the command's flags of these names."""
    return re.sub(r"`(\w+)`", lambda field: f"--{field[1]}" if field[1] in flags.FLAGS else field[0], message)


def no_arguments(arguments: Sequence[str]) -> None:
    """Raises UsageError if a command that takes flags alone got anything else."""
    if arguments:
        raise UsageError(f"Unexpected argument {arguments[0]!r}; options start with --.")


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _fail(f"{_last_line(str(error))} (--help lists all flags)", status=2)
    except (AttributeError, KeyError, TypeError) as error:
        # ml_collections lets errors of a config override through as they are.
        _fail(_explain_override(error), status=2)


def _last_line(text: str) -> str:
    """What absl says, less the traceback that it quotes of an error in a config file."""
    if "Traceback (most recent call last)" not in text:
        return " ".join(text.split())
    return text.strip().splitlines()[-1].strip().partition(": ")[2]


def _explain_override(error: Exception) -> str:
    text = str(error.args[0]) if error.args else str(error)
    meant = re.search(r'Did you mean "([^"]+)" instead of "([^"]+)"', text)
    if meant:
        return f"The config has no field {meant[2]!r}; did you mean {meant[1]!r}?"
    return f"A --config.FIELD=VALUE flag does not fit the config: {text}"


def _fail(message: str, status: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _log_plainly() -> None:
    logger = logging.getLogger("como_jax")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # Orbax and JAX speak through absl, at length.
    absl.logging.set_verbosity(absl.logging.WARNING)
