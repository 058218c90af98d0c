"""Hand-coded gated functions: n known functions of one number t  (APD, appendix B).

Every function is switched on by a bit of its own.

  r = (t, bits, 0);   r += ReLU(r W_in,i + b_in,i) W_out,i for every layer i
  out = last entry of r  ≈  Σ_f bit_f F_f(t)
  F_f(t) = a cos(b t + c) + d sin(e t + f) + g on [0, END]

Nothing is trained. Each function has m neurons of its own, which interpolate it between m knots.
The neurons of all functions are distributed over the layers at random.

The config's `gate` says what keeps a neuron at 0 while its bit is off (β is its breakpoint):
  bias     ReLU(t - β - GATE + GATE·bit_f), as in the paper. The bias acts on every input and is
           not decomposed. A component with less than half of a neuron's in-weights therefore
           leaves the neuron at exactly 0, and the minimality loss has no gradient there.
  weights  ReLU(β·bit_f - t), and one neuron ReLU(bit_f) for the offset. There is no bias, so half
           of the weights give a quarter of the output. A neuron's in-weights and out-weights have
           the same norm, so this norm says how much the neuron matters.

The true component P_f holds all weights of f's neurons: columns of W_in (two entries each, at t
and at bit f) and rows of W_out (one entry each). Σ_f P_f = θ* on the decomposed leaves.

Shapes: B examples, n functions, C components, m neurons per function, M neurons per layer,
D = n + 2 the residual width, T values of t in a sweep.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from scipy.optimize import linear_sum_assignment

from apd_jax import components as components_lib
from apd_jax.decomposition import Decomposition
from apd_jax.errors import InputError, one_of
from apd_jax.targets.base import Config, Panel, Score, Target, at_least_one
from apd_jax.targets.chain import Layer

GATES = ("bias", "weights")
END = 5.0  # t lies in [0, END]
GATE = END + 1  # keeps a neuron at 0, bit off, as long as its breakpoint lies at -1 or above
MIN_NEURONS = 6  # then the first breakpoint, END / (m - 1) below 0, lies at -1 or above
LOW = (-1.0, 0.1, -np.pi, -1.0, 0.1, -np.pi, -1.0)  # of the coefficients a, b, c, d, e, f, g
HIGH = (1.0, 1.0, np.pi, 1.0, 1.0, np.pi, 1.0)
SWEEP_VALUES = 51
# A function is found if the component matched to it has a cosine of at least FOUND_COSINE with P_f
# and a norm ratio within FOUND_NORM of 1.
FOUND_COSINE, FOUND_NORM = 0.99, 0.1
# It is computed if that component alone has a mean squared error to the target below this share of
# the target's mean square, with the function's bit alone on.
COMPUTED_ERROR = 0.05


class GatedMLP(nn.Module):
    """Returns outputs [B, 1] and, per layer, the neurons' activations [B, M]."""

    num_functions: int
    num_layers: int
    d_mlp: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B n_plus_1"]
    ) -> tuple[Float[Array, "B 1"], dict[str, Float[Array, "B M"]]]:
        D, zeros = self.num_functions + 2, nn.initializers.zeros
        r = jnp.pad(x, ((0, 0), (0, 1)))
        hidden = {}
        for i in range(self.num_layers):
            pre = (
                r @ self.param(f"mlp_in_{i}", zeros, (D, self.d_mlp))
                + self.param(f"bias_in_{i}", zeros, (self.d_mlp,))[None, :]
            )
            hidden[f"mlp_in_{i}"] = nn.relu(pre)
            r += hidden[f"mlp_in_{i}"] @ self.param(f"mlp_out_{i}", zeros, (self.d_mlp, D))
        return r[:, -1:], hidden


def function_values(
    coefficients: Float[Array, "n 7"], t: Float[Array, " T"]
) -> Float[Array, "n T"]:
    """F_f(t) of every function: a cos(b t + c) + d sin(e t + f) + g."""
    a, b, c, d, e, f, g = coefficients.T[:, :, None]
    return a * jnp.cos(b * t[None] + c) + d * jnp.sin(e * t[None] + f) + g


def neurons(
    coefficients: Float[Array, "n 7"], m: int, gate: str
) -> tuple[Float[Array, "n m"], ...]:
    """Every neuron's weight on t, weight on its bit, bias, and weight to the output.

    The interpolation is exact at m equally spaced knots.
    """
    shape, interval = (len(coefficients), m), END / (m - 1)
    if gate == "bias":
        # Breakpoints from left to right. The first lies below 0, so F_f(0) needs no extra neuron.
        knots = jnp.linspace(0, END, m)
        slopes = jnp.diff(function_values(coefficients, knots), axis=1, prepend=0) / interval
        bias = jnp.broadcast_to(-(knots - interval) - GATE, shape)
        return jnp.ones(shape), jnp.full(shape, GATE), bias, jnp.diff(slopes, axis=1, prepend=0)
    knots = jnp.linspace(END, 0, m)
    values = function_values(coefficients, knots)
    bends = jnp.diff(jnp.diff(values, axis=1) / interval, axis=1, prepend=0)
    t, bit = jnp.full(m, -1.0).at[0].set(0), jnp.concatenate([jnp.ones(1), knots[:-1]])
    out = jnp.concatenate([values[:, :1], bends], axis=1)
    scale = jnp.sqrt(jnp.maximum(jnp.abs(out), 1e-6) / jnp.hypot(t, bit)[None])
    return scale * t[None], scale * bit[None], jnp.zeros(shape), out / scale


def hand_code(
    key: PRNGKeyArray, num_functions: int, num_layers: int, neurons_per_function: int, gate: str
) -> dict[str, Array]:
    """Draws n functions and sets the weights that compute them.

    Returns:
      The weights, and under "functions" [n, 7] the coefficients, which the forward pass does not
      read.
    """
    n, m = num_functions, neurons_per_function
    draw_key, deal_key = jax.random.split(key)
    coefficients = jax.random.uniform(
        draw_key, (n, 7), minval=jnp.asarray(LOW), maxval=jnp.asarray(HIGH)
    )
    flat = [weight.reshape(-1) for weight in neurons(coefficients, m, gate)]
    params: dict[str, Array] = {"functions": coefficients}
    for i, dealt in enumerate(jax.random.permutation(deal_key, n * m).reshape(num_layers, -1)):
        t, bit, bias, out = (weight[dealt] for weight in flat)
        bits = bit[None] * jax.nn.one_hot(dealt // m, n, axis=0)
        params[f"mlp_in_{i}"] = jnp.concatenate([t[None], bits, jnp.zeros((1, len(t)))])
        params[f"bias_in_{i}"] = bias
        params[f"mlp_out_{i}"] = jnp.zeros((len(t), n + 2)).at[:, -1].set(out)
    return params


def truth(params: PyTree, num_layers: int) -> dict[str, Float[Array, "n _ _"]]:
    """P_f of every function, by leaf: all weights of the neurons that read its bit.

    Summed over f they give the decomposed leaves.
    """
    parts = {}
    for i in range(num_layers):
        W_in, W_out = params[f"mlp_in_{i}"], params[f"mlp_out_{i}"]
        owned = W_in[1:-1] != 0  # [n, M]
        parts |= {
            f"mlp_in_{i}": W_in[None] * owned[:, None, :],
            f"mlp_out_{i}": W_out[None] * owned[:, :, None],
        }
    return parts


def neuron_norms(
    weights: Mapping[str, Array | np.ndarray], num_layers: int
) -> Float[np.ndarray, "parts all_neurons"]:
    """Norm of every neuron's in-weights and out-weights together, in each of several components.

    Args:
      weights: {leaf: [components, ...]}.
    """
    parts = [
        np.hypot(
            np.linalg.norm(weights[f"mlp_in_{i}"], axis=1),
            np.linalg.norm(weights[f"mlp_out_{i}"], axis=2),
        )
        for i in range(num_layers)
    ]
    return np.concatenate(parts, axis=1)


def one_bit_inputs(num_functions: int) -> Float[Array, "n T n_plus_1"]:
    """t swept over [0, END] with exactly one bit on, for every bit."""
    n, T = num_functions, SWEEP_VALUES
    t = jnp.broadcast_to(jnp.linspace(0, END, T)[None, :, None], (n, T, 1))
    bits = jnp.broadcast_to(jnp.eye(n)[:, None], (n, T, n))
    return jnp.concatenate([t, bits], axis=2)


@dataclasses.dataclass(frozen=True)
class Matching:
    """True components beside found ones, matched one to one by cosine.

    With fewer components than functions some functions are left over. They have own = -1, and
    cosine and norm ratio 0.
    """

    true: dict[str, Float[np.ndarray, "n _ _"]]  # by leaf
    parts: dict[str, Float[np.ndarray, "C _ _"]]  # by leaf
    own: Int[np.ndarray, " n"]  # the component matched to each function
    cosine: Float[np.ndarray, " n"]  # of it and P_f, over all decomposed leaves
    ratio: Float[np.ndarray, " n"]  # its norm over that of P_f

    @property
    def found(self) -> Bool[np.ndarray, " n"]:
        return (self.cosine >= FOUND_COSINE) & (np.abs(self.ratio - 1) <= FOUND_NORM)

    @property
    def order(self) -> list[int]:
        """Components in the order of their functions, then those without a function."""
        matched = [int(c) for c in self.own if c >= 0]
        num_components = len(next(iter(self.parts.values())))
        return [*matched, *(c for c in range(num_components) if c not in matched)]


def match(decomposition: Decomposition, num_functions: int, num_layers: int) -> Matching:
    """The matching with the largest sum of cosines; no component is used twice."""
    params = decomposition.problem.params
    found = components_lib.materialize(decomposition.components)
    true = {name: np.asarray(part, np.float64) for name, part in truth(params, num_layers).items()}
    parts = {name: np.asarray(found[name], np.float64) for name in true}
    P, T = (
        np.concatenate([tree[name].reshape(len(tree[name]), -1) for name in true], axis=1)
        for tree in (parts, true)
    )
    norms, sizes = np.linalg.norm(P, axis=1), np.linalg.norm(T, axis=1)
    cosines = P @ T.T / np.maximum(np.outer(norms, sizes), 1e-12)
    component, function = linear_sum_assignment(cosines, maximize=True)
    own = np.full(num_functions, -1)
    cosine, ratio = np.zeros(num_functions), np.zeros(num_functions)
    own[function] = component
    cosine[function] = cosines[component, function]
    ratio[function] = norms[component] / sizes[function]
    return Matching(true, parts, own, cosine, ratio)


def score(decomposition: Decomposition, num_functions: int, num_layers: int) -> Score:
    """Compares components with the true ones, matched one to one by cosine.

    Metrics:
      mmcs_functions, ml2r_functions: cosine and norm ratio of the matched component and P_f, over
        all decomposed leaves, averaged over functions.
      num_functions: n. functions_found: see FOUND_COSINE and FOUND_NORM.
      success: 1 if all functions are found, else 0.
      functions_computed: see COMPUTED_ERROR.
      one_bit_error: squared error of the sparse model to the target over the target's square, on
        inputs with exactly one bit on. The component with the largest attribution is kept.
      one_bit_error_own: the same with the matched component kept.
    """
    n, apply_fn = num_functions, decomposition.problem.apply_fn
    matching = match(decomposition, n, num_layers)
    x = one_bit_inputs(n)
    flat = x.reshape(-1, n + 1)
    components = jnp.arange(decomposition.components.num_components)

    def alone(kept: Int[np.ndarray | Array, " N"]) -> Float[np.ndarray, "n T"]:
        """Outputs with one component kept on each input, none where it is -1."""
        out = decomposition.sparse_output(flat, jnp.asarray(kept)[:, None] == components[None])[0]
        return np.asarray(out).reshape(n, SWEEP_VALUES)

    target = np.asarray(apply_fn(decomposition.problem.params, flat)[0]).reshape(n, SWEEP_VALUES)
    own_out = alone(np.repeat(matching.own, SWEEP_VALUES))
    best_out = alone(jnp.argmax(decomposition.attributions(flat), axis=1))
    square = np.mean(target**2, axis=1)
    own_error = np.mean((own_out - target) ** 2, axis=1) / np.maximum(square, 1e-12)
    metrics = {
        "mmcs_functions": float(matching.cosine.mean()),
        "ml2r_functions": float(matching.ratio.mean()),
        "num_functions": n,
        "functions_found": int(matching.found.sum()),
        "success": int(matching.found.all()),
        "functions_computed": int((own_error < COMPUTED_ERROR).sum()),
        "one_bit_error": float(np.mean((best_out - target) ** 2) / max(np.mean(square), 1e-12)),
        "one_bit_error_own": float(np.mean((own_out - target) ** 2) / max(np.mean(square), 1e-12)),
    }
    labels = {
        "success": "all functions found (1)",
        "functions_found": f"functions found, of {n} (all)",
        "functions_computed": f"functions that their component computes alone, of {n} (all)",
        "mmcs_functions": "cosine with the function's weights (1)",
        "ml2r_functions": "norm over that of the function's weights (1)",
        "one_bit_error": "error with one bit on, best component alone (0)",
        "one_bit_error_own": "error with one bit on, the function's component alone (0)",
    }
    exact = np.asarray(function_values(decomposition.problem.params["functions"], x[0, :, 0]))
    panels = {
        f"function_{f}": function_panel(f, x[f, :, 0], exact[f], target[f], own_out[f])
        for f in range(n)
    }
    return Score(metrics, labels, panels | {"neurons": neuron_panel(matching, num_layers)})


def function_panel(
    f: int, t: Array, exact: np.ndarray, target: np.ndarray, own: np.ndarray
) -> Panel:
    """Function f, the target's outputs and those of its matched component, over t [T]."""
    return Panel(
        title=f"Function {f}",
        caption="Output against t with this function's bit on and all others off: of the function "
        "itself, of the target that interpolates it, and of the component matched to it. Good: "
        "all three coincide.",
        xlabel="t",
        ylabel="output",
        x=np.asarray(t),
        lines={"function": exact, "target": target, "its component alone": own},
    )


def neuron_panel(matching: Matching, num_layers: int) -> Panel:
    """Share of every neuron's norm in the true components and in the found ones."""
    true_norms = neuron_norms(matching.true, num_layers)
    part_norms = neuron_norms(matching.parts, num_layers)
    order = np.argsort(true_norms.argmax(axis=0), kind="stable")
    whole = np.maximum(true_norms.sum(axis=0), 1e-12)  # every neuron is in one true component
    components = matching.order
    functions = range(len(true_norms))
    return Panel(
        title="Which component holds which neuron",
        caption="Norm of every neuron's weights over its norm in the target: in the true "
        "components (top) and in the found ones (below). Neurons are ordered by function. Good: "
        "the lower part repeats the upper one, and components without a function are dark.",
        xlabel="neuron (ordered by function)",
        ylabel="",
        matrix=np.concatenate([true_norms, part_norms[components]])[:, order] / whole[order],
        unit="norm of the neuron's weights / norm in the target",
        rows=[
            *(f"function {f}" for f in functions),
            *(f"component {c}" for c in components),
        ],
    )


def sampler(
    batch_size: int, num_functions: int, probability: float
) -> Callable[..., Float[Array, "B n_plus_1"]]:
    """(rng, step) -> x: t uniform in [0, END], every bit on with `probability`.

    Raises:
      InputError: a batch below 1, or a probability outside (0, 1].
    """
    at_least_one(batch_size=batch_size)
    if not 0 < probability <= 1:
        raise InputError(f"bit_probability must lie in (0, 1]; got {probability}.")

    def sample_fn(rng: PRNGKeyArray, step: Int[Array, ""] | int) -> Float[Array, "B n_plus_1"]:
        key_t, key_bits = jax.random.split(jax.random.fold_in(rng, step))
        t = jax.random.uniform(key_t, (batch_size, 1), maxval=END)
        bits = jax.random.bernoulli(key_bits, probability, (batch_size, num_functions))
        return jnp.concatenate([t, bits.astype(t.dtype)], axis=1)

    return sample_fn


def layers(num_layers: int) -> tuple[Layer, ...]:
    """The network as a list of layers."""
    chain = [Layer("pad", size=1)]
    for i in range(num_layers):
        mlp = (
            Layer("linear", f"mlp_in_{i}"),
            Layer("bias", f"bias_in_{i}"),
            Layer("relu"),
            Layer("linear", f"mlp_out_{i}"),
        )
        chain += [Layer("keep"), *mlp, Layer("add")]
    return (*chain, Layer("last", size=1))


def build(config: Config, batch_size: int) -> Target:
    """The gated functions of `config` (fields: configs/gated.py).

    Raises:
      InputError: a size below 1, fewer than MIN_NEURONS neurons per function, a number of neurons
        that is not a multiple of the number of layers, an unknown gate, or a probability outside
        (0, 1].
    """
    n, L, m = config.num_functions, config.num_layers, config.neurons_per_function
    gate = one_of("target.gate", config.gate, GATES)
    at_least_one(num_functions=n, num_layers=L)
    if m < MIN_NEURONS:
        raise InputError(f"neurons_per_function must be at least {MIN_NEURONS}; got {m}.")
    if n * m % L:
        raise InputError(
            f"num_functions · neurons_per_function = {n * m} neurons "
            f"cannot be shared evenly by num_layers = {L}."
        )
    model = GatedMLP(n, L, n * m // L)
    return Target(
        name="gated",
        init_fn=lambda key: hand_code(key, n, L, m, gate),
        apply_fn=lambda params, x: model.apply({"params": params}, x),
        sample_fn=sampler(batch_size, n, config.bit_probability),
        select=("mlp_in_*", "mlp_out_*"),
        num_active_fn=lambda x: jnp.sum(x[:, 1:] != 0, axis=1, dtype=jnp.int32),
        score_fn=lambda decomposition, key, alive: score(decomposition, n, L),
        layers=layers(L),
    )
