"""What a stranger's network may get wrong, each in one sentence."""

import jax
import jax.numpy as jnp
import pytest

import apd_jax
from apd_jax.errors import InputError
from apd_jax.network.problem import Problem, check_function

PARAMS = {"W": jnp.ones((3, 2)), "b": jnp.zeros(2), "unused": jnp.ones((2, 2))}


def linear(params, x):
    return x @ params["W"] + params["b"][None]


def sample(rng, step):
    return jax.random.normal(rng, (4, 3))


@pytest.mark.parametrize(
    ("apply_fn", "select", "sentence"),
    [
        (lambda params, x: linear(PARAMS, x), "W", "does not depend on params leaf 'W'"),
        (
            lambda params, x: jax.lax.while_loop(
                lambda h: h.sum() < 0, lambda h: h * 2, linear(params, x)
            ),
            "W",
            "Try using lax.scan",
        ),
        (linear, "unused", "does not depend on params leaf 'unused'"),
        (lambda params, x: {"logits": linear(params, x)}, "W", "must return a floating array"),
        (
            lambda params, x: jnp.argmax(linear(params, x), axis=1),
            "W",
            "must return a floating array",
        ),
        (lambda params, x: (linear(params, x), linear(params, x)), "W", "its second value is a"),
        (lambda params, x: linear(params, x).T, "W", "keep the batch as first axis"),
        (lambda params, x: linear(params, x).mean(), "W", "keep the batch as first axis"),
        (lambda params, x: x[:, :2] @ params["W"], "W", "fails on params and a batch"),
        (
            lambda params, x: linear(params, x - x.mean(0, keepdims=True)),
            "W",
            "must treat examples one by one",
        ),
        (
            lambda params, x: linear(
                params, x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)
            ),
            "W",
            "must treat examples one by one",
        ),
        (
            lambda params, x: linear(params, x.reshape(2, 2, 3).reshape(4, 3)),
            "W",
            "with a batch of one it fails",
        ),
    ],
)
def test_refused(apply_fn, select, sentence):
    method = apd_jax.APD(batch_size=4)
    with pytest.raises(InputError, match=sentence):
        apd_jax.decompose(apply_fn, PARAMS, sample, method, select=select)


def test_a_leaf_that_is_no_array_is_refused():
    with pytest.raises(InputError, match="params leaf 'act' is a function, not an array"):
        apd_jax.decompose(
            lambda params, x: params["act"](linear(params, x)),
            PARAMS | {"act": lambda a: a},
            sample,
            apd_jax.default_config(),
        )


def test_a_leaf_used_inside_jit_counts_as_used():
    check_function(Problem(jax.jit(linear), PARAMS, sample, select="W"))


def test_an_empty_place_in_params_shifts_no_names():
    """None is no leaf: what is unused is named rightly after it."""
    params = {"A": None, **PARAMS}
    check_function(Problem(linear, params, sample, select="W"))
    with pytest.raises(InputError, match="does not depend on params leaf 'unused'"):
        check_function(Problem(linear, params, sample, select="unused"))
