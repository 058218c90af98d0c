"""What a compiled program sends between devices, read off its own text.

Bytes are those of the arrays that each device gets from a collective operation. What goes over a
wire is up to the algorithm: in an all-reduce by a ring each of n devices sends 2 (n - 1) / n times
as much.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping

import numpy as np

OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(OPERATIONS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch|called)_computations=\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One kind of collective operation in a program.

    per_iteration: inside a loop whose number of iterations is decided at run time: what one
      iteration sends.
    """

    operation: str
    axes: tuple[str, ...]  # of the mesh, along which devices exchange
    per_iteration: bool
    count: float  # per step, or per iteration
    num_bytes: float  # per device, of all `count` together


def read(text: str, mesh: Mapping[str, int], *, num_steps: int = 1) -> list[Transfer]:
    """The transfers of a compiled program, by operation and axes.

    Args:
      text: of the program, `lowered.compile().as_text()`.
      mesh: {axis: devices along it}, in the order of the mesh; for `jax.pmap` its one axis.
      num_steps: of the scan in the program. Loops with a known number of iterations count that many
        times, so the scan's body is counted once per step.
    """
    computations, entry = _computations(text)
    found: Counter = Counter()
    sizes: Counter = Counter()

    def visit(name: str, times: float, per_iteration: bool) -> None:
        for line in computations.get(name, ()):
            if match := _COLLECTIVE.search(line):
                if axes := _axes(line, mesh):  # a group of one device sends nothing
                    key = (match[2], axes, per_iteration)
                    found[key] += times
                    sizes[key] += times * _num_bytes(match[1], match[2], started=bool(match[3]))
                continue
            called = [
                n
                for single, several in _CALLED.findall(line)
                for n in (single, *re.findall(r"[\w.\-]+", several))
                if n
            ]
            trips = _TRIPS.search(line) if " while(" in line else None
            for inner in called:
                if " while(" in line and trips is None:
                    visit(inner, 1.0, True)
                else:
                    visit(inner, times * int(trips[1]) if trips else times, per_iteration)

    visit(entry, 1 / num_steps, False)
    order = sorted(found, key=lambda key: (key[2], key[1], key[0]))
    return [
        Transfer(operation, axes, inside, found[key], sizes[key])
        for key in order
        for operation, axes, inside in [key]
    ]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, and the name of the one that runs."""
    lines: dict[str, list[str]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = header[2]
            lines[current] = []
            entry = current if header[1] else entry
        elif current:
            lines[current].append(line)
    return lines, entry


def _num_bytes(shape: str, operation: str, *, started: bool) -> int:
    """Of the arrays in the type of an instruction's result.

    The asynchronous ones name their operands first.
    """
    sizes = [
        max(1, (8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])) // 8)
        * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in _ARRAY.findall(re.sub(r"/\*.*?\*/|\{[^{}]*\}", "", shape))
    ]
    if started and operation != "all-reduce":
        sizes = sizes[1:2] if operation == "collective-permute" else sizes[len(sizes) // 2 :]
    return sum(sizes)


def _axes(line: str, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the devices of one group differ; none given means all devices."""
    shape = tuple(mesh.values())
    group = list(range(math.prod(shape)))
    if listed := _LISTED.search(line):
        groups = [
            [int(n) for n in one.split(",") if n] for one in re.findall(r"\{([\d,]*)\}", listed[1])
        ]
        group = max(groups, key=len, default=group)
    elif iota := _IOTA.search(line):
        dims, ids, order = (
            [int(n) for n in part.split(",")] if part else None for part in iota.groups()
        )
        assert dims is not None and ids is not None
        group = np.arange(math.prod(ids)).reshape(ids).transpose(order).reshape(dims)[0].tolist()
    places = np.array(np.unravel_index(group, shape))
    return tuple(
        axis for axis, along in zip(mesh, places, strict=True) if len(set(along.tolist())) > 1
    )
