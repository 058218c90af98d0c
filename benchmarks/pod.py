"""A 124M-parameter transformer on a v5e-64 pod, on paper: nothing here has been run.

  computed   operations, bytes and memory, from the shapes below
  measured   the share of the matmul peak that each term reached on the machine of `scaling.py`;
             the pod is assumed to reach the same share
  published  the peaks of a v5e chip

Shapes: C components of rank m in every decomposed matrix, T tokens of a batch with one mask each,
k components kept per token, n probes.
The batch is split over `data` chips and the components over `component` chips. Every chip that
holds a part of the components of the same examples runs the whole network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

CHIPS = 64
# Per chip.
BF16_FLOPS, HBM_BYTES_S, HBM_BYTES = 197e12, 819e9, 16e9
ICI_BYTES_S = 200e9  # between chips: 1,600 Gbit/s


@dataclasses.dataclass(frozen=True)
class Assumptions:
    layers: int = 12
    d_model: int = 768
    num_params: float = 124e6  # with the embeddings, which are not decomposed
    num_components: int = 8192
    rank: int = 4
    tokens: int = 65_536  # 64 sequences of 1024
    topk: float = 64.0  # kept per token
    num_probes: int = 8
    padding: float = 2.0  # slots per kept pair in the sparse pass

    @property
    def width(self) -> int:
        """Σ d_in = Σ d_out over the matrices: query, key, value, output, up, down."""
        return self.layers * (4 * self.d_model + 5 * self.d_model)

    @property
    def decomposed(self) -> int:
        return self.layers * 12 * self.d_model**2


def predict(a: Assumptions, data: int, efficiency: Mapping[str, float]) -> dict[str, Any]:
    """ms of each term per step and GB per chip on `data` x `CHIPS / data` chips.

    Args:
      efficiency: share of the matmul peak that "attributions", "sparse_pass" and "faithfulness"
        reach.
    """
    component = CHIPS // data
    T, C, m = a.tokens / data, a.num_components / component, a.rank  # of one chip
    params = C * m * 2 * a.width
    flop = {
        # One forward pass and n backward. The products with the components: once inputs with U,
        # and for every probe cotangents with V.
        "attributions": (2 + 4 * a.num_probes) * a.num_params * T
        + 2 * T * C * m * a.width * (1 + a.num_probes),
        "sparse_pass": 6 * a.num_params * T
        + 6 * a.padding * (a.topk / component) * T * m * 2 * a.width,
        "faithfulness": 6 * C * m * a.decomposed,
    }
    # Over data: gradients in float32. Over component: outputs and their cotangents in bfloat16.
    sent = _all_reduce(4 * params, data) + _all_reduce(2 * T * 2 * a.width, component)
    ms = {name: 1e3 * value / (efficiency[name] * BF16_FLOPS) for name, value in flop.items()}
    ms |= {
        "optimizer": 1e3 * 8 * 4 * params / HBM_BYTES_S,
        "communication": 1e3 * sent / ICI_BYTES_S,
    }
    state = 4 * 4 * params / 1e9  # components, gradient, two moments
    # The products x U of one layer's six matrices in bfloat16; scores and mask.
    working = (2 * T * C * m * 6 + 2 * 4 * T * C) / 1e9
    return {
        "mesh": f"{data} x {component}",
        "parameters per chip, G": params / 1e9,
        **{f"{name} ms": value for name, value in ms.items()},
        "step ms": sum(ms.values()),
        "binds": max(ms, key=lambda name: ms[name]),
        "sent, GB": sent / 1e9,
        "state GB": state,
        "working GB": working,
        "fits 16 GB": "yes" if 1e9 * (state + working) + 4 * a.num_params < HBM_BYTES else "no",
    }


def _all_reduce(size: float, chips: int) -> float:
    """Bytes that a chip sends when `size` bytes are summed over a ring of chips."""
    return 2 * (1 - 1 / chips) * size


def table(efficiency: Mapping[str, float]) -> list[dict[str, Any]]:
    return [predict(Assumptions(), data, efficiency) for data in (1, 2, 4, 8, 16)]
