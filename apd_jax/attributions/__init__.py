"""A_c(x): how much a component matters for an input.

Shapes: B examples, C components, T positions, O outputs (all output axes but the first, flattened), n probes.
`params` is where the gradient is taken: the target's, or `components.total(...)` for the sum.

How far outputs move is measured in a metric, the same for all kinds of attribution:
  mse  A² = mean_o δ_o²
  kl   A² = mean over positions of Σ_v p_v δ_v² - (Σ_v p_v δ_v)²,  p = softmax of the outputs: to second order twice the KL divergence
with δ the change of the outputs. Positions that are not `valid` (padding) do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jaxtyping import Array, Bool, Float, PyTree

from apd_jax import components as components_lib
from apd_jax.components import Components
from apd_jax.errors import InputError, one_of
from apd_jax.forward import sparse
from apd_jax.network.outputs import outputs

KINDS = ("gradient", "integrated_gradient", "ablation", "activation")
MODES = ("auto", "forward", "reverse", "probe")
METRICS = ("mse", "kl")
INTEGRATION_STEPS = 16
_TWO_PRODUCTS = 4

# What one chunk of tangents or Jacobians may hold in its largest array: a CPU is fastest when it stays in cache
# (TMS 40-10, batch 2048: a step takes 5.8 ms of processor time with 4 MiB, 8.0 ms with 16), an accelerator when it is busy.
_CHUNK_BYTES = {"cpu": 4 * 2**20}
_CHUNK_BYTES_ELSEWHERE = 512 * 2**20


def squared(
    kind: str,
    apply_fn: Callable,
    params: PyTree,
    components: Components,
    x: PyTree,
    *,
    mode: str = "auto",
    metric: str = "mse",
    valid: Bool[Array, "B T"] | None = None,
    per_position: bool = False,
    num_probes: int = 8,
    rng: Array | None = None,
) -> Float[Array, "B *T C"]:
    """A_c(x)² of any kind; of gradients it has a finite derivative where it is 0, which A_c(x) has not.

    Args:
      kind: gradient | integrated_gradient | ablation | activation: see the functions of these names.
      apply_fn: (params, x) -> outputs [B, ...], or (outputs, hidden). Example b of the output depends on example b alone.
      mode: how gradients are taken.
        forward  C tangents of one linearised pass; of components of low rank through their factors.
        reverse  `jax.vjp` over the O output dimensions, example by example, contracted with every P_c.
        probe    unbiased estimate from n random output directions: A² = E (v·J P_c)² for v with independent signs, since
                 E v vᵀ = 1. One backward pass per probe gives all components. The relative standard deviation of A² is at most
                 sqrt(2/n), and smaller the more outputs a component moves independently.
        auto     forward unless O = 1 or the network has functions with a custom_vjp; per position reverse.
      metric: mse | kl, how the change of the outputs is measured (see the module).
      valid: which positions of the outputs [B, T, ...] count.
      per_position: how each position's use of the weights matters: [B, T, C]. Gradients in mode reverse or probe, or activation.
      num_probes, rng: n, and the key of the signs (or one key per example, [B]); only for mode probe.
    Returns: [B, C], or [B, T, C] per position.
    Raises:
      InputError: components and params differ; an unknown kind, mode or metric; options that do not go together.
    Cost: forward C·(a forward pass); reverse B·O·(a backward pass + C·|θ|), which is why auto takes forward: a tangent costs about
      what a cotangent does, and the contraction alone costs O times as much. probe n·(a backward pass + B·C·m·(d_in + d_out) per
      leaf). Memory is bounded by chunks of components or examples, at most 4 MiB each on CPU.
    """
    one_of("attribution", kind, KINDS)
    one_of("attribution_mode", mode, MODES)
    one_of("attribution_metric", metric, METRICS)
    if per_position and (kind in ("integrated_gradient", "ablation") or mode == "forward"):
        raise InputError(
            f"attributions per position are gradients in mode auto, reverse or probe, or activations; got {kind!r} in mode {mode!r}."
        )
    if mode == "probe" and rng is None:
        raise InputError(
            "attribution mode 'probe' draws random output directions; give it a key as rng."
        )
    if kind == "activation":
        summed = components_lib.total(components, params)
        return _through_gates(
            apply_fn, summed, components, x, metric, valid, per_position, "activation"
        )
    if kind == "ablation":
        return _ablation_squared(apply_fn, params, components, x, metric, valid)
    moved_fn = (
        _averaged(apply_fn, params, components) if kind == "integrated_gradient" else apply_fn
    )
    leaves = components_lib.decomposed_leaves(components, params)

    def model(leaves: dict[str, Array], x: PyTree, valid: Any) -> Float[Array, "B O"]:
        out = outputs(moved_fn(components_lib.replace_leaves(params, leaves), x))
        at = out if moved_fn is apply_fn else outputs(apply_fn(params, x))
        return in_metric(out, jax.lax.stop_gradient(at), metric, valid)

    num_outputs = jax.eval_shape(model, leaves, x, valid).shape[1]
    if mode == "probe" or per_position:
        keys = rng if mode == "probe" else None
        return _through_gates(
            moved_fn,
            params,
            components,
            x,
            metric,
            valid,
            per_position,
            "gradient",
            num_probes,
            keys,
        )
    if mode == "reverse" or (mode == "auto" and num_outputs == 1):
        return _reverse(model, leaves, components, x, valid)
    try:
        if kind == "gradient" and _low_rank(components):
            return _forward_factored(apply_fn, params, components, x, metric, valid)
        return _forward(model, leaves, components, x, valid)
    except TypeError as error:
        if mode == "auto" and "custom_vjp" in str(error):  # such functions have no tangents
            return _reverse(model, leaves, components, x, valid)
        raise


def gradient(
    apply_fn: Callable, params: PyTree, components: Components, x: PyTree, **options: Any
) -> Float[Array, "B *T C"]:
    r"""How far the outputs move, to first order, when P_c is ablated: [B, C], in units of the output.

    A_c(x) = sqrt( mean_o ( ∂f_o(x, θ)/∂θ · P_c )² )          (APD eq. 3)

    Args: as in `squared`.
    """
    return jnp.sqrt(squared("gradient", apply_fn, params, components, x, **options))


def integrated_gradient(
    apply_fn: Callable, params: PyTree, components: Components, x: PyTree, **options: Any
) -> Float[Array, "B C"]:
    r"""The gradient averaged over the path on which the decomposed weights grow from 0 to θ.

    A_c(x) = sqrt( mean_o ( ∫₀¹ ∂f_o(x, αθ)/∂θ dα · P_c )² )          (midpoint rule, INTEGRATION_STEPS points)

    Complete: the signed terms of components that sum to θ add up to f(x, θ) - f(x, 0). It sees past a saturated softmax.

    Args: as in `squared`. Cost: INTEGRATION_STEPS times `gradient`.
    """
    return jnp.sqrt(squared("integrated_gradient", apply_fn, params, components, x, **options))


def ablation(
    apply_fn: Callable, params: PyTree, components: Components, x: PyTree, **options: Any
) -> Float[Array, "B C"]:
    r"""How far the outputs really move when P_c is taken from the component sum.

    A_c(x) = sqrt( mean_o ( f_o(x, Σ_i P_i) - f_o(x, Σ_i P_i - P_c) )² )

    Args: as in `squared`; metric and valid only. Cost: C + 1 forward passes, in chunks of components. The gradient attribution is
      its first-order estimate.
    """
    return jnp.sqrt(squared("ablation", apply_fn, params, components, x, **options))


def activation(
    apply_fn: Callable, params: PyTree, components: Components, x: PyTree, **options: Any
) -> Float[Array, "B *T C"]:
    r"""How strongly a component's own part of every matrix product is driven, wherever that leads.

    A_c(x) = sqrt( Σ_uses ‖h P_c‖² ),  h the input of each use of a decomposed leaf in the pass with all components

    Uses other than products, convolutions and lookups do not count. Args: as in `squared`. Cost: one pass forward and back,
      with B·C·m·d_in per leaf.
    """
    return jnp.sqrt(squared("activation", apply_fn, params, components, x, **options))


def in_metric(
    change: Float[Array, "B ..."], out: Float[Array, "B ..."], metric: str, valid: Any = None
) -> Float[Array, "B O"]:
    """A linear map of changes of the outputs `out`, after which their squared norm is what the metric says of them."""
    count = math.prod(out.shape[1:])
    if metric == "kl":
        p = jax.nn.softmax(out, axis=-1)
        change = jnp.sqrt(p) * (change - jnp.sum(p * change, axis=-1, keepdims=True))
        count = math.prod(out.shape[1:-1])
    if valid is not None:
        if out.shape[:2] != valid.shape:
            raise InputError(
                f"valid has shape {valid.shape}, but the outputs have {out.shape}; they must agree in examples and positions."
            )
        weight = valid / jnp.maximum(jnp.mean(valid, axis=1, keepdims=True), 1e-6)
        change = change * jnp.sqrt(weight).reshape(*weight.shape, *[1] * (out.ndim - 2)).astype(
            out.dtype
        )
    return change.reshape(out.shape[0], -1) / math.sqrt(count)


def _averaged(apply_fn: Callable, params: PyTree, components: Components) -> Callable:
    """The function whose gradient at params is the average of apply_fn's over the path of integrated gradients."""
    fixed = components_lib.decomposed_leaves(components, params)

    def fn(p: PyTree, x: PyTree) -> Array:
        moving = components_lib.decomposed_leaves(components, p)

        def at(alpha):
            return outputs(
                apply_fn(
                    components_lib.replace_leaves(
                        p, {n: moving[n] - (1 - alpha) * fixed[n] for n in moving}
                    ),
                    x,
                )
            )

        return jnp.mean(
            jax.lax.map(at, (jnp.arange(INTEGRATION_STEPS) + 0.5) / INTEGRATION_STEPS), axis=0
        )

    return fn


def _forward(model, leaves, components, x, valid):
    _, tangent = jax.linearize(lambda leaves: model(leaves, x, valid), leaves)

    def one(factors):
        return _row_sums(
            tangent({name: f.weights.astype(leaves[name].dtype) for name, f in factors.items()})
            ** 2
        )

    widest = max(
        _largest_array(tangent, leaves), sum(leaf.nbytes for leaf in leaves.values())
    )  # a component's own weights are formed
    return _chunked(one, components.factors, components.num_components, widest).T


def _low_rank(components: Components) -> bool:
    """Whether activations pass U and V with fewer operations than the P_c that these make, by a factor that makes up for two products."""
    factors = components.factors.values()
    return _TWO_PRODUCTS * sum(f.U[0].size + f.V[0].size for f in factors) < sum(
        f.num_params for f in factors
    )


def _forward_factored(apply_fn, params, components, x, metric, valid):
    """The same tangents with no P_c formed: x·dP_c = (x U_c) V_c wherever the leaf meets activations in a product."""

    def one(factors):
        component = jax.tree.map(lambda a: a[None], factors)

        def moved(s):
            out = outputs(
                sparse.together(apply_fn, params, component, s, None, x, flavor="tangent")
            )
            return in_metric(out, jax.lax.stop_gradient(out), metric, valid)

        return _row_sums(jax.jvp(moved, (jnp.zeros(1),), (jnp.ones(1),))[1] ** 2)

    widest = _largest_array(one, jax.eval_shape(lambda: jax.tree.map(lambda a: a[0], components)))
    return _chunked(one, components, components.num_components, widest).T


def _row_sums(squares: Float[Array, "B O"]) -> Float[Array, " B"]:
    """Sums over the last axis, as a product with ones: XLA on CPU adds up short rows several times slower than it multiplies."""
    return jnp.dot(
        squares, jnp.ones(squares.shape[1], squares.dtype), precision="highest"
    )  # accelerators would round the squares


def _reverse(model, leaves, components, x, valid):
    stacked = {name: f.weights for name, f in components.factors.items()}
    num_outputs = jax.eval_shape(model, leaves, x, valid).shape[1]

    def one(example):
        batch = jax.tree.map(lambda a: a[None], example)
        out, pullback = jax.vjp(lambda leaves: model(leaves, *batch)[0], leaves)
        jacobian = jax.vmap(lambda cotangent: pullback(cotangent)[0])(
            jnp.eye(num_outputs, dtype=out.dtype)
        )
        dot = sum(
            jnp.tensordot(
                jacobian[n].reshape(num_outputs, -1), p.reshape(p.shape[0], -1), axes=(1, 1)
            )
            for n, p in stacked.items()
        )
        return jnp.sum(dot**2, axis=0)  # [O, C] -> [C]

    return _chunked(
        one,
        (x, valid),
        _batch_size(x),
        num_outputs * 4 * sum(leaf.size for leaf in leaves.values()),
    )


def _through_gates(
    apply_fn, params, components, x, metric, valid, per_position, flavor, num_probes=0, rng=None
):
    """By the derivative in gates s of f(θ + Σ_c s_c P_c) at s = 0: one backward pass per output direction gives every component
    (and position). Without rng all O directions are taken, which is exact."""
    shape = jax.eval_shape(lambda: outputs(apply_fn(params, x))).shape
    if per_position and len(shape) < 2:
        raise InputError(
            f"attributions per position need outputs [B, T, ...]; apply_fn gives {shape}."
        )
    gates = jnp.zeros(
        (*shape[1:2], components.num_components) if per_position else (components.num_components,)
    )
    keys = (
        rng
        if rng is None or rng.ndim
        else jax.vmap(lambda b: jax.random.fold_in(rng, b))(jnp.arange(shape[0]))
    )

    def one(example):
        x_b, valid_b, key = example

        def moved(gates):
            out = outputs(
                sparse.substituted(apply_fn, params, components, gates, None, x_b, flavor=flavor)
            )[None]
            return in_metric(
                out, jax.lax.stop_gradient(out), metric, None if valid_b is None else valid_b[None]
            )[0]

        z, pullback = jax.vjp(moved, gates)
        if flavor == "activation":  # the "derivative" is the answer itself, whatever comes back
            return pullback(jnp.ones_like(z))[0]
        if key is None:
            return jnp.sum(
                jax.lax.map(lambda v: pullback(v)[0], jnp.eye(z.size, dtype=z.dtype)) ** 2, axis=0
            )
        signs = jax.random.rademacher(key, (num_probes, z.size), z.dtype)
        return jnp.mean(
            jax.vmap(lambda v: pullback(v)[0])(signs) ** 2, axis=0
        )  # together: what they share is computed once

    examples = (x, valid, keys)
    first = jax.eval_shape(lambda: jax.tree.map(lambda a: a[0], examples))
    return _chunked(one, examples, shape[0], _largest_array(one, first))


def _ablation_squared(apply_fn, params, components, x, metric, valid):
    summed = components_lib.total(components, params)
    leaves = components_lib.decomposed_leaves(components, summed)
    whole = outputs(apply_fn(summed, x))

    def one(factors):
        without = {
            name: leaves[name] - f.weights.astype(leaves[name].dtype) for name, f in factors.items()
        }
        change = outputs(apply_fn(components_lib.replace_leaves(summed, without), x)) - whole
        return jnp.sum(in_metric(change, whole, metric, valid) ** 2, axis=1)

    widest = _largest_array(lambda p: apply_fn(p, x), summed)
    return _chunked(one, components.factors, components.num_components, widest).T


def _batch_size(x: PyTree) -> int:
    return jax.tree.leaves(x)[0].shape[0]


def _largest_array(fn: Callable, *args: Any) -> int:
    """Bytes of the largest array that one evaluation of `fn` makes, constants aside (inner jaxprs included)."""

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (
                math.prod(v.aval.shape) * v.aval.dtype.itemsize
                for v in eqn.outvars
                if hasattr(v.aval, "shape")
            )
            for inner in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda p: isinstance(p, (Jaxpr, ClosedJaxpr))
            ):
                if isinstance(inner, (Jaxpr, ClosedJaxpr)):
                    yield from sizes(getattr(inner, "jaxpr", inner))

    return max(sizes(jax.make_jaxpr(fn)(*args).jaxpr), default=1)


def _chunked(fn: Callable, xs: PyTree, length: int, bytes_each: int) -> Array:
    """`vmap(fn)(xs)` in chunks of bounded size: equal ones if the length has a divisor near, else the last is shorter."""
    fitting = max(1, _CHUNK_BYTES.get(jax.default_backend(), _CHUNK_BYTES_ELSEWHERE) // bytes_each)
    if fitting >= length:
        return jax.vmap(fn)(xs)
    divisor = max(d for d in range(1, fitting + 1) if length % d == 0)
    return jax.lax.map(fn, xs, batch_size=divisor if 2 * divisor > fitting else fitting)
