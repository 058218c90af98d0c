"""What a run must be before its first step, and stay at every one."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from apd_jax import losses
from apd_jax.errors import InputError, NonFiniteError, first_line
from apd_jax.methods.base import HERE, Method
from apd_jax.network import data
from apd_jax.network.outputs import split_result
from apd_jax.network.problem import Problem, check_params


def data_fits(problem: Problem, method: Method) -> None:
    """Checks that weights are finite, and data and outputs what the method's settings ask for.

    Raises:
      InputError: they are not.
    """
    if (len(method.streams) > 1) != (problem.elsewhere is not None):
        raise InputError(
            f"method {method.name!r} needs a second stream of data; give elsewhere."
            if problem.elsewhere is None
            else f"elsewhere is read by methods of two streams of data, not by {method.name!r}."
        )
    check_params(problem)
    shapes = data.shapes(problem.source)
    _loss_fits(problem, method, shapes[HERE] if problem.elsewhere is not None else shapes)
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(shapes)}
    if sizes != {method.batch_size}:
        raise InputError(
            f"sample_fn gives arrays with leading sizes {sorted(map(str, sizes))}, but batch_size "
            f"is {method.batch_size}; make them equal, or of an iterable give ragged='join'."
        )


def _loss_fits(problem: Problem, method: Method, x: PyTree) -> None:
    kind = method.minimality_loss
    out = split_result(jax.eval_shape(problem.apply_fn, problem.params, x))[0]
    if method.distance == "kl" and (len(out.shape) < 2 or out.shape[-1] < 2):
        raise InputError(
            f"minimality_loss = {kind} takes the outputs' last axis as logits; of outputs "
            f"{out.shape} there are fewer than two: use mse."
        )
    valid = jax.eval_shape(problem.valid, x)
    weights = None if valid is None else jax.ShapeDtypeStruct(valid.shape, jnp.float32)
    try:
        jax.eval_shape(lambda *a: losses.minimality(a[0], a[0], kind, *a[1:]), out, weights, x)
    except InputError:
        raise
    except Exception as error:
        name = getattr(kind, "__name__", kind)
        raise InputError(
            f"minimality_loss, {name}, fails on outputs {out.shape}: {first_line(error)}."
        ) from error


def losses_finite(metrics: Mapping[str, np.ndarray], start: int, kept: int | None) -> None:
    """Checks the losses of the steps after `start`.

    Args:
      kept: the step of the newest checkpoint, if there is one.
    Raises:
      NonFiniteError: one of them is not finite.
    """
    bad = [
        (int(np.argmin(finite)), name)
        for name, values in metrics.items()
        if not (finite := np.isfinite(values.reshape(len(values), -1)).all(1)).all()
    ]
    if not bad:
        return
    first, _ = min(bad)
    terms = [name for i, name in bad if i == first and name != "total"] or ["total"]
    after = "" if kept is None else f" The checkpoint of step {kept} is kept."
    raise NonFiniteError(
        f"training stopped at step {start + first + 1}: not finite: {', '.join(terms)}; try a "
        f"smaller learning_rate or init_scale.{after}"
    )
