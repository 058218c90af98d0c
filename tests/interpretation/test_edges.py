"""Edges between components, against finite differences of a network written out in numpy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close
from layered import PER_SITE, SITES, D, T, decomposition, network

from apd_jax import components as components_lib
from apd_jax.errors import InputError
from apd_jax.interpretation import edges

TOKENS = np.array([3, 1, 4, 1])
RNG = np.random.default_rng(1)
GATES = np.where(RNG.random((T, 3 * PER_SITE)) < 0.6, RNG.random((T, 3 * PER_SITE)), 0)
GATES = GATES.astype(np.float32)


@pytest.fixture(scope="module")
def found():
    return decomposition()


def arrays(found):
    W = {n: np.asarray(a, np.float64) for n, a in found.problem.params.items()}
    factors = found.components.factors
    U = [np.asarray(factors[n].U, np.float64)[..., 0] for n in SITES]
    V = [np.asarray(factors[n].V, np.float64)[:, 0] for n in SITES]
    return W, U, V


def inner(found, added, held, weights=None):
    """a [T, 9] and logits, where what site s hands on is held[s] and `added` [3, T, out].

    held None: what the weights (g of pieces, or the target's own) give; the pass itself.
    """
    W, U, V = arrays(found)
    read, handed = [], []

    def site(s, x):
        read.append(x)
        g = None if weights is None else weights[:, PER_SITE * s : PER_SITE * (s + 1)]
        y = x @ W[SITES[s]] if g is None else (g * (x @ U[s].T)) @ V[s]
        handed.append(y)
        return (y if held is None else held[s]) + (0 if added is None else added[s])

    x = W["E"][TOKENS]
    mixed = np.cumsum(np.tanh(site(0, x)), axis=0) / np.arange(1, T + 1)[:, None]
    x = x + site(1, mixed)
    logits = 2 * (x + np.tanh(site(2, x)) @ W["W4"]) @ W["E"].T
    return np.concatenate([r @ u.T for r, u in zip(read, U, strict=True)], axis=1), logits, handed


def differences(found, weights, position, token):
    """(edges [T, 9, T, 9] and [T, 9] to the logit, target first) by central differences, and a."""
    a, _, held = inner(found, None, None, weights)
    V = arrays(found)[2]
    to, out = np.zeros((T, 9, T, 9)), np.zeros((T, 9))
    for t in range(T):
        for c in range(9):
            s, j = divmod(c, PER_SITE)
            to[:, :, t, c], out[t, c] = difference(
                found, held, s, t, a[t, c] * V[s][j], position, token
            )
    return to, out, a


def difference(found, held, s, t, handed, position, token):
    """What a vector more from site s at t adds: to a [T, 9], and to the logit."""
    sides = []
    for e in (1e-4, -1e-4):
        added = [np.zeros_like(h) for h in held]
        added[s][t] = e * handed
        moved, logits, _ = inner(found, added, held)
        row = logits[position]
        sides.append((moved, row[token] - row.mean()))
    return [(plus - minus) / 2e-4 for plus, minus in zip(*sides, strict=True)]


def test_what_the_nodes_leave_over_has_its_own_effect(found):
    got = edges.of_prompt(found, TOKENS, GATES, output=(T - 1, 5))
    a, _, held = inner(found, None, None)
    on, V = GATES > 0, arrays(found)[2]
    for s in range(len(SITES)):
        own = slice(PER_SITE * s, PER_SITE * (s + 1))
        left = held[s] - (GATES[:, own] * a[:, own]) @ V[s]  # a θ* less what nodes hand on
        for t in range(T):
            to, out = difference(found, held, s, t, left[t], T - 1, 5)
            close(got.rest[:, t, s], to[on], 1e-4)
            close(got.rest_to_output[t, s], out, 1e-4)
    assert (np.abs(got.rest) > 1e-3).mean() > 0.05


def test_nothing_is_left_over_where_the_components_are_all(found):
    # The target's weights are Σ P, and all are on: what is left is rounding, and is said to be 0.
    params = components_lib.total(found.components, found.problem.params)
    whole = dataclasses.replace(found, problem=dataclasses.replace(found.problem, params=params))
    got = edges.of_prompt(whole, TOKENS, np.ones((T, 9), np.float32), output=(T - 1, 5))
    assert (got.rest == 0).all() and (got.rest_to_output == 0).all()
    assert (got.to_output != 0).any()
    masked = edges.of_prompt(whole, TOKENS, GATES, output=(T - 1, 5), masked=True)
    assert masked.rest is masked.rest_to_output is None


@pytest.mark.parametrize("masked", [False, True])
def test_edges_are_the_direct_effects(found, masked):
    got = edges.of_prompt(found, TOKENS, GATES, output=(T - 1, 5), masked=masked)
    assert got.sites == SITES
    on = GATES > 0
    assert np.array_equal(np.stack([got.position, got.component]), np.stack(np.nonzero(on)))
    assert np.array_equal(got.site, got.component // PER_SITE)
    to, out, a = differences(found, GATES if masked else None, T - 1, 5)
    close(got.activation, a[on])
    close(got.gate, GATES[on])
    close(got.weight, to[on][:, on] * GATES[on], 1e-4)
    close(got.to_output, out[on] * GATES[on], 1e-4)
    # From W1 to W3 there is no way but through W2; none back, none to earlier positions.
    source, target = got.site[None], got.site[:, None]
    assert (got.weight[(source >= target) | (target - source == 2)] == 0).all()
    assert (got.weight[got.position[None] > got.position[:, None]] == 0).all()
    assert (np.abs(got.weight) > 1e-3).mean() > 0.1


def test_a_component_with_several_pieces_has_their_length(found):
    # Components 0 and 1, both of W1, become one: a = √(a_0² + a_1²), and it hands on both.
    joined = components_lib.merge(found.components, [0, 1])
    numbers = [0, 0, *range(1, 8)]
    two = dataclasses.replace(found, components=joined)
    gates = np.ones((T, 8), np.float32)
    got = edges.of_prompt(two, TOKENS, gates)
    each = edges.of_prompt(found, TOKENS, gates[:, numbers])
    a = each.activation.reshape(T, 9)
    close(got.activation.reshape(T, 8)[:, 0], np.sqrt(a[:, 0] ** 2 + a[:, 1] ** 2))
    weight = each.weight.reshape(T, 9, T, 9)
    summed = np.concatenate([weight[..., :2].sum(-1, keepdims=True), weight[..., 2:]], axis=-1)
    close(got.weight.reshape(T, 8, T, 8)[:, 1:], summed[:, 2:])


def test_edges_over_data_are_normalised_sums(found):
    tokens = np.stack([TOKENS, TOKENS[::-1], [0, 2, 6, -1]])
    got = edges.over_data(found, [tokens[:2], tokens[2:]], components=[3, 5, 7])
    total, mass, squares, count = np.zeros((9, 9)), np.zeros(9), np.zeros(9), 0
    for row in tokens:
        counts = np.append(row[1:] >= 0, False)  # what predicts the next token
        g = np.asarray(found.activity(row[None]).values[0])
        all_on = edges.of_prompt(found, np.maximum(row, 0), np.ones((T, 9), np.float32))
        weight = all_on.weight.reshape(T, 9, T, 9)
        total += np.einsum("tcsd,t,sd->cd", weight, counts, g * counts[:, None])
        mass += (g * counts[:, None]).sum(0)
        squares += (all_on.activation.reshape(T, 9) ** 2 * counts[:, None]).sum(0)
        count += counts.sum()
    assert (mass > 0).any() and got.targets.tolist() == [3, 5, 7] == list(got.component[[3, 5, 7]])
    size = np.sqrt(squares / count)
    close(got.size, size)
    close(got.mass, mass)
    expected = total / np.where(mass > 0, mass, np.inf)[None] / size[:, None]
    close(got.weight, expected[[3, 5, 7]], 1e-4)


def test_what_has_no_edges(found):
    with pytest.raises(InputError, match="no component is on"):
        edges.of_prompt(found, TOKENS, np.zeros((T, 9)))
    with pytest.raises(InputError, match="component 9 does not exist"):
        edges.over_data(found, [TOKENS[None]], components=[9])
    with pytest.raises(InputError, match="at least one"):
        edges.over_data(found, [])


def test_gates_of_a_prompt_count_at_its_last_position(found):
    # Text counts up to the last token but one; a prompt is asked what comes after all of it.
    g = edges.gates_on(found, TOKENS)
    text = found.activity(TOKENS[None]).values[0]
    assert (np.asarray(text)[-1] == 0).all() and (np.asarray(g)[-1] > 0).any()
    close(g[:-1], text[:-1])
    assert network(found.problem.params, jnp.asarray(TOKENS)[None]).shape == (1, T, 7) and D == 4
