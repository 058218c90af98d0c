"""Which axes of a weight are inputs: uses that the networks of `networks.py` do not have."""

import jax
import jax.numpy as jnp

from apd_jax.components import layout
from apd_jax.components.layout import Layout

MATRIX = Layout((), (0,), (1,))


def test_parts_of_a_stack_that_is_taken_apart():
    params = {"w": jnp.ones((3, 4, 5)), "v": jnp.ones((3, 5, 4))}

    def fn(p, x):
        for w, v in zip(jnp.unstack(p["w"]), p["v"], strict=True):
            x = x + jnp.tanh(x @ w) @ v
        return x

    stack = Layout((0,), (1,), (2,))
    assert layout.infer(fn, params, jnp.ones((2, 4))) == {"w": stack, "v": stack}


def test_a_weight_scaled_by_a_number_is_a_view_and_its_inverse_is_not():
    params = {"a": jnp.ones((4, 5)), "b": jnp.ones((4, 5)), "c": jnp.ones((4, 5))}

    def fn(p, x):
        return x @ (0.5 * p["a"]) + x @ (p["b"] / 3) + x @ (2 / p["c"])

    assert layout.infer(fn, params, jnp.ones((2, 4))) == {"a": MATRIX, "b": MATRIX}


def test_the_first_use_counts():
    params = {"w": jnp.ones((4, 6)), "e": jnp.ones((7, 6))}

    def fn(p, x):
        h = p["e"][x["tokens"]] @ p["w"].T  # its outputs are contracted first
        return (h @ p["w"]) @ p["e"].T

    x = {"tokens": jax.ShapeDtypeStruct((2, 3), jnp.int32)}
    found = layout.infer(fn, params, x)
    assert found == {"w": Layout((), (1,), (0,)), "e": MATRIX}


def test_inner_functions_hand_views_on():
    params = {"w": jnp.ones((4, 5))}
    turn = jax.jit(lambda w: w.T)

    def fn(p, x):
        return jax.lax.cond(x.sum() > 0, lambda w: x @ w.T, lambda w: -x @ w.T, turn(p["w"]))

    assert layout.infer(fn, params, jnp.ones((2, 4))) == {"w": MATRIX}
