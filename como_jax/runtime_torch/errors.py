"""Errors of the runtime; each says in one line what is wrong and what to do."""


class ModelFileError(ValueError):
    """An exported model that cannot be loaded: a file is missing, damaged, or does not fit the others."""


class InputError(ValueError):
    """A call with frames, latents, observations or settings that the model cannot take."""


class NonFiniteError(ArithmeticError):
    """A policy gave an action that is not finite, which no robot may be told."""
