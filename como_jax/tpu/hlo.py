"""Reads the text of a compiled XLA module: its computations, their instructions, and how often each of them runs.

The compiler's own cost analysis counts the body of a loop once, however often it runs, and does not count exchanges
between devices; so both are counted from the text.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

BYTES_OF = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}
"""Bytes of the types whose names do not end in their number of bits."""

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
        """Size without the padding of tiles."""
        bits = re.match(r"[a-z]+(\d+)", self.dtype)
        width = BYTES_OF.get(self.dtype, int(bits[1]) / 8 if bits else 0)
        return self.size * width


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation.

    Attributes:
      name, opcode: as in the text.
      shapes: of the result, several if it is a tuple.
      operands: names of instructions of the same computation.
      attributes: the text of the line from the opcode on.
      is_root: whether the computation returns it.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, attribute: str) -> str | None:
        """The name of the computation in `attribute`, which is `calls` or `body`, for example."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


Computation = Mapping[str, Instruction]
"""Instructions by name, in the order of the text."""


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program of one device."""

    entry: str
    computations: Mapping[str, Computation]

    @classmethod
    def parse(cls, text: str) -> Module:
        """Parses what `jax.stages.Compiled.as_text` gives.

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
        """Computations that run as sequences of instructions, which those of fusions do not, and how often they run."""
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
                # All branches count as if each were taken; none of them costs much here.
                for branch in _branches(instruction):
                    yield from self._executed(branch, times)

    def rounds(self, loop: Instruction, surroundings: Computation) -> int:
        """How often the body of a `while` runs, from start, step and bound of its counter; 1 if these are unknown."""
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
        """The operations of the computation that a fusion or an asynchronous call runs, and those within them."""
        name = instruction.called("calls") if instruction.opcode in ("fusion", "async-start") else None
        if name is None:
            return
        computation = self.computations[name]
        for inner in computation.values():
            yield inner, computation
            yield from self.within(inner)

    def operations(self) -> Iterator[tuple[Instruction, Computation, float]]:
        """Every operation, also within fusions, with the computation that holds it and how often it runs."""
        for computation, times in self.executed():
            for instruction in computation.values():
                yield instruction, computation, times
                for inner, surroundings in self.within(instruction):
                    yield inner, surroundings, times

    @functools.cached_property
    def parameters(self) -> dict[str, Shape]:
        """Shapes of the program's arguments on one device, by the names that JAX gives them."""
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
    # In shapes, no parenthesis follows a word; so the first word before a parenthesis is the opcode.
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
    """The names between the first parenthesis and the one that closes it."""
    depth = 0
    for end, character in enumerate(call):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == ")" and not depth:
            return tuple(re.findall(r"%([\w.\-]+)", call[: end + 1]))
    return ()


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _follow(computation: Computation, name: str) -> Instruction:
    """The instruction of that name, or, if it is a copy, the original."""
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast"):
        instruction = computation[instruction.operands[0]]
    return instruction


def _constant(instruction: Instruction) -> int | None:
    """The value of an integer constant, or None for anything else."""
    value = re.match(r"constant\((-?\d+)\)", instruction.attributes)
    return int(value[1]) if value else None


def _branches(instruction: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if listed:
        return re.findall(r"%([\w.\-]+)", listed[1])
    names = [instruction.called("true_computation"), instruction.called("false_computation")]
    return [name for name in names if name]
