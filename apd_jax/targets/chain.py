"""Networks that are a chain of simple layers, as a list of those layers.

The report's live panel runs the network in a browser, without JAX, from this list.

Shapes: B examples, d the width of the activations h [B, d] between two layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTIVATIONS = {"relu": nn.relu, "gelu": functools.partial(nn.gelu, approximate=False)}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One step of the chain. `leaf` names its weight.

    op          h becomes
    linear      h W, or h Wᵀ if `transpose`
    bias        h + b
    relu, gelu  the function of every entry (gelu exact, without the tanh approximation)
    keep        h; a copy is put on a stack, for `add`
    add         h + the copy on top of the stack, or h + that copy times W if `leaf` is set;
                the copy is taken off the stack
    pad         h with `size` zeros appended
    last        the last `size` entries of h
    """

    op: str
    leaf: str = ""
    transpose: bool = False
    size: int = 0


def run(
    layers: Sequence[Layer], leaves: Mapping[str, Array], x: Float[Array, "B F"]
) -> Float[Array, "B O"]:
    """The outputs of the chain; `leaves` are the weights by name."""
    h, kept = x, []
    for layer in layers:
        if layer.op == "linear":
            W = leaves[layer.leaf]
            h = h @ (W.T if layer.transpose else W)
        elif layer.op == "bias":
            h = h + leaves[layer.leaf][None, :]
        elif layer.op == "keep":
            kept.append(h)
        elif layer.op == "add":
            h = h + (kept.pop() @ leaves[layer.leaf] if layer.leaf else kept.pop())
        elif layer.op == "pad":
            h = jnp.pad(h, ((0, 0), (0, layer.size)))
        elif layer.op == "last":
            h = h[:, -layer.size :]
        else:
            h = ACTIVATIONS[layer.op](h)
    return h


def fold(
    layers: Sequence[Layer], leaves: Mapping[str, Array], changing: Collection[str]
) -> tuple[tuple[Layer, ...], dict[str, Array], dict[str, tuple[Array | None, Array | None]]]:
    """The same function of one residual block, with its fixed first and last matrix folded in.

    E is the embedding, D the unembedding.

      x E; keep; W_in; ...; W_out; [b]; add; D
    becomes
      keep; (E W_in); ...; (W_out D); [b D]; add times (E D)

    No matrix keeps an axis of the residual width, so the weights of a wide stream get much smaller.

    Args:
      changing: names of the leaves that are not fixed.
    Returns:
      layers, leaves, and {leaf W: (L, R)} for every leaf that is now L W R (None in place of a
      factor that is absent). All unchanged where the network has another form.
    """
    ops = [layer.op for layer in layers]
    linear = [layer.leaf for layer in layers if layer.op == "linear" and not layer.transpose]
    fits = (
        ops[:3] == ["linear", "keep", "linear"]
        and ops[-2:] == ["add", "linear"]
        and ops.count("keep") == 1
        and ops.count("linear") == len(linear) == 4
        and [name in changing for name in linear] == [False, True, True, False]
    )
    if not fits:
        return tuple(layers), dict(leaves), {}
    E, W_in, W_out, D = linear
    after = [layer.leaf for layer in layers[ops.index("linear", 3) :] if layer.op == "bias"]
    folded = {name: leaf for name, leaf in leaves.items() if name not in (E, D)}
    folded |= {
        W_in: leaves[E] @ leaves[W_in],
        W_out: leaves[W_out] @ leaves[D],
        E: leaves[E] @ leaves[D],
    }
    folded |= {bias: leaves[bias] @ leaves[D] for bias in after}
    return (
        (*layers[1:-2], Layer("add", E)),
        folded,
        {W_in: (leaves[E], None), W_out: (None, leaves[D])},
    )
