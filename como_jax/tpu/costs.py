"""What a compiled module computes, reads, writes and sends, per device and step."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np

from como_jax.tpu.hlo import Computation, Instruction, Module, Shape

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)

_MOVES_NOTHING = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
}

_MOVES_NOTHING_EITHER = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast|AsyncCollective\w+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices in a step.

    Attributes:
      kind: name of the operation in XLA.
      bytes: what one device gives or receives in one run, whichever is more.
      group: devices that exchange, by their place in the mesh; the first group stands for all groups.
      times: how often it runs in a step.
      shapes: what one device receives.
      source: the JAX operation that it comes from.
    """

    kind: str
    bytes: float
    group: tuple[int, ...]
    times: float
    shapes: tuple[Shape, ...]
    source: str


def matmul_flops(module: Module) -> float:
    """Multiplications and additions of all matrix products and convolutions, for one device and step."""
    return sum(
        times * _flops(instruction, surroundings)
        for instruction, surroundings, times in module.operations()
        if instruction.opcode in ("convolution", "dot")
    )


def _flops(instruction: Instruction, surroundings: Computation) -> float:
    left, right = (surroundings[name].shapes[0] for name in instruction.operands[:2])
    output = instruction.shapes[0]
    if instruction.opcode == "dot":
        contracted = _numbers(instruction.attributes, "lhs_contracting_dims")
        return 2.0 * output.size * math.prod(left.dims[axis] for axis in contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    of_input, of_kernel, of_output = (
        dict(zip(names, shape.dims, strict=True))
        for names, shape in zip(labels.groups(), (left, right, output), strict=True)
    )
    products = of_kernel["i"] * of_output["b"] * of_output["f"]
    for axis, window in enumerate(_windows(instruction.attributes)):
        products *= window.products(of_input[str(axis)], of_output[str(axis)])
    return 2.0 * products


@dataclasses.dataclass(frozen=True)
class Window:
    """One spatial axis of a convolution; TPUs run batched matrix products as dilated convolutions."""

    size: int
    stride: int = 1
    pad: int = 0
    lhs_dilate: int = 1
    rhs_dilate: int = 1

    def products(self, inputs: int, outputs: int) -> int:
        """Number of pairs of an output and a kernel element that read an input, not padding or a dilation's hole."""
        place = self.stride * np.arange(outputs)[:, None] + self.rhs_dilate * np.arange(self.size) - self.pad
        inside = (place >= 0) & (place <= (inputs - 1) * self.lhs_dilate)
        return int(np.count_nonzero(inside & (place % self.lhs_dilate == 0)))


def _windows(attributes: str) -> list[Window]:
    """The windows of all spatial axes; none for a plain matrix product."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    if not found:
        return []
    fields = dict(field.split("=") for field in found[1].split())
    known = [field.name for field in dataclasses.fields(Window) if field.name in fields]
    columns = {name: fields[name].split("x") for name in known}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [Window(**{name: int(value.split("_")[0]) for name, value in row.items()}) for row in rows]


def _numbers(text: str, attribute: str) -> list[int]:
    found = re.search(rf"{attribute}=\{{([\d,]*)\}}", text)
    return [int(x) for x in found[1].split(",") if x] if found else []


def hbm_bytes(module: Module) -> float:
    """Bytes read from and written to HBM by one device in a step; what stays on the chip is free."""
    return sum(
        times * _traffic(module, instruction, computation)
        for computation, times in module.executed()
        for instruction in computation.values()
    )


def _traffic(module: Module, instruction: Instruction, surroundings: Computation) -> float:
    if instruction.opcode in _MOVES_NOTHING or instruction.opcode.endswith("-done"):
        return 0.0
    if instruction.opcode == "custom-call" and _MOVES_NOTHING_EITHER.search(instruction.attributes):
        return 0.0
    if instruction.opcode in ("fusion", "async-start") and (name := instruction.called("calls")):
        return _fusion_traffic(module.computations[name], instruction, surroundings)
    if instruction.opcode == "dynamic-slice":
        return 2 * _in_hbm(instruction.shapes)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _in_hbm(surroundings[instruction.operands[1]].shapes)
    operands = [shape for name in instruction.operands for shape in surroundings[name].shapes]
    if instruction.opcode in ("copy-start", "slice-start"):
        # The result names source and target. A slice reads only that part of the source which it gives.
        target = instruction.shapes[1 if instruction.opcode == "slice-start" else 0]
        return target.bytes * (target.in_hbm + any(shape.in_hbm for shape in operands))
    if instruction.opcode.endswith("-start"):
        return _in_hbm(instruction.shapes)
    return _in_hbm(instruction.shapes) + _in_hbm(operands)


def _fusion_traffic(fused: Computation, call: Instruction, surroundings: Computation) -> float:
    """Bytes that a fusion reads of its operands, of which it may need slices only, and bytes that it writes."""
    operands = [surroundings[name].shapes for name in call.operands]
    total, parameters = 0.0, {}
    for instruction in fused.values():
        if instruction.opcode == "parameter":
            parameters[instruction.name] = operands[int(re.search(r"\((\d+)\)", instruction.attributes)[1])]
    for name, shapes in parameters.items():
        users = [user for user in fused.values() if name in user.operands]
        total += min(_in_hbm(shapes), sum(_read(user, name, fused) for user in users)) if _in_hbm(shapes) else 0
    root = next(instruction for instruction in fused.values() if instruction.is_root)
    results = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    shapes = call.shapes if len(call.shapes) == len(results) else [result.shapes[0] for result in results]
    return total + sum(_written(result, shape, fused) for result, shape in zip(results, shapes, strict=True))


def _read(user: Instruction, name: str, fused: Computation) -> float:
    """Bytes of `name` that an operation within a fusion reads."""
    if user.opcode in ("dynamic-slice", "slice", "gather"):
        return sum(shape.bytes for shape in user.shapes)
    if user.opcode == "dynamic-update-slice" and user.operands[0] == name:
        return 0.0
    # An exchange that runs while the fusion computes only passes its buffers through.
    if user.opcode in ("tuple", "custom-call", *COLLECTIVES):
        return 0.0
    return sum(shape.bytes for shape in fused[name].shapes)


def _written(result: Instruction, shape: Shape, fused: Computation) -> float:
    if not shape.in_hbm or result.opcode in ("parameter", "custom-call", *COLLECTIVES):
        return 0.0
    if result.opcode == "dynamic-update-slice":
        return fused[result.operands[1]].shapes[0].bytes
    return shape.bytes


def _in_hbm(shapes: Iterable[Shape]) -> float:
    return sum(shape.bytes for shape in shapes if shape.in_hbm)


def collectives(module: Module) -> list[Collective]:
    """All exchanges between devices in a step."""
    found = []
    for computation, times in module.executed():
        seen = set()
        for instruction in computation.values():
            for operation, surroundings in [(instruction, computation), *module.within(instruction)]:
                kind = operation.opcode.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                # An exchange that overlaps with several fusions is written into each of them, under one channel number.
                channel = re.search(r"channel_id=(\d+)", operation.attributes)
                number = channel[1] if channel else operation.name
                if number not in seen:
                    seen.add(number)
                    found.append(_collective(kind, operation, surroundings, times))
    return found


def _collective(kind: str, operation: Instruction, surroundings: Computation, times: float) -> Collective:
    source = re.search(r'op_name="([^"]*)"', operation.attributes)
    given = [shape for name in operation.operands for shape in surroundings[name].shapes]
    # The result of an asynchronous exchange also holds its operands, and that of a permutation two counters.
    gives = operation.shapes
    if operation.opcode.endswith("-start") and kind != "all-reduce":
        gives = gives[len(given) : 2 * len(given)]
    size = max(sum(shape.bytes for shape in shapes) for shapes in (gives, given))
    return Collective(kind, size, _group(operation.attributes), times, tuple(gives), source[1] if source else "")


def _group(attributes: str) -> tuple[int, ...]:
    """The first group of devices that exchange; XLA writes groups in several ways."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return tuple(int(x) for x in listed[1].split(","))
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return int(pairs[1]), int(pairs[2])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", attributes)
    if mesh:
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        chosen = set(re.findall(r"'(\w+)'", mesh[3]))
        devices = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(axes.values()))
        places = devices.reshape(list(axes.values()))
        return tuple(places[tuple(slice(None) if name in chosen else 0 for name in axes)].ravel().tolist())
    groups = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\S+)", attributes)
    if groups:
        return tuple(_iota(groups[3])[: int(groups[2])].tolist())
    return ()


def _iota(text: str) -> np.ndarray:
    """The numbers that `[8,4]T(1,0)` stands for: counted up in that shape, which is then transposed."""
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    dims = [int(x) for x in found[1].split(",")]
    order = [int(x) for x in found[2].split(",")] if found[2] else range(len(dims))
    return np.arange(math.prod(dims)).reshape(dims).transpose(order).ravel()
