"""The reference points of a target, in units of which losses are measured.

A coefficient then means the same on every target. The recipe measures all its losses so, and so
does a method with `loss_units` = "target".
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from apd_jax import components as components_lib
from apd_jax import losses
from apd_jax.components import Components
from apd_jax.components.layout import Layout, unfold
from apd_jax.errors import InputError
from apd_jax.forward import positions
from apd_jax.methods.base import Method
from apd_jax.network.outputs import outputs, position_weights, split_result
from apd_jax.network.problem import Problem
from apd_jax.train.progress import say

FAR = 0.05  # of the decomposed weights' effect: a sum that misses more is warned of
BATCHES = 20  # over which a loss is measured
_DRAWS = 0x5EED  # sets these draws apart from those of training

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Scales:
    """The reference points of a target.

    faithfulness: the loss of components that sum to 0.
    minimality: the distance of the model without the decomposed leaves from the target.
    hidden: the same of the hidden activations; 0 where there are none.
    simplicity: the loss of the whole target as one component, kept on every input:
      Σ_l uses_l Σ_j σ_j(θ*_l)^p / N.
    positions: of an example that have a mask of their own; 1 where masks are per example.
    """

    faithfulness: float
    minimality: float
    hidden: float
    simplicity: float
    positions: float = 1.0


def absolute(problem: Problem, method: Method) -> Method:
    """The method with absolute coefficients: those in units of the target are divided by them.

    The unit "components" is their number: all of them on at once cost 1.

    Raises:
      InputError: see `measure`.
    """
    if method.loss_units == "absolute":
        return method
    shapes = jax.eval_shape(lambda key: method.make_components(key, problem), jax.random.key(0))
    asked = {f: u for f, u in method.measured_in.items() if (getattr(method, f, None) or 0) > 0}
    found = measure(problem, method, with_simplicity="simplicity" in asked.values())
    units = dataclasses.asdict(found) | {"components": shapes.num_components}
    changes: dict[str, Any] = {"loss_units": "absolute"}
    for field, unit in asked.items():
        changes[field] = getattr(method, field) / units[unit]
    return method.replace(**changes)


def prepared(problem: Problem, method: Method) -> Method:
    """The settings as training reads them: coefficients absolute, nothing left to the network."""
    ready = absolute(problem, method.fitted(problem))
    changed = [f for f in method.fields() if getattr(method, f) != getattr(ready, f)]
    if changed := [f for f in changed if f != "loss_units"]:
        told = ", ".join(f"{f} = {_short(getattr(ready, f))}" for f in changed)
        units = " (coefficients in units of the target)" if method.loss_units == "target" else ""
        say(f"Decided by this network{units}: {told}.")
    return ready


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else repr(value)


def warn_if_far(problem: Problem, method: Method, found: Sequence[Components]) -> None:
    """Logs a warning if the components' sum is not the network, where it should be."""
    if not getattr(method, "faithfulness_coeff", 0) > 0:
        return
    far = np.max([missing(problem, method, components) for components in found])
    if not far <= FAR:
        log.warning(
            "the components' sum is not the network: it misses %.0f %% of what the decomposed "
            "weights do to the outputs. Raise faithfulness_coeff or num_steps, or give more "
            "components.",
            100 * far,
        )


def missing(problem: Problem, method: Method, components: Components) -> float:
    """What the components' sum misses of what the decomposed leaves do.

    D(f(θ*, x), f(Σ_c P_c, x)) / D(f(θ*, x), f(0, x)) on one batch: 0 is all there, 1 as without
    them. 0 where the leaves do nothing.
    """
    x = problem.example_batch()

    def distance(components: Components, params: PyTree, x: PyTree, share: Any) -> jax.Array:
        moved = components_lib.weighted_sum(components, params, share)
        out, target = [outputs(problem.body(p, x)) for p in (moved, params)]
        weights, head = position_weights(problem.valid(x))[0], problem.head(params)
        return losses.minimality(out, target, method.distance, weights, head=head)

    of_share = jax.jit(distance)
    ones = jnp.ones(components.num_components)
    some, none = (of_share(components, problem.params, x, share) for share in (ones, 0 * ones))
    return 0.0 if none == 0 else float(some) / float(none)


def measure(problem: Problem, method: Any, with_simplicity: bool = True) -> Scales:
    """The reference points of a problem, on fresh batches.

    Args:
      with_simplicity: else that is NaN, and no singular values are taken.
    Cost: two passes of the network over BATCHES batches, the singular values of every matrix.

    Raises:
      InputError: the outputs, or the hidden activations where they count, do not change when the
        decomposed leaves are set to 0; or are not finite.
    """
    minimality, hidden = distances(problem, method, _without(problem))
    own = callable(method.distance)
    if not np.isfinite([minimality, hidden]).all():
        raise InputError(
            "minimality_loss is not finite where all decomposed leaves are set to 0; look at that "
            "function, or at the network's weights and data."
            if own
            else "the outputs are not finite, of the network itself or with all decomposed leaves "
            "set to 0; look at its weights and data, or set loss_units = 'absolute'."
        )
    if minimality == 0:
        raise InputError(
            "minimality_loss is 0 where all decomposed leaves are set to 0, too: it must grow with "
            "the distance of the two outputs that it is given."
            if own
            else "the outputs stay the same when all decomposed leaves are set to 0; there is "
            "nothing to decompose."
        )
    if hidden == 0 and getattr(method, "hidden_reconstruction_coeff", 0) > 0:
        raise InputError(
            "hidden_reconstruction_coeff is above 0, but apply_fn returns no hidden activations "
            "that depend on the decomposed leaves."
        )
    sites, uses = problem.sites, problem.uses or {}
    counts = {name: float(uses.get(name, 1)) for name in sites}
    size = sum(counts[name] * leaf.size for name, leaf in sites.items())
    squares = {n: float(_sum_of_squares(a)) for n, a in sites.items()}
    simplicity = np.nan
    if with_simplicity:
        spectra = {n: _singular_values(problem, n) ** float(method.norm_p) for n in sites}
        simplicity = sum(counts[n] * float(np.sum(spectra[n])) for n in sites) / size
    return Scales(
        faithfulness=sum(counts[n] * squares[n] for n in sites) / size,
        minimality=minimality,
        hidden=hidden,
        simplicity=simplicity,
        positions=_positions(problem) if method.per_position else 1.0,
    )


def _positions(problem: Problem) -> float:
    """Of an example, those that count; the mean over a batch."""
    x = problem.example_batch()
    valid = problem.valid(x)
    if valid is not None:
        return float(jnp.mean(jnp.sum(valid, axis=1)))
    shape = jax.eval_shape(lambda p, x: outputs(problem.body(p, x)), problem.params, x).shape
    return float(shape[1]) if len(shape) > 1 else 1.0


@jax.jit
def _sum_of_squares(leaf: jax.Array) -> jax.Array:
    return jnp.sum(losses.single(leaf) ** 2)


def _without(problem: Problem) -> PyTree:
    """params with the decomposed leaves at 0."""
    zeros = {name: jnp.zeros_like(leaf) for name, leaf in problem.sites.items()}
    return components_lib.replace_leaves(problem.params, zeros)


def _singular_values(problem: Problem, site: str) -> np.ndarray:
    """Of a site's matrix; of all its matrices where layers are stacked."""
    leaf = losses.single(jnp.asarray(problem.sites[site]))
    matrices = unfold(leaf, problem.layouts.get(site, Layout.default(leaf.ndim)))
    return np.linalg.svd(np.asarray(matrices), compute_uv=False)


def distances(problem: Problem, method: Any, params: PyTree) -> tuple[float, float]:
    """How far the network with these parameters is from the target.

    In the outputs, and in the hidden activations (0 without any).
    """

    def of_batch(ends: tuple[PyTree, PyTree], x: PyTree) -> tuple[jax.Array, jax.Array]:
        (out, hidden), (target_out, target_hidden) = [
            split_result(problem.body(params, x)) for params in ends
        ]
        weights, head = position_weights(problem.valid(x))[0], problem.head(ends[1])
        distance = losses.minimality(out, target_out, method.distance, weights, head=head)
        if not hidden:
            return distance, jnp.zeros(())
        of_hidden = positions.hidden_weights(problem.body, ends[0], x, weights)
        return distance, losses.hidden_reconstruction(hidden, target_hidden, of_hidden)

    ends, measure = (params, jax.tree.map(jnp.asarray, problem.params)), jax.jit(of_batch)
    key = jax.random.fold_in(jax.random.key(method.seed), _DRAWS)
    distance, hidden = np.mean([measure(ends, x) for x in problem.looks(key, BATCHES)], axis=0)
    return float(distance), float(hidden)
