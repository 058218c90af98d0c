"""Small problems whose mechanisms are known, with settings of quick stages."""

import jax
import jax.numpy as jnp
import numpy as np

from apd_jax.methods.apd import APD
from apd_jax.network.problem import Problem
from apd_jax.recipe.numbers import STAGES, default_recipe
from apd_jax.targets.base import feature_sampler

DIAGONAL = np.diag([3.0, 2.0]).astype(np.float32)


def small(**more):
    """Quick stages; components begin at random, as they do where modes explain too little."""
    r = default_recipe()
    r.update({"restarts": 2, "least_explained": 2.0} | more)
    r.update({stage: {"num_steps": 6} for stage in STAGES})
    method = APD(
        num_components=4,
        batch_size=1000,
        steps_per_call=3,
        log_every_steps=3,
        checkpoint_every_steps=3,
    )
    return method, r


def linear_problem(data=None):
    """f(x) = x W + 1, x standard normal."""

    def sample(key, step):
        return jax.random.normal(jax.random.fold_in(key, step), (1000, 2))

    return Problem(
        lambda p, x: x @ p["W"] + p["b"][None],
        {"W": jnp.asarray(DIAGONAL), "b": jnp.ones(2)},
        data or sample,
    )


def one_feature_at_a_time(W, num_instances=1):
    """f(x) = x W, x a single feature of random size: every row of W is a mechanism."""

    def sample(key, step):
        which, size = jax.random.split(jax.random.fold_in(key, step))
        feature = jax.nn.one_hot(jax.random.randint(which, 64, 0, len(W)), len(W))
        return feature * jax.random.uniform(size, (64, 1), minval=0.5)

    method, r = small(least_explained=0.8)
    method = method.replace(
        num_components=len(W) + 1, batch_size=64, topk=1.0, rank=2, num_instances=num_instances
    )
    return Problem(lambda p, x: x @ p["W"], {"W": jnp.asarray(W)}, sample), method, r


def three_features():
    return one_feature_at_a_time(np.diag([3.0, 2.0, 1.0]).astype(np.float32))


def features_of_their_own(F=5, p=0.2):
    """f(x) = x W, W diagonal, every feature on with probability p: F p on average. k is open."""

    def sample(key, step):
        on, size = jax.random.split(jax.random.fold_in(key, step))
        return jax.random.bernoulli(on, p, (256, F)) * jax.random.uniform(size, (256, F))

    _, method, r = one_feature_at_a_time(np.eye(F))
    W = jnp.diag(jnp.linspace(1.0, 2.0, F))
    problem = Problem(lambda params, x: x @ params["W"], {"W": W}, sample)
    return problem, method.replace(batch_size=256, topk=0.0), r


def mixtures_of_three():
    """f(x) = x W, exactly three of sixteen features on, so that no example has one alone."""
    _, method, r = one_feature_at_a_time(np.eye(2))
    W = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    sample = feature_sampler(256, 16, 0.1, signed=False, num_on=3)
    problem = Problem(lambda params, x: x @ params["W"], {"W": jnp.asarray(W)}, sample)
    return problem, method.replace(num_components=18, batch_size=256, topk=0.0), r


def twelve_dimensions():
    """x is standard normal in twelve dimensions: hardly any two examples have a cosine of 0.95."""
    method, r = small(least_explained=0.8)

    def sample(key, step):
        return jax.random.normal(jax.random.fold_in(key, step), (method.batch_size, 12))

    return Problem(lambda p, x: x @ p["W"], {"W": jnp.eye(12)}, sample), method, r


def six_features_that_share_a_layer(C):
    """f(x) = x W H, every row of W a mechanism, H of rank 3."""
    W = np.array([[3.0, 0, 0], [0, 2, 0], [0, 0, 2], [1, 1, 0], [0, 1, -1], [-1, 0, 1]], np.float32)
    one, method, r = one_feature_at_a_time(W)
    params = one.params | {"H": jnp.diag(jnp.array([1.0, 2.0, 3.0]))}
    problem = Problem(lambda p, x: x @ p["W"] @ p["H"], params, one.sample_fn)
    return problem, method.replace(num_components=C), r
