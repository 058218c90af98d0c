"""A 124M-parameter transformer on a v5e-64 pod, on paper: nothing here has been run.

Arithmetic: operations, bytes and memory, from the shapes below. Measured: only the share of the device's matmul peak that each term
reached on the machine of `scaling.py`, assumed to be the same here. Published: the peaks of a v5e chip.

Shapes: C components of rank m in every decomposed matrix, T tokens of a batch with a mask each, k kept per token, n probes; the batch is
split over `data` chips, the components over `component` chips, and every chip of a component group runs the network itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

CHIPS = 64
BF16_FLOPS, HBM_BYTES_S, HBM_BYTES, ICI_BYTES_S = (
    197e12,
    819e9,
    16e9,
    200e9,
)  # per chip; 1,600 Gbit/s between chips


@dataclasses.dataclass(frozen=True)
class Assumptions:
    layers: int = 12
    d_model: int = 768
    num_params: float = 124e6  # embeddings included, which are not decomposed
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

    efficiency: the share of the matmul peak, of "attributions", "sparse_pass" and "faithfulness".
    """
    component = CHIPS // data
    T, C, m = a.tokens / data, a.num_components / component, a.rank  # a chip's
    params = C * m * 2 * a.width
    flop = {
        # One forward pass, n backward; every probe's cotangents meet all components, the inputs x U once.
        "attributions": (2 + 4 * a.num_probes) * a.num_params * T
        + 2 * T * C * m * a.width * (1 + a.num_probes),
        "sparse_pass": 6 * a.num_params * T
        + 6 * a.padding * (a.topk / component) * T * m * 2 * a.width,
        "faithfulness": 6 * C * m * a.decomposed,
    }
    ring = lambda size, chips: 2 * (1 - 1 / chips) * size  # noqa: E731, bytes a chip sends in an all-reduce
    sent = ring(4 * params, data) + ring(
        2 * T * 2 * a.width, component
    )  # gradients float32; outputs and their cotangents bfloat16
    ms = {name: 1e3 * value / (efficiency[name] * BF16_FLOPS) for name, value in flop.items()}
    ms |= {
        "optimizer": 1e3 * 8 * 4 * params / HBM_BYTES_S,
        "communication": 1e3 * sent / ICI_BYTES_S,
    }
    state = 4 * 4 * params / 1e9  # components, gradient, two moments
    working = (
        2 * T * C * m * 6 + 2 * 4 * T * C
    ) / 1e9  # inner activations of one layer's matrices (bfloat16), scores and mask
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


def table(efficiency: Mapping[str, float]) -> list[dict[str, Any]]:
    return [predict(Assumptions(), data, efficiency) for data in (1, 2, 4, 8, 16)]
