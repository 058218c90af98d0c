"""A linear map, and a block-diagonal one: how many components does a d-dimensional mechanism need?

  y = x W          (x nonzero in one block, drawn for each example; with one block, dense)

The authors' claim: on dense inputs the method finds *one* d-dimensional component for a
d-dimensional map, however many components there are. It does not split the map. With n blocks that
are used on disjoint inputs, the truth is one component per block.

Shapes: B examples, n blocks of size s, d = n·s, C components.
W [d, d] is not trained: every block is a random orthogonal matrix.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from scipy.optimize import linear_sum_assignment

from apd_jax import components as components_lib
from apd_jax.decomposition import Decomposition
from apd_jax.targets.base import Config, Panel, Score, Target, at_least_one
from apd_jax.targets.chain import Layer

# A block is found if the component matched to it has a cosine of at least FOUND_COSINE with it and
# a norm ratio within FOUND_NORM of 1.
FOUND_COSINE, FOUND_NORM = 0.99, 0.05


def block_diagonal(num_blocks: int, block_size: int):
    """An initialiser: a random orthogonal matrix in every block of the diagonal, 0 elsewhere."""

    def init(key: PRNGKeyArray, shape: tuple[int, int]) -> Float[Array, "d d"]:
        blocks = jax.random.orthogonal(key, block_size, (num_blocks,))
        return jax.scipy.linalg.block_diag(*blocks)

    return init


class Linear(nn.Module):
    """Returns y [B, d]."""

    num_blocks: int
    block_size: int

    @nn.compact
    def __call__(self, x: Float[Array, "B d"]) -> Float[Array, "B d"]:
        d = self.num_blocks * self.block_size
        return x @ self.param("W", block_diagonal(self.num_blocks, self.block_size), (d, d))


def build(config: Config, batch_size: int) -> Target:
    """The linear map of `config` (fields: configs/linear.py).

    Raises:
      InputError: a size below 1.
    """
    n, s = config.num_blocks, config.block_size
    at_least_one(num_blocks=n, block_size=s, batch_size=batch_size)
    model = Linear(n, s)

    def sample_fn(rng: PRNGKeyArray, step: Array) -> Float[Array, "B d"]:
        key_value, key_block = jax.random.split(jax.random.fold_in(rng, step))
        block = jax.nn.one_hot(jax.random.randint(key_block, (batch_size,), 0, n), n)
        value = jax.random.normal(key_value, (batch_size, n * s))
        return value * jnp.repeat(block, s, axis=1)

    return Target(
        name="linear",
        init_fn=lambda key: model.init(key, jnp.zeros((1, n * s)))["params"],
        apply_fn=lambda params, x: model.apply({"params": params}, x),
        sample_fn=sample_fn,
        select=("W",),
        score_fn=lambda decomposition, key, alive: score(decomposition, n, s),
        layers=(Layer("linear", "W"),),
    )


def score(decomposition: Decomposition, num_blocks: int, block_size: int) -> Score:
    """Compares every block with the component matched to it one to one, by cosine.

    Metrics:
      num_blocks: n. num_blocks_found: see FOUND_COSINE and FOUND_NORM.
      block_cosine, block_norm_ratio: cosine and norm ratio of block and component, averaged over
        blocks; a block without a component counts as 0.
      share_of_largest: squared norm of the n largest components over that of all.
    """
    W = np.asarray(decomposition.problem.params["W"])
    P = np.asarray(components_lib.materialize(decomposition.components)["W"])
    owner = np.repeat(np.arange(num_blocks), block_size)
    in_block = np.equal.outer(owner, owner)
    truth = np.stack([np.where(in_block & (owner[:, None] == i), W, 0) for i in range(num_blocks)])
    norms, sizes = np.linalg.norm(P, axis=(1, 2)), np.linalg.norm(truth, axis=(1, 2))
    dots = np.einsum("iab,cab->ic", truth, P)
    cosines = dots / np.maximum(np.outer(sizes, norms), 1e-12)
    rows, matched = linear_sum_assignment(-cosines)
    cosine, ratio = np.zeros(num_blocks), np.zeros(num_blocks)
    cosine[rows], ratio[rows] = cosines[rows, matched], norms[matched] / sizes[rows]
    found = (cosine >= FOUND_COSINE) & (np.abs(ratio - 1) <= FOUND_NORM)
    squares = np.sort(norms**2)[::-1]
    return Score(
        metrics={
            "num_blocks": num_blocks,
            "num_blocks_found": int(found.sum()),
            "block_cosine": float(cosine.mean()),
            "block_norm_ratio": float(ratio.mean()),
            "share_of_largest": float(squares[:num_blocks].sum() / max(squares.sum(), 1e-12)),
        },
        labels={
            "num_blocks_found": f"blocks with a component of their own; good: {num_blocks}",
            "block_cosine": "cosine of a block and its component; good: 1",
            "block_norm_ratio": "norm of that component over the block's; good: 1",
            "share_of_largest": (
                f"share of the squared norm in the {num_blocks} largest components; good: 1"
            ),
        },
        panels=panels(W, P, norms, num_blocks, block_size),
    )


def panels(
    W: Float[np.ndarray, "d d"],
    P: Float[np.ndarray, "C d d"],
    norms: Float[np.ndarray, " C"],
    num_blocks: int,
    block_size: int,
) -> dict[str, Panel]:
    """The weights of W and of the largest components, and the norms of all components."""
    order = np.argsort(-norms)[: max(num_blocks + 3, 6)]
    return {
        "weights": Panel(
            title=f"W, then the {len(order)} largest components",
            caption="The map's weights (left) and the components with the largest norm, side by "
            "side. Good: one component per block, equal to it, and nothing in the others.",
            xlabel="output (of each matrix in turn)",
            ylabel="input",
            matrix=np.concatenate([W, *P[order]], axis=1),
            unit="weight",
        ),
        "norms": Panel(
            title="Norm of every component, ordered",
            caption=f"Good: {num_blocks} components of norm {block_size**0.5:.2f} (the root of the "
            "block's size), and a sharp fall to 0.",
            xlabel="component (ordered)",
            ylabel="Frobenius norm",
            x=np.arange(len(norms)),
            lines={"norm": np.sort(norms)[::-1]},
        ),
    }
