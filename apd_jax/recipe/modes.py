r"""Where components begin: at what examples of one kind have in common.

On one example x a weight W matters along few directions: the gradient of the outputs, along their own change v = f(θ*, x) - f(0, x), is

  G_l(x) = ∂(v·f)/∂W_l,   of rank one where x passes the layer once: (what the layer reads) ⊗ (how its output counts)

so its leading left singular vector e_l(x) says what the layer reads, and P_l(x) = e_l e_lᵀ W_l is the least matrix that does on x what the
layer does. Examples that need one mechanism alone share P(x), mixtures of several are scattered: mechanisms are the densest points,
the modes, of P(x) over the data. Every mode becomes a component, which must do its part whatever else an example needs. So it reads

  d_i = argmin_d Σ_{x without mode i} (d·e(x))²   where d·e_i = 1,    (the beamformer of minimum variance: Capon 1969)

the direction that is blind to all examples without the mode; with D the rows d_i and t_i the rows of pinv(D)ᵀ, it is

  P_i = d_i ⊗ t_iᵀ W,    so that Σ_i P_i is W on the span of the d_i

Where layers read nothing but sums of the e_i these d_i are their dual basis, and t_i = e_i. Where a layer also reads what earlier ones
wrote, which is no sum of what they write for single modes, the d_i are blind to that, and what W makes of it belongs to no mode.

The gain of a leaf, tr(E pinv(E))/n with E the rows e_i, is how much of what the leaf does on a mode that mode's part can do alone. It is 1
if the directions are independent, and (dimensions they span)/n if there are more modes than that: the modes then share the leaf.

Shapes: N examples, n modes, C components, b matrices of a leaf (1 unless stacked), m rank, r dimensions.
Nothing here looks at a ground truth.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree
from scipy import sparse

from apd_jax import attributions as attributions_lib
from apd_jax import components as components_lib
from apd_jax.components import Components, Factors
from apd_jax.components.layout import Layout, unfold
from apd_jax.errors import InputError
from apd_jax.network import data
from apd_jax.network.problem import Problem

NUM_EXAMPLES = 16_384  # that are drawn, `times` over; one batch where the data comes from the host
MOST_KEPT = 8192  # of them that are compared with each other, `times` over
LEAST_EFFECT = 0.1  # of the mean effect of the decomposed weights on the outputs: examples below it are left out
NEAR, FAR = (
    0.95,
    0.7,
)  # cosines of P(x): above NEAR an example counts for a mode's density, above FAR it is used up with the mode
LEAST_COUNT = 5  # examples that make a mode
LEAST_DENSITY = 0.35  # of the density that modes usually have, in which each is counted by the square of its own
SHARED = 0.75  # a leaf whose gain is below this goes whole into the components that are always on, if there are any
_POWER_ITERATIONS = 12
_CONDITION = 0.03  # singular values of E below this part of the largest are taken as 0
_NO_EFFECT = 1e-4  # as LEAST_EFFECT: what these examples read is not looked at
_PRESENT = 0.02  # of what an example reads, by the leaf that tells modes apart best: from there on it has a mode
_NOTHING = 1e-6  # singular parts of a weight below this part of the largest belong to no component
_UNSEEN = 1e-9  # of the largest variance among directions: what varies less is not read
_CHUNK_BYTES = 256 * 2**20  # that the gradients of one chunk of examples may take


@dataclasses.dataclass(frozen=True)
class Modes:
    """The modes, in the order they were found, the densest first."""

    ins: dict[str, Float[np.ndarray, "n b d_in"]]  # e, of every leaf
    reads: dict[str, Float[np.ndarray, "n b d_in"]]  # d
    seen: dict[
        str, Float[np.ndarray, "b d_in r"]
    ]  # an orthonormal basis of all that examples read (further columns are 0)
    density: Float[np.ndarray, " n"]  # examples near each, counted by their effect, at most 1 each
    unexplained: float = 0.0  # part of what examples read, in squares, that is no sum of the modes, in the leaf where it is least
    active: float = 0.0  # modes that an example has, the mean over all examples: an estimate of k

    def __len__(self) -> int:
        return len(self.density)

    @property
    def gains(self) -> dict[str, float]:
        """The gain of every leaf, the mean over its matrices."""
        return {
            name: float(np.mean([_dual(e[:, i])[1] for i in range(e.shape[1])]))
            for name, e in self.ins.items()
        }

    def first(self, n: int) -> Modes:
        ins, reads = (
            {name: a[:n] for name, a in arrays.items()} for arrays in (self.ins, self.reads)
        )
        return Modes(ins, reads, self.seen, self.density[:n], self.unexplained, self.active)


def find(problem: Problem, batch_size: int, key: PRNGKeyArray, *, times: int = 1) -> Modes:
    """The modes of this network on its data.

    The more mechanisms an example needs on average, the rarer are those that need one alone, and the more `times` must be looked.

    Cost: times · NUM_EXAMPLES gradients of the network; on the host (times · MOST_KEPT)² products of the directions of every leaf.
    """
    if isinstance(problem.sample_fn, data.Batches):
        of_batch = jax.jit(lambda params, x: _directions(problem.with_params(params), x))
        drawn = [of_batch(problem.params, problem.example_batch())]
    else:

        @jax.jit
        def of_step(params: PyTree, step: Array) -> tuple[dict[str, Array], Array]:
            return _directions(problem.with_params(params), problem.sample_fn(key, step))

        drawn = [
            jax.device_get(of_step(problem.params, jnp.asarray(step)))
            for step in range(math.ceil(times * NUM_EXAMPLES / batch_size))
        ]
    ins, effect = jax.tree.map(lambda *a: np.concatenate(a), *drawn)
    return densest(ins, effect, _matrices(problem), most=times * MOST_KEPT)


def densest(
    ins: dict[str, Float[np.ndarray, "N b d_in"]],
    effect: Float[np.ndarray, " N"],
    weights: dict[str, np.ndarray],
    most: int = MOST_KEPT,
) -> Modes:
    """The modes of given examples.

    One after the other: the example with most others near it; then all that are not far from it are used up. A mode's direction is the
    leading one of the examples near it, of the quarter of them that agrees best.

    Args:
      ins: e, what every example reads in every leaf, of unit length.
      effect: how far the decomposed weights move the outputs, mean over outputs of (f(θ*, x) - f(0, x))².
      weights: {leaf: [b, d_in, d_out]}, the target's.
      most: how many examples are compared with each other.
    """
    relative = effect / max(float(np.mean(effect)), 1e-30)
    kept = np.flatnonzero(relative > LEAST_EFFECT)[:most]
    count = np.minimum(relative[kept], 1).astype(np.float32)
    everyone, ins = ins, {name: e[kept] for name, e in ins.items()}
    near, not_far = _alike(ins, weights)
    density, left = near @ count, np.ones(len(kept), bool)
    centres, found = [], []
    while left.any():
        best = int(np.argmax(np.where(left, density, -1)))
        usual = np.sum(np.power(found, 3)) / np.sum(np.square(found)) if found else 0.0
        if density[best] < max(LEAST_COUNT, LEAST_DENSITY * usual):
            break
        centres.append(best)
        found.append(float(density[best]))
        used = np.zeros_like(left)
        used[[best, *not_far[[best]].indices]] = True
        used &= left
        density -= near[used].T @ count[used]
        left &= ~used
    members = [_purest(ins, count, near[[centre]].indices) for centre in centres]
    leading = {
        name: np.array([_leading(e[m], count[m]) for m in members]).reshape(-1, *e.shape[1:])
        for name, e in ins.items()
    }
    present, unexplained = _present(ins, leading)
    reads, seen = _reads(ins, leading, present(ins))
    active = np.sum(present(everyone)[relative > _NO_EFFECT]) / len(relative)
    return Modes(leading, reads, seen, np.asarray(found), unexplained, float(active))


def components(
    problem: Problem, modes: Modes, fresh: Components, *, num_always_on: int = 0
) -> Components:
    """Components that sum to the target and begin at the modes, after the always-on ones.

    Leaves whose gain is below SHARED are held by the always-on components, if there are any, and so is what other leaves make of what is
    read but belongs to no mode. What is left of a leaf, on which it does nothing, goes in pieces of rank m to the components that no mode
    has taken; without always-on components both do. Further columns of U are those of `fresh` with rows of 0 in V, so that ranks can grow.

    Args:
      fresh: as `components.init` gives them: shapes and small random values.
    Raises:
      InputError: the always-on components have too small a rank for what they are to hold.
    """
    C = fresh.num_components
    modes = modes.first(C - num_always_on)
    weights, gains = _matrices(problem), modes.gains
    taken = slice(num_always_on, num_always_on + len(modes))

    def make(path: tuple, f: Factors | None) -> Factors | None:
        if f is None:
            return None
        name = components_lib.path_name(path)
        W = weights[name]
        m = f.U.shape[-1]
        U = np.array(f.U).reshape(C, len(W), -1, m)
        here = np.asarray(
            U.any(axis=(1, 2, 3), keepdims=True)
        )  # the components that `select` gives this leaf
        U[[c for c in range(C) if not taken.start <= c < taken.stop]] = 0
        V = np.zeros((C, len(W), m, W.shape[-1]), U.dtype)
        always, spare = [
            [c for c in part if here[c]] for part in (range(num_always_on), range(taken.stop, C))
        ]
        for i, matrix in enumerate(W):
            least = _NOTHING * float(np.linalg.norm(matrix, 2))
            if num_always_on and gains[name] < SHARED:
                U[:, i] = 0
                if rest := _spread(matrix, U[:, i], V[:, i], [always], least):
                    rank, held = num_always_on * m + rest, num_always_on * m
                    raise InputError(
                        f"{name!r} of rank {rank} is shared by all modes, but {num_always_on} always-on component(s) of rank {m} hold only "
                        f"{held}; set num_always_on to at least {-(-rank // m)}, or the rank to at least {-(-rank // num_always_on)}."
                    )
                continue
            d = modes.reads[name][:, i].astype(np.float64)
            v = _dual(d, 1e-6)[0] @ matrix
            scale = np.sqrt(
                np.linalg.norm(v, axis=1) / np.maximum(np.linalg.norm(d, axis=1), 1e-30)
            )[:, None]
            U[taken, i, :, 0], V[taken, i, 0] = d * scale, v / np.maximum(scale, 1e-30)
            left = matrix - d.T @ v
            read = modes.seen[name][i] @ (modes.seen[name][i].T @ left)
            _spread(read, U[:, i], V[:, i], [always, spare], least)
            _spread(left - read, U[:, i], V[:, i], [spare, always], least)
        return dataclasses.replace(
            f,
            U=jnp.asarray((U * here).reshape(f.U.shape)),
            V=jnp.asarray((V * here).reshape(f.V.shape)),
        )

    tree = jax.tree_util.tree_map_with_path(make, fresh.tree, is_leaf=components_lib.is_slot)
    return Components(tree)


def num_to_hold(problem: Problem, name: str, components: Components) -> int:
    """How many components of the rank that these have hold the whole of a leaf between them."""
    m = components.factors[name].U.shape[-1]
    singular = np.linalg.svd(_matrices(problem)[name], compute_uv=False)
    return int(-(-np.sum(singular > _NOTHING * singular[:, :1], axis=1).max() // m))


def _matrices(problem: Problem) -> dict[str, np.ndarray]:
    """The decomposed leaves as [b, d_in, d_out]."""
    names = components_lib.selected_paths(problem.params, problem.select, problem.layouts)
    leaves = {
        components_lib.path_name(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(problem.params)[0]
    }
    return {name: np.asarray(_matrix(problem, name, leaves[name]), np.float32) for name in names}


def _matrix(problem: Problem, name: str, leaf: Array) -> Float[Array, "b d_in d_out"]:
    matrix = unfold(leaf, problem.layouts.get(name, Layout.default(leaf.ndim)))
    return matrix.reshape(-1, *matrix.shape[-2:])


def _directions(
    problem: Problem, x: PyTree
) -> tuple[dict[str, Float[Array, "B b d_in"]], Float[Array, " B"]]:
    """What every example of a batch reads in every leaf, and the effect of these leaves on its outputs."""
    names = components_lib.selected_paths(problem.params, problem.select, problem.layouts)
    leaves = {
        components_lib.path_name(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(problem.params)[0]
    }
    leaves = {name: leaves[name] for name in names}
    fn = problem.attribution_fn or problem.apply_fn

    def one(x_b: PyTree) -> tuple[dict[str, Array], Array]:
        def model(leaves):
            batch = jax.tree.map(lambda a: a[None], x_b)
            return attributions_lib.outputs(
                fn(components_lib.replace_leaves(problem.params, leaves), batch)
            )

        out, pull = jax.vjp(model, leaves)
        change = out - model(jax.tree.map(jnp.zeros_like, leaves))
        gradient = {
            name: _matrix(problem, name, g).astype(jnp.float32)
            for name, g in pull(change)[0].items()
        }
        return {name: jax.vmap(_leading_left)(g) for name, g in gradient.items()}, jnp.mean(
            change.astype(jnp.float32) ** 2
        )

    fitting = max(1, _CHUNK_BYTES // sum(4 * leaf.size for leaf in leaves.values()))
    return (
        jax.lax.map(one, x, batch_size=fitting)
        if fitting < jax.tree.leaves(x)[0].shape[0]
        else jax.vmap(one)(x)
    )


def _leading_left(G: Float[Array, "i o"]) -> Float[Array, " i"]:
    """The leading left singular vector, by power iterations on the smaller of GᵀG and GGᵀ; 0 where G is 0."""

    def unit(v):
        return v / jnp.maximum(jnp.linalg.norm(v), 1e-30)

    wide = G.shape[0] < G.shape[1]
    gram = G @ G.T if wide else G.T @ G
    longest = gram[
        jnp.argmax(jnp.diagonal(gram))
    ]  # of the rows: it has a part along the leading vector
    v = jax.lax.fori_loop(0, _POWER_ITERATIONS, lambda _, v: unit(gram @ v), unit(longest))
    return v if wide else unit(G @ v)


def _alike(
    ins: dict[str, Float[np.ndarray, "N b d_in"]], weights: dict[str, np.ndarray]
) -> tuple[sparse.csr_array, sparse.csr_array]:
    """Which examples are near each other, and which not far: 1 where the cosine of their P, every leaf in units of ‖W_l‖, is large."""
    factors = []
    for name, e in ins.items():
        W = weights[name] / max(float(np.linalg.norm(weights[name])), 1e-30)
        factors += [(e[:, i], e[:, i] @ W[i]) for i in range(len(W))]
    length = np.sqrt(
        np.maximum(sum(np.sum(e**2, 1) * np.sum(v**2, 1) for e, v in factors), 1e-30)
    ).astype(np.float32)
    N = len(length)
    near, not_far = [], []
    for rows in np.array_split(np.arange(N), max(1, N // 512)):
        cosine = (
            sum((e[rows] @ e.T) * (v[rows] @ v.T) for e, v in factors)
            / length[rows, None]
            / length[None]
        )
        near.append(sparse.csr_array((cosine > NEAR).astype(np.float32)))
        not_far.append(sparse.csr_array((cosine > FAR).astype(np.float32)))
    return sparse.csr_array(sparse.vstack(near)), sparse.csr_array(sparse.vstack(not_far))


def _leading(
    e: Float[np.ndarray, "k b d"], count: Float[np.ndarray, " k"]
) -> Float[np.ndarray, "b d"]:
    """The leading direction of several, whatever their signs."""
    lines = np.moveaxis(e * np.sqrt(count)[:, None, None], 0, 1)
    return np.stack([np.linalg.svd(line, full_matrices=False)[2][0] for line in lines])


def _purest(
    ins: dict[str, Float[np.ndarray, "N b d"]], count: Float[np.ndarray, " N"], members: np.ndarray
) -> np.ndarray:
    """The half of these examples that is nearest to their leading directions, and the half of that; not fewer than LEAST_COUNT."""
    for _ in range(2):
        cosine = [
            np.einsum("kbd,bd->kb", e[members], _leading(e[members], count[members]))
            for e in ins.values()
        ]
        nearest = np.argsort(-np.sum(np.square(np.concatenate(cosine, 1)), 1), kind="stable")
        members = members[nearest[: max(LEAST_COUNT, len(members) // 2)]]
    return members


def _present(
    ins: dict[str, Float[np.ndarray, "N b d"]], modes: dict[str, Float[np.ndarray, "n b d"]]
) -> tuple[Callable[[dict[str, np.ndarray]], Bool[np.ndarray, "N n"]], float]:
    """ins -> which modes each example has, and which part of what is read the modes do not explain.

    Both are told by the leaf that tells modes apart best: whose modes are independent and explain what is read.
    """
    leaf, best, least = None, -1.0, 1.0
    for name, e in ins.items():
        for i in range(e.shape[1]):
            dual, gain = _dual(modes[name][:, i])
            unexplained = float(
                np.mean(np.sum((e[:, i] - e[:, i] @ dual.T @ modes[name][:, i]) ** 2, 1))
            )
            if gain * (1 - unexplained) > best:
                leaf, best, least = (name, i, dual), gain * (1 - unexplained), unexplained
    assert leaf is not None
    name, i, dual = leaf
    return lambda ins: np.abs(ins[name][:, i] @ dual.T) > _PRESENT, least


def _reads(
    ins: dict[str, Float[np.ndarray, "N b d"]],
    modes: dict[str, Float[np.ndarray, "n b d"]],
    present: Bool[np.ndarray, "N n"],
) -> tuple[dict[str, Float[np.ndarray, "n b d"]], dict[str, Float[np.ndarray, "b d r"]]]:
    """d of every mode and leaf, and what examples read at all. The modes themselves count as examples that have no other mode.

    Cost, per matrix of every leaf: d_in³ for the basis, n solutions of r linear equations.
    """
    reads, seen = {name: np.zeros_like(e) for name, e in modes.items()}, {}
    for name, e in ins.items():
        bases = []
        for i in range(e.shape[1]):
            x, E = e[:, i].astype(np.float64), modes[name][:, i].astype(np.float64)
            variance, basis = np.linalg.eigh(x.T @ x)
            bases.append(basis[:, variance > _UNSEEN * variance[-1]])
            x, E = x @ bases[-1], E @ bases[-1]
            every = x.T @ x + E.T @ E
            for j in range(len(E)):
                own = np.concatenate([x[present[:, j]], E[[j]]])
                without = every - own.T @ own
                without[np.diag_indices_from(without)] += _UNSEEN * max(np.trace(every), 1e-30)
                d = np.linalg.solve(without, E[j])
                reads[name][j, i] = bases[-1] @ (d / max(float(d @ E[j]), 1e-30))
        widest = max(b.shape[1] for b in bases)
        seen[name] = np.stack([np.pad(b, ((0, 0), (0, widest - b.shape[1]))) for b in bases])
    return reads, seen


def _dual(
    E: Float[np.ndarray, "n d"], condition: float = _CONDITION
) -> tuple[Float[np.ndarray, "n d"], float]:
    """The dual directions ê, the rows of pinv(Eᵀ), and the mean of e_i·ê_i: tr(E pinv(E))/n."""
    if not len(E):
        return E, 0.0
    u, s, vt = np.linalg.svd(E, full_matrices=False)
    large = s > condition * s[0]
    return (u[:, large] / s[large]) @ vt[large], float(large.mean() * min(E.shape) / len(E))


def _spread(
    W: Float[np.ndarray, "i o"],
    U: Float[np.ndarray, "C i m"],
    V: Float[np.ndarray, "C m o"],
    where: Sequence[Sequence[int]],
    least: float,
) -> int:
    """Writes the singular parts of W above `least` into free places (V is 0) of these groups of components, one group after the other, in
    turn within it. Returns how many did not fit, the smallest."""
    u, s, vt = np.linalg.svd(W, full_matrices=False)
    parts = np.flatnonzero(s > least)
    free = [
        (c, k) for group in where for k in range(U.shape[-1]) for c in group if not V[c, k].any()
    ]
    for j, (c, k) in zip(parts, free, strict=False):
        U[c, :, k], V[c, k] = u[:, j] * np.sqrt(s[j]), np.sqrt(s[j]) * vt[j]
    return max(0, len(parts) - len(free))
