"""Outputs scored in chunks: the losses, gradients and tables of whole ones, which never exist."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apd_jax import SPD, losses
from apd_jax.decomposition import Decomposition
from apd_jax.evaluation import language
from apd_jax.language.tokens import PAD, cross_entropy, predicting
from apd_jax.network import headed, problem
from apd_jax.network.headed import Headed
from apd_jax.network.problem import Problem
from apd_jax.train.state import init_state
from apd_jax.train.step import make_loss, make_step

B, T, D, V = 3, 5, 4, 11
rng = np.random.default_rng(0)
PARAMS = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in
          {"E": (V, D), "W": (D, D), "U": (D, V)}.items()}  # fmt: skip
TOKENS = jnp.asarray(np.where(np.arange(T) < [[5], [3], [4]], rng.integers(0, V, (B, T)), PAD))
SETTINGS = SPD(num_components=3, batch_size=B, mask_per="position", minimality_loss="kl")


def body(params, tokens):
    x = jnp.take(params["E"], tokens, axis=0, mode="clip")
    return x + jnp.tanh(x @ params["W"])


def head(params, x):
    return x @ params["U"]


def whole(params, tokens):
    return head(params, body(params, tokens))


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Two positions at a time: 15 leave one over, 12 none."""
    monkeypatch.setattr(problem, "WIDE", 8)
    monkeypatch.setattr(headed, "CHUNK", 2 * V)


def of(network, select="W", **fields):
    return Problem(
        network, PARAMS, lambda rng, step: TOKENS, select=select, valid_fn=predicting, **fields
    )


@pytest.mark.parametrize("kind", ["kl", "mse", "next_token"])
@pytest.mark.parametrize("padded", [False, True])
def test_losses_and_gradients_are_those_of_whole_outputs(kind, padded):
    here, there = (jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32) for _ in range(2))
    weights = predicting(TOKENS) * 1.5 if padded else None
    here = here.at[1, 3].set(jnp.nan) if padded else here  # at padding, where it is not seen
    own = lambda x: head(PARAMS, x)  # noqa: E731
    x = jnp.maximum(TOKENS, 0)

    def plain(out):
        return losses.minimality(own(out), own(there), kind, weights, x)

    def chunked(out):
        return losses.minimality(out, there, kind, weights, x, head=own)

    for fn in (lambda f: f, jax.jit):
        found, expected = (fn(jax.value_and_grad(f))(here) for f in (chunked, plain))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), found, expected
        )
        assert np.isfinite(expected[0]) and np.abs(found[1]).max() > 1e-3


def test_a_distance_of_ones_own_gets_whole_outputs():
    out = body(PARAMS, TOKENS)
    seen = []
    losses.minimality(
        out, out, lambda a, b: seen.append(a.shape) or 0.0, head=lambda x: head(PARAMS, x)
    )
    assert seen == [(B, T, V)]


def test_cross_entropy_in_chunks():
    out = body(PARAMS, TOKENS)
    found = cross_entropy(out, TOKENS, head=lambda x: head(PARAMS, x))
    np.testing.assert_allclose(found, cross_entropy(head(PARAMS, out), TOKENS), rtol=1e-5)


def test_weights_of_the_head_have_no_derivative():
    """Rather refused than 0."""
    out = body(PARAMS, TOKENS)
    with pytest.raises(jax.errors.UnexpectedTracerError):
        jax.grad(lambda p: losses.minimality(out, 2 * out, "kl", head=lambda x: head(p, x)))(PARAMS)


def test_a_step_forms_no_whole_outputs():
    """Neither the target's nor those of a pass, in the loss or in its gradient."""

    def largest(jaxpr):
        outs = [v.aval for eqn in jaxpr.eqns for v in eqn.outvars]
        inner = jax.tree.leaves([list(eqn.params.values()) for eqn in jaxpr.eqns])
        sizes = [largest(j) for j in inner if hasattr(j, "eqns")]
        return max([*sizes, *(a.size for a in outs if a.shape[-1:] == (V,))], default=0)

    found = {}
    for name, network in (("chunks", Headed(body, head)), ("whole", whole)):
        own = of(network)
        state = init_state(jax.random.key(0), own, SETTINGS)
        step = make_step(own, SETTINGS)
        found[name] = largest(jax.make_jaxpr(step)(state, PARAMS, jax.random.key(1)).jaxpr)
        loss = make_loss(own, SETTINGS)
        found[f"{name} loss"] = loss(
            state.components, state.gate, PARAMS, jax.random.key(1), TOKENS
        )
    assert found["chunks"] < B * T * V <= found["whole"]
    np.testing.assert_allclose(found["chunks loss"], found["whole loss"], rtol=1e-5)


def test_the_table_is_that_of_whole_outputs():
    metrics = []
    for network in (Headed(body, head), whole):
        own = of(network)
        state = init_state(jax.random.key(0), own, SETTINGS)
        found = Decomposition(own, state.components, SETTINGS, gate=state.gate)
        metrics.append(language.evaluate(found, [TOKENS]))
    assert set(metrics[0]) == set(metrics[1])
    for name, value in metrics[1].items():
        assert metrics[0][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_when_outputs_are_whole(monkeypatch):
    """Where the head is decomposed itself, where they are narrow, or not said to have a head."""
    assert of(Headed(body, head)).body.fn is body
    for own in (of(Headed(body, head), select=["W", "U"]), of(whole)):
        assert own.body is own.apply_fn and own.head(PARAMS) is None
    monkeypatch.setattr(problem, "WIDE", V)
    narrow = of(Headed(body, head))
    assert narrow.body is narrow.apply_fn


def test_hidden_activations_pass_the_head():
    network = Headed(lambda p, x: (body(p, x), {"h": x}), head)
    out, hidden = network(PARAMS, TOKENS)
    np.testing.assert_array_equal(out, whole(PARAMS, TOKENS))
    assert list(hidden) == ["h"]
