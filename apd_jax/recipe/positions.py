r"""What is read at every position by itself, where the method's masks are per position.

A row is one position of one example. What a leaf reads there is known, x(b, t), and so is whether
it counts: by how far the decomposed weights move the outputs of that position. Only what tells
positions apart whatever the example, as an embedding of positions, is no mechanism of a row. With

  m_t = mean_b x(b, t),   S = Σ_t n_t (m_t - m)(m_t - m)ᵀ / Σ_t n_t

mechanisms are looked for in what is left without the part of m_t - m in the directions Q of S that
are larger than chance,

  e(b, t) ∝ x(b, t) - Q Qᵀ (m_t - m)

and what reads one is to be blind to the x of all rows without it. What no mechanism reads is held
by components that are always on.

Shapes: B examples, T positions, N rows, b matrices of a leaf (1 unless stacked).
"""

from __future__ import annotations

import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from apd_jax import components as components_lib
from apd_jax.errors import InputError, first_line
from apd_jax.forward import capture
from apd_jax.network import data
from apd_jax.network.outputs import outputs
from apd_jax.network.problem import Problem
from apd_jax.recipe import modes
from apd_jax.recipe.directions import shapes
from apd_jax.recipe.modes import Rows, unit_rows

log = logging.getLogger("apd_jax.recipe")

_TOLD = 1e-3  # of the variance of what is read: less tells no positions apart
_CHANCE = 2.0  # times the variance of means by chance


def read(
    problem: Problem, batch_size: int, key: PRNGKeyArray, times: int
) -> tuple[Rows, Float[np.ndarray, " N"], Rows, Rows] | None:
    """e of every leaf, the effect, e as long as it is, and x/|x|, of times · NUM_EXAMPLES rows.

    None where positions cannot be told apart in what some leaf reads, which is logged. Positions of
    padding are left out.

    Cost: two forward passes of the examples.
    """
    x = data.shapes(problem.sample_fn)
    shape = jax.eval_shape(lambda p, x: outputs(problem.apply_fn(p, x)), problem.params, x).shape
    if len(shape) < 2:
        log.info("outputs %s have no positions; beginnings look at whole examples.", shape)
        return None
    of_batch = jax.jit(lambda params, without, x: _read(problem.with_params(params), without, x))
    # As an argument: XLA's CPU backend gives NaN for some products with zeros that it knows of.
    zeros = {name: jnp.zeros_like(leaf) for name, leaf in problem.sites.items()}
    without = components_lib.replace_leaves(problem.params, zeros)
    try:
        drawn = [
            jax.device_get(of_batch(problem.params, without, x))
            for x in modes.looked_at(problem, batch_size * shape[1], key, times)
        ]
    except InputError as error:
        log.info("beginnings look at whole examples: %s", first_line(error))
        return None
    rows, effect, valid = jax.tree.map(lambda *a: np.concatenate(a), *drawn)
    left = {
        name: np.stack([_left(x[:, :, i], valid) for i in range(x.shape[2])], 1)
        for name, x in rows.items()
    }
    whole = {name: x[valid] for name, x in rows.items()}
    return unit_rows(left), effect[valid], left, unit_rows(whole)


def _read(problem: Problem, without: PyTree, x: PyTree) -> tuple[dict[str, Array], Array, Array]:
    """What every leaf reads at every position, the effect there, and which count.

    Raises:
      InputError: a leaf reads no single row of numbers at a position.
    """
    out, seen = capture.inputs(
        problem.apply_fn, problem.params, problem.site_names, x, per_position=True
    )
    out, found = outputs(out), {}
    for name, W in shapes(problem).items():
        r = seen.get(name)
        if (
            r is None
            or r.side != "in"
            or not jnp.issubdtype(r.rows.dtype, jnp.floating)
            or math.prod(r.rows.shape[2:]) != math.prod(W[:2])
        ):
            raise InputError(f"{name!r} does not read one row of numbers at every position.")
        found[name] = r.rows.reshape(*r.rows.shape[:2], *W[:2]).astype(jnp.float32)
    fn = problem.attribution_fn or problem.apply_fn
    whole = out if problem.attribution_fn is None else outputs(fn(problem.params, x))
    change = (whole - outputs(fn(without, x))).astype(jnp.float32)
    effect = jnp.mean(change**2, axis=range(2, change.ndim))
    valid = problem.valid(x)
    return found, effect, jnp.ones(effect.shape, bool) if valid is None else valid


def _left(
    x: Float[np.ndarray, "B T d"], valid: Bool[np.ndarray, "B T"]
) -> Float[np.ndarray, "N d"]:
    """Valid rows without what tells their positions apart."""
    x = np.where(valid[..., None], x.astype(np.float64), 0)
    count = np.maximum(valid.sum(0), 1)[:, None]
    each, mean = x.sum(0) / count, x.sum((0, 1)) / max(valid.sum(), 1)
    apart = (each - mean) * (valid.sum(0) > 0)[:, None]
    within = (x - each)[valid]
    spread = np.linalg.eigvalsh(within.T @ within)
    size, basis = np.linalg.eigh((apart * count).T @ apart)
    chance = _CHANCE * valid.any(0).sum() * max(float(spread[-1]), 0) / max(valid.sum(), 1)
    told = basis[:, size > max(_TOLD * float(spread.sum()), chance)]
    return (x - apart @ told @ told.T)[valid].astype(np.float32)
