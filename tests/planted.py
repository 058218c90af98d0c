"""A network of one layer whose components are planted: f(x)_t = W[x_t], W = Σ_c P_c.

Component 0 adds a bigram: it writes the logit of token B when the input is token A. 1 answers to
two other tokens, by half to the second; 2 is never on; 3 is on everywhere and writes the rest. The
gate is a table: g_c = G[token, c].
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from apd_jax import components as components_lib
from apd_jax.decomposition import Decomposition
from apd_jax.gates.base import INPUTS, Activity, at_valid
from apd_jax.interpretation.harvest import Sizes
from apd_jax.language import Tokenizer
from apd_jax.language.tokens import predicting
from apd_jax.methods.apd import APD
from apd_jax.network.problem import Problem

V, C, A, B = 12, 4, 3, 7
WORDS = [*"abcdefghijk", "</script><b>"]
rng = np.random.default_rng(0)
PIECES = np.zeros((C, V, V), np.float32)
PIECES[0, A, B] = 6.0
PIECES[1, 5], PIECES[1, 6] = rng.normal(size=V), rng.normal(size=V)
PIECES[3] = 0.5 * rng.normal(size=(V, V))
G = np.zeros((V, C), np.float32)
G[A, 0] = G[5, 1] = 1.0
G[6, 1], G[:, 3] = 0.5, 0.25


class Letters(Tokenizer):
    """A tokenizer of WORDS, whose text are letters."""

    def __init__(self):
        pass

    def encode(self, text):
        return np.array([WORDS.index(letter) for letter in text], np.int32)

    def decode(self, tokens):
        return "".join(WORDS[t] for t in tokens)


@dataclasses.dataclass(frozen=True)
class Table:
    reads = frozenset({INPUTS})
    says = "a table"

    def rule(self):
        return None

    def __call__(self, seen):
        g = jnp.asarray(G)[jnp.maximum(seen.x, 0)] * (seen.x >= 0)[..., None]
        g = at_valid(g, seen.valid)
        return Activity(g, g > 0, g)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planted(APD):
    def gate(self, arrays, problem):
        return Table()


def network(params, tokens):
    return jnp.take(params["W"], tokens, axis=0, mode="clip")


def decomposition(scale=1.0, **settings):
    pieces = jnp.asarray(PIECES * scale)
    problem = Problem(network, {"W": pieces.sum(0)}, None, valid_fn=predicting)
    cs = components_lib.from_materialized({"W": pieces}, rank=V)
    given = {"mask_per": "position", "minimality_loss": "kl"} | settings
    return Decomposition(problem, cs, Planted(num_components=C, **given))


def text(num_batches, B=4, T=9, seed=1):
    """Batches of uniform tokens; in some rows the last ones are missing."""
    drawn = np.random.default_rng(seed)
    batches = drawn.integers(0, V, (num_batches, B, T)).astype(np.int32)
    batches[:, 1, 5:] = -1
    return batches


SIZES = Sizes(num_top=5, num_random=3, width=5, num_tokens=4, num_others=2, min_count=1)
TEXT = text(7)
