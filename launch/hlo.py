"""Memory traffic and collectives of a compiled program, read from its text, with loops counted in all iterations.

XLA's own cost analysis counts a loop's body once. Here each body counts as often as its condition says; a loop of
unknown length (decoding) counts one iteration.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

SCATTERED = "all-reduce-scatter"  # what TPU's compiler calls a fused all-reduce of which each chip keeps a part
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "while")
FREE += ("conditional", "call", "copy-done", "async-done", "slice-done", "opt-barrier", "custom-call")
CUTS = ("dynamic-slice", "slice", "gather")
KERNELS = ("tpu_custom_call",)  # custom calls that read and write their operands
SIZES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
LINE = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")


@dataclass
class Instruction:
    """A line of a program in HLO: `name` = `shape` `kind`(`operands`), `rest`."""

    name: str
    shape: str
    kind: str
    operands: list[str]
    rest: str
    root: bool = False


@dataclass
class Traffic:
    """The traffic of one chip."""

    bytes: float = 0.0  # to and from its memory
    collectives: dict[str, dict[str, float]] = field(default_factory=dict)  # kind -> count, bytes sent
    between: dict[str, dict[str, float]] = field(default_factory=dict)  # the same, to other slices

    def times(self, calls: int) -> "Traffic":
        """That of so many calls."""
        several = (
            {kind: {n: calls * x for n, x in of.items()} for kind, of in x.items()}
            for x in (self.collectives, self.between)
        )
        return Traffic(calls * self.bytes, *several)


def size(shape: str) -> float:
    """Bytes of the arrays in a shape that lie in the chip's large memory, and not in the fast one beside the cores."""
    total = 0.0
    for dtype, dims, layout in ARRAY.findall(shape):
        if "S(" not in layout:
            width = SIZES.get(dtype) or int(re.sub(r"\D", "", dtype)[:2] or 8) / 8
            total += width * math.prod(int(d) for d in dims.split(",") if d)
    return total


def whole_size(shape: str) -> float:
    """Bytes of the arrays in a shape, wherever they lie."""
    return size(re.sub(r"S\(\d+\)", "", shape))


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Computations by name, and the name of the one that the program begins with."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.endswith("{") and (begin := re.match(r"^(ENTRY )?%(\S+) \(", line)):
            current = computations.setdefault(begin[2], [])
            entry = begin[2] if begin[1] else entry
        elif current is not None and (result := LINE.match(line)):
            name, shape, kind, rest = result.groups()
            operands = re.findall(r"%([^\s,)]+)", rest.split("), ")[0])
            current.append(Instruction(name, shape, kind, operands, rest, "ROOT" in line[:12]))
    return computations, entry


def read(text: str, one_round: bool = False, slices: int = 1) -> Traffic:
    """The traffic of one run of a compiled program, or with `one_round` of one round of its loop without known end; the
    program is that of one of `slices` slices."""
    computations, entry = parse(text)
    if one_round:
        loops = [
            i for i in computations[entry] if i.kind == "while" and _trips(computations[_called(i)["condition"]]) == 1
        ]
        entry = _called(loops[0])["body"]
    traffic, channels = Traffic(), {}
    for name, times in _rounds(computations, entry).items():
        shapes = {i.name: i.shape for i in computations[name]}
        for instruction in computations[name]:
            traffic.bytes += times * _moved(instruction, shapes, computations)
        for inner in _with_fusions(name, computations):
            for instruction in computations[inner]:
                kind = instruction.kind.removesuffix("-start")
                if kind in COLLECTIVES:
                    sent = _sent(kind, instruction)
                    if inner.startswith(SCATTERED):
                        kind, sent = "reduce-scatter", sent / 2
                    # An asynchronous collective is written in several instructions, under one channel.
                    channel = re.search(r"channel_id=(\d+)", instruction.rest)
                    key = channel[1] if channel else instruction.name
                    if times > channels.get(key, (0,))[0]:
                        channels[key] = times, kind, sent
    traffic.collectives = _by_kind(channels.values())
    traffic.between = _by_kind(_between(computations, entry, slices))
    return traffic


def total(kinds: dict[str, dict[str, float]]) -> float:
    """Bytes of all kinds."""
    return sum(kind["bytes"] for kind in kinds.values())


def _by_kind(found: Iterable[tuple[int, str, float]]) -> dict[str, dict[str, float]]:
    """(times, kind, bytes) added up by kind."""
    result: dict[str, dict[str, float]] = defaultdict(lambda: {"count": 0, "bytes": 0.0})
    for times, kind, sent in found:
        result[kind]["count"] += times
        result[kind]["bytes"] += times * sent
    return dict(result)


def _between(computations: dict[str, list[Instruction]], entry: str, slices: int) -> Iterator[tuple[int, str, float]]:
    """(times, kind, bytes) of what goes to other slices: sends to the hosts, whose runtime carries them on. A sum over
    slices sends as a ring does."""
    for name, times in _rounds(computations, entry).items():
        for instruction in computations[name]:
            kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
            if instruction.kind == "send" and kind:
                size_of_first = whole_size(ARRAY.search(instruction.shape)[0])
                sent = 2 * (slices - 1) / slices * size_of_first if kind[1] == "ALL_REDUCE" else size_of_first
                yield times, kind[1].lower().replace("_", "-"), sent


def _rounds(computations: dict[str, list[Instruction]], entry: str) -> dict[str, int]:
    """How often each computation that is not part of another instruction runs."""
    times: dict[str, int] = defaultdict(int)
    todo = [(entry, 1)]
    while todo:
        name, count = todo.pop()
        times[name] += count
        for instruction in computations[name]:
            inner = _called(instruction)
            if instruction.kind == "while":
                todo.append((inner["body"], count * _trips(computations[inner["condition"]])))
            elif instruction.kind in ("call", "async-start") and (
                called := inner.get("to_apply") or inner.get("calls")
            ):
                todo.append((called, count))
            elif instruction.kind == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
                names = (
                    branches[1]
                    if branches
                    else " ".join(re.findall(r"(?:true|false)_computation=(%[^\s,)]+)", instruction.rest))
                )
                todo += [(branch, count) for branch in re.findall(r"%([^\s,]+)", names)]
    return times


def _called(instruction: Instruction) -> dict[str, str]:
    """The computations that an instruction refers to, by role."""
    return dict(re.findall(r"(condition|body|to_apply|calls)=%([^\s,)}]+)", instruction.rest))


def _trips(condition: list[Instruction]) -> int:
    """Iterations of a loop that counts from 0 up to a constant; 1 for any other."""
    root = next(i for i in condition if i.root)
    limits = [int(m[1]) for i in condition if i.kind == "constant" and (m := re.match(r"(\d+)\)", i.rest))]
    counts = (root.kind == "compare" and "direction=LT" in root.rest) or root.kind == "fusion"
    return limits[0] if counts and len(limits) == 1 else 1


def _with_fusions(name: str, computations: dict[str, list[Instruction]]) -> list[str]:
    """A computation and those that are fused into its instructions."""
    results = [name]
    for instruction in computations[name]:
        if instruction.kind == "fusion":
            results += _with_fusions(_called(instruction)["calls"], computations)
    return results


def _sent(kind: str, instruction: Instruction) -> float:
    """Bytes that each chip sends, by the usual ring algorithms."""
    arrays = ARRAY.findall(instruction.shape)
    result = whole_size(instruction.shape)
    if instruction.kind.endswith("-start") and len(arrays) > 1:  # (operands, results, ...)
        result = max(whole_size(f"{dtype}[{dims}]") for dtype, dims, _ in arrays)
    n = _group(instruction.rest)
    share = (n - 1) / n
    return {
        "all-gather": result * share,
        "all-reduce": 2 * result * share,
        "reduce-scatter": result * (n - 1),
        "all-to-all": result * share,
        "collective-permute": result,
    }[kind]


def _group(rest: str) -> int:
    """The number of chips in a collective's group."""
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes[2])) or 1
    if groups := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(groups[2])
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return groups[1].count(",") + 1
    return 2


def _moved(instruction: Instruction, shapes: dict[str, str], computations: dict[str, list[Instruction]]) -> float:
    """Bytes that an instruction reads and writes; for slices only the part that is read or written."""
    kind, given = instruction.kind, [shapes.get(name, "") for name in instruction.operands]
    if kind in FREE or kind.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
        kernel = kind == "custom-call" and any(name in instruction.rest for name in KERNELS)
        return size(instruction.shape) + sum(map(size, given)) if kernel else 0.0
    if kind in (*CUTS, "slice-start"):
        arrays = [m[0] for m in ARRAY.finditer(instruction.shape)]
        cut = arrays[1 if kind == "slice-start" else 0]  # (operand, result, ...)
        return size(cut) + (whole_size(cut) if size(given[0]) else 0.0)
    if kind == "dynamic-update-slice":
        return 2 * size(given[1])
    if kind == "copy-start":
        return size(given[0])
    if kind == "fusion":
        return _moved_by_fusion(instruction, given, computations)
    return size(instruction.shape) + sum(map(size, given))


def _moved_by_fusion(instruction: Instruction, given: list[str], computations: dict[str, list[Instruction]]) -> float:
    body = computations[_called(instruction)["calls"]]
    total = 0.0
    for number, shape in enumerate(given):
        total += min(size(shape), _read_of(number, body, computations)) if size(shape) else 0.0
    by_name = {i.name: i for i in body}
    root = next(i for i in body if i.root)
    parts = [by_name[name] for name in root.operands if name in by_name] if root.kind == "tuple" else [root]
    for part in parts:
        changed = part.kind == "dynamic-update-slice" and by_name.get(part.operands[1])
        written = size(part.shape)
        total += min(written, whole_size(changed.shape)) if changed else written
    return total


def _read_of(number: int, body: list[Instruction], computations: dict[str, list[Instruction]]) -> float:
    """Bytes that a fused computation reads of its operand `number`: of one that is only cut, the pieces."""
    names = {i.name for i in body if i.kind == "parameter" and i.rest.startswith(f"{number})")}
    total = 0.0
    for instruction in body:  # in order: what a name stands for comes before its uses
        places = [place for place, name in enumerate(instruction.operands) if name in names]
        if not places:
            continue
        if instruction.kind == "bitcast":
            names.add(instruction.name)
        elif instruction.kind in CUTS and places == [0]:
            total += whole_size(instruction.shape)
        elif instruction.kind == "fusion":
            inner = computations[_called(instruction)["calls"]]
            if all(i.kind in ("parameter", "bitcast") for i in inner):
                names.add(instruction.name)
                continue
            total += sum(_read_of(place, inner, computations) for place in places)
        elif not (instruction.kind == "dynamic-update-slice" and places == [0]):
            return math.inf
    return total
