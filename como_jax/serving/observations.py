"""Finds the inputs of a policy in the message of a robot.

Maps inside a message are flattened: `{"images": {"top": ...}}` becomes `images/top`. The image of camera NAME is then
the first of `observation/NAME`, `images/NAME`, `observation/images/NAME` and `NAME` that the message has, the state is
`observation/state`, `state` or `states`, and the instruction is `prompt` or `task_description`, as openpi's clients for
LIBERO and ALOHA and the benchmarks of vla-eval name them. For any other robot the names of the fields are given. Fields
that the policy does not need are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from como_jax.errors import ConfigError, InputError, closest
from como_jax.serving.messages import RequestError
from como_jax.serving.policy import PolicyInputs
from como_jax.spec.observations import check_image, check_instruction, check_numbers, check_state

STATE, PROMPT, RESET = "state", "prompt", "reset"
_PREFIXES = ("observation/", "images/", "observation/images/", "")
_STATES = ("observation/state", "state", "states")
_PROMPTS = ("prompt", "task_description")
_MAX_DEPTH = 8


class PolicyRequest(NamedTuple):
    """The content of one message.

    Attributes:
      images: uint8 RGB `[H, W, 3]` of every camera.
      state: float32 `[S]`; empty for a policy that uses no state.
      prompt: the instruction; empty for a policy that reads none.
      reset: whether a new episode begins with this message.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    prompt: str
    reset: bool


class ObservationReader:
    """Reads the inputs of one policy from messages."""

    def __init__(
        self, inputs: PolicyInputs, fields: Mapping[str, Sequence[str]] | None = None, default_prompt: str = ""
    ):
        """Makes a reader.

        Args:
          inputs: of the policy.
          fields: the field of the message for a camera, "state" or "prompt"; several fields of a state are
            concatenated. Inputs that are not named here are found as the module's docstring says.
          default_prompt: the instruction for messages without prompt.

        Raises:
          ConfigError: `fields` names an input that the policy does not have, or gives it no field or too many.
        """
        self._inputs, self._default_prompt = inputs, default_prompt
        given = dict(fields or {})
        known = (*inputs.cameras, *([STATE] if inputs.state_size else []), *([PROMPT] if inputs.uses_text else []))
        for name, sources in given.items():
            if name not in known:
                raise ConfigError(f"fields has {name!r}, but the policy has {', '.join(known)}{closest(name, known)}")
            if not sources or not all(sources) or (len(sources) > 1 and name != STATE):
                raise ConfigError(
                    f"fields[{name!r}] is {','.join(sources)!r} and must name one field; only state may name several."
                )
        # Alternatives for every input; the first whose fields are all in the message is taken.
        self._ways = {name: [tuple(given[name])] if name in given else _usual(name, inputs) for name in known}

    def describe(self) -> dict[str, str]:
        """Returns the kind of value that a message must hold in each field, for the metadata of clients."""
        kinds = {camera: "uint8 RGB [H, W, 3]" for camera in self._inputs.cameras}
        kinds[STATE] = f"float32 [{self._inputs.state_size}]"
        kinds[PROMPT] = "text, optional" if self._default_prompt else "text"
        joined = f"part of {kinds[STATE]}, concatenated in this order"
        return {
            field: joined if len(ways[0]) > 1 else kinds[name] for name, ways in self._ways.items() for field in ways[0]
        }

    def read(self, message: Any) -> PolicyRequest:
        """Reads one message.

        Raises:
          RequestError: a field is missing or holds something else; the error names the field.
        """
        if not isinstance(message, dict):
            raise RequestError(f"An observation must be a map of fields, not {type(message).__name__}.")
        found = dict(_flatten(message))
        try:
            return PolicyRequest(
                images={camera: self._image(found, camera) for camera in self._inputs.cameras},
                state=self._state(found),
                prompt=self._prompt(found),
                reset=_flag(found.get(RESET, False)),
            )
        except InputError as error:
            raise RequestError(str(error)) from error

    def _image(self, found: Mapping[str, Any], camera: str) -> np.ndarray:
        (name,) = self._locate(found, camera)
        return check_image(name, found[name])

    def _state(self, found: Mapping[str, Any]) -> np.ndarray:
        size = self._inputs.state_size
        if not size:
            return np.zeros(0, np.float32)
        names = self._locate(found, STATE)
        state = np.concatenate([check_numbers(name, found[name]) for name in names])
        return check_state(" + ".join(names), state, size)

    def _prompt(self, found: Mapping[str, Any]) -> str:
        if not self._inputs.uses_text:
            return ""
        names = [name for (name,) in self._ways[PROMPT]]
        name = next((name for name in names if name in found), names[0])
        if name not in found and not self._default_prompt:
            raise RequestError(f"{' or '.join(names)} is missing: the policy reads an instruction, which may be empty.")
        prompt = check_instruction(name, found.get(name, ""))
        return prompt if prompt.strip() else self._default_prompt or prompt

    def _locate(self, found: Mapping[str, Any], name: str) -> tuple[str, ...]:
        """The fields of the message that hold an input."""
        for way in self._ways[name]:
            if all(field in found for field in way):
                return way
        wanted = " or ".join(" + ".join(way) for way in self._ways[name])
        has = ", ".join(sorted(found)[:20]) or "no fields"
        raise RequestError(
            f"{wanted} is missing; the message has {has}. The server can be started with other names of fields."
        )


def _usual(name: str, inputs: PolicyInputs) -> list[tuple[str, ...]]:
    if name in inputs.cameras:
        return [(prefix + name,) for prefix in _PREFIXES]
    return [(field,) for field in (_PROMPTS if name == PROMPT else _STATES)]


def _flatten(fields: Mapping[Any, Any], prefix: str = "", depth: int = 1) -> Iterator[tuple[str, Any]]:
    if depth > _MAX_DEPTH:
        raise RequestError(f"Maps in the message are nested deeper than {_MAX_DEPTH} levels.")
    for name, value in fields.items():
        if not isinstance(name, str):
            raise RequestError(f"Names of fields must be text, not {type(name).__name__}.")
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}/", depth + 1)
        else:
            yield prefix + name, value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise RequestError(f"{RESET} must be true or false, not {type(value).__name__}.")
    return bool(value)
