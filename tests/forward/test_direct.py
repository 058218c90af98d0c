"""Direct effects where layers are a scan over stacked matrices, and recomputed in it."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import close
from draws import drawn_components

from apd_jax.components import Layout
from apd_jax.forward import capture, direct
from apd_jax.forward.sparse import SiteWeights

L, D, T, n = 3, 4, 5, 2
RNG = np.random.default_rng(0)
PARAMS = {"W": jnp.asarray(RNG.normal(size=(L, D, D)), jnp.float32)}
X = jnp.asarray(RNG.normal(size=(T, D)), jnp.float32)
W_ = RNG.random((T, n)).astype(np.float32)


def network(params, x):
    layer = jax.checkpoint(lambda h, W: h + jnp.tanh(h @ W))
    return jax.lax.scan(lambda h, W: (layer(h, W), None), x, params["W"])[0]


def test_reads_and_their_derivatives():
    layouts = {"W": Layout((0,), (1,), (2,))}
    components = drawn_components(PARAMS, num_components=n, rank=1, layouts=layouts)
    f = components.factors["W"]
    U, V = np.asarray(f.U)[..., 0], np.asarray(f.V)[..., 0, :]  # [n, L, D]

    def rows(w, beta):
        weights = {"W": SiteWeights(w, beta)}
        _, read = direct.reads(network, PARAMS, components, weights, X)
        return read["W"].rows  # [T, L, D]

    # With β = 1 and w = 0 it is the target's own pass.
    one = jnp.ones(T)
    own = capture.inputs(network, PARAMS, components, X[None], per_position=True)[1]["W"].rows[0]
    close(rows(jnp.zeros((T, n)), one), own)
    # By hand: what layer l hands on counts as a constant but for w_j (h·U_j) V_j in it.
    h, before = np.asarray(X), []
    slopes = np.zeros((T, n, D))  # ∂h(t)/∂w_j(t) so far
    expected = np.zeros((T, L, D, n))
    for layer in range(L):
        before.append(h)
        expected[:, layer] = slopes.transpose(0, 2, 1)
        inner = h @ U[:, layer].T
        pre = (inner * W_) @ V[:, layer]
        slopes = slopes + (1 - np.tanh(pre) ** 2)[:, None] * inner[..., None] * V[None, :, layer]
        h = h + np.tanh(pre)
    close(rows(jnp.asarray(W_), None), np.stack(before, axis=1))
    slope = jax.jacrev(lambda w: rows(w, None))(jnp.asarray(W_))  # [T, L, D, T, n]
    close(np.einsum("tldtj->tldj", np.asarray(slope)), expected, 1e-4)
    off = ~np.eye(T, dtype=bool)
    assert (np.abs(np.asarray(slope)).max((1, 2, 4))[off] == 0).all()
