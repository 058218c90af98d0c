"""Gates that read whole inputs: an MLP by hand, a transformer in numpy, and what it may see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import close
from scipy import special

from apd_jax.errors import InputError
from apd_jax.gates import networks

B, T, C, D, FFN = 2, 5, 7, 8, 12
WIDTHS = {"b.first": 3, "a.second": 4}  # not in alphabetical order


def gelu(z):
    return z * special.ndtr(z)


def arrays(variables):
    return jax.tree.map(np.float64, variables["params"])


def make(**fields):
    """The transformer of this file, with some fields changed."""
    settings = {"num_components": C, "d_model": D, "num_blocks": 2, "num_heads": 2, "d_ffn": FFN}
    return networks.GateTransformer(tuple(WIDTHS), **settings | fields)


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), len(WIDTHS))
    return {
        name: jax.random.normal(key, (B, T, width))
        for key, (name, width) in zip(keys, WIDTHS.items(), strict=True)
    }


@pytest.fixture(scope="module")
def variables(inputs):
    return jax.jit(make().init)(jax.random.key(1), inputs)


def test_input_mlp_by_hand():
    net = networks.InputMLP((3,), 2)
    x = jax.random.normal(jax.random.key(0), (4, 5, 6))
    variables = jax.jit(net.init)(jax.random.key(1), x)
    p = arrays(variables)
    hidden = gelu(np.float64(x) @ p["hidden_0"]["kernel"] + p["hidden_0"]["bias"])
    expected = hidden @ p["logits"]["kernel"] + p["logits"]["bias"]
    close(jax.jit(net.apply)(variables, x), expected, 1e-6)


def test_input_mlp_sizes():
    # 6 -> 3 -> 4 -> 2: (6 + 1)·3 + (3 + 1)·4 + (4 + 1)·2 = 47 parameters; without widths (6 + 1)·2.
    for widths, expected in (((3, 4), 47), ((), 14)):
        variables = jax.jit(networks.InputMLP(widths, 2).init)(jax.random.key(0), jnp.zeros((1, 6)))
        assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == expected


# The transformer in numpy: one head, one block, loops over positions.


def rms(v):
    return v / np.sqrt(np.mean(v**2, -1, keepdims=True) + np.finfo(np.float32).eps)


def turned(v, t):
    """Pair (j, j + d/2) as a complex number, times e^(i t 10000^(-2j/d))."""
    half = len(v) // 2
    pairs = (v[:half] + 1j * v[half:]) * np.exp(1j * t * 10_000.0 ** (-np.arange(half) / half))
    return np.concatenate([pairs.real, pairs.imag])


def attention(x, p, sees):
    """One head of one sequence x [T, D]: position t sees s if sees(t, s)."""
    q, k, v = (x @ p[f"block_0_{kind}"]["kernel"] for kind in ("query", "key", "value"))
    out = np.zeros_like(x)
    for t in range(len(x)):
        seen = [s for s in range(len(x)) if sees(t, s)]
        weights = np.exp([turned(q[t], t) @ turned(k[s], s) / np.sqrt(D) for s in seen])
        out[t] = weights @ v[seen] / weights.sum()
    return out @ p["block_0_mix"]["kernel"]


def transformer(inputs, p, sees):
    def dense(x, name):
        return x @ p[name]["kernel"] + p[name]["bias"]

    logits = []
    for b in range(B):
        x = dense(np.concatenate([rms(np.float64(inputs[n][b])) for n in WIDTHS], -1), "embed")
        x = x + attention(rms(x), p, lambda t, s, b=b: sees(b, t, s))
        x = x + dense(gelu(dense(rms(x), "block_0_hidden")), "block_0_out")
        logits.append(dense(rms(x), "logits"))
    return np.stack(logits)


VALID = np.arange(T)[None] < np.array(
    [[T], [3]]
)  # the second sequence has two positions of padding
SEES = {
    "all": (False, None, lambda b, t, s: True),
    "causal": (True, None, lambda b, t, s: s <= t),
    "padded": (False, VALID, lambda b, t, s: VALID[b, s]),
    "causal, padded": (True, VALID, lambda b, t, s: s <= t and VALID[b, s]),
}


@pytest.mark.parametrize("causal, valid, sees", SEES.values(), ids=SEES)
def test_transformer_in_numpy(inputs, causal, valid, sees):
    net = make(num_blocks=1, num_heads=1, causal=causal)
    variables = jax.jit(net.init)(jax.random.key(2), inputs)
    valid = None if valid is None else jnp.asarray(valid)
    close(
        jax.jit(net.apply)(variables, inputs, valid),
        transformer(inputs, arrays(variables), sees),
        3e-6,
    )


def test_transformer_sizes(variables):
    # Input 7·8 + 8; twice: attention 4·8·8, feed-forward (8·12 + 12) + (12·8 + 8); head 8·7 + 7.
    expected = 64 + 2 * (256 + 108 + 104) + 63
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == expected
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def changed(inputs, where):
    """Other inputs at the positions where `where` [B, T] is true."""
    return {
        name: jnp.where(jnp.asarray(where)[:, :, None], 3 - 2 * a, a) for name, a in inputs.items()
    }


def test_causal_sees_nothing_later(inputs, variables):
    net = make(causal=True)
    late = np.broadcast_to(np.arange(T) >= 3, (B, T))
    before, after = (jax.jit(net.apply)(variables, x) for x in (inputs, changed(inputs, late)))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.all(np.any(before[:, 3:] != after[:, 3:], axis=-1))


def test_bidirectional_sees_everything(inputs, variables):
    last = np.broadcast_to(np.arange(T) == T - 1, (B, T))
    before, after = (jax.jit(make().apply)(variables, x) for x in (inputs, changed(inputs, last)))
    assert np.all(np.any(before != after, axis=-1))


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_not_seen(inputs, variables, causal):
    net, valid = make(causal=causal), jnp.asarray(VALID)
    before, after = (
        jax.jit(net.apply)(variables, x, valid) for x in (inputs, changed(inputs, ~VALID))
    )
    np.testing.assert_array_equal(before[VALID], after[VALID])
    assert np.all(np.isfinite(after))


def test_only_padding_is_finite(inputs, variables):
    logits = jax.jit(make().apply)(variables, inputs, jnp.zeros((B, T), bool))
    assert np.all(np.isfinite(logits))


def test_scale_of_an_input_does_not_matter(inputs, variables):
    # RMS-normalised by site, and ε = 1e-7 is small against mean squares near 1.
    scaled = {name: 10.0 * (i + 1) * a for i, (name, a) in enumerate(inputs.items())}
    close(jax.jit(make().apply)(variables, scaled), jax.jit(make().apply)(variables, inputs), 1e-5)


def test_order_of_sites_is_that_of_the_field(inputs, variables):
    backwards = dict(reversed(inputs.items())) | {"not read": jnp.zeros((B, T, 1))}
    np.testing.assert_array_equal(
        jax.jit(make().apply)(variables, backwards), jax.jit(make().apply)(variables, inputs)
    )


def test_rotation_keeps_lengths_and_depends_on_distance():
    vectors = jax.random.normal(jax.random.key(3), (2, 6))
    q, k = networks.rotate(jnp.broadcast_to(vectors[:, None, None], (2, T, 1, 6)))[:, :, 0]
    close(jnp.sum(q**2, axis=-1), np.full(T, jnp.sum(vectors[0] ** 2)), 1e-6)
    products = q @ k.T  # [t, s]
    for shift in range(-2, 3):
        diagonal = np.diag(products, shift)
        close(diagonal, np.full_like(diagonal, diagonal[0]), 1e-5)


def test_half_precision_gives_float32(inputs, variables):
    half = {name: a.astype(jnp.bfloat16) for name, a in inputs.items()}
    full = {name: a.astype(jnp.float32) for name, a in half.items()}
    logits = jax.jit(make().apply)(variables, half)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, jax.jit(make().apply)(variables, full))


def test_refuses(inputs, variables):
    first = {"b.first": inputs["b.first"]}
    with pytest.raises(InputError, match=r"'a\.second'"):
        jax.jit(make().apply)(variables, first)
    with pytest.raises(InputError, match="one-hot"):
        jax.jit(make().apply)(variables, first | {"a.second": jnp.zeros((B, T, 4), jnp.int32)})
    with pytest.raises(InputError, match="multiple of twice the number of heads, 8"):
        make(num_heads=8).init(jax.random.key(0), inputs)
