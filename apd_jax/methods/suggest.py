"""Settings for a network of which nothing is said: read off its inputs and outputs.

Numbers are chosen once for a kind of network, in units of the target (`Method.loss_units`), and
for all networks of that kind. Those of SPD and VPD on tokens were measured
(`docs/howto/choose.md`); those of other methods there are a first guess. Everything but tokens
gets a method's defaults.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from apd_jax.methods import registry
from apd_jax.methods.base import Method
from apd_jax.network import data
from apd_jax.network.outputs import split_result
from apd_jax.network.problem import Problem

POSITIONS = 512  # of a batch of sequences, in all
EXAMPLES = 2048  # of a batch of anything else

# What every method is given for sequences of tokens, those with learned gates, with an adversary
# among these, and each of its own.
_TOKENS: dict[str, Any] = {"mask_per": "position", "minimality_loss": "kl", "steps_per_call": 5}
_LEARNED: dict[str, Any] = {
    "num_components": 0,
    "loss_units": "target",
    "faithfulness_coeff": 10.0,
    "faithfulness_warmup_steps": 200,
    "gate_width": 4,
    "importance_coeff": 1.0,
    "num_steps": 3000,
    "learning_rate": 2e-3,
    "schedule": "half_cosine",
}
_ADVERSARIAL: dict[str, Any] = _LEARNED | {
    "gate_kind": "pieces",
    "optimizer": "adam",
    "gradient_clip": None,
    "frequency_coeff": 0.0,
    "adversary_shared": "position",
    "adversary_rate": 0.05,
}
_TOKENS_OF: dict[str, dict[str, Any]] = {
    "apd": {
        "num_components": 200,
        "rank": 1,
        "topk": 20.0,
        "attribution_metric": "kl",
        "faithfulness_coeff": 10.0,
        "simplicity_coeff": 0.1,
    },
    "spd": _LEARNED | {"layerwise_coeff": 0.0, "dropped_coeff": 1.0},
    "vpd": _ADVERSARIAL,
    "whole": _ADVERSARIAL | {"num_components": 1000},
    "targeted": _ADVERSARIAL
    | {"num_components": 200, "faithfulness_coeff": 0.0, "faithfulness_warmup_steps": 0},
}


def suggested(problem: Problem, name: str | None = None) -> Method:
    """The settings of a method, by its name, for this network.

    Where the inputs are whole numbers [B, T] and the outputs [B, T, V], the network is taken to be
    a language model: every position has components of its own, outputs are logits, and the method,
    where none is named, is SPD with as many components per matrix as it needs. Everything else
    gets a method's own defaults, of APD where none is named. The batch is the data's.

    Raises:
      InputError: there is no such method; the data or the function fail.
    """
    shapes = data.shapes(problem.sample_fn)
    size = jax.tree.leaves(shapes)[0].shape[0]
    if not reads_tokens(problem, shapes):
        return registry.by_name(name or "apd")(batch_size=size)
    return registry.by_name(name or "spd")(**for_tokens(name or "spd"), batch_size=size)


def for_tokens(name: str) -> dict[str, Any]:
    """What a method's settings are for a language model, where they are not its defaults."""
    return _TOKENS | _TOKENS_OF.get(name, {})


def why(problem: Problem, method: Method) -> str:
    """What `suggested` chose, and by what, in a sentence."""
    shapes = data.shapes(problem.sample_fn)
    default = type(method)()
    own = {f: getattr(method, f) for f in method.fields()}
    told = ", ".join(f"{f} = {v!r}" for f, v in own.items() if v != getattr(default, f))
    kind = "have no tokens with logits"
    if reads_tokens(problem, shapes):
        kind = "are tokens and logits, as of a language model"
    return (
        f"Settings that were not given: inputs and outputs {kind}, so method {method.name!r} with "
        f"{told or 'its defaults'}."
    )


def reads_tokens(problem: Problem, shapes: PyTree) -> bool:
    """Whether inputs are whole numbers [B, T] and outputs [B, T, V], as a language model's are."""
    leading = {s.shape for s in jax.tree.leaves(shapes) if s.ndim == 2 and _whole(s)}
    if not leading:
        return False
    out = split_result(jax.eval_shape(problem.apply_fn, problem.params, shapes))[0]
    return out.ndim == 3 and out.shape[:2] in leading


def batch_size(rows: PyTree) -> int:
    """How many examples of arrays [N, ...] make a batch: about 512 tokens, or 2048 examples.

    A multiple of 8, and of the number of devices, where there are as many examples.
    """
    first = jax.tree.leaves(rows)[0]
    most = EXAMPLES
    if first.ndim == 2 and _whole(first):
        most = -(-POSITIONS // max(first.shape[1], 1))
    size, devices = first.shape[0], jax.device_count()
    step = math.lcm(8, devices)
    step = step if size >= step else devices
    return max(min(-(-most // step), size // step) * step, 1)


def _whole(a: Any) -> bool:
    return jnp.issubdtype(a.dtype, jnp.integer)
