"""TMS, the toy model of superposition: more sparse features than hidden dimensions.

  x̂ = ReLU( x W [Hid] Wᵀ + b )          (Elhage et al. 2022; APD, section 3.1)

Shapes: B examples, F features, H hidden dimensions (H < F).
W [F, H] is used twice and is one leaf. Row f is the direction of feature f, the paper's W_{:,f}.
Hid [H, H] is optional and fixed: the identity, or a rotation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from apd_jax.errors import one_of
from apd_jax.targets.base import (
    Config,
    FeatureTarget,
    at_least_one,
    feature_data,
    feature_sampler,
    identity,
    num_nonzero,
)
from apd_jax.targets.chain import Layer

HIDDEN = ("none", "identity", "rotation")


class TMS(nn.Module):
    """Returns outputs [B, F] and every matrix product, before bias and ReLU.

    The released code can reconstruct these products.
    """

    num_features: int
    d_hidden: int
    hidden: str = "none"

    @nn.compact
    def __call__(
        self, x: Float[Array, "B F"]
    ) -> tuple[Float[Array, "B F"], dict[str, Float[Array, "B _"]]]:
        W = self.param("W", nn.initializers.xavier_normal(), (self.num_features, self.d_hidden))
        b = self.param("b", nn.initializers.zeros, (self.num_features,))
        products = {"linear1": x @ W}
        h = products["linear1"]
        if self.hidden != "none":
            init = rotation if self.hidden == "rotation" else identity
            H = self.d_hidden
            h = products["hidden_0"] = h @ self.param("hidden", init, (H, H))
        products["linear2"] = h @ W.T
        return nn.relu(products["linear2"] + b[None, :]), products


def rotation(key: PRNGKeyArray, shape: tuple[int, int]) -> Float[Array, "n n"]:
    """A random rotation R whose largest plane angle is 30°, as an initialiser of a fixed matrix.

    R = exp(S), S skew-symmetric with normal entries, scaled to a largest singular value of π/6.

    Why 30°: W is tied, so feature f reaches its own output with weight w·Rw, w its row of W. Here
    that is at least cos(30°)·|w|². Under a uniformly drawn orthogonal matrix it can be negative,
    and trained targets lose features altogether (rows of W of length 0 in 40-10). At 45° a 5-2
    target still has two rows of length 0.4.
    """
    a = jax.random.normal(key, shape)
    skew = a - a.T
    # The norm is 0 in one dimension, where R = 1.
    angle = jnp.maximum(jnp.linalg.norm(skew, 2), jnp.finfo(skew.dtype).tiny)
    return jax.scipy.linalg.expm(math.pi / 6 * skew / angle)


def contracted(params: PyTree, x: Float[Array, "B F"]) -> Float[Array, "B F"]:
    """The same outputs as ReLU(x (W [Hid] Wᵀ) + b).

    A directional derivative then costs one product [B, F] x [F, F], not two or three with W.
    """
    W = params["W"]
    through = W @ params["hidden"] if "hidden" in params else W
    return nn.relu(x @ (through @ W.T) + params["b"][None, :])


def layers(hidden: str = "none") -> tuple[Layer, ...]:
    """The network as a list of layers."""
    between = () if hidden == "none" else (Layer("linear", "hidden"),)
    return (
        Layer("linear", "W"),
        *between,
        Layer("linear", "W", transpose=True),
        Layer("bias", "b"),
        Layer("relu"),
    )


def build(config: Config, batch_size: int) -> FeatureTarget:
    """The TMS target of `config` (fields: configs/tms.py).

    Raises:
      InputError: a size below 1, an unknown kind of `hidden`, or a probability outside (0, 1].
    """
    F, H = config.num_features, config.d_hidden
    hidden = one_of("target.hidden", config.hidden, HIDDEN)
    at_least_one(num_features=F, d_hidden=H)
    model = TMS(F, H, hidden)

    def apply_fn(params: PyTree, x: Array):
        return model.apply({"params": params}, x)

    return FeatureTarget(
        name="tms",
        num_features=F,
        init_fn=lambda key: model.init(key, jnp.zeros((1, F)))["params"],
        apply_fn=apply_fn,
        attribution_fn=contracted,
        loss_fn=lambda params, x: jnp.mean((apply_fn(params, x)[0] - x) ** 2),
        label_fn=lambda x: x,
        sample_fn=feature_sampler(batch_size, F, **feature_data(config), signed=False),
        pretrain_sample_fn=feature_sampler(
            config.pretrain.batch_size, F, config.feature_probability, signed=False
        ),
        feature_weights=lambda params, weights: weights["W"],
        num_active_fn=num_nonzero,
        select=("W",) if hidden == "none" else ("W", "hidden"),
        uses={"W": 2},
        frozen=() if hidden == "none" else ("hidden",),
        layers=layers(hidden),
    )


def build_untied(config: Config, batch_size: int) -> FeatureTarget:
    """The same network, trained tied, with its two matrices as leaves of their own: W_out = Wᵀ.

    SPD's paper decomposes TMS so: encoder and decoder have components, and gates, of their own.
    """
    tied = build(config, batch_size)
    assert tied.loss_fn is not None
    tied_loss: Callable[..., Any] = tied.loss_fn

    def split(params: PyTree) -> PyTree:
        return {**params, "W_out": params["W"].T}

    def apply_fn(params: PyTree, x: Array):
        products = {"linear1": x @ params["W"]}
        if "hidden" in params:
            products["hidden_0"] = products["linear1"] @ params["hidden"]
        h = products.get("hidden_0", products["linear1"])
        products["linear2"] = h @ params["W_out"]
        return nn.relu(products["linear2"] + params["b"][None, :]), products

    def loss_fn(params: PyTree, x: Array):
        return tied_loss({name: p for name, p in params.items() if name != "W_out"}, x)

    between = [layer for layer in tied.layers if layer.leaf == "hidden"]
    ends = (Layer("linear", "W_out"), Layer("bias", "b"), Layer("relu"))
    return dataclasses.replace(
        tied,
        init_fn=lambda key: split(tied.init_fn(key)),
        apply_fn=apply_fn,
        attribution_fn=None,
        loss_fn=loss_fn,
        finish_fn=split,
        select=("W", "W_out", *tied.select[1:]),
        uses={},
        frozen=("W_out", *tied.frozen),
        layers=(Layer("linear", "W"), *between, *ends),
    )
