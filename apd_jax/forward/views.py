"""Views of a weight: which entries of its matrices are the axes of a transposed or sliced one.

Entry (k_0, k_1, ...) of a view is the entry of the leaf's matrices whose number among the inputs is
the sum of the offsets of its input axes at their k, and alike for outputs and matrices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn, Literal

from apd_jax.components.layout import Layout, regroup
from apd_jax.forward.primitives import ints

SIDES = {"b": "batch", "i": "ins", "o": "outs"}


@dataclasses.dataclass(frozen=True)
class Axis:
    """side: i inputs, o outputs, b matrices; "" for an axis of size 1 that belongs to none."""

    side: str
    offsets: np.ndarray


@dataclasses.dataclass(frozen=True)
class View:
    """fixed: what axes that are gone have left, by side. taken: the b axes that scans slice."""

    site: str
    axes: tuple[Axis, ...]
    fixed: Mapping[str, int] = dataclasses.field(default_factory=dict)
    taken: tuple[np.ndarray, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(axis.offsets) for axis in self.axes)

    def of_side(self, side: str) -> list[int]:
        return [i for i, axis in enumerate(self.axes) if axis.side == side]

    def numbers(self, side: str, axes: Sequence[int]) -> np.ndarray:
        """The numbers along some axes of one side, flattened in this order."""
        own = [self.axes[i].offsets for i in axes]
        return flat_sum([*(self.taken if side == "b" else ()), *own]) + self.fixed.get(side, 0)

    def replace(self, axes: Sequence[Axis], gone: Sequence[Axis] = ()) -> View:
        """With other axes; those that are `gone` had size 1."""
        fixed = dict(self.fixed)
        for axis in gone:
            fixed[axis.side] = fixed.get(axis.side, 0) + int(axis.offsets[0])
        return dataclasses.replace(self, axes=tuple(axes), fixed=fixed)

    def without(self, axes: Sequence[int]) -> View:
        left = [axis for i, axis in enumerate(self.axes) if i not in axes]
        return self.replace(left, [self.axes[i] for i in axes])

    def cut(self, axis: int, where: Any) -> View:
        axes = list(self.axes)
        axes[axis] = Axis(axes[axis].side, axes[axis].offsets[where])
        return self.replace(axes)

    def scanned(self) -> View | None:
        """What one step of a scan sees of it; None where that is not one matrix of a stack."""
        if not self.axes or self.axes[0].side != "b":
            return None
        taken = (*self.taken, self.axes[0].offsets)
        return dataclasses.replace(self, axes=self.axes[1:], taken=taken)


def whole(site: str, shape: Sequence[int], layout: Layout) -> View:
    """The leaf itself."""
    axes: dict[int, Axis] = {}
    for side, group in SIDES.items():
        step = 1
        for axis in reversed(getattr(layout, group)):
            axes[axis] = Axis(side, step * np.arange(shape[axis]))
            step *= shape[axis]
    return View(site, tuple(axes[i] for i in range(len(shape))))


def flat_sum(offsets: Sequence[np.ndarray]) -> np.ndarray:
    """All sums of one entry of each, the last running fastest."""
    total = np.zeros(1, int)
    for own in offsets:
        total = (total[:, None] + own[None]).reshape(-1)
    return total


def view_of(eqn: JaxprEqn, known: Sequence[View | None]) -> list[View] | None:
    """What an operation makes of the views among its operands; None where that is no view."""
    name, p = eqn.primitive.name, eqn.params
    if name in ("mul", "div"):  # by a number
        operands = list(zip(known, reversed(eqn.invars), strict=True))[: 2 if name == "mul" else 1]
        return [view for view, x in operands if view and not _shape(x)] or None
    if known[0] is None or name not in _VIEWS:
        return None
    found = _VIEWS[name](eqn, known[0], p)
    return [found] if isinstance(found, View) else found


def _shape(var: Any) -> tuple[int, ...]:
    return getattr(var.aval, "shape", ())


def _same(eqn: JaxprEqn, view: View, p: Mapping[str, Any]) -> View:
    return view


def _transpose(eqn: JaxprEqn, view: View, p: Mapping[str, Any]) -> View:
    return view.replace([view.axes[i] for i in p["permutation"]])


def _slice(eqn: JaxprEqn, view: View, p: Mapping[str, Any]) -> View:
    strides = p["strides"] or [1] * len(view.axes)
    for i, (start, stop, step) in enumerate(
        zip(p["start_indices"], p["limit_indices"], strides, strict=True)
    ):
        view = view.cut(i, slice(start, stop, step))
    return view


def _dynamic_slice(eqn: JaxprEqn, view: View, p: Mapping[str, Any]) -> View | None:
    """Where every start is a number, or everything is taken."""
    for i, (start, size) in enumerate(zip(eqn.invars[1:], p["slice_sizes"], strict=False)):
        if size == view.shape[i]:
            continue
        if not isinstance(start, Literal):
            return None
        first = min(max(int(start.val), 0), view.shape[i] - size)
        view = view.cut(i, slice(first, first + size))
    return view


def _split(eqn: JaxprEqn, view: View, p: Mapping[str, Any]) -> list[View]:
    stops = np.cumsum(p["sizes"]).tolist()
    starts = [0, *stops[:-1]]
    return [view.cut(int(p["axis"]), slice(a, b)) for a, b in zip(starts, stops, strict=True)]


def _unstack(eqn: JaxprEqn, view: View, p: Mapping[str, Any]) -> list[View]:
    axis = int(p["axis"])
    parts = [view.cut(axis, slice(k, k + 1)) for k in range(view.shape[axis])]
    return [part.without([axis]) for part in parts]


def _rev(eqn: JaxprEqn, view: View, p: Mapping[str, Any]) -> View:
    for axis in ints(p["dimensions"]):
        view = view.cut(axis, slice(None, None, -1))
    return view


def _broadcast(eqn: JaxprEqn, view: View, p: Mapping[str, Any]) -> View | None:
    """Where it only adds axes of size 1."""
    places, sizes = ints(p["broadcast_dimensions"]), p["shape"]
    new = [i for i in range(len(sizes)) if i not in places]
    if any(sizes[i] != 1 for i in new) or [sizes[i] for i in places] != list(view.shape):
        return None
    own = dict(zip(places, view.axes, strict=True))
    return view.replace([own.get(i, _NONE) for i in range(len(sizes))])


def _reshape(eqn: JaxprEqn, view: View, p: Mapping[str, Any]) -> View | None:
    """Where it splits and merges axes of one side only."""
    groups = regroup(view.shape, tuple(p["new_sizes"]))
    axes: list[Axis] = []
    gone: list[Axis] = []
    for old, new in groups or ():
        mine = [view.axes[i] for i in old if view.axes[i].side]
        large = [axis for axis in mine if len(axis.offsets) > 1]
        if large or not new:
            gone += [axis for axis in mine if len(axis.offsets) == 1]
            mine = large
        if not new:
            continue
        parts = _split_offsets(mine, [p["new_sizes"][i] for i in new])
        if parts is None:
            return None
        axes += parts
    return None if groups is None else view.replace(axes, gone)


def _split_offsets(old: Sequence[Axis], sizes: Sequence[int]) -> list[Axis] | None:
    """Axes of these sizes with the same numbers as the old ones; None where there are none."""
    if not old:
        return [_NONE for _ in sizes]
    if len({axis.side for axis in old}) > 1:
        return None
    numbers = flat_sum([axis.offsets for axis in old]).reshape(sizes)
    first = numbers[(0,) * len(sizes)]
    along = [
        numbers[tuple(slice(None) if i == j else 0 for j in range(len(sizes)))] - first
        for i in range(len(sizes))
    ]
    along[0] = along[0] + first
    if not np.array_equal(flat_sum(along), numbers.reshape(-1)):
        return None
    return [Axis(old[0].side, own) for own in along]


_NONE = Axis("", np.zeros(1, int))
_VIEWS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        ("convert_element_type", "copy", "copy_p", "neg", "reduce_precision", "stop_gradient"),
        _same,
    ),
    "sharding_constraint": _same,
    "transpose": _transpose,
    "squeeze": lambda eqn, view, p: view.without(ints(p["dimensions"])),
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "unstack": _unstack,
    "rev": _rev,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
}
