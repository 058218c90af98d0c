"""Logits W[x_t] of components that are known: 0 writes token 4 after token 1, 1 and 2 cancel there.

Without ablation neither 1 nor 2 is needed after token 1. A random part of each is a small change;
all of one and nothing of the other is a large one. After token 0 nothing is written at all.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from apd_jax import components as components_lib
from apd_jax.decomposition import Decomposition
from apd_jax.gates.base import INPUTS, Activity
from apd_jax.language.tokens import predicting
from apd_jax.methods.apd import APD
from apd_jax.network.problem import Problem

V, C = 5, 3
PIECES = np.zeros((C, V, V), np.float32)
PIECES[0, 1, 4] = 2.0
PIECES[1, 1, :2] = 1.5
PIECES[2] = -PIECES[1]


@dataclasses.dataclass(frozen=True)
class On:
    reads = frozenset({INPUTS})
    says = "all on"

    def rule(self):
        return None

    def __call__(self, seen):
        g = jnp.ones((*seen.x.shape, C))
        return Activity(g, g > 0, g)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllOn(APD):
    def gate(self, arrays, problem):
        return On()


def network(params, tokens):
    return jnp.take(params["W"], tokens, axis=0, mode="clip")


def decomposition() -> Decomposition:
    problem = Problem(network, {"W": jnp.asarray(PIECES.sum(0))}, None, valid_fn=predicting)
    cs = components_lib.from_materialized({"W": jnp.asarray(PIECES)}, rank=1)
    method = AllOn(num_components=C, mask_per="position", minimality_loss="kl")
    return Decomposition(problem, cs, method)
