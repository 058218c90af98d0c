r"""Which component drives which: edges between components, on one prompt and over data.

A component c has at a site and a position the inner activation

  a_c = a·U_c               of what the site reads there, of a rank-one piece. Of several pieces, of
                            higher rank, or of several rows: the length of all these together

and c' drives it by

  edge(c' → c) = (∂a_c / ∂a_c')_direct · a_c' · g_c'                                      (VPD)

with g_c' the causal importance of the source, and the derivative with everything else held: what
any other component hands on counts as a constant, so that it is the effect by ways which meet no
decomposed matrix on the way from c' to c. Of edges in a row the products are the indirect effects.
Since c' hands on w a_c' V_c' (w = 1), (∂a_c/∂a_c') a_c' = ∂a_c/∂w, and one backward pass of
`forward.direct` gives the edges from all sources to one target. Edges of a target whose activation
is no length change their sign with that of U_c.

At a site l and a position the nodes hand on Σ_c' g_c' a_c' V_c', and the target a θ*. What is left
over, of Δ = θ* - Σ P and of components that are no nodes, has the direct effect

  rest(l → c) = ∂a_c/∂β_l - Σ_c' edge(c' → c)      κ_l = β_l θ*_l + Σ w P, over the nodes c' there

Over data, t and t' positions that count, with A_c² the mean of a_c² over these:

  edge(c' → c) = Σ_x Σ_tt' (∂a_c(t) / ∂w_c'(t')) g_c'(t') / (Σ_xt' g_c'(t') · A_c)

that is, how much of c's usual size one firing of c' adds, summed over where it arrives.

Shapes: T positions, C components, L sites, K columns: every component at every site that holds it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import wadler_lindig as wl
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from apd_jax.components import Components, Factors
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError
from apd_jax.forward import capture, direct
from apd_jax.forward.sparse import SiteWeights
from apd_jax.network.outputs import outputs

_TOGETHER = 16  # backward passes at once
_ROUNDING = 1e-5  # of what is subtracted from each other
_LEAST = 1e-12  # below the root of a length: a finite gradient at 0


@dataclasses.dataclass(frozen=True)
class Columns:
    """Every component at every site that holds it, site after site as the network uses them.

    site: [K] the place of the site in `sites`. component: [K].
    """

    sites: tuple[str, ...]
    site: Int[np.ndarray, " K"]
    component: Int[np.ndarray, " K"]

    def __repr__(self) -> str:
        return wl.pformat(self)

    @staticmethod
    def of(decomposition: Decomposition, x: PyTree) -> Columns:
        problem, components = decomposition.problem, decomposition.components
        sites = tuple(capture.order(problem.apply_fn, problem.params, components, x))
        numbers = [_numbers(components.factors[name])[0] for name in sites]
        site = np.repeat(np.arange(len(sites)), [len(own) for own in numbers])
        return Columns(sites, site, np.concatenate(numbers))

    def weights(
        self, w: Array, beside: Array | None, components: Components
    ) -> dict[str, SiteWeights]:
        """w [T, K] as weights of pieces, and beside [T, L] as those of the target's own, β."""
        found = {}
        for i, name in enumerate(self.sites):
            place = _numbers(components.factors[name])[1]
            own = None if beside is None else beside[:, i]
            found[name] = SiteWeights(w[:, self.site == i][:, place], own)
        return found

    def ones(self, T: int) -> Float[Array, "T L"]:
        """β of the target's own pass."""
        return jnp.ones((T, len(self.sites)))

    def activations(
        self, components: Components, read: Mapping[str, capture.Reading]
    ) -> Float[Array, "T K"]:
        """a_c of every column."""
        parts = [_activation(components.factors[name], read[name]) for name in self.sites]
        return jnp.concatenate(parts, axis=-1)


def _numbers(f: Factors) -> tuple[np.ndarray, np.ndarray]:
    """The components that a site holds, and the place among them of every piece."""
    own = np.arange(f.num_pieces) if f.ids is None else np.asarray(f.ids)
    return np.unique(own, return_inverse=True)


def _activation(f: Factors, reading: capture.Reading) -> Float[Array, "T k"]:
    h = capture.inner(f, reading)  # [T, *rows, *batch, n, m]
    numbers, place = _numbers(f)
    if len(numbers) == f.num_pieces and h.ndim == 3 and h.shape[-1] == 1:
        return h[:, np.argsort(place), 0]
    squares = jnp.sum(h**2, axis=(*range(1, h.ndim - 2), -1))
    return jnp.sqrt(jax.ops.segment_sum(squares.T, place, len(numbers)).T + _LEAST)


@dataclasses.dataclass(frozen=True)
class PromptEdges:
    """Edges among nodes of one prompt. A node is a component at a site and a position.

    position, site, component: [n]; sites: names by number. activation: a_c. gate: g_c.
    weight: [n, n], weight[i, j] from node j to node i. to_output: [n], to the logit of `token` at
    position `at` above the mean of all logits; None where none is asked for.
    rest: [n, T, L], of what is left over at every position and site, to node i; rest_to_output:
    [T, L], to the logit. 0 where it is rounding; None for derivatives in the masked pass.
    """

    sites: tuple[str, ...]
    position: Int[np.ndarray, " n"]
    site: Int[np.ndarray, " n"]
    component: Int[np.ndarray, " n"]
    activation: Float[np.ndarray, " n"]
    gate: Float[np.ndarray, " n"]
    weight: Float[np.ndarray, "n n"]
    to_output: Float[np.ndarray, " n"] | None = None
    rest: Float[np.ndarray, "n T L"] | None = None
    rest_to_output: Float[np.ndarray, "T L"] | None = None

    def __repr__(self) -> str:
        return wl.pformat(self)


def of_prompt(
    decomposition: Decomposition,
    x: PyTree,
    gates: Any = None,
    *,
    output: tuple[int, int] | None = None,
    masked: bool = False,
) -> PromptEdges:
    """Edges among all components whose gate is above 0, on one prompt.

    Args:
      x: one example, arrays [T, ...]. All its positions count.
      gates: g [T, C] in place of what the gate says, e.g. those of a pruned graph.
      output: (position, token), to add edges to the logit of the token there.
      masked: take derivatives in the pass of Σ_c g_c P_c; else in the target's own.
    Raises:
      InputError: nothing is on, or activations that cannot be told (`capture.inputs`).
    Cost: n backward passes of the sparse pass of all pieces, n nodes; n² + n·T·L numbers.
    """
    problem, components = decomposition.problem, decomposition.components
    g = gates_on(decomposition, x) if gates is None else jnp.asarray(gates, jnp.float32)
    columns = Columns.of(decomposition, jax.tree.map(lambda a: jnp.asarray(a)[None], x))
    wide = g[:, columns.component]
    position, column = (np.asarray(a) for a in np.nonzero(np.asarray(wide) > 0))
    if not len(position):
        raise InputError("no component is on anywhere in this prompt, so there are no edges.")

    def jacobian(params: PyTree, components: Components, x: PyTree, wide: Array) -> Any:
        def nodes(w: Array, beside: Array | None) -> tuple[Array, Array]:
            out, a = _pass(problem.apply_fn, params, components, columns, w, beside, x)
            chosen = a[position, column]
            if output is None:
                return chosen, chosen
            logits = outputs(out)[output[0]]
            return jnp.append(chosen, logits[output[1]] - jnp.mean(logits)), chosen

        beside = None if masked else columns.ones(len(wide))
        start = wide if masked else jnp.zeros_like(wide)
        z, pullback, a = jax.vjp(nodes, start, beside, has_aux=True)

        def row(i: Array) -> tuple[Array, Array | None]:
            by_w, by_beside = pullback(jnp.zeros_like(z).at[i].set(1))
            return by_w[position, column] * wide[position, column], by_beside

        return lax.map(row, jnp.arange(len(z)), batch_size=_TOGETHER), a

    one = jax.tree.map(jnp.asarray, x)
    (rows, whole), a = jax.jit(jacobian)(problem.params, components, one, wide)
    rows, n, asked = np.asarray(rows), len(position), output is not None
    rest = None if masked else _rest(np.asarray(whole), rows, position, columns.site[column])
    return PromptEdges(
        columns.sites,
        position,
        columns.site[column],
        columns.component[column],
        np.asarray(a),
        np.asarray(wide)[position, column],
        rows[:n],
        rows[n] if asked else None,
        None if rest is None else rest[:n],
        rest[n] if asked and rest is not None else None,
    )


def _rest(
    whole: Float[np.ndarray, "rows T L"],
    nodes: Float[np.ndarray, "rows n"],
    position: Int[np.ndarray, " n"],
    site: Int[np.ndarray, " n"],
) -> Float[np.ndarray, "rows T L"]:
    """What all that a site hands on does, less what its nodes do."""
    rest, size = whole.copy(), np.abs(whole)
    np.subtract.at(rest, (slice(None), position, site), nodes)
    np.add.at(size, (slice(None), position, site), np.abs(nodes))
    return np.where(np.abs(rest) > _ROUNDING * size, rest, 0)


def gates_on(decomposition: Decomposition, x: PyTree) -> Float[Array, "T C"]:
    """What the gate says of one example, all of whose positions count."""
    problem = dataclasses.replace(decomposition.problem, valid_fn=None)
    one = dataclasses.replace(decomposition, problem=problem)
    batch = jax.tree.map(lambda a: jnp.asarray(a)[None], x)
    return _spread(one.activity(batch).values, capture.num_positions_of(batch))[0]


@dataclasses.dataclass(frozen=True)
class DataEdges:
    """Edges over data. sites, site, component: as `Columns`. targets: [n] of the K columns.

    weight: [n, K], from every column to every target. mass: [K] Σ g. size: [K] A_c.
    """

    sites: tuple[str, ...]
    site: Int[np.ndarray, " K"]
    component: Int[np.ndarray, " K"]
    targets: Int[np.ndarray, " n"]
    weight: Float[np.ndarray, "n K"]
    mass: Float[np.ndarray, " K"]
    size: Float[np.ndarray, " K"]

    def __repr__(self) -> str:
        return wl.pformat(self)


def over_data(
    decomposition: Decomposition,
    batches: Iterable[Any],
    components: Sequence[int] | None = None,
) -> DataEdges:
    """Edges over batches of inputs, from all components to the chosen ones; see above.

    Args:
      components: the targets, by number; None: all.
    Raises:
      InputError: no batch, or a component that does not exist.
    Cost: per batch as many backward passes as there are targets; n·K numbers are kept.
    """
    columns = step = targets = None
    total: Any = None
    for batch in batches:
        x = jax.tree.map(jnp.asarray, batch)
        if columns is None:
            columns = Columns.of(decomposition, x)
            targets = _targets(columns, decomposition.components, components)
            step = jax.jit(_summed(decomposition, columns, targets))
        assert step is not None
        valid = decomposition.problem.valid(x)
        values = decomposition.activity(x).values
        g = _spread(values, capture.num_positions_of(x))[..., columns.component]
        counts = jnp.ones(g.shape[:2]) if valid is None else valid.astype(jnp.float32)
        g = g * counts[..., None]
        found = step(decomposition.problem.params, decomposition.components, x, g, counts)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if columns is None or targets is None:
        raise InputError("there are no batches to take edges over; give at least one.")
    weight, mass, squares, count = (np.asarray(a) for a in total)
    size = np.sqrt(squares / max(float(count), 1.0))
    scale = size[targets][:, None] * mass[None]
    weight = np.divide(weight, scale, out=np.zeros_like(weight), where=scale > 0)
    return DataEdges(columns.sites, columns.site, columns.component, targets, weight, mass, size)


def _targets(columns: Columns, components: Components, chosen: Any) -> np.ndarray:
    numbers = range(components.num_components) if chosen is None else list(chosen)
    if bad := [c for c in numbers if not 0 <= c < components.num_components]:
        raise InputError(
            f"component {bad[0]} does not exist; there are {components.num_components}."
        )
    return np.flatnonzero(np.isin(columns.component, numbers))


def _summed(decomposition: Decomposition, columns: Columns, targets: np.ndarray) -> Callable:
    """(params, components, x, g, counts) -> sums over a batch: edges, Σ g, Σ a², positions."""
    apply_fn = decomposition.problem.apply_fn

    def one(params: PyTree, components: Components, x: PyTree, g: Array, counts: Array) -> Any:
        def nodes(w: Array) -> tuple[Array, Array]:
            beside = columns.ones(len(w))
            a = _pass(apply_fn, params, components, columns, w, beside, x)[1]
            return jnp.sum(a * counts[:, None], axis=0)[targets], a

        _, pullback, a = jax.vjp(nodes, jnp.zeros_like(g), has_aux=True)
        rows = lax.map(
            lambda i: jnp.sum(pullback(jnp.zeros(len(targets)).at[i].set(1))[0] * g, axis=0),
            jnp.arange(len(targets)),
            batch_size=_TOGETHER,
        )
        return rows, jnp.sum(g, axis=0), jnp.sum(a**2 * counts[:, None], axis=0), jnp.sum(counts)

    def summed(params: PyTree, components: Components, x: PyTree, g: Array, counts: Array) -> Any:
        # One example after the other: memory as for one.
        each = lax.map(lambda args: one(params, components, *args), (x, g, counts))
        return jax.tree.map(lambda a: jnp.sum(a, axis=0), each)

    return summed


def _pass(
    apply_fn: Callable,
    params: PyTree,
    components: Components,
    columns: Columns,
    w: Float[Array, "T K"],
    beside: Float[Array, "T L"] | None,
    x: PyTree,
) -> tuple[Any, Float[Array, "T K"]]:
    weights = columns.weights(w, beside, components)
    out, read = direct.reads(apply_fn, params, components, weights, x)
    return out, columns.activations(components, read)


def _spread(values: Array, T: int) -> Float[Array, "B T C"]:
    """Gates of every position; those of an example hold at all of them."""
    values = values.astype(jnp.float32)
    if values.ndim == 3:
        return values
    return jnp.broadcast_to(values[:, None], (len(values), T, values.shape[-1]))
