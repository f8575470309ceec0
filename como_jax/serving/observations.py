"""From the fields of a robot's message to what a policy sees.

Robots name their fields differently. Maps inside a message are flattened: `{"images": {"top": ...}}` is `images/top`. A
policy's camera NAME is then the first of `observation/NAME`, `images/NAME`, `observation/images/NAME` and `NAME` that
the message has, its state `observation/state` or `state`, its instruction `prompt`, as openpi's clients for LIBERO and
ALOHA name them. Any other robot's fields are given by name. Fields that the policy has no use for are left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from como_jax.errors import ConfigError, closest
from como_jax.serving.policy import PolicyInputs
from como_jax.serving.protocol import RequestError

STATE, PROMPT, RESET = "state", "prompt", "reset"
_PREFIXES = ("observation/", "images/", "observation/images/", "")
_MAX_DEPTH = 8
_MAX_PROMPT = 4096


class Observation(NamedTuple):
    """What a message says.

    Attributes:
      images: uint8 RGB `[H, W, 3]` of every camera.
      state: float32 `[S]`; empty where the policy does not use it.
      prompt: the instruction; empty where the policy reads none.
      reset: whether a new episode begins with it.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    prompt: str
    reset: bool


class ObservationReader:
    """Finds a policy's inputs in messages."""

    def __init__(
        self, inputs: PolicyInputs, fields: Mapping[str, Sequence[str]] | None = None, default_prompt: str = ""
    ):
        """Says where the inputs are.

        Args:
          inputs: of the policy.
          fields: by camera, "state" or "prompt" the message's field, of the state also several, which are joined; what
            is left out is found as the module says.
          default_prompt: for messages without prompt.

        Raises:
          ConfigError: `fields` names an input that the policy does not have, or no field or too many for one.
        """
        self._inputs, self._default_prompt = inputs, default_prompt
        given = dict(fields or {})
        known = (*inputs.cameras, *([STATE] if inputs.state_size else []), *([PROMPT] if inputs.uses_text else []))
        for name, sources in given.items():
            if name not in known:
                raise ConfigError(f"--field {name}: the policy has {', '.join(known)}{closest(name, known)}")
            if not sources or not all(sources) or (len(sources) > 1 and name != STATE):
                raise ConfigError(f"--field {name}={','.join(sources)}: must name one field; state may name several.")
        # Ways of naming an input: of those whose fields the message all has, the first is taken.
        self._ways = {name: [tuple(given[name])] if name in given else _usual(name, inputs) for name in known}

    def describe(self) -> dict[str, str]:
        """What a message must hold: by field the kind of value, for the client's side."""
        kinds = {camera: "uint8 RGB [H, W, 3]" for camera in self._inputs.cameras}
        kinds[STATE] = f"float32 [{self._inputs.state_size}]"
        kinds[PROMPT] = "text, optional" if self._default_prompt else "text"
        joined = f"part of {kinds[STATE]}, joined in this order"
        return {
            field: joined if len(ways[0]) > 1 else kinds[name] for name, ways in self._ways.items() for field in ways[0]
        }

    def read(self, message: Any) -> Observation:
        """What a message says.

        Raises:
          RequestError: a field is missing or not what it must be; the message names it.
        """
        if not isinstance(message, dict):
            raise RequestError(f"An observation must be a map of fields, not {type(message).__name__}.")
        found = dict(_flatten(message))
        return Observation(
            images={camera: self._image(found, camera) for camera in self._inputs.cameras},
            state=self._state(found),
            prompt=self._prompt(found),
            reset=_flag(found.get(RESET, False)),
        )

    def _image(self, found: Mapping[str, Any], camera: str) -> np.ndarray:
        (name,) = self._locate(found, camera)
        image = found[name]
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            raise RequestError(f"{name} must be an array of uint8, RGB from 0 to 255, not {_describe(image)}.")
        # As robots' drivers for PyTorch give them; openpi takes them too.
        if image.ndim == 3 and image.shape[0] == 3 != image.shape[2]:
            image = np.ascontiguousarray(np.moveaxis(image, 0, 2))
        if image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise RequestError(f"{name} must have shape [H, W, 3], not {list(image.shape)}.")
        return image

    def _state(self, found: Mapping[str, Any]) -> np.ndarray:
        size = self._inputs.state_size
        if not size:
            return np.zeros(0, np.float32)
        names = self._locate(found, STATE)
        state = np.concatenate([_numbers(name, found[name]) for name in names])
        if len(state) != size:
            raise RequestError(f"{' + '.join(names)} must be {size} numbers, not {len(state)}.")
        return state

    def _prompt(self, found: Mapping[str, Any]) -> str:
        if not self._inputs.uses_text:
            return ""
        ((name,),) = self._ways[PROMPT]
        prompt = found.get(name, "")
        if isinstance(prompt, np.ndarray) and prompt.dtype.kind == "U" and prompt.size == 1:
            prompt = prompt.item()
        if not isinstance(prompt, str):
            raise RequestError(f"{name} must be text, not {_describe(prompt)}.")
        if len(prompt) > _MAX_PROMPT:
            raise RequestError(f"{name} has {len(prompt)} characters; {_MAX_PROMPT} are the most.")
        prompt = str(prompt) if prompt.strip() else self._default_prompt
        if not prompt:
            raise RequestError(f"{name} is missing: the policy needs an instruction to act.")
        return prompt

    def _locate(self, found: Mapping[str, Any], name: str) -> tuple[str, ...]:
        """The fields of an input that a message has."""
        for way in self._ways[name]:
            if all(field in found for field in way):
                return way
        wanted = " or ".join(" + ".join(way) for way in self._ways[name])
        has = ", ".join(sorted(found)[:20]) or "no fields"
        raise RequestError(f"{wanted} is missing; the message has {has}. The server's --field maps other names.")


def _usual(name: str, inputs: PolicyInputs) -> list[tuple[str, ...]]:
    if name in inputs.cameras:
        return [(prefix + name,) for prefix in _PREFIXES]
    return [("prompt",)] if name == PROMPT else [("observation/state",), ("state",)]


def _flatten(fields: Mapping[Any, Any], prefix: str = "", depth: int = 1) -> Iterator[tuple[str, Any]]:
    if depth > _MAX_DEPTH:
        raise RequestError(f"Fields lie in each other deeper than {_MAX_DEPTH}.")
    for name, value in fields.items():
        if not isinstance(name, str):
            raise RequestError(f"Names of fields must be text, not {type(name).__name__}.")
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}/", depth + 1)
        else:
            yield prefix + name, value


def _numbers(name: str, value: Any) -> np.ndarray:
    """float32 `[n]`."""
    try:
        numbers = np.atleast_1d(np.asarray(value))
        if numbers.ndim != 1 or numbers.dtype.kind not in "iuf":
            raise ValueError
    # Of NumPy, for lists of lists of different lengths, or numbers of more than 64 bits.
    except (ValueError, OverflowError):
        raise RequestError(f"{name} must be a row of numbers, not {_describe(value)}.") from None
    with np.errstate(over="ignore"):
        numbers = numbers.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise RequestError(f"{name} holds numbers that are not finite.")
    return numbers


def _flag(value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise RequestError(f"{RESET} must be true or false, not {_describe(value)}.")
    return bool(value)


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
