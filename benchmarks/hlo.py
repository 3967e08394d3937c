"""What an optimised program consists of, read off the text of its HLO.

The counts of XLA itself (`cost_analysis`) are missing for GPUs, and do not say how many kernels a
program launches, nor what is inside its conditionals. Here a conditional counts as the mean of its
branches, and a loop as often as it runs, if the compiler knows that.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

WIDTHS = {"pred": 1, "bf16": 2, "token": 0}  # Others say how many bits they have.
ARRAY = re.compile(r"\b(pred|bf16|[subfc]\d+|f8\w+)\[([\d,]*)\]")
NAME = re.compile(r"%([\w.-]+)")
HEAD = re.compile(r"^(ENTRY )?%([\w.-]+) \(.*\{$")
COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
# What launches no kernel, and moves nothing.
FREE = ("parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id "
        "opt-barrier").split()  # fmt: skip


class Instruction(NamedTuple):
    """One line, such as `%y = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}`."""

    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        return [] if self.opcode == "constant" else NAME.findall(self.arguments)

    def dimensions(self, key: str) -> list[int]:
        """The attribute of that name, as in `key={0,1}`."""
        found = re.search(key + r"=\{([\d,]*)\}", self.attributes)
        return _integers(found[1]) if found else []

    def called(self, *keys: str) -> list[str]:
        """The computations that an attribute names."""
        found: list[str] = []
        for key in keys:
            match = re.search(key + r"=(\{[^}]*\}|%[\w.-]+)", self.attributes)
            found += NAME.findall(match[1]) if match else []
        return found

    @property
    def config(self) -> dict[str, Any]:
        """What the compiler's back end has chosen."""
        start = self.attributes.find("backend_config={")
        if start < 0:
            return {}
        start += len("backend_config=")
        return json.JSONDecoder().raw_decode(self.attributes[start:])[0]


Computation = dict[str, Instruction]


class Program(NamedTuple):
    entry: str
    computations: dict[str, Computation]


class Kernel(NamedTuple):
    """Something that is launched: a fusion, a call of a library, a copy, a collective.

    Attributes:
      opcode: of the instruction; "custom-call" for a library.
      flops: of products and convolutions; elementwise operations do not count.
      bytes: read and written.
      sent: bytes of the operands of a collective.
      runs: how often it runs on average.
      is_conditional: whether it belongs to a branch of a conditional.
    """

    opcode: str
    flops: float
    bytes: float
    sent: float
    runs: float
    is_conditional: bool


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if head := HEAD.match(line):
                current = computations[head[2]] = {}
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif " = " in line:
            instruction = _instruction(re.sub(r"/\*.*?\*/", "", line.strip()))
            current[instruction.name] = instruction
    return Program(entry, computations)


def kernels(program: Program) -> list[Kernel]:
    """All kernels of a program, on one device."""
    return list(_kernels(program, program.entry, 1.0, False))


def count(program: Program, opcode: str) -> int:
    """How many instructions of a kind there are, anywhere."""
    return sum(x.opcode == opcode for c in program.computations.values() for x in c.values())


def nbytes(type_: str) -> int:
    """Bytes of an array or a tuple of arrays."""
    return sum(_width(dtype) * math.prod(shape) for dtype, shape in shapes(type_))


def shapes(type_: str) -> list[tuple[str, list[int]]]:
    """dtypes and shapes of an array or a tuple of arrays."""
    return [(dtype, _integers(sizes)) for dtype, sizes in ARRAY.findall(type_)]


def _width(dtype: str) -> int:
    if dtype.startswith("f8"):
        return 1
    bits = re.search(r"\d+", dtype)
    return WIDTHS[dtype] if dtype in WIDTHS else max(1, int(bits[0]) // 8 if bits else 0)


def _integers(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def _instruction(line: str) -> Instruction:
    left, _, rest = line.partition(" = ")
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest[len(opcode) :])
    arguments, attributes = rest[len(opcode) + 1 :][: end - 2], rest[len(opcode) + end :]
    is_root = left.startswith("ROOT ")
    return Instruction(left.split("%")[-1], type_, opcode, arguments, attributes, is_root)


def _closing(text: str) -> int:
    """The length of the text up to the bracket that closes its first one."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return i + 1
    raise ValueError(f"no bracket closes the first one of {text[:80]!r}")


def _kernels(program: Program, name: str, runs: float, is_conditional: bool) -> Iterator[Kernel]:
    computation = program.computations[name]
    for x in computation.values():
        if x.opcode in FREE or x.opcode.endswith("-done"):
            continue
        if x.opcode == "conditional":
            keys = "branch_computations", "true_computation", "false_computation"
            branches = x.called(*keys)
            for branch in branches:
                yield from _kernels(program, branch, runs / len(branches), True)
        elif x.opcode == "while":
            known = x.config.get("known_trip_count", {})
            times = runs * int(known.get("n", 1))
            yield from _kernels(program, x.called("body")[0], times, is_conditional)
        elif x.opcode in ("call", "async-start"):
            for called in x.called("to_apply", "calls"):
                yield from _kernels(program, called, runs, is_conditional)
        else:
            operands = [computation[n].type for n in x.operands if n in computation]
            moved = _fusion_bytes(program, x) if x.opcode == "fusion" else None
            if moved is None:
                moved = sum(map(nbytes, operands)) + nbytes(x.type)
            is_sent = x.opcode.removesuffix("-start") in COLLECTIVES
            sent = sum(map(nbytes, operands)) if is_sent else 0
            flops = _flops(program, computation, x)
            yield Kernel(x.opcode, flops, moved, sent, runs, is_conditional)


def _flops(program: Program, computation: Computation, x: Instruction) -> float:
    if x.opcode == "fusion":
        inner = program.computations[x.called("calls")[0]]
        return sum(_flops(program, inner, y) for y in inner.values())
    if x.opcode not in ("dot", "convolution", "custom-call"):
        return 0
    target = re.search(r'custom_call_target="([^"]*)"', x.attributes)
    if x.opcode == "convolution" or (target and "cudnn$conv" in target[1]):
        return _convolution_flops(computation, x, target[1] if target else "")
    contracted = x.dimensions("lhs_contracting_dims")
    if target:
        if "gemm" not in target[1] and "matmul" not in target[1]:
            return 0
        config = x.config.get("gemm_backend_config", x.config)
        numbers = config.get("dot_dimension_numbers", {})
        contracted = [int(i) for i in numbers.get("lhs_contracting_dimensions", [])]
    (_, result), (_, lhs) = (shapes(t)[0] for t in (x.type, computation[x.operands[0]].type))
    return 2 * math.prod(result) * math.prod(lhs[i] for i in contracted)


def _convolution_flops(computation: Computation, x: Instruction, target: str) -> float:
    """Without padding taken off, as for a kernel that is small compared with the image."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.attributes)
    assert labels, x
    result = shapes(x.type)[0][1]
    first, second = (shapes(computation[n].type)[0][1] for n in x.operands[:2])
    # What a forward convolution of these sizes would call its kernel and its result.
    output, kernel = result, second
    if "BackwardFilter" in target:
        output, kernel = second, result
    elif "BackwardInput" in target:
        output = first
    return 2 * math.prod(output) * math.prod(kernel) / kernel[labels[2].index("o")]


def _fusion_bytes(program: Program, x: Instruction) -> float:
    """Bytes that a fusion reads and writes: of an array that is sliced, the slice."""
    inner = program.computations[x.called("calls")[0]]
    users: dict[str, list[tuple[Instruction, int]]] = {name: [] for name in inner}
    for y in inner.values():
        for i, operand in enumerate(y.operands):
            if operand in users:
                users[operand].append((y, i))

    def read(name: str, whole: int) -> int:
        total = 0
        for y, i in users[name]:
            if y.opcode in ("slice", "dynamic-slice", "gather") and i == 0:
                total += nbytes(y.type)
            elif y.opcode in ("dynamic-update-slice", "scatter") and i == 0:
                continue  # In place.
            elif y.opcode == "bitcast":
                total += read(y.name, whole)
            else:
                return whole
        return min(total, whole)

    def written(y: Instruction) -> int:
        if y.opcode == "tuple":
            return sum(written(inner[n]) for n in y.operands)
        if y.opcode == "bitcast" and inner[y.operands[0]].opcode == "dynamic-update-slice":
            return written(inner[y.operands[0]])
        if y.opcode == "dynamic-update-slice":
            return nbytes(inner[y.operands[1]].type)
        return nbytes(y.type)

    parameters = [y for y in inner.values() if y.opcode == "parameter"]
    root = next(y for y in inner.values() if y.is_root)
    return sum(read(y.name, nbytes(y.type)) for y in parameters) + written(root)
