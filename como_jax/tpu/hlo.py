"""Reads the text of a compiled XLA module: its computations, their instructions, and how often each is run.

The compiler's own cost analysis counts the body of a loop once, whatever the number of rounds, and says nothing of
collectives; so both are counted from the text.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

BYTES_OF = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}
"""Of types whose name does not end in their number of bits."""

_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([\w\-]+)\(")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: its element type, its dimensions, and whether it lives in HBM rather than on the chip."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Without the padding of tiles."""
        bits = re.match(r"[a-z]+(\d+)", self.dtype)
        width = BYTES_OF.get(self.dtype, int(bits[1]) / 8 if bits else 0)
        return self.size * width


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation.

    Attributes:
      name, opcode: as in the text.
      shapes: of its result, several where it is a tuple.
      operands: names of instructions of the same computation.
      attributes: the line from the opcode on.
      is_root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, attribute: str) -> str | None:
        """The computation that `attribute` names, such as `calls` or `body`."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


Computation = Mapping[str, Instruction]
"""Instructions by name, in order."""


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program of one device."""

    entry: str
    computations: Mapping[str, Computation]

    @classmethod
    def parse(cls, text: str) -> Module:
        """Of what `jax.stages.Compiled.as_text` gives.

        Raises:
          ValueError: there is no entry computation.
        """
        computations: dict[str, dict[str, Instruction]] = {}
        entry, current = "", None
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
            elif line.startswith("}"):
                current = None
            elif current is not None and (instruction := _parse_instruction(line)):
                current[instruction.name] = instruction
        if not entry:
            raise ValueError("no ENTRY computation: this is not the text of an XLA module.")
        return cls(entry, computations)

    def executed(self) -> Iterator[tuple[Computation, float]]:
        """Computations that run as sequences of instructions, and how often: not those within fusions."""
        yield from self._executed(self.entry, 1)

    def _executed(self, name: str, times: float) -> Iterator[tuple[Computation, float]]:
        computation = self.computations[name]
        yield computation, times
        for instruction in computation.values():
            if instruction.opcode == "while":
                rounds = self.rounds(instruction, computation)
                yield from self._executed(instruction.called("body"), times * rounds)
            elif instruction.opcode == "call":
                yield from self._executed(instruction.called("to_apply"), times)
            elif instruction.opcode == "conditional":
                # All branches, as if each were taken: none of them costs much here.
                for branch in _branches(instruction):
                    yield from self._executed(branch, times)

    def rounds(self, loop: Instruction, surroundings: Computation) -> int:
        """How often the body of a `while` runs: from its counter's start, step and bound; 1 where they are not seen."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition, body = (self.computations[loop.called(name)] for name in ("condition", "body"))
        compare = _root(condition)
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return 1
        counter, bound = (condition[name] for name in compare.operands)
        if counter.opcode != "get-tuple-element" or (end := _constant(bound)) is None:
            return 1
        place = int(re.search(r"index=(\d+)", counter.attributes)[1])
        begin = _constant(_follow(surroundings, surroundings[loop.operands[0]].operands[place])) or 0
        following = _follow(body, _root(body).operands[place])
        steps = [_constant(_follow(body, name)) for name in following.operands if following.opcode == "add"]
        return math.ceil((end - begin) / next((step for step in steps if step), 1))

    def within(self, instruction: Instruction) -> Iterator[tuple[Instruction, Computation]]:
        """The instruction's own operations: those of the computation that a fusion or an async call runs, or itself."""
        name = instruction.called("calls") if instruction.opcode in ("fusion", "async-start") else None
        if name is None:
            return
        computation = self.computations[name]
        for inner in computation.values():
            yield inner, computation
            yield from self.within(inner)

    def operations(self) -> Iterator[tuple[Instruction, Computation, float]]:
        """Every operation, within fusions too, with the computation it stands in and how often it runs."""
        for computation, times in self.executed():
            for instruction in computation.values():
                yield instruction, computation, times
                for inner, surroundings in self.within(instruction):
                    yield inner, surroundings, times

    @functools.cached_property
    def parameters(self) -> dict[str, Shape]:
        """Shapes, on one device, of the arguments of the program, by the name that JAX gives them."""
        found = {}
        for instruction in self.computations[self.entry].values():
            name = re.search(r'op_name="([^"]*)"', instruction.attributes)
            if instruction.opcode == "parameter" and name:
                found[name[1].replace("\\'", "'")] = instruction.shapes[0]
        return found


def _parse_instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(_COMMENT.sub("", line.strip()))
    if not found:
        return None
    # Shapes hold no space before a parenthesis, so that the first word with one is the opcode.
    text = f" {found[3]}"
    opcode = _OPCODE.search(text)
    if not opcode:
        return None
    call = text[opcode.start() + 1 :]
    return Instruction(
        name=found[2],
        opcode=opcode[1],
        shapes=tuple(_shapes(text[: opcode.start()])),
        operands=_operands(call),
        attributes=call,
        is_root=bool(found[1]),
    )


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        yield Shape(dtype, tuple(int(x) for x in dims.split(",") if x), space is None or space[1] == "0")


def _operands(call: str) -> tuple[str, ...]:
    """Names between the first parenthesis and the one that closes it."""
    depth = 0
    for end, character in enumerate(call):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == ")" and not depth:
            return tuple(re.findall(r"%([\w.\-]+)", call[: end + 1]))
    return ()


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _follow(computation: Computation, name: str) -> Instruction:
    """The instruction of that name, or what it copies."""
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast"):
        instruction = computation[instruction.operands[0]]
    return instruction


def _constant(instruction: Instruction) -> int | None:
    """The value of a whole number."""
    value = re.match(r"constant\((-?\d+)\)", instruction.attributes)
    return int(value[1]) if value else None


def _branches(instruction: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if listed:
        return re.findall(r"%([\w.\-]+)", listed[1])
    names = [instruction.called("true_computation"), instruction.called("false_computation")]
    return [name for name in names if name]
