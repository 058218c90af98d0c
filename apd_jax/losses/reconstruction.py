"""How far components are from the target's parameters, and a sparse pass from its outputs.

Shapes: B examples, T positions, L sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from apd_jax import components as components_lib
from apd_jax.components import Components, path_name
from apd_jax.errors import InputError, one_of
from apd_jax.network.headed import Head, by_rows
from apd_jax.network.outputs import position_weights

DISTANCES = ("mse", "kl", "next_token")
Distance = str | Callable[[Array, Array], Array]
_FUNCTION = "function "  # before its name in a file
_TOKENS = ("tokens", "input_ids")  # what the integers of a batch that are tokens are called


def single(x: Array) -> Array:
    """x in single precision if it is less precise."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def faithfulness(components: Components, params: PyTree) -> Float[Array, ""]:
    r"""How far the components are from summing to the target.

    Σ_l uses_l ‖θ*_l - Σ_c P_{c,l}‖² / N          (APD eq. 5; VPD's MSE(Δ) where no leaf is tied)

    Cost: one matmul [d_in, n·m] x [n·m, d_out] per leaf.
    """
    leaves = components_lib.decomposed_leaves(components, params)
    errors = [
        f.uses * jnp.sum((components_lib.leaf_total(f) - single(leaves[name])) ** 2)
        for name, f in components.factors.items()
    ]
    return jnp.asarray(sum(errors)) / components.num_params


def relative_faithfulness(components: Components, params: PyTree) -> Float[Array, ""]:
    r"""mean_l ‖θ*_l - Σ_c P_{c,l}‖² / ‖θ*_l‖²: every site in units of its own size."""
    leaves = components_lib.decomposed_leaves(components, params)
    errors = []
    for name, f in components.factors.items():
        leaf = single(leaves[name])
        missing = jnp.sum((components_lib.leaf_total(f) - leaf) ** 2)
        errors.append(missing / jnp.maximum(jnp.sum(leaf**2), 1e-30))
    return jnp.asarray(sum(errors)) / len(errors)


def minimality(
    sparse_out: Float[Array, "B ..."],
    target_out: Float[Array, "B ..."],
    kind: Distance = "mse",
    weights: Float[Array, "B T"] | None = None,
    x: PyTree = None,
    axis_name: str | None = None,
    head: Head | None = None,
) -> Float[Array, ""]:
    r"""D(f(θ*, x), f(κ(x), x)), averaged over the batch  (APD eq. 6).

    mse: mean over batch and outputs of the squared difference.
    kl:  mean over batch (and positions) of KL(softmax(target) ‖ softmax(sparse)) over the last
         axis, in nats. A logit that is -inf on both sides adds nothing.
    next_token: mean over b and t < T of -log softmax(f(κ(x), x)_bt)[x_b,t+1], the cross-entropy of
         the sparse model on the data's own next tokens, in nats; the target's outputs are not
         read. Of positions that count, and whose next one does.
    a function (sparse, target) -> a number, or values [B] or [B, T] of which the mean counts.

    Args:
      weights: of each position of outputs [B, T, ...], with mean 1: 0 for padding, where a function
        is given outputs of 0.
      x: the batch; for next_token.
      axis_name: the mapped axis over which the batch is split, over which `weights` have mean 1;
        the mean over devices is then that of the whole batch.
      head: outputs are what it makes of the two, in chunks of positions; a function gets them all.
    Raises:
      InputError: unknown kind; of a function, values that do not fit.
    """
    known(kind)
    if callable(kind) and head is not None:
        sparse_out, target_out = head(sparse_out), head(target_out)
    sparse_out = counted(single(sparse_out), weights)
    target_out = counted(single(target_out), weights)
    if callable(kind):
        return _mean_of(kind(sparse_out, target_out), sparse_out, weights)
    if kind == "next_token":
        tokens = next_tokens(x, sparse_out.shape)
        return _next_token(sparse_out, tokens, weights, axis_name, head)
    if kind == "mse" and head is None:
        return jnp.mean(weighted((sparse_out - target_out) ** 2, weights))
    each = _mean_square if kind == "mse" else _kl
    if head is None:
        return jnp.mean(weighted(each(sparse_out, target_out), weights))
    score = lambda out, target: each(single(out), single(head(target)))  # noqa: E731
    return jnp.mean(weighted(by_rows(head, score, sparse_out, target_out), weights))


def _mean_square(sparse: Float[Array, "*n V"], target: Float[Array, "*n V"]) -> Float[Array, "*n"]:
    return jnp.mean((sparse - target) ** 2, axis=-1)


def _kl(sparse: Float[Array, "*n V"], target: Float[Array, "*n V"]) -> Float[Array, "*n"]:
    log_p, log_q = jax.nn.log_softmax(target), jax.nn.log_softmax(sparse)
    impossible = jnp.isneginf(log_p)  # p = 0: its term is 0, whatever q is
    ratio = jnp.where(impossible, 0.0, log_p) - jnp.where(impossible, 0.0, log_q)
    return jnp.sum(jnp.exp(log_p) * ratio, axis=-1)


def _mean_of(values: Any, out: Array, weights: Array | None) -> Float[Array, ""]:
    """The mean of what a function says of a batch."""
    values = jnp.asarray(values)
    lead = values.shape[: 1 if weights is None else 2]
    if values.ndim and lead != out.shape[: len(lead)]:
        raise InputError(
            f"minimality_loss gives values {values.shape} of outputs {out.shape}; give a number, "
            "or one for every example, or position."
        )
    if weights is None:
        return jnp.mean(single(values))
    if values.ndim == 0:
        raise InputError(
            "minimality_loss gives one number, in which padding cannot be told from the rest; with "
            "valid_fn give one for every example, or position."
        )
    return jnp.mean(weighted(single(values), weights) if values.ndim > 1 else single(values))


def _next_token(
    out: Float[Array, "B T _"],
    tokens: Array,
    weights: Float[Array, "B T"] | None,
    axis_name: str | None,
    head: Head | None,
) -> Float[Array, ""]:
    if head is None:
        log_q = jax.nn.log_softmax(out[:, :-1])
        loss = -jnp.take_along_axis(log_q, tokens[:, 1:, None], axis=-1)[..., 0]
    else:
        score = lambda logits, token: -jax.nn.log_softmax(single(logits))[token]  # noqa: E731
        loss = by_rows(head, score, out[:, :-1], tokens[:, 1:])
    if weights is None:
        return jnp.mean(loss)
    counts = (weights[:, :-1] > 0) & (weights[:, 1:] > 0)
    return jnp.mean(weighted(loss, position_weights(counts, axis_name)[0]))


def next_tokens(x: PyTree, shape: tuple[int, ...]) -> Any:
    """The tokens [B, T] of a batch whose outputs are logits of this shape [B, T, V].

    Raises:
      InputError: not one array of whole numbers [B, T], or several, none of them called tokens or
        input_ids.
    """
    leaves = jax.tree_util.tree_flatten_with_path(x)[0]
    found = {
        path_name(path): a
        for path, a in leaves
        if jnp.issubdtype(a.dtype, jnp.integer) and tuple(a.shape) == shape[:2]
    }
    called = [a for name, a in found.items() if name.split(".")[-1] in _TOKENS]
    chosen = called if len(found) > 1 else list(found.values())
    if len(shape) != 3 or shape[1] < 2 or len(chosen) != 1:
        raise InputError(
            "minimality_loss = next_token needs logits [B, T, V] and one array of tokens [B, T] in "
            f"the batch (of several, one called tokens or input_ids); the outputs are {shape}."
        )
    return chosen[0]


def written(value: Any) -> Any:
    """A distance, or another setting, as files hold it: of a function its name."""
    if not callable(value):
        return value
    name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value)}"
    return _FUNCTION + name


def known(kind: Distance) -> None:
    """Raises InputError for a name that is no distance, as that of a function in a file."""
    if callable(kind):
        return
    if kind.startswith(_FUNCTION):
        raise InputError(
            f"minimality_loss was the {kind}, which is code and not stored; give it again, as "
            "minimality_loss of load, train or the settings."
        )
    one_of("minimality_loss", kind, DISTANCES)


def best_constant(
    target_out: Float[Array, "B ..."],
    kind: Distance = "mse",
    weights: Float[Array, "B T"] | None = None,
) -> Float[Array, "..."]:
    r"""One output for all examples (and positions) that is the nearest to the target's.

    mse: their mean. kl: logits of the mean of their distributions. Of other distances the mean,
    which need not be the best.

    Args:
      weights: as of `minimality`.
    """
    out = single(target_out)
    values = jax.nn.softmax(out) if kind == "kl" else out
    mean = jnp.mean(weighted(values, weights), axis=range(out.ndim - 1))
    return jnp.log(mean + 1e-30) if kind == "kl" else mean


def weighted(
    values: Float[Array, "B ..."], weights: Float[Array, "B ..."] | None
) -> Float[Array, "B ..."]:
    """values [B, T, ...] times the weights of positions.

    Positions of weight 0 give 0, whatever stands there.

    Args:
      weights: [B, T], or with as many axes as values.
    Raises:
      InputError: values do not lead with examples and positions.
    """
    return values if weights is None else counted(values, weights) * _along(values, weights)


def counted(
    values: Float[Array, "B ..."], weights: Float[Array, "B ..."] | None
) -> Float[Array, "B ..."]:
    """values, and 0 at positions of weight 0: no NaN that stands there reaches a gradient."""
    return values if weights is None else jnp.where(_along(values, weights) > 0, values, 0)


def _along(values: Array, weights: Array) -> Array:
    """Weights of positions, to be multiplied with values."""
    if weights.ndim == values.ndim:
        return weights
    if values.shape[:2] != weights.shape:
        raise InputError(
            f"valid_fn gives {weights.shape}, but the outputs have {values.shape}; they must agree "
            "in examples and positions."
        )
    return weights.reshape(*weights.shape, *[1] * (values.ndim - 2))


def hidden_reconstruction(
    sparse_hidden: Mapping[str, Float[Array, "B ..."]],
    target_hidden: Mapping[str, Float[Array, "B ..."]],
    weights: Mapping[str, Float[Array, "B ..."] | None] | None = None,
) -> Float[Array, ""]:
    r"""mean_b Σ_l ‖h_l(θ*, x_b) - h_l(κ(x_b), x_b)‖² / Σ_l width_l  (APD appendix A.3).

    l runs over the named activations.

    Args:
      weights: of the positions of every activation, with as many axes as it: 0 for padding. See
        `apd_jax.forward.positions.hidden_weights`.
    Raises:
      InputError: the two differ in names, or there are none.
    """
    if not target_hidden or set(target_hidden) != set(sparse_hidden):
        raise InputError(
            "hidden reconstruction needs apply_fn to return (outputs, {name: activations}), alike "
            f"in both passes; got {sorted(sparse_hidden)} and {sorted(target_hidden)}."
        )
    squares = []
    for name, target in target_hidden.items():
        own = None if weights is None else weights[name]
        change = counted(single(sparse_hidden[name]), own) - counted(single(target), own)
        squares.append(jnp.sum(weighted(change**2, own)))
    return jnp.asarray(sum(squares)) / float(sum(h.size for h in target_hidden.values()))
