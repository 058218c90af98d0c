"""Learned causal importances: networks that say from the target's activations what is needed.

  g      = lower_leaky(z)   the mask                      (`sigmoids`)
  upper  = upper_leaky(z)   what importance losses price

pieces       z_c = Σ over the pieces of component c of γ_j(h_j), a small MLP of each piece's own
             inner activation h_j = a_l(x)·U_j  (SPD)
inputs       z = an MLP of a site's whole input, for the pieces of that site
transformer  z = a transformer over the RMS-normalised inputs of all sites  (VPD)

Shapes: B examples, T positions, C components, n pieces of a site, d width of what it reads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from apd_jax.components import Components, Factors
from apd_jax.components.layout import matrix_shape
from apd_jax.forward import capture
from apd_jax.gates import networks, piece_mlp
from apd_jax.gates.base import INPUTS, Activity, Observation, Rule, at_valid
from apd_jax.gates.sigmoids import lower_leaky, upper_leaky

KINDS = ("pieces", "inputs", "transformer")


@dataclasses.dataclass(frozen=True)
class Spec:
    """What decides the shapes of a learned gate."""

    kind: str = "pieces"
    width: int = 16
    d_model: int = 64
    blocks: int = 2
    heads: int = 4
    causal: bool = False
    per_position: bool = False


def init(rng: PRNGKeyArray, spec: Spec, components: Components) -> PyTree:
    """The gate's arrays to begin with."""
    sites = components.factors
    keys = dict(zip(sites, jax.random.split(rng, len(sites)), strict=True))
    if spec.kind == "pieces":
        counts = {name: f.num_pieces for name, f in sites.items()}
        return piece_mlp.init(keys, counts, spec.width)
    widths = {name: _read_width(f) for name, f in sites.items()}
    if spec.kind == "inputs":
        return {
            n: networks.InputMLP((spec.width,), f.num_pieces).init(
                keys[n], jnp.zeros((1, widths[n]))
            )
            for n, f in sites.items()
        }
    inputs = {name: jnp.zeros((1, 1, width)) for name, width in widths.items()}
    return _transformer(spec, components).init(rng, inputs)


def _read_width(f: Factors) -> int:
    return matrix_shape(f.shape, f.axes)[0]


def _transformer(spec: Spec, components: Components) -> networks.GateTransformer:
    return networks.GateTransformer(
        sites=tuple(components.factors),
        num_components=components.num_components,
        d_model=spec.d_model,
        num_blocks=spec.blocks,
        num_heads=spec.heads,
        d_ffn=4 * spec.d_model,
        causal=spec.causal,
    )


@dataclasses.dataclass(frozen=True)
class LearnedGate:
    """A gate network with its arrays."""

    spec: Spec
    arrays: PyTree
    says = "causal importances above 0"

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({INPUTS})

    def rule(self) -> Rule | None:
        return None

    def __call__(self, seen: Observation) -> Activity:
        z = self.logits(seen)
        g = at_valid(lower_leaky(z), seen.valid)
        upper = at_valid(upper_leaky(z), seen.valid)
        return Activity(g, at_valid(z > 0, seen.valid), z, upper)

    def logits(self, seen: Observation) -> Float[Array, "B *T C"]:
        """z of every component."""
        assert seen.inputs is not None, "this gate reads what sites read"
        components = seen.components
        if self.spec.kind == "transformer":
            return self._transformed(seen)
        by_site = self._pieces(seen) if self.spec.kind == "pieces" else self._inputs(seen)
        parts = {name: _strongest(z, self.spec.per_position) for name, z in by_site.items()}
        if _in_turn(components):
            return jnp.concatenate([parts[name] for name in components.factors], axis=-1)
        total = None
        for name, f in components.factors.items():
            z = jnp.moveaxis(parts[name], -1, 0)
            placed = jnp.moveaxis(f.sums(z, components.num_components), 0, -1)
            total = placed if total is None else total + placed
        assert total is not None
        return total

    def _pieces(self, seen: Observation) -> dict[str, Float[Array, "B ... n"]]:
        """γ_j of every site's pieces.

        Sites with the same rows are put side by side, as if they were one: programs take longer to
        compile by the number of loops than to run by a copy.
        """
        assert seen.inputs is not None
        inner = {n: _inner(f, seen.inputs[n]) for n, f in seen.components.factors.items()}
        alike: dict[tuple[int, ...], list[str]] = {}
        for name, h in inner.items():
            alike.setdefault(h.shape[:-1], []).append(name)
        found = {}
        for names in alike.values():
            mlps = [self.arrays[name] for name in names]
            mlp = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *mlps)
            z = piece_mlp.apply(mlp, jnp.concatenate([inner[name] for name in names], axis=-1))
            ends = np.cumsum([inner[name].shape[-1] for name in names])
            found |= dict(zip(names, jnp.split(z, ends[:-1], axis=-1), strict=True))
        return found

    def _inputs(self, seen: Observation) -> dict[str, Float[Array, "B ... n"]]:
        """An MLP of each site's own input."""
        assert seen.inputs is not None
        found = {}
        for name, f in seen.components.factors.items():
            net = networks.InputMLP((self.spec.width,), f.num_pieces)
            found[name] = net.apply(self.arrays[name], _vectors(f, seen.inputs[name]))
        return found

    def _transformed(self, seen: Observation) -> Float[Array, "B *T C"]:
        assert seen.inputs is not None
        inputs = {}
        for name, f in seen.components.factors.items():
            rows = _vectors(f, seen.inputs[name])
            if self.spec.per_position:
                rows = rows.reshape(*rows.shape[:2], -1, rows.shape[-1]).mean(axis=2)
            else:
                rows = rows.reshape(rows.shape[0], 1, -1, rows.shape[-1]).mean(axis=2)
            inputs[name] = rows
        net = _transformer(self.spec, seen.components)
        valid = seen.valid if self.spec.per_position else None
        z: Any = net.apply(self.arrays, inputs, valid)
        return z if self.spec.per_position else z[:, 0]


def _inner(f: Factors, reading: Any) -> Float[Array, "B ... n"]:
    """h_j of every piece: of one of higher rank, the length of its vector of inner activations."""
    h = capture.inner(f, reading)  # [B, ..., n, m]
    return h[..., 0] if h.shape[-1] == 1 else jnp.sqrt(jnp.sum(h**2, axis=-1) + 1e-12)


def _vectors(f: Factors, reading: Any) -> Float[Array, "B ... d"]:
    """What a site reads as vectors: those that are looked up as one-hot."""
    if jnp.issubdtype(reading.rows.dtype, jnp.integer):
        return jax.nn.one_hot(reading.rows, _read_width(f))
    return reading.rows


def _strongest(z: Float[Array, "B ... n"], per_position: bool) -> Float[Array, "B *T n"]:
    """The largest logit over rows that share a mask: a component is on if any of them needs it.

    The matrices of a site that is a stack of them count as rows.
    """
    lead = 2 if per_position else 1
    extra = tuple(range(lead, z.ndim - 1))
    return jnp.max(z, axis=extra) if extra else z


def _in_turn(components: Components) -> bool:
    """Whether sites hold consecutive ranges that make up all numbers: no scatter is needed."""
    first = 0
    for f in components.factors.values():
        if not isinstance(f.ids, range) or f.ids.start != first:
            return len(components.factors) == 1 and f.ids is None
        first = f.ids.stop
    return first == components.num_components
