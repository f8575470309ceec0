"""What all commands share: plain log lines, and errors of usage in one line instead of a traceback."""

from __future__ import annotations

import difflib
import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

import absl.logging
from absl import app, flags

from como_jax.errors import ConfigError, NonFiniteError, UsageError, one_line

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_CACHE = flags.DEFINE_string(
    "compilation_cache", None, "Folder that keeps compiled programs for later runs [that of JAX_COMPILATION_CACHE_DIR]."
)
_FULL_DISK = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT)))


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
        except Exception as error:
            if fault := full_disk(error):
                _fail(f"the disk is full: {fault}", status=2)
            raise

    app.run(guarded, flags_parser=_parse_flags)


def full_disk(error: BaseException) -> str:
    """Returns what an error says, if it or what led to it is that a disk is full or a quota used up; else ''.

    Libraries raise it as errors of their own, of which only the text tells.
    """
    seen: BaseException | None = error
    while seen is not None:
        if any(text in str(seen) for text in _FULL_DISK):
            return one_line(seen)
        seen = seen.__cause__ or seen.__context__
    return ""


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


def parse_pairs(flag: str, texts: Sequence[str]) -> dict[str, str]:
    """Values by name of NAME=VALUE texts; raises ConfigError for other texts and for names given twice."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value) or name in pairs:
            raise ConfigError(f"--{flag} {text}: must be NAME=VALUE, each name once.")
        pairs[name] = value
    return pairs


def unknown_field(config: ConfigDict, name: str) -> str:
    """Says that a config has no field of that full name, and which was probably meant; "" where it has the field."""
    section, parts = config, name.split(".")
    for number, part in enumerate(parts):
        where = ".".join(["config", *parts[:number]])
        if not _is_section(section):
            return f"{where} is a value, and has no field {part!r}."
        if part not in section:
            guesses = difflib.get_close_matches(part, list(section), n=1)
            guesses = [".".join([*parts[:number], guess, *parts[number + 1 :]]) for guess in guesses]
            # A field of that name in another section.
            guesses += [path for path in _paths(config) if path.rpartition(".")[2] == parts[-1]]
            known = f"did you mean {guesses[0]!r}?" if guesses else f"{where} has {', '.join(sorted(section))}."
            return f"The config has no field {name!r}; {known}"
        section = section[part]
    return ""


def _is_section(value: object) -> bool:
    # Not by its type, since robots serve policies without ml_collections.
    return hasattr(value, "items")


def _paths(section: ConfigDict, prefix: str = "") -> list[str]:
    """Full names of all fields that are no sections."""
    found = []
    for name, value in section.items():
        found += _paths(value, f"{prefix}{name}.") if _is_section(value) else [prefix + name]
    return found


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _fail(f"{_last_line(str(error))} (--help lists all flags)", status=2)
    except (AttributeError, KeyError, TypeError) as error:
        # ml_collections lets errors of a config override through as they are.
        _fail(_explain_override(argv) or f"A --config.FIELD=VALUE flag does not fit the config: {error}", status=2)


def _last_line(text: str) -> str:
    """What absl says, less the traceback that it quotes of an error in a config file."""
    if "Traceback (most recent call last)" not in text:
        return " ".join(text.split())
    return text.strip().splitlines()[-1].strip().partition(": ")[2]


def _explain_override(argv: Sequence[str]) -> str:
    """What is wrong with the first --config.FIELD of a command line that names no field; "" where all do."""
    for argument in argv[1:]:
        flag, _, field = argument.lstrip("-").partition("=")[0].partition(".")
        flag = flag if flag in flags.FLAGS else flag.removeprefix("no")
        config = _load_config(flag, argv) if field and flag in flags.FLAGS else None
        message = unknown_field(config, field) if config is not None else ""
        if message:
            return message
    return ""


def _load_config(flag: str, argv: Sequence[str]) -> ConfigDict | None:
    """The config that the command line names by --FLAG=FILE or --FLAG FILE, without overrides."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, path = argument.lstrip("-").partition("=")
        if name == flag:
            return flags.FLAGS[flag].parser.parse(path if equals else following)
    return None


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
    # What fails in a thread of Orbax is raised again where the thread is waited for.
    absl.logging.get_absl_handler().addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
