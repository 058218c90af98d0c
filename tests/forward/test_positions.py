"""Masks and attributions per position, padding, the KL metric and random probes.

Against plain definitions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_method, make_problem, seen
from draws import drawn_components

import apd_jax
from apd_jax import attributions, components, losses
from apd_jax.errors import InputError
from apd_jax.forward import sparse
from apd_jax.train.state import init_state
from apd_jax.train.step import make_step

B, T, V, C = 4, 3, 5, 3
rng = np.random.default_rng(0)
PARAMS = {
    name: jnp.asarray(rng.standard_normal(shape, np.float32), jnp.float32)
    for name, shape in {"e": (7, 4), "w": (4, 6), "v": (6, V)}.items()
}
PARAMS |= {"b": jnp.asarray(np.linspace(-0.5, 0.5, 6), jnp.float32)}
TOKENS = jnp.asarray(rng.integers(7, size=(B, T)), jnp.int32)
# One program each; the first arguments are names and functions.
squared = jax.jit(
    attributions.squared, static_argnums=(0, 1), static_argnames=("mode", "metric", "num_probes")
)
squared_per_position = jax.jit(
    functools.partial(attributions.squared, per_position=True),
    static_argnums=(0, 1),
    static_argnames=("mode", "num_probes"),
)


def network(p, tokens):
    """Looks back one position, then acts on each: e is looked up, w and v multiply."""
    x = p["e"][tokens]
    x = x + jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return jax.nn.gelu(x @ p["w"] + p["b"][None, None, :]) @ p["v"]


def by_hand(weights, tokens):
    """The same with a weight for every position, leaves [T, ...]; one example."""
    x = jax.vmap(lambda e, t: e[t])(weights["e"], tokens)
    x = x + jnp.pad(x[:-1], ((1, 0), (0, 0)))
    return jnp.einsum(
        "td,tde->te",
        jax.nn.gelu(jnp.einsum("td,tde->te", x, weights["w"]) + PARAMS["b"][None, :]),
        weights["v"],
    )


@pytest.fixture(scope="module")
def cs():
    return drawn_components(PARAMS, 3.0, num_components=C, select=["e", "w", "v"])


def per_position(cs, s, base=0.0):
    """Leaves [T, ...]: base·θ + Σ_c s_tc P_c."""
    P = components.materialize(cs)
    return {
        n: base * PARAMS[n][None] + jnp.einsum("tc,c...->t...", s, P[n]) for n in ("e", "w", "v")
    }


def test_every_position_uses_its_own_components(cs):
    mask = jnp.asarray(np.random.default_rng(0).uniform(size=(B, T, C)) < 0.5)

    def oracle(cs):
        return jax.vmap(lambda m, x: by_hand(per_position(cs, m.astype(jnp.float32)), x))(
            mask, TOKENS
        )

    def loss(cs, route):
        out = (
            oracle(cs)
            if route == "oracle"
            else sparse.apply(network, PARAMS, cs, mask, TOKENS, route=route, slots=2)
        )
        return jnp.sum(out**2), out

    same = jnp.broadcast_to(mask[:, :1], mask.shape)
    derive = jax.value_and_grad(loss, has_aux=True)
    routes = ("oracle", "masked", "dispatch", "materialize")
    results, of_positions, of_examples = jax.jit(
        lambda cs: (
            {r: derive(cs, r) for r in routes},
            sparse.apply(network, PARAMS, cs, same, TOKENS),
            sparse.apply(network, PARAMS, cs, mask[:, 0], TOKENS),
        )
    )(cs)
    (_, expected), gradient = results.pop("oracle")
    for route, ((_, out), other) in results.items():
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5, err_msg=route)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                a, b, rtol=1e-3, atol=1e-4 * float(np.abs(b).max())
            ),
            other,
            gradient,
        )
    # The same mask at every position is a mask per example.
    np.testing.assert_allclose(of_positions, of_examples, rtol=1e-4, atol=1e-5)


def test_attributions_of_each_positions_use(cs):
    def one(x):
        jacobian = jax.jacrev(lambda s: by_hand(per_position(cs, s, base=1.0), x))(
            jnp.zeros((T, C))
        )  # [T, V, T, C]
        return jnp.sqrt(jnp.mean(jacobian**2, axis=(0, 1)))

    expected = jax.jit(jax.vmap(one))(TOKENS)
    found = jax.jit(
        lambda cs: attributions.gradient(network, PARAMS, cs, TOKENS, per_position=True)
    )(cs)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_probes_are_unbiased_and_their_error_falls_as_stated(cs):
    args = ("gradient", network, PARAMS, cs, TOKENS)
    exact = np.asarray(squared(*args))
    errors = {
        n: np.stack(
            [
                np.asarray(squared(*args, mode="probe", rng=jax.random.key(i), num_probes=n))
                / exact
                - 1
                for i in range(100)
            ]
        )
        for n in (2, 32)
    }
    for n, error in errors.items():
        spread = error.std(axis=0)
        assert (
            spread <= 1.25 * np.sqrt(2 / n)
        ).all()  # 100 draws: the estimate of a deviation is off by 7 %
        assert (np.abs(error.mean(axis=0)) < 4 * spread / 10).all()
    every = np.asarray(squared_per_position(*args))
    many = squared_per_position(*args, mode="probe", rng=jax.random.key(0), num_probes=2000)
    np.testing.assert_allclose(many, every, rtol=0.25, atol=1e-3 * float(every.max()))


@pytest.mark.parametrize("mode", ["forward", "reverse", "probe"])
def test_kl_metric_is_twice_the_divergence(cs, mode):
    options = {"rng": jax.random.key(0), "num_probes": 3000} if mode == "probe" else {}
    found = np.asarray(
        squared("gradient", network, PARAMS, cs, TOKENS, mode=mode, metric="kl", **options)
    )
    run, step = jax.jit(network), np.float32(1e-2)
    target = run(PARAMS, TOKENS)
    P = {n: None if p is None else np.asarray(p) for n, p in components.materialize(cs).items()}
    for c in range(C):
        moved = run(
            {
                n: PARAMS[n] if p is None else np.asarray(PARAMS[n]) + step * p[c]
                for n, p in P.items()
            },
            TOKENS,
        )
        p, q = (np.exp(np.asarray(out, np.float64)) for out in (target, moved))
        p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
        divergence = (p * np.log(p / q)).sum(-1).mean(1)
        np.testing.assert_allclose(found[:, c], 2 * divergence / step**2, rtol=0.15)


def test_integrated_gradients_are_complete():
    """One component that is the network, one output: what the output loses without it."""
    one = components.from_materialized({n: None if n == "b" else PARAMS[n][None] for n in PARAMS})
    fn = lambda p, x: jnp.tanh(0.05 * network(p, x).sum((1, 2)))[:, None]  # noqa: E731
    nothing = {n: PARAMS[n] if n == "b" else jnp.zeros_like(PARAMS[n]) for n in PARAMS}
    found, ablated, whole, without = jax.jit(
        lambda cs: (
            attributions.integrated_gradient(fn, PARAMS, cs, TOKENS),
            attributions.ablation(fn, PARAMS, cs, TOKENS),
            fn(PARAMS, TOKENS),
            fn(nothing, TOKENS),
        )
    )(one)
    lost = np.abs(np.subtract(whole, without))
    np.testing.assert_allclose(found, lost, rtol=0.05)
    np.testing.assert_allclose(ablated, lost, rtol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [{}, {"mask": "learned", "threshold": 0.3, "importance_coeff": 0.1, "num_always_on": 1}],
    ids=str,
)
def test_padding_counts_nowhere(cs, fields):
    valid = jnp.asarray(
        [[True] * 3, [True, True, False], [True, False, False], [True, True, False]]
    )
    valid_fn = lambda x: x["valid"]  # noqa: E731
    fn = lambda p, x: network(p, x["tokens"])  # noqa: E731
    method = make_method(
        mask_per="position",
        attribution_metric="kl",
        minimality_loss="kl",
        num_components=C,
        topk=1.5,
        batch_size=B,
        **fields,
    )
    metrics = {}
    for name, tokens in {"a": TOKENS, "b": jnp.where(valid, TOKENS, 6 - TOKENS)}.items():
        batch = {"tokens": tokens, "valid": valid}
        problem = make_problem(
            fn,
            PARAMS,
            lambda key, i, batch=batch: batch,
            valid_fn=valid_fn,
            select=["e", "w", "v"],
        )
        state = init_state(jax.random.key(0), problem, method)
        arrays = {"log_thresholds": jnp.log(jnp.array([9, 0.5, 9]))} if fields else ()
        gate = method.gate(arrays, problem)
        mask = gate(seen(jnp.ones((B, T, C)), batch, valid=valid)).active
        state, metrics[name] = jax.jit(make_step(problem, method))(state, PARAMS, jax.random.key(1))
        # ⌊1.5 · 8 positions⌋, or two of three components.
        assert mask.sum() == (16 if fields else 12) and not mask[~valid].any()
    if fields:
        assert 0 < metrics["a"]["importance"] < C - 1 and metrics["a"]["mean_active"] >= 1
    else:
        assert metrics["a"]["mean_active"] == 1.5
    for name, value in metrics["a"].items():
        np.testing.assert_allclose(value, metrics["b"][name], rtol=1e-5, err_msg=name)


def test_weighted_losses_are_means_over_what_counts():
    out, target = jax.random.normal(jax.random.key(0), (2, B, T, V))
    valid = np.random.default_rng(1).uniform(size=(B, T)) < 0.6
    weights = jnp.asarray(valid / valid.mean(), jnp.float32)
    squares = np.asarray((out - target) ** 2)
    np.testing.assert_allclose(
        losses.minimality(out, target, "mse", weights), squares[valid].mean(), rtol=1e-5
    )
    found = losses.hidden_reconstruction(
        {"h": out, "p": out[:, 0]},
        {"h": target, "p": target[:, 0]},
        {"h": jnp.broadcast_to(weights[..., None], out.shape), "p": None},
    )
    expected = (squares[valid].mean() * B * T * V + squares[:, 0].sum()) / (B * T * V + B * V)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("select", "options", "sentence"),
    [
        (["b"], {}, "leaf 'b' is used by more than matrix products"),
        (["w"], {"mode": "forward"}, "per position are gradients"),
        (["w"], {"kind": "ablation"}, "per position are gradients"),
        (["w"], {"mode": "probe"}, "give it a key"),
    ],
)
def test_refused(select, options, sentence):
    some = drawn_components(PARAMS, num_components=2, select=select)
    with pytest.raises(InputError, match=sentence):
        attributions.squared(
            options.pop("kind", "gradient"),
            network,
            PARAMS,
            some,
            TOKENS,
            per_position=True,
            **options,
        )


def test_positions_that_are_gone_are_refused():
    fn = lambda p, x: jnp.mean(x, axis=1) @ p["w"]  # noqa: E731
    some = drawn_components({"w": PARAMS["w"]}, num_components=2)
    sentence = r"leaf 'w' meets activations of shape \(1, 4\), .* carries the 3 positions \(none is"
    with pytest.raises(InputError, match=sentence):
        sparse.apply(
            fn, {"w": PARAMS["w"]}, some, jnp.ones((B, 3, 2), jnp.bool_), jnp.ones((B, 3, 4))
        )


def test_decompose_per_position():
    config = apd_jax.default_config()
    config.update(
        num_components=4,
        topk=1.0,
        batch_size=8,
        num_steps=4,
        steps_per_call=2,
        mask_per="position",
        minimality_loss="kl",
    )
    config.update(attribution_mode="probe", attribution_metric="kl", num_probes=2)
    sample = lambda rng, step: jax.random.randint(jax.random.fold_in(rng, step), (8, T), 0, 7)  # noqa: E731
    decomposition = apd_jax.decompose(network, PARAMS, sample, config)
    assert (
        decomposition.mask(TOKENS).shape == (B, T, 4) and decomposition.mask(TOKENS).sum() == B * T
    )
    assert decomposition.sparse_output(TOKENS).shape == (B, T, V)
    assert np.isfinite(decomposition.history[-1]["total"])
