"""What functions are made of."""

import jax
import jax.numpy as jnp
from networks import NETWORKS

from apd_jax.forward.primitives import uses_primitive


def test_functions_without_forward_derivatives_are_found():
    found = {name for name, build in NETWORKS.items() if _has_custom_vjp(*build())}
    assert found == {"custom_vjp_activation", "custom_vjp_on_weights_and_in_a_scan"}


def _has_custom_vjp(fn, params, x):
    return uses_primitive(fn, params, x)


def test_names_are_looked_for_in_loops_branches_and_inner_functions():
    def fn(x):
        h = jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=2)[0]
        h = jax.lax.cond(h.sum() > 0, jnp.cos, jax.jit(jnp.exp), h)
        return jax.lax.while_loop(lambda h: h.sum() < 9, lambda h: h + jnp.tan(x), h)

    abstract = jax.ShapeDtypeStruct((3,), jnp.float32)
    for name in ("sin", "cos", "exp", "tan", "lt"):
        assert uses_primitive(fn, abstract, names=(name,)), name
    assert not uses_primitive(fn, abstract, names=("tanh", "dot_general"))
