"""Components that begin at singular directions, beside NumPy's SVD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apd_jax import components as lib
from apd_jax.components.layout import Layout
from apd_jax.methods.spd import SPD
from apd_jax.network.problem import Problem

RNG = np.random.default_rng(0)
PARAMS = {
    "wide": RNG.normal(size=(4, 6)).astype(np.float32),
    "stack": RNG.normal(size=(2, 5, 3)).astype(np.float32),
    "beside": np.ones(3, np.float32),
}


@pytest.fixture(scope="module", params=[(6, 1), (2, 3), (3, 1)], ids=["more", "blocks", "fewer"])
def begun(request):
    n, m = request.param
    key = jax.random.key(1)
    layouts = {"stack": Layout((0,), (1,), (2,))}
    drawn = lib.init(
        key,
        PARAMS,
        num_components=n,
        rank=m,
        init_scale=1.0,
        select=["wide", "stack"],
        layouts=layouts,
    )
    return drawn, jax.jit(lib.at_singular)(drawn, PARAMS)


def test_pieces_are_singular_directions_the_largest_first(begun):
    found = begun[1]
    for name, matrices in (("wide", PARAMS["wide"][None]), ("stack", PARAMS["stack"])):
        f = found.factors[name]
        n, m = f.num_pieces, f.rank
        got = np.asarray(jnp.einsum("n...im,n...mo->n...io", f.U, f.V)).reshape(n, *matrices.shape)
        for i, W in enumerate(matrices):
            u, s, vt = np.linalg.svd(W, full_matrices=False)
            s = np.pad(s, (0, max(0, n * m - len(s))))[: n * m].reshape(n, m)
            u, vt = (np.pad(a, ((0, 0), (0, max(0, n * m - a.shape[1])))) for a in (u, vt.T))
            u, v = (a[:, : n * m].reshape(len(a), n, m) for a in (u, vt))
            want = np.einsum("inm,nm,onm->nio", u, s, v)
            np.testing.assert_allclose(got[:, i], want, atol=1e-5)
        whole = lib.holds_all(f)
        assert whole == (n * m >= min(matrices.shape[1:]))
        total = np.asarray(lib.total(found, PARAMS)[name]).reshape(matrices.shape)
        assert np.allclose(total, matrices, atol=1e-5) == whole


def test_what_is_left_over_adds_nothing_and_can_learn(begun):
    drawn, found = begun
    for name, f in found.factors.items():
        left = np.abs(np.asarray(f.V)).max(axis=(*range(1, f.V.ndim - 2), -1)) == 0
        U, before = (np.moveaxis(np.asarray(a.factors[name].U), -1, 1) for a in (found, drawn))
        np.testing.assert_array_equal(U[left], before[left])
        assert not np.any(np.asarray(U)[left] == 0)


def test_a_method_begins_there_and_needs_no_warm_up():
    def apply_fn(params, x):
        return x @ params["wide"]

    params = {"wide": jnp.asarray(PARAMS["wide"])}
    problem = Problem(apply_fn, params, lambda key, step: jax.random.normal(key, (8, 4)))
    kept = {"initial": "svd", "init_scale": 1.0, "faithfulness_warmup_steps": 30}
    for count, exact in ((5, True), (2, False)):
        method = SPD(num_components=count, **kept)
        begun = method.make_components(jax.random.key(0), problem)
        first = lib.at_singular(begun, params)
        apart = [
            float(jnp.abs(a - b).max())
            for a, b in zip(begun.factors["wide"].V, first.factors["wide"].V, strict=True)
        ]
        assert (max(apart) == 0) == exact
