r"""What a decomposition of a language model is worth on text: cross-entropy, distance, sparsity.

  CE recovered = (CE_zero - CE) / (CE_zero - CE_target), with CE_zero that of the network whose
  decomposed matrices are zero; in words beside it, since another zero gives another share
  ΔCE = CE - CE_target, in nats per predicted token; KL = KL(target ‖ pass), in nats

Passes, each κ = Σ_c m_c P_c at all sites, without Δ = θ* - Σ P but for the last:
  unmasked     m = 1
  gates        m = g, as they are
  rounded_t    m = [g > t]; L0 is the mean of Σ_c m_c per predicted token
  others       m = [g > 0] of another position, drawn at random     controls: these should be
  random       as many of every site as g > 0, drawn at random      far worse
  stochastic   m = g + (1 - g) r, r ~ U(0, 1)
  zero         m = 0
  adversary    m = g + (1 - g) r and r_Δ of Δ, after ascents by sign; one r_c and one r_Δ per site
               for all sequences and positions of a batch
  adversary_n  the worst of that after STEPS, 2 STEPS, 4 STEPS, ..., n ascents, which go on from
               each other
  adversary_free  the same STEPS with r of every position's own

Shapes: B sequences, T positions, V tokens, C components, L sites.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from apd_jax import components as components_lib
from apd_jax import losses
from apd_jax.ablations import Adversary, Sources, site_weights
from apd_jax.ablations.base import Shape
from apd_jax.components import Components
from apd_jax.decomposition import Decomposition
from apd_jax.evaluation import masks
from apd_jax.evaluation.general import STREAM, Grid
from apd_jax.forward import sparse
from apd_jax.gates.base import Activity
from apd_jax.language.tokens import cross_entropy, predicting
from apd_jax.methods import observe
from apd_jax.methods.optimizers import Trained
from apd_jax.network.outputs import outputs, position_weights
from apd_jax.network.problem import Problem
from apd_jax.targets.scoring import alive_components
from apd_jax.train.progress import ProgressDisplay

ROUNDED = (0.0, 0.1, 0.5)
STEPS, STEP_SIZE = 20, 0.1  # of the adversary
LADDER = (40, 80, 160, 320)  # ascents in all, multiples of STEPS
_SAYS = {
    "target": "target",
    "unmasked": "all components on",
    "gates": "gates as they are",
    **{f"rounded_{t:g}": f"gates rounded at {t:g}" for t in ROUNDED},
    "others": "control: those of another position",
    "random": "control: as many at random",
    "stochastic": "the rest times U(0, 1)",
    "adversary": f"adversary, {STEPS} x {STEP_SIZE}, with Δ",
    **{f"adversary_{n}": f"the same gone on with, worst until {n}" for n in LADDER},
    "adversary_free": f"adversary, {STEPS} x {STEP_SIZE}, free at every position",
    "zero": "matrices at zero",
}


def drawn(sample_fn: Callable, num_batches: int, seed: int) -> Iterator[Array]:
    """The batches 0 to num_batches - 1 of a sampler, those of `general.evaluate`."""
    draw, key = jax.jit(sample_fn), jax.random.fold_in(jax.random.key(seed), STREAM)
    return (draw(key, step) for step in range(num_batches))


def evaluate(
    decomposition: Decomposition,
    batches: Iterable[Any],
    *,
    num_adversary_batches: int = 2,
    seed: int = 0,
    thorough: bool = False,
    num_batches: int | None = None,
) -> dict[str, float | int]:
    """Measures one instance on batches of tokens [B, T], one after the other.

    Positions count whose next token is in the row (not below 0) and that the problem takes for
    valid; all means are over these. One batch at a time is in memory, and what is counted.

    Args:
      num_adversary_batches: those that the adversaries are tried on.
      thorough: also the ladder of ascents and the free adversary.
      num_batches: how many there will be, for a display of progress; None: none is shown.
    Returns: flat and JSON-able
      ce_{pass}, kl_{pass}, delta_ce_{pass}, ce_recovered_{pass}: see above; for gates that only
        know on and off, gates stands for all that is rounded. ce_recovered is left out where
        zeroed matrices are no worse than the target.
      l0_components_{t}, l0_pieces_{t}: active per predicted token, components and rank-one pieces
        (a component with pieces at s sites of rank m has s·m), of gates rounded at t (at 0 where
        they only know on and off).
      l0_pieces_at_{site}: the same at each site, rounded at 0. alive_at_{site}: alive components
        with a piece there.
      num_alive_components, num_components; num_predicted_tokens, num_adversary_tokens: what the
        means are over.
    Cost: per batch the gate and 10 forward passes; the adversary 20 with backward, thoroughly 340.
    """
    problem, trained = decomposition.problem, decomposition.trained
    totals: Counter[str] = Counter()
    fired = np.zeros(trained.components.num_components)
    attacked = min(num_adversary_batches, num_batches or 0) * (_turns(thorough) + thorough)
    display = ProgressDisplay("evaluation", num_batches + attacked) if num_batches else None
    with display or contextlib.nullcontext():
        measure = _Measure(decomposition, thorough, display)
        for i, batch in enumerate(batches):
            tokens, key = jnp.asarray(batch), jax.random.fold_in(jax.random.key(seed), i)
            found = measure(problem.params, trained, tokens, key, i < num_adversary_batches)
            fired += found.pop("fired")
            totals.update(found)  # Counter adds
    metrics = _means(totals)
    alive = alive_components(
        fired / totals["tokens"], np.asarray(components_lib.norms(trained.components))
    )
    metrics |= {"num_components": len(alive), "num_alive_components": int(alive.sum())}
    for name, f in trained.components.factors.items():
        numbers = np.arange(len(alive)) if f.ids is None else np.unique(np.asarray(f.ids))
        metrics[f"alive_at_{name}"] = int(alive[numbers].sum())
    return metrics


def _means(totals: Mapping[str, float]) -> dict[str, float | int]:
    """Sums over predicted tokens as means, and what follows from them."""
    found: dict[str, float | int] = {}
    for name, total in totals.items():
        if "tokens" not in name:
            of_adversary = "_adversary" in name or name == "ce_target_there"
            found[name] = total / totals["adversary_tokens" if of_adversary else "tokens"]
    there = found.pop("ce_target_there", 0.0)  # the target on the adversaries' batches
    target, zero = found["ce_target"], found["ce_zero"]
    for name in [n.removeprefix("ce_") for n in found if n.startswith("ce_")]:
        if name != "target":
            beside = there if name.startswith("adversary") else target
            found[f"delta_ce_{name}"] = found[f"ce_{name}"] - beside
            if zero - target > 1e-6:
                found[f"ce_recovered_{name}"] = 1 - found[f"delta_ce_{name}"] / (zero - target)
    found["num_predicted_tokens"] = int(totals["tokens"])
    return found | {"num_adversary_tokens": int(totals["adversary_tokens"])}


def _turns(thorough: bool) -> int:
    """How often an adversary goes on for STEPS ascents."""
    return LADDER[-1] // STEPS if thorough else 1


class _Measure:
    """Sums over the predicted tokens of one batch; every program is compiled once."""

    def __init__(
        self, decomposition: Decomposition, thorough: bool, display: ProgressDisplay | None
    ):
        self._display, self._done = display, 0
        self.method, self.problem = decomposition.method, decomposition.problem
        self.thorough = thorough
        self.observed = jax.jit(self._observed)
        self.masks = jax.jit(_masks)
        self.scored = jax.jit(self._scored)
        self.started = jax.jit(self._started, static_argnums=0)
        self.attacked = jax.jit(self._attacked)

    def __call__(
        self, params: PyTree, trained: Trained, tokens: Array, key: Array, attack: bool
    ) -> dict[str, Any]:
        components = trained.components
        out, activity, found = self.observed(params, trained, tokens)
        counts = counted(self.problem, tokens)
        for name, mask in self.masks(activity, components, counts, key).items():
            ce, kl = self.scored(params, components, mask, tokens, out)
            found |= {f"ce_{name}": ce, f"kl_{name}": kl}
        if attack:
            found |= self._adversaries(params, components, activity, tokens, out, key)
            found |= {"adversary_tokens": found["tokens"], "ce_target_there": found["ce_target"]}
        host = self._reached(found)
        return {n: np.asarray(v) if n == "fired" else float(v) for n, v in host.items()}

    def _reached(self, found: Any) -> Any:
        """These on the host, once they are computed; the display moves on."""
        host, self._done = jax.device_get(found), self._done + 1
        if self._display is not None:
            self._display.update(self._done, {})
        return host

    def _observed(
        self, params: PyTree, trained: Trained, tokens: Array
    ) -> tuple[Array, Activity, dict[str, Array]]:
        """The target's outputs, what the gate says, and what is counted of both."""
        out = outputs(self.problem.body(params, tokens))
        activity = observe.activity(self.method, self.problem, trained, params, tokens)
        counts = counted(self.problem, tokens)
        total = jnp.sum(counts, dtype=jnp.float32)
        ce = cross_entropy(out, tokens, counts, self.problem.head(params))
        found = {"tokens": total, "ce_target": ce * total}
        rows = counts if activity.values.ndim == 3 else jnp.any(counts, axis=1)
        # What is kept per sequence counts once for each of its predicted tokens.
        shares = jnp.ones(()) if activity.values.ndim == 3 else jnp.sum(counts, axis=1)
        weights = rows * jnp.broadcast_to(shares, rows.shape)
        for t in ROUNDED[:1] if activity.hard else ROUNDED:
            on = (activity.values > t).astype(jnp.float32) * weights[..., None]
            per_component = jnp.sum(on, axis=tuple(range(on.ndim - 1)))
            sites = {
                name: jnp.sum(f.take(per_component)) * f.rank
                for name, f in trained.components.factors.items()
            }
            found |= {f"l0_components_{t:g}": jnp.sum(per_component)}
            found |= {f"l0_pieces_{t:g}": jnp.asarray(sum(sites.values()))}
            if t == 0:
                found |= {"fired": per_component}
                found |= {f"l0_pieces_at_{name}": value for name, value in sites.items()}
        return out, activity, found

    def _scored(
        self, params: PyTree, components: Components, mask: Array, tokens: Array, out: Array
    ) -> tuple[Array, Array]:
        """Cross-entropy and distance to the target of a pass."""
        here = sparse.apply(self.problem.body, params, components, mask, tokens)
        return self._sums(params, outputs(here), tokens, out)

    def _adversaries(
        self,
        params: PyTree,
        components: Components,
        activity: Activity,
        tokens: Array,
        out: Array,
        key: Array,
    ) -> dict[str, Array]:
        """Of every adversary the cross-entropy and the distance where it has come to."""
        fixed = (params, components, activity, tokens, out)
        sources = self.started("batch", components, activity, key)
        worst, found = None, {}
        for turn in range(1, _turns(self.thorough) + 1):
            ce, kl, sources = self.attacked(*fixed, sources)
            ce, kl = self._reached((ce, kl))
            n = turn * STEPS
            if n in (STEPS, *LADDER):
                worst = (ce, kl) if worst is None or kl > worst[1] else worst
                name = "adversary" if n == STEPS else f"adversary_{n}"
                found |= {f"ce_{name}": worst[0], f"kl_{name}": worst[1]}
        if self.thorough:
            ce, kl, _ = self.attacked(*fixed, self.started("position", components, activity, key))
            ce, kl = self._reached((ce, kl))
            found |= {"ce_adversary_free": ce, "kl_adversary_free": kl}
        return found

    def _started(
        self, shared: str, components: Components, activity: Activity, key: Array
    ) -> Sources:
        """Where an adversary begins."""
        values = activity.values
        shape = Shape(
            size=len(values),
            positions=values.shape[1:-1],
            num_components=components.num_components,
            num_sites=len(components.factors),
            with_delta=True,
        )
        return Adversary(shared=shared).draw((), jax.random.split(key, len(values)), shape)

    def _attacked(
        self,
        params: PyTree,
        components: Components,
        activity: Activity,
        tokens: Array,
        out: Array,
        sources: Sources,
    ) -> tuple[Array, Array, Sources]:
        """Cross-entropy and distance after STEPS ascents from these sources, and where to."""

        def run(sources: Any) -> Array:
            weights = site_weights(components, activity, sources, delta="masked")
            return outputs(sparse.run(self.problem.body, params, components, weights, tokens))

        def distance(sources: Any) -> Array:
            kl = self._sums(params, run(sources), tokens, out)[1]
            return kl / jnp.asarray(tokens.size, jnp.float32)

        adversary = Adversary(steps=STEPS, step_size=STEP_SIZE)
        _, sources = adversary.ascend((), sources, jax.grad(distance))
        return *self._sums(params, run(sources), tokens, out), sources

    def _sums(self, params: PyTree, here: Array, tokens: Array, out: Array) -> tuple[Array, Array]:
        counts, head = counted(self.problem, tokens), self.problem.head(params)
        total = jnp.sum(counts, dtype=jnp.float32)
        kl = losses.minimality(here, out, "kl", position_weights(counts)[0], head=head)
        return cross_entropy(here, tokens, counts, head) * total, kl * total


def counted(problem: Problem, tokens: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Which positions count."""
    valid, counts = problem.valid(tokens), predicting(tokens)
    return counts if valid is None else counts & valid


def _masks(
    activity: Activity, components: Components, counts: Bool[Array, "B T"], key: Array
) -> dict[str, Float[Array, "B *T C"]]:
    """The masks that are asked about. All of one dtype: one program runs them all."""
    g = activity.values.astype(jnp.float32)
    found = {"unmasked": jnp.ones_like(g), "gates": g, "zero": jnp.zeros_like(g)}
    if not activity.hard:
        found |= {f"rounded_{t:g}": (g > t).astype(jnp.float32) for t in ROUNDED}
    rows = counts if g.ndim == 3 else jnp.any(counts, axis=1)
    others, random = (jax.random.fold_in(key, i) for i in (1, 2))
    found["others"] = masks.of_others(g > 0, rows, others).astype(jnp.float32)
    found["random"] = masks.at_random(g > 0, components, random).astype(jnp.float32)
    soft = dataclasses.replace(activity, values=g)
    return found | {"stochastic": masks.stochastic(soft, key)}


def grid(metrics: Mapping[str, float | int]) -> Grid:
    """The table: a row for each pass."""
    rows = []
    for name, says in _SAYS.items():
        if f"ce_{name}" not in metrics:
            continue
        cells = [f"{metrics[f'ce_{name}']:.3f}"]
        for column, form in (("delta_ce", "+.3f"), ("ce_recovered", ".1%"), ("kl", ".3f")):
            value = metrics.get(f"{column}_{name}")
            cells.append("" if value is None else format(value, form))
        t = name.removeprefix("rounded_") if name.startswith("rounded") else None
        if name == "gates" and "ce_rounded_0" not in metrics:
            t = "0"
        for what in ("components", "pieces"):
            cells.append("" if t is None else f"{metrics[f'l0_{what}_{t}']:.1f}")
        rows.append((says, *cells))
    alive, C = metrics["num_alive_components"], metrics["num_components"]
    return Grid(
        title=f"{metrics['num_predicted_tokens']:,} tokens (adversary: "
        f"{metrics['num_adversary_tokens']:,}), in nats; components and rank-one pieces active per "
        f"token; {alive:,} of {C:,} components alive",
        columns=("pass", "CE", "ΔCE", "recovered", "KL", "components", "pieces"),
        rows=tuple(rows),
    )
