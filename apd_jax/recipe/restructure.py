"""Between two stages of training: components that are one mechanism in several pieces are joined, unused ones are cleared.

Gradient descent cannot do either. Two halves of a mechanism, kept on the same inputs, lie in a flat valley of all losses; a component that
is never kept pays no simplicity and may hold anything. Nothing here looks at a ground truth: joining is judged by the simplicity loss.

Shapes: B examples, C components.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from apd_jax import components as components_lib
from apd_jax.components import Components, Factors
from apd_jax.gates import selection as masks
from apd_jax.methods.config import Config
from apd_jax.network import data
from apd_jax.network.problem import Problem
from apd_jax.train import step as step_lib

NUM_EXAMPLES = (
    20_000  # that the statistics are taken on, about; one batch where the data comes from the host
)
SCHATTEN_P = 0.5  # of the comparison: well below 1, so that one component is clearly simpler than two halves of it
LEAST_GAIN = 0.1  # joining must save at least this part of the two components' simplicity ...
PARALLEL = 0.8  # or their cosine is above this: the attributions of parallel components are proportional on every input
LEAST_OVERLAP = 0.3  # ... and is only tried if one of the two matters on this part of the inputs on which the other does
LEAST_FIRING = 0.01  # an alive component is kept, and matters, on this part of the average component's inputs, k/C ...
LEAST_STRENGTH = 0.25  # ... and has, where it is kept, this part of the mean squared attribution of all that are kept


class Usage(NamedTuple):
    """On which inputs components matter: have an attribution above the threshold."""

    together: Float[
        Array, "C C"
    ]  # share of the examples (positions) on which both matter; the diagonal, on which each does
    firing: Float[Array, " C"]  # share on which it matters and is kept
    square: Float[
        Array, " C"
    ]  # mean squared attribution, where it matters and is kept; 0 elsewhere


def usage(
    problem: Problem, config: Config, components: Components, threshold: float, key: PRNGKeyArray
) -> Usage:
    """How often components matter, alone and in pairs.

    Args:
      components: of one instance.
      threshold: of the attributions, in units of the output.
    Cost: the attributions of NUM_EXAMPLES examples.
    """
    attribute = step_lib.make_attribution_fn(
        problem.apply_fn, config, attribution_fn=problem.attribution_fn, valid_fn=problem.valid_fn
    )

    def one(x: PyTree, key: PRNGKeyArray) -> Usage:
        A = jnp.sqrt(attribute(components, problem.params, x, key)).reshape(
            -1, components.num_components
        )
        matters = threshold < A
        flags = matters.astype(jnp.float32)
        fired = matters & masks.batch_topk(A, config.topk)
        return Usage(
            flags.T @ flags / len(flags),
            jnp.mean(fired, axis=0, dtype=jnp.float32),
            jnp.mean(A**2 * fired, axis=0),
        )

    if isinstance(problem.sample_fn, data.Batches):
        return one(jax.tree.map(jnp.asarray, problem.sample_fn.first), key)
    steps = jnp.arange(max(1, NUM_EXAMPLES // config.batch_size))
    drawn = jax.lax.map(
        lambda step: one(problem.sample_fn(key, step), jax.random.fold_in(key, step)), steps
    )
    return jax.tree.map(lambda a: jnp.mean(a, axis=0), drawn)


def restructure(
    components: Components,
    usage: Usage,
    topk: float,
    *,
    fresh: Components | None = None,
    num_always_on: int = 0,
) -> tuple[Components, Bool[np.ndarray, " C"]]:
    """Joins what is one mechanism, and clears what is unused.

    Components a and b become P_a + P_b if that is simpler: n_{a∪b}·S(P_a + P_b) < (1 - LEAST_GAIN)·(n_a·S(P_a) + n_b·S(P_b)), with n the
    inputs on which they matter and S = Σ_l uses_l Σ_j σ_j^SCHATTEN_P the simplicity of all leaves; or if they are PARALLEL. The most
    parallel pair, or else the one that saves most, goes first. The sum is cut to the leaf's rank. Components that hardly ever matter, or
    matter little, are set to 0, or to those of `fresh`.

    Args:
      components: of one instance, on the host.
      topk: k, active components per example.
      fresh: freshly drawn ones, from which cleared components begin anew; None leaves them at 0, where their gradient is 0 too.
      num_always_on: the first components, which are left as they are.
    Returns: the components, and which of them are alive.
    Cost: one singular value decomposition of 2m x 2m per leaf and pair that matters together.
    """
    U = {name: np.array(f.U) for name, f in components.factors.items()}
    V = {name: np.array(f.V) for name, f in components.factors.items()}
    uses = {name: f.uses for name, f in components.factors.items()}
    together = np.array(usage.together, np.float64)
    C = len(together)
    firing, square = np.array(usage.firing, np.float64), np.array(usage.square, np.float64)
    always = np.arange(C) < num_always_on
    alive = (firing > LEAST_FIRING * topk / C) & (
        square * firing.sum() >= LEAST_STRENGTH * firing * square.sum()
    )

    def joined(name: str, members: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return _svd(
            np.concatenate([U[name][c] for c in members], axis=-1),
            np.concatenate([V[name][c] for c in members], axis=-2),
        )

    def size(*members: int) -> float:
        return float(sum(uses[name] * np.sum(joined(name, members)[1] ** SCHATTEN_P) for name in U))

    def inner(a: int, b: int) -> float:
        return float(
            sum(
                np.sum(
                    (np.swapaxes(U[n][a], -1, -2) @ U[n][b])
                    * (V[n][a] @ np.swapaxes(V[n][b], -1, -2))
                )
                for n in U
            )
        )

    def gain(a: int, b: int) -> float:
        if (
            alive[a]
            and alive[b]
            and (cosine := inner(a, b) / max(inner(a, a) * inner(b, b), 1e-30) ** 0.5) > PARALLEL
        ):
            return 1 + cosine
        n_a, n_b, n_ab = together[a, a], together[b, b], together[a, b]
        if not (alive[a] and alive[b]) or n_ab <= LEAST_OVERLAP * min(n_a, n_b):
            return 0.0
        return 1 - (n_a + n_b - n_ab) * size(a, b) / max(n_a * sizes[a] + n_b * sizes[b], 1e-30)

    sizes = [size(c) for c in range(C)]
    gains = {(a, b): gain(a, b) for a, b in itertools.combinations(range(num_always_on, C), 2)}
    while gains and max(gains.values()) > LEAST_GAIN:
        a, b = max(gains, key=lambda pair: gains[pair])
        for name in U:
            u, s, vt = joined(name, (a, b))
            m = min(U[name].shape[-1], s.shape[-1])
            root = np.sqrt(s[..., None, :m])
            U[name][a], V[name][a] = 0, 0
            U[name][a][..., :m] = u[..., :m] * root
            V[name][a][..., :m, :] = np.swapaxes(root, -1, -2) * vt[..., :m, :]
        either = np.maximum(
            together[a], together[b]
        )  # at least; exact where the two are kept on the same inputs
        either[a] = together[a, a] + together[b, b] - together[a, b]
        together[a], together[:, a], alive[b], sizes[a] = either, either, False, size(a)
        gains |= {pair: gain(*pair) for pair in gains if a in pair or b in pair}

    def rebuilt(f: Factors, name: str, new: Factors | None) -> Factors:
        keep = (alive | always).reshape(-1, *[1] * (f.U.ndim - 1))
        return dataclasses.replace(
            f,
            U=jnp.asarray(np.where(keep, U[name], 0 if new is None else np.asarray(new.U))),
            V=jnp.asarray(np.where(keep, V[name], 0 if new is None else np.asarray(new.V))),
        )

    names = iter(U)
    others = components.tree if fresh is None else fresh.tree
    tree = jax.tree.map(
        lambda f, new: (
            None if f is None else rebuilt(f, next(names), None if fresh is None else new)
        ),
        components.tree,
        others,
        is_leaf=components_lib.is_slot,
    )
    return Components(tree), alive


def _svd(
    U: Float[np.ndarray, "*b d_in m"], V: Float[np.ndarray, "*b m d_out"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """u, s, vt of U V without forming it."""
    q_in, r_in = np.linalg.qr(U.astype(np.float64))
    q_out, r_out = np.linalg.qr(np.swapaxes(V, -1, -2).astype(np.float64))
    u, s, vt = np.linalg.svd(r_in @ np.swapaxes(r_out, -1, -2), full_matrices=False)
    return q_in @ u, s, vt @ np.swapaxes(q_out, -1, -2)
