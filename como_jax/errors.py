"""Errors that the commands report in one line: the message names the file, field or flag and says what to do."""

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str]) -> str:
    """A question to append to a message about an unknown name: the known one that is most like it, if any is."""
    guesses = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {guesses[0]}?" if guesses else ""


def one_line(error: BaseException) -> str:
    """The message of any error as one line, or the name of its class if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


class UsageError(ValueError):
    """What was asked for cannot be done as asked; the base of all errors that a user can mend."""


class ConfigError(UsageError):
    """A config field, or a combination of fields, that describes nothing."""


class ConversionError(UsageError):
    """A source that cannot be converted as asked."""


class DatasetError(UsageError):
    """A dataset that cannot serve what was asked of it."""


class NoClipsError(DatasetError):
    """A dataset none of whose episodes gives a clip of the wanted kind."""


class OutputError(UsageError):
    """A directory that cannot be made where it was asked for."""


class MeshError(UsageError):
    """A mesh or batch that does not fit the devices."""


class RunError(UsageError):
    """A run directory or checkpoint that cannot be used."""


class ModelFileError(RunError):
    """An exported model that cannot be loaded: a file is missing, damaged, or does not fit the others."""


class InputError(UsageError):
    """Frames, latents, observations or instructions that a model cannot take."""


class NonFiniteError(RuntimeError):
    """A loss term, a gradient or an action became NaN or infinite."""
