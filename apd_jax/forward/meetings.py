"""Where the sites of a network first meet activations: found in its jaxpr, without any array."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from apd_jax.components.layout import Layout
from apd_jax.errors import InputError
from apd_jax.forward import positions
from apd_jax.forward.harvest import Watch
from apd_jax.forward.links import shape_of
from apd_jax.forward.positions import Scope
from apd_jax.forward.primitives import called, ints
from apd_jax.forward.views import View, view_of, whole


@dataclasses.dataclass(frozen=True)
class Sites:
    """shapes: of all leaves of params, in order. layouts: of the sites."""

    shapes: Mapping[str, tuple[int, ...]]
    layouts: Mapping[str, Layout]

    def num_matrices(self, site: str) -> int:
        return math.prod(self.shapes[site][axis] for axis in self.layouts[site].batch)


@dataclasses.dataclass(frozen=True)
class Meeting:
    """A product, convolution or lookup of some matrices of a site.

    kind: product, patches (a convolution is a product with those) or lookup.
    side: the side of the matrix that is read, i or o.
    var: the activations. Their axes are named without those that scans add in front of them; those
      of patches are (batch, *spatial, features).
    matrices: which of the site's matrices meet them, flattened over `taken` and `batch`.
    columns: the number, on the side that is read, of every entry along `contract` (of every index).
    free: the other axes. examples, carrying: which of them carry the examples and the positions.
    """

    key: int
    site: str
    kind: str
    side: str
    var: Any
    num_scans: int
    matrices: np.ndarray
    columns: np.ndarray
    batch: tuple[int, ...]
    free: tuple[int, ...]
    contract: tuple[int, ...]
    examples: frozenset[int] = frozenset()
    carrying: frozenset[int] = frozenset()
    window: tuple[int, ...] = ()  # of a convolution, by axis of its kernel
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Found:
    """The first uses of every site, and where the activations stand."""

    watch: Watch = dataclasses.field(default_factory=Watch)
    uses: dict[str, list[Meeting]] = dataclasses.field(default_factory=dict)

    def covered(self, site: str) -> set[int]:
        return {int(m) for use in self.uses.get(site, ()) for m in use.matrices}


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a walk is: its scopes for examples and positions, and the scans around it."""

    examples: Scope
    positions: Scope | None
    num_scans: int = 0
    shared: bool = False  # in a branch, or in a loop of unknown length

    def inner(self, i: int, k: int, **changes: Any) -> _Place:
        at = None if self.positions is None else self.positions.inner[i][k]
        return dataclasses.replace(
            self, examples=self.examples.inner[i][k], positions=at, **changes
        )


def find(jaxpr: Jaxpr, sites: Sites, inputs: Sequence[Any], num_positions: int | None) -> Found:
    """The first use of every matrix of every site in apply_fn's jaxpr, traced with one example.

    Raises:
      InputError: a site that has none, or whose first use cannot be handed out.
    """
    num_params = len(sites.shapes)
    nothing: list[tuple[int, ...]] = [()] * num_params
    examples = positions.track(jaxpr, nothing + [(0,) for _ in inputs])
    carrying = None
    if num_positions is not None:
        starts = nothing + positions.of_inputs(inputs, num_positions)
        carrying = positions.track(jaxpr, starts)
    views = {
        var: whole(name, shape, sites.layouts[name])
        for var, (name, shape) in zip(jaxpr.invars, sites.shapes.items(), strict=False)
        if name in sites.layouts
    }
    found = Found()
    _walk(jaxpr, views, _Place(examples, carrying), found, found.watch)
    for name in sites.layouts:
        if missing := sites.num_matrices(name) - len(found.covered(name)):
            some = f"{missing} matrices of " if found.uses.get(name) else ""
            raise InputError(
                f"what {some}params leaf {name!r} reads cannot be told: the weight itself meets no "
                "activations in a product, convolution or lookup (it is changed before, or picked "
                "by a computed index); leave it out of select."
            )
    return found


def order_of(uses: Sequence[Meeting]) -> np.ndarray:
    """Where, among the matrices of all uses, matrix 0, 1, ... first is."""
    return np.unique(np.concatenate([use.matrices for use in uses]), return_index=True)[1]


def _walk(jaxpr: Jaxpr, views: dict[Any, View], place: _Place, found: Found, watch: Watch) -> None:
    for i, eqn in enumerate(jaxpr.eqns):
        known = [None if isinstance(v, Literal) else views.get(v) for v in eqn.invars]
        if not any(known):
            continue
        name, function = eqn.primitive.name, called(eqn)
        if name in _MEETINGS:
            _record(_MEETINGS[name](eqn, known, place), place, found, watch)
        elif name in ("scan", "while", "cond"):
            _loop(eqn, known, i, place, found, watch)
        elif function is not None:
            within = _enter(function[0], known, i, 0, place.inner(i, 0), found, watch)
            for outer, v in zip(eqn.outvars, function[0].outvars, strict=True):
                if not isinstance(v, Literal) and v in within:
                    views[outer] = within[v]
        else:
            views |= zip(eqn.outvars, view_of(eqn, known) or (), strict=False)


def _enter(
    jaxpr: Jaxpr,
    known: Sequence[View | None],
    i: int,
    k: int,
    place: _Place,
    found: Found,
    watch: Watch,
) -> dict[Any, View]:
    within = {v: view for v, view in zip(jaxpr.invars, known, strict=True) if view is not None}
    below = Watch()
    _walk(jaxpr, within, place, found, below)
    if below.here or below.inner:
        watch.inner[i] = below
    return within


def _loop(
    eqn: JaxprEqn,
    known: Sequence[View | None],
    i: int,
    place: _Place,
    found: Found,
    watch: Watch,
) -> None:
    p = eqn.params
    if eqn.primitive.name == "scan":
        first = p["num_consts"] + p["num_carry"]
        sliced = [view and view.scanned() for view in known[first:]]
        inside = place.inner(i, 0, num_scans=place.num_scans + 1)
        _enter(p["jaxpr"].jaxpr, [*known[:first], *sliced], i, 0, inside, found, watch)
        return
    if eqn.primitive.name == "while":
        n, m = p["cond_nconsts"], p["body_nconsts"]
        functions = [(p["cond_jaxpr"], [*known[:n], *known[n + m :]]), (p["body_jaxpr"], known[n:])]
    else:
        functions = [(branch, known[1:]) for branch in p["branches"]]
    for k, (closed, own) in enumerate(functions):
        _enter(closed.jaxpr, own, i, k, place.inner(i, k, shared=True), found, watch)


def _record(meeting: Meeting | None, place: _Place, found: Found, watch: Watch) -> None:
    if meeting is None or not set(meeting.matrices.tolist()) - found.covered(meeting.site):
        return
    if place.shared or meeting.num_scans != place.num_scans:
        raise InputError(
            f"params leaf {meeting.site!r} is first used in a branch, or in a loop all steps of "
            "which share it, so what it reads is no single array; leave it out of select, or "
            "choose a gate that does not read inputs."
        )
    uses = found.uses.setdefault(meeting.site, [])
    key = sum(map(len, found.uses.values()))
    uses.append(dataclasses.replace(meeting, key=key))
    watch.here[key] = meeting.var


# The three kinds


def _dot(eqn: JaxprEqn, known: Sequence[View | None], place: _Place) -> Meeting | None:
    """All of one side is contracted with the activations, and matrices are batch axes."""
    k = 0 if known[0] is not None else 1
    view, x = known[k], eqn.invars[1 - k]
    if view is None or known[1 - k] is not None:
        return None
    contracting, batching = (
        [ints(axes) for axes in pair] for pair in eqn.params["dimension_numbers"]
    )
    side = _side_read(view, contracting[k], batching[k])
    if side is None:
        return None
    contract, batch, ndim = contracting[1 - k], batching[1 - k], len(shape_of(x))
    return _meeting(
        view,
        side,
        place,
        kind="product",
        var=x,
        along=contracting[k],
        stacked=batching[k],
        batch=batch,
        contract=contract,
        free=tuple(i for i in range(ndim) if i not in (*contract, *batch)),
        of=(x, range(ndim)),
    )


def _conv(eqn: JaxprEqn, known: Sequence[View | None], place: _Place) -> Meeting | None:
    view, p = known[1], eqn.params
    if view is None or known[0] is not None:
        return None
    numbers = p["dimension_numbers"]
    _, in_axis, *window = ints(numbers.rhs_spec)
    batch_axis, _, *spatial = ints(numbers.out_spec)
    side = _side_read(view, (in_axis, *window), ())
    if side is None or p["feature_group_count"] != 1 or p["batch_group_count"] != 1:
        return None
    return _meeting(
        view,
        side,
        place,
        kind="patches",
        var=eqn.invars[0],
        along=(in_axis, *window),
        stacked=(),
        batch=(),
        contract=(1 + len(spatial),),
        free=tuple(range(1 + len(spatial))),
        of=(eqn.outvars[0], (batch_axis, *spatial)),
        window=tuple(view.shape[axis] for axis in window),
        params=p,
    )


def _gather(eqn: JaxprEqn, known: Sequence[View | None], place: _Place) -> Meeting | None:
    view, numbers = known[0], eqn.params["dimension_numbers"]
    if view is None or len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    (axis,) = ints(numbers.start_index_map)
    others = [i for i in range(len(view.axes)) if i != axis]
    side = _side_read(view, (axis,), ())
    if (
        side is None
        or ints(numbers.collapsed_slice_dims) != (axis,)
        or [eqn.params["slice_sizes"][i] for i in others] != [view.shape[i] for i in others]
    ):
        return None
    indices = eqn.invars[1]
    free = tuple(range(len(shape_of(indices)) - 1))
    return _meeting(
        view,
        side,
        place,
        kind="lookup",
        var=indices,
        along=(axis,),
        stacked=(),
        batch=(),
        contract=(),
        free=free,
        of=(indices, free),
    )


_MEETINGS = {"dot_general": _dot, "conv_general_dilated": _conv, "gather": _gather}


def _side_read(view: View, along: Sequence[int], stacked: Sequence[int]) -> str | None:
    """The side that these axes are all of, where the stacked ones are all that count matrices."""
    sides = {view.axes[i].side for i in along} - {""}
    if len(sides) != 1 or sides & {"b"} or sorted(stacked) != view.of_side("b"):
        return None
    side = sides.pop()
    return side if set(view.of_side(side)) <= set(along) else None


def _meeting(
    view: View,
    side: str,
    place: _Place,
    *,
    along: Sequence[int],
    stacked: Sequence[int],
    of: tuple[Any, Sequence[int]],
    free: Sequence[int],
    **fields: Any,
) -> Meeting | None:
    """of: a variable, and which of its axes are those that the activations begin with."""
    columns = view.numbers(side, along)
    if not np.array_equal(np.sort(columns), np.arange(len(columns))):
        return None
    var, axes = of
    at = [
        frozenset() if scope is None else scope.axes(var)
        for scope in (place.examples, place.positions)
    ]
    examples, carrying = (frozenset(i for i in free if axes[i] in found) for found in at)
    return Meeting(
        key=-1,
        site=view.site,
        side=side,
        num_scans=len(view.taken),
        matrices=view.numbers("b", stacked),
        columns=columns,
        free=tuple(free),
        examples=examples,
        carrying=carrying,
        **fields,
    )
